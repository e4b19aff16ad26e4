"""How even tokens come while long prompts arrive, by the bound on steps that compute prompts.

    scripts/bench_pace.py smollm2-135m-instruct --mixed-tokens none 16 auto

A few answers are on their way all the time, and long prompts come one after another. Time between
the tokens of an answer is time between steps: by the wall, and of CPU, which other processes do not
disturb. One JSON line a bound: medians and 99th percentiles in milliseconds, and seconds to the
first token of a long prompt.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from typing import Any

import numpy as np

import jaxllm
from jaxllm.serve.config import EngineConfig
from jaxllm.serve.engine import Engine
from jaxllm.serve.request import Request


def watched(engine: Any) -> list[tuple[float, float]]:
    """(wall, CPU) seconds at which the tokens of each step are there, as it goes."""
    seen: list[tuple[float, float]] = []
    read = engine._read

    def call(*args: Any) -> None:
        read(*args)
        seen.append((time.perf_counter(), time.process_time()))

    engine._read = call
    return seen


def measured(engine: Engine, given: argparse.Namespace, dice: np.random.Generator) -> Any:
    """Gaps between steps while long prompts come, and when their first tokens did."""
    vocab, seen = engine.model.spec.vocab, watched(engine)

    def ask(length: int, tokens: int) -> Request:
        ids = tuple(dice.integers(0, vocab, length).tolist())
        return Request(prompt_ids=ids, max_tokens=tokens, ignore_eos=True)

    steady = [engine.submit(ask(8, 700)) for _ in range(given.answers)]
    for stream in steady:
        next(iter(stream))
    for number in range(1 + given.prompts):
        if number == 1:  # the first is not counted: what steps take is learned from it
            first, firsts = len(seen), []
        begun = time.perf_counter()
        engine.generate(ask(given.length, 1))
        if number:
            firsts.append(time.perf_counter() - begun)
        wanted = len(seen) + given.between
        while len(seen) < wanted:
            time.sleep(0.01)
    gaps = np.diff(np.array(seen[first:]), axis=0) * 1e3
    for stream in steady:
        stream.cancel()
    return gaps, firsts


def main() -> None:
    """One line for each bound."""
    parser = argparse.ArgumentParser()
    parser.add_argument("source")
    parser.add_argument("--mixed-tokens", nargs="*", default=["none", "auto"])
    parser.add_argument("--answers", type=int, default=4)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--between", type=int, default=20)
    given = parser.parse_args()
    model = jaxllm.load(given.source)
    for bound in given.mixed_tokens:
        mixed = {"none": None, "auto": "auto"}.get(bound) if not bound.isdigit() else int(bound)
        config = EngineConfig(
            context=1024, cache_tokens=8192, mixed_tokens=mixed, prefix_cache=False
        )
        with Engine(model, config) as engine:
            gaps, firsts = measured(engine, given, np.random.default_rng(0))
        line: dict[str, Any] = {"mixed_tokens": bound, "load": os.getloadavg()[0]}
        for i, name in enumerate(("wall", "cpu")):
            half, most = np.percentile(gaps[:, i], (50, 99))
            line[name] = {"p50": half, "p99": most, "ratio": most / half}
        line |= {"steps": len(gaps), "first_token_s": statistics.median(firsts)}
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
