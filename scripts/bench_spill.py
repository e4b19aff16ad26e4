"""Prompts that come again when the device has lost their pages: from the host, or computed anew.

    scripts/bench_spill.py smollm2-135m-instruct --prompts 6 --length 768

Prompts of random tokens in turn, more than the cache holds, with `spill_gib` and without; answers
must be equal. One JSON line a round: seconds by the wall and of CPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import time

import numpy as np

import jaxllm
from jaxllm.serve.config import EngineConfig
from jaxllm.serve.engine import Engine
from jaxllm.serve.request import Request


def measured(engine: Engine, prompts: list[tuple[int, ...]]) -> dict[str, object]:
    """One greedy token for every prompt, one after another, and what it took."""
    before, wall, cpu = engine.stats(), time.perf_counter(), time.process_time()
    found = [engine.generate(Request(prompt_ids=ids, max_tokens=2))[0] for ids in prompts]
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    now = engine.stats()
    counts = ("hit_tokens", "prompt_tokens", "spilled_pages", "restored_pages")
    counted = {name: getattr(now, name) - getattr(before, name) for name in counts}
    return {"tokens": [c.token_ids for c in found], "wall_s": wall, "cpu_s": cpu, **counted}


def main() -> None:
    """Rounds of all prompts, after one that fills the caches."""
    parser = argparse.ArgumentParser()
    parser.add_argument("source")
    parser.add_argument("--prompts", type=int, default=6)
    parser.add_argument("--length", type=int, default=768)
    parser.add_argument("--cache-tokens", type=int, default=1024)
    parser.add_argument("--spill-gib", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=2)
    given = parser.parse_args()
    model = jaxllm.load(given.source)
    dice = np.random.default_rng(0)
    prompts = [
        tuple(dice.integers(0, model.spec.vocab, given.length).tolist())
        for _ in range(given.prompts)
    ]
    off = EngineConfig(context=given.cache_tokens, cache_tokens=given.cache_tokens, max_sequences=1)
    on = dataclasses.replace(off, spill_gib=given.spill_gib)
    with Engine(model, off) as anew, Engine(model, on) as kept:
        for number in range(1 + given.rounds):
            found = [measured(engine, prompts) for engine in (anew, kept)]
            if found[0].pop("tokens") != found[1].pop("tokens"):
                raise SystemExit("the answers differ")
            if number:
                line = {"load": os.getloadavg()[0], "off": found[0], "on": found[1]}
                print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
