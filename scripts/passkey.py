#!/usr/bin/env python3
"""Passkey retrieval beyond the training length: rope scalings, windows with global tokens, sinks.

    JAX_PLATFORMS=cpu python scripts/passkey.py [--only NAME ...] [--seed 0] [--out FILE.json]

Somewhere in a row of random tokens a mark and four digits stand; at its end a second mark asks for
the digits. Models of two layers, width 64, are trained on rows of 64 tokens and asked on rows of up
to 512, without any training at those lengths: with the rope scaled, or with masks that see a window
and a few tokens of the whole row. Prints one line a check, and a table in Markdown at the end.
"""

import argparse
import dataclasses
import json
from pathlib import Path

import numpy as np
from learning import accuracy, fit

from jaxllm.spec.mask import And, Causal, Global, Mask, Or, Window
from jaxllm.spec.model import Block, Embedding, ModelSpec, sub
from jaxllm.spec.ops import MLP, Attention, Norm
from jaxllm.spec.rope import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    NtkScaling,
    Rope,
    RopeScaling,
    YarnScaling,
)

VOCAB, DIGITS, KEY, ASK = 64, range(48, 58), 62, 63
TRAINED, LENGTHS, DIGITS_OF_KEY, BATCH, STEPS, RATE = 64, (64, 128, 256, 512), 4, 64, 1500, 3e-3
WINDOW = 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kind:
    """A model that is trained, and whether the key's tokens and the question are marked global."""

    mask: Mask = Causal()
    rope: bool = True
    sinks: bool = False
    marked: bool = False


NEAR = And(first=Causal(), second=Window(left=WINDOW - 1))


def beside(more: Mask) -> Mask:
    """The window, and what `more` shows of the past."""
    return And(first=Causal(), second=Or(first=NEAR, second=more))


KINDS = {
    "full": Kind(),
    "no positions": Kind(rope=False),
    f"window {WINDOW}": Kind(mask=NEAR),
    f"window {WINDOW}, learned sinks": Kind(mask=NEAR, sinks=True),
    f"window {WINDOW} + first 4": Kind(mask=beside(Global(first=4))),
    f"window {WINDOW} + marked": Kind(mask=beside(Global()), marked=True),
}


def scalings(length: int) -> dict[str, RopeScaling | None]:
    """Ropes for a length that was not trained."""
    factor = length / TRAINED
    return {
        "plain": None,
        "linear": LinearScaling(factor=factor),
        "ntk": NtkScaling(factor=factor),
        "dynamic": DynamicScaling(factor=1.0, original_context=TRAINED),
        "yarn": YarnScaling(factor=factor, original_context=TRAINED),
        "llama3": Llama3Scaling(
            factor=factor, low_freq_factor=1.0, high_freq_factor=4.0, original_context=TRAINED
        ),
    }


def rows(random: np.random.Generator, count: int, length: int) -> tuple[np.ndarray, ...]:
    """Token ids [count, length], the digit wanted after each token or -1, and the marked tokens."""
    ids = random.integers(0, DIGITS[0], (count, length), dtype=np.int32)
    wanted = np.full((count, length), -1, np.int32)
    marks = np.zeros((count, length), bool)
    end = length - DIGITS_OF_KEY - 1
    for row in range(count):
        digits = random.choice(DIGITS, DIGITS_OF_KEY)
        place = random.integers(0, end - DIGITS_OF_KEY)
        ids[row, place], ids[row, place + 1 : place + 1 + DIGITS_OF_KEY] = KEY, digits
        ids[row, end], ids[row, end + 1 :] = ASK, digits
        wanted[row, end:-1] = digits
        marks[row, place : place + 1 + DIGITS_OF_KEY] = True
    return ids, wanted, marks


def model(kind: Kind, scaling: RopeScaling | None = None) -> ModelSpec:
    """Two layers of attention and MLP."""
    rope = Rope(scaling=scaling) if kind.rope else None
    attention = Attention(
        heads=2, kv_heads=2, head_dim=32, rope=rope, mask=kind.mask, sinks=kind.sinks
    )
    subs = (
        sub("attn", attention, norm_in=Norm()),
        sub("mlp", MLP(width=128), norm_in=Norm()),
    )
    return ModelSpec(
        vocab=VOCAB,
        width=64,
        blocks=(Block(name="G", subs=subs),),
        layers="G*2",
        context=max(LENGTHS),
        embedding=Embedding(scale=8.0),
        final_norm=Norm(),
    )


def train(name: str, seed: int, steps: int = STEPS) -> dict[str, dict[int, float]]:
    """Share of the digits that are right, by rope and length."""
    kind, random = KINDS[name], np.random.default_rng(seed)

    def with_marks(found: tuple[np.ndarray, ...]) -> tuple:
        return found if kind.marked else (*found[:2], None)

    batches = (with_marks(rows(random, BATCH, TRAINED)) for _ in range(steps))
    params = fit(model(kind), batches, RATE, steps=steps, seed=seed)
    results: dict[str, dict[int, float]] = {}
    for length in LENGTHS:
        test = with_marks(rows(np.random.default_rng(10_000 + length), 128, length))
        for rope, scaling in scalings(length).items() if name == "full" else [("plain", None)]:
            label = f"{name}, {rope}" if name == "full" else name
            found = accuracy(model(kind, scaling), params, *test)
            results.setdefault(label, {})[length] = found
            print(f"{label}: length {length}, right {found:.3f}", flush=True)
    return results


def main() -> None:
    """Train what is asked for, by default all."""
    parser = argparse.ArgumentParser(description="Passkey retrieval beyond the training length.")
    parser.add_argument("--only", nargs="*", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON file of all accuracies")
    arguments = parser.parse_args()
    results: dict[str, dict[int, float]] = {}
    for name in arguments.only:
        results |= train(name, arguments.seed)
    print(f"\n| model | {' | '.join(str(x) for x in LENGTHS)} |\n|{' --- |' * (len(LENGTHS) + 1)}")
    for name, found in results.items():
        print(f"| {name} | {' | '.join(f'{found[x]:.3f}' for x in LENGTHS)} |")
    if arguments.out:
        arguments.out.write_text(json.dumps({"seed": arguments.seed, "right": results}) + "\n")


if __name__ == "__main__":
    main()
