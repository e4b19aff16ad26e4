#!/usr/bin/env python3
"""Associative recall (MQAR, arXiv 2312.04927): which layers learn to look up, and how soon.

    JAX_PLATFORMS=cpu python scripts/mqar.py [--only NAME ...] [--seed 0] [--out FILE.json]

Each row of 64 tokens names 8 pairs of a key and a value (vocabulary 256), then shows each key again
among random tokens; its value has to follow. Models are of width 64 and two layers without an MLP.
Prints one line a check, and a table in Markdown at the end.

Embeddings begin with values of size 1. The table's own draw is 1/8 of that, and what a layer with a
norm of its reads adds is of size 1 from the first step on: tokens drown in it, and gated DeltaNet
stays at chance. Learning rates are those of a kind: recurrences learn in a narrow band.
"""

import argparse
import dataclasses
import json
from pathlib import Path

import numpy as np
from learning import accuracy, fit

from jaxllm.spec.linear_attention import GatedDecay, LinearAttention, OutNorm
from jaxllm.spec.model import Block, Embedding, ModelSpec, sub
from jaxllm.spec.ops import Attention, Norm
from jaxllm.spec.state_space import StateSpaceDual

VOCAB, LENGTH, PAIRS, WIDTH = 256, 64, 8, 64
SIZES = {"heads": 2, "key_heads": 2, "key_dim": 32, "value_dim": 32, "conv": 4}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixer:
    """What both layers are; peak learning rate, steps, rows a step; learned positions or none."""

    op: Attention | LinearAttention | StateSpaceDual
    rate: float
    steps: int = 1000
    batch: int = 64
    positions: bool = False


DELTA = LinearAttention(
    **SIZES,
    decay=GatedDecay(),
    delta=True,
    activation="silu",
    l2_eps=1e-6,
    out_norm=OutNorm(),
    gate="silu",
)
MIXERS = {
    "softmax attention": Mixer(
        op=Attention(heads=2, kv_heads=2, head_dim=32, rope=None), rate=3e-3, positions=True
    ),
    "gated DeltaNet": Mixer(op=DELTA, rate=1e-2, steps=500, batch=256),
    "Mamba-2": Mixer(op=StateSpaceDual(heads=2, head_dim=32, state=64), rate=6e-3),
    "elu+1 linear attention": Mixer(
        op=LinearAttention(**SIZES, feature="elu1", normalizer=1e-6), rate=1e-2, steps=2000
    ),
}
CHECKS = (250, 500, 1000, 1500, 2000)


def rows(random: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids [count, 64], and the value wanted after each token, or -1."""
    half = VOCAB // 2
    ids = random.integers(0, VOCAB, (count, LENGTH), dtype=np.int32)
    wanted = np.full((count, LENGTH), -1, np.int32)
    for row in range(count):
        keys = random.choice(half - 1, PAIRS, replace=False) + 1
        values = random.integers(half, VOCAB, PAIRS)
        ids[row, : 2 * PAIRS : 2], ids[row, 1 : 2 * PAIRS : 2] = keys, values
        places = 2 * (PAIRS + random.choice(LENGTH // 2 - PAIRS, PAIRS, replace=False))
        ids[row, places], wanted[row, places] = keys, values
        ids[row, places + 1] = values
    return ids, wanted


def model(mixer: Mixer) -> ModelSpec:
    """Two layers of the mixer alone."""
    block = Block(name="G", subs=(sub("mix", mixer.op, norm_in=Norm()),))
    return ModelSpec(
        vocab=VOCAB,
        width=WIDTH,
        blocks=(block,),
        layers="G*2",
        context=LENGTH,
        embedding=Embedding(scale=WIDTH**0.5, positions=LENGTH if mixer.positions else None),
        final_norm=Norm(),
    )


def train(name: str, seed: int, last: int | None = None) -> dict[int, float]:
    """Accuracy on 256 other rows, by number of steps; `last` ends a run early."""
    mixer = MIXERS[name]
    spec, found = model(mixer), {}
    test, random = rows(np.random.default_rng(10_000 + seed), 256), np.random.default_rng(seed)

    def at(i, params, loss, seconds):
        if i in CHECKS:
            found[i] = accuracy(spec, params, *test)
            print(f"{name}: {i} steps, loss {float(loss):.4f}, right {found[i]:.4f}, "
                  f"{seconds:.0f} s", flush=True)  # fmt: skip

    batches = ((*rows(random, mixer.batch), None) for _ in range(last or mixer.steps))
    fit(spec, batches, mixer.rate, steps=mixer.steps, seed=seed, at=at)
    return found


def main() -> None:
    """Train what is asked for, by default all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=list(MIXERS), choices=list(MIXERS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON file of all accuracies")
    arguments = parser.parse_args()
    results = {name: train(name, arguments.seed) for name in arguments.only}
    print("\n| mixer | steps → accuracy |\n| --- | --- |")
    for name, found in results.items():
        print(f"| {name} | {', '.join(f'{i:,} → {a:.3f}' for i, a in found.items())} |")
    if arguments.out:
        arguments.out.write_text(json.dumps({"seed": arguments.seed, "accuracy": results}) + "\n")


if __name__ == "__main__":
    main()
