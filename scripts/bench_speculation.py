"""Speculation on and off in turn: one answer at a time, copying and free text.

    scripts/bench_speculation.py smollm2-135m-instruct --draft-tokens 7
    scripts/bench_speculation.py MODEL --draft MODEL --draft-format int4

By prompt lookup, or by a draft model.

Answers must be equal. One JSON line a pair: seconds by the wall and of CPU, steps, drafts.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import time

import jaxllm
from jaxllm.serve.config import EngineConfig
from jaxllm.serve.engine import Engine
from jaxllm.serve.request import Request

TEXT = (
    "The harbour was quiet in the early morning. Three boats lay at the pier, and a man in a grey "
    "coat was mending a net. He did not look up when the children came by, but he smiled.\n\n"
)
CHATS = {
    "copy": f"Repeat the following text word for word, twice: {TEXT}",
    "free": "List ten animals and say a word about each.",
    "story": "Tell me a short story about a lighthouse.",
    "sky": "Why is the sky blue?",
}


def measured(engine: Engine, ids: tuple[int, ...], tokens: int) -> dict[str, object]:
    """One greedy answer and what it took."""
    before, wall, cpu = engine.stats(), time.perf_counter(), time.process_time()
    (choice,) = engine.generate(Request(prompt_ids=ids, max_tokens=tokens))
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    now = engine.stats()
    counts = ("steps", "drafted_tokens", "accepted_tokens")
    found = {name: getattr(now, name) - getattr(before, name) for name in counts}
    return {"tokens": choice.token_ids, "wall_s": wall, "cpu_s": cpu, **found}


def main() -> None:
    """Three pairs of each prompt, after one that is not counted."""
    parser = argparse.ArgumentParser()
    parser.add_argument("source")
    parser.add_argument("--draft-tokens", type=int, default=7)
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--draft")
    parser.add_argument("--draft-format")
    given = parser.parse_args()
    model = jaxllm.load(given.source)
    assert model.tokenizer is not None
    prompts = {name: tuple(model.prompt_ids(text)) for name, text in CHATS.items()}
    prompts["repeat"] = tuple(model.tokenizer.encode(TEXT * 3))
    bounds = EngineConfig(context=1024, cache_tokens=8192, max_sequences=given.sequences)
    drafting = dataclasses.replace(bounds, draft_tokens=given.draft_tokens)
    draft = None
    if given.draft is not None:
        draft = model if given.draft == given.source else jaxllm.load(given.draft)
        draft = draft.quantize(given.draft_format) if given.draft_format else draft
    with Engine(model, bounds) as plain, Engine(model, drafting, draft=draft) as ahead:
        for name, ids in prompts.items():
            for number in range(1 + given.pairs):
                off, on = (measured(engine, ids, given.max_tokens) for engine in (plain, ahead))
                if off.pop("tokens") != on.pop("tokens"):
                    raise SystemExit(f"{name}: the answers differ")
                if number:
                    line = {"prompt": name, "load": os.getloadavg()[0], "off": off, "on": on}
                    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
