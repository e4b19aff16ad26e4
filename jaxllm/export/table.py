"""The closed table of a bundle's programs, by the sizes that were asked for."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

from jaxllm.aot.program import Program
from jaxllm.core.config import require
from jaxllm.infer import programs
from jaxllm.infer.programs import Setup
from jaxllm.infer.sampling import Mode
from jaxllm.spec.model import ModelSpec

__all__ = ["DEFAULT_CONTEXT", "Row", "Sizes", "table"]

DEFAULT_CONTEXT = 4096
"""Tokens of prompt and answer that a bundle holds, if the model takes as many."""
_MODES: tuple[Mode, ...] = ("greedy", "penalize")
"""Without penalties `penalize` is `sample`, bit for bit."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """What a bundle's programs are compiled for.

    Attributes:
      context: most tokens of a prompt and its answer; the model's own, at most 4096, by default.
      prefill: lengths to which prompts are padded; longer ones come in chunks of the largest.
    """

    context: int | None = None
    prefill: tuple[int, ...] = (32, 64, 128, 256, 512, 1024, 2048)

    def __post_init__(self) -> None:
        require(
            bool(self.prefill) and all(n >= 16 and n & (n - 1) == 0 for n in self.prefill),
            f"prefill lengths are powers of two of at least 16, found {self.prefill}",
        )

    def fit(self, spec: ModelSpec) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
        """(context, prefill lengths, capacities) for a model.

        Raises:
          ConfigError: more context than the model has.
        """
        context = min(spec.context, DEFAULT_CONTEXT) if self.context is None else self.context
        require(
            2 <= context <= spec.context,
            f"context is in 2..{spec.context}, the model's own, found {context}",
        )
        lengths = sorted(set(self.prefill))
        needed = [n for n in lengths if n < context] + [n for n in lengths if n >= context][:1]
        if not spec.has_slots:
            return context, tuple(needed), (1,)
        capacities = [256]
        while capacities[-1] < max(context, needed[-1]):
            capacities.append(2 * capacities[-1])
        return context, tuple(needed), tuple(capacities)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One program of the table.

    Attributes:
      kind: `prefill` of a fresh sequence, `extend` by a further chunk, `decode`, or `grow`.
      mode: of sampling; empty for `grow`.
      tokens: taken in (prefill, extend) or drawn by a call (decode).
      capacity: slots of the state that it takes, or makes.
      to: slots of the grown state.
      program: what is compiled.
    """

    kind: str
    mode: str = ""
    tokens: int = 0
    capacity: int
    to: int = 0
    program: Program

    @property
    def name(self) -> str:
        """The key by which `runtime.py` asks for it."""
        numbers = {"prefill": [self.tokens], "extend": [self.tokens, self.capacity]}
        numbers |= {"decode": [self.capacity], "grow": [self.capacity]}
        return "-".join(filter(None, [self.kind, self.mode, *map(str, numbers[self.kind])]))


def table(setup: Setup, sizes: Sizes, *, tokens_per_call: int) -> Iterator[Row]:
    """All programs of a bundle for one way to run it."""
    context, lengths, capacities = sizes.fit(setup.spec)
    longest, top = lengths[-1], capacities[-1]
    has_slots = setup.spec.has_slots
    for mode in _MODES:
        for length in lengths:
            # Room for an answer, so that a prompt that fills its bucket need not grow at once.
            capacity = next((c for c in capacities if c > length), top)
            size = {"batch": 1, "length": length, "capacity": capacity}
            program = programs.prefill(setup, **size, mode=mode, fresh=True)
            yield Row(kind="prefill", mode=mode, tokens=length, capacity=capacity, program=program)
        for capacity in capacities:
            if context > longest and (2 * longest <= capacity or not has_slots):
                size = {"batch": 1, "length": longest, "capacity": capacity}
                program = programs.prefill(setup, **size, mode=mode, fresh=False)
                yield Row(
                    kind="extend", mode=mode, tokens=longest, capacity=capacity, program=program
                )
            program = programs.decode(
                setup, batch=1, capacity=capacity, mode=mode, tokens=tokens_per_call
            )
            yield Row(
                kind="decode", mode=mode, tokens=tokens_per_call, capacity=capacity, program=program
            )
    for capacity, to in itertools.pairwise(capacities):
        program = programs.grow(setup, batch=1, capacity=capacity, to=to)
        yield Row(kind="grow", capacity=capacity, to=to, program=program)
