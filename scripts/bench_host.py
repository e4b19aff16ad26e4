"""Host time of the engine's decode steps, with a device that only waits.

    JAX_PLATFORMS=cpu scripts/bench_host.py --sequences 1 64 256 --decode-steps 1 4

The engine's own thread plans, packs, dispatches and hands out; programs are replaced by ones that
take --device-ms a step. Median and p90 of the thread's CPU time a step, in ms, one JSON line each:
dispatch by jax and the transfer of a step's integers are not in it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
import types
from typing import Any

import jax
import numpy as np

from jaxllm.infer.open import run_policy, run_segments
from jaxllm.infer.programs import Setup
from jaxllm.serve import engine as engines
from jaxllm.serve import parts, programs, runner
from jaxllm.serve.config import EngineConfig
from jaxllm.serve.programs import Drawn, Shape
from jaxllm.serve.request import Request
from jaxllm.zoo.families import PRESETS


class Tokens:
    """What a step draws, there after a while."""

    def __init__(self, count: int, seconds: float):
        self._count, self._ready = count, time.perf_counter() + seconds

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        time.sleep(max(0.0, self._ready - time.perf_counter()))
        return np.full((self._count,), 5, np.int32)


def engine_of(steps: int, seconds: float) -> Any:
    """An engine of the 1.24B shape without weights or a device."""
    spec = PRESETS["llama-3.2-1b"]
    policy = run_policy("bfloat16", platform="gpu")
    setup = Setup(spec=spec, policy=policy, params={}, segments=run_segments(spec, policy))

    def program(shape: Shape) -> Any:
        def call(_: Any, state: Any, carry: Any, *__: Any) -> Any:
            tokens = Tokens(shape.places, seconds * shape.steps)
            return state, carry, Drawn(tokens, None, None, None)

        return call

    fake: Any = runner.Runner
    empty = lambda: (None, None)  # noqa: E731
    fake._load = lambda self, _: ({shape: program(shape) for shape in self._shapes}, empty)
    fake._put = lambda _, tree: tree
    table: Any = parts
    table.table = lambda *_: programs.shapes(
        tokens=2048, sequences=256, longest=2048, contexts=(2048,), greedy=steps
    )
    clock = types.SimpleNamespace(
        perf_counter=time.thread_time, monotonic=time.monotonic, sleep=time.sleep
    )
    timed: Any = engines
    timed.time = clock
    generator = types.SimpleNamespace(setup=setup, params={}, store=None)
    model: Any = types.SimpleNamespace(spec=spec, tokenizer=None, eos_ids=(), generator=generator)
    config = EngineConfig(
        context=2048,
        max_sequences=256,
        max_batch_tokens=2048,
        cache_tokens=256 * 2048,
        page_size=64,
        decode_steps=steps,
    )
    return engines.Engine(model, config)


def main() -> None:
    """Measure what was asked for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--sequences", type=int, nargs="*", default=[1, 64, 256])
    parser.add_argument("--decode-steps", type=int, nargs="*", default=[1, 4])
    parser.add_argument("--device-ms", type=float, default=3.0)
    parser.add_argument("--tokens", type=int, default=300)
    given = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    random = np.random.default_rng(0)
    for steps in given.decode_steps:
        for count in given.sequences:
            with engine_of(steps, 1e-3 * given.device_ms) as engine:
                prompts = random.integers(0, 9999, (count, 100)).tolist()
                ask = {"max_tokens": given.tokens, "ignore_eos": True}
                streams = [engine.submit(Request(prompt_ids=tuple(p), **ask)) for p in prompts]
                for stream in streams:
                    stream.result()
                times = sorted(list(engine.host_times)[-given.tokens // (2 * steps) :])
            found = {
                "sequences": count,
                "decode_steps": steps,
                "host_ms_median": round(1e3 * statistics.median(times), 3),
                "host_ms_p90": round(1e3 * times[-len(times) // 10], 3),
                "load": os.getloadavg()[0],
            }
            print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
