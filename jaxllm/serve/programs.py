"""The closed table of serving programs: tokens x sequences x context, nothing else is ever run.

A step's integers come in one array, so that a step is one transfer: see `Shape.parts`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jaxllm.aot.program import Program
from jaxllm.core.config import require
from jaxllm.core.precision import dtype_of
from jaxllm.infer.programs import Setup
from jaxllm.infer.sampling import Sampling
from jaxllm.ops.sampling import History
from jaxllm.serve.grammar import words
from jaxllm.serve.pace import sizes
from jaxllm.state.paged import paged_state
from jaxllm.typing import Slot

__all__ = [
    "BIASES",
    "TOP",
    "Carry",
    "Drawn",
    "Memory",
    "Options",
    "Shape",
    "guessing",
    "shapes",
    "step",
    "unpack",
    "verifying",
]

TOP = 20
"""Alternatives of which log probabilities are given."""
BIASES = 64
"""Tokens that one request can bias."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """How much the engine remembers.

    Attributes:
      page_size: Z.
      pages: of each group of layers, beside a spare one for padding.
      windows: tokens before a query that each group sees, None for all.
      slots: sequences at once.
      kv_dtype: of keys and values; see `paged_state`.
    """

    page_size: int
    pages: Mapping[str, int]
    windows: Mapping[str, int | None]
    slots: int
    kv_dtype: str = "auto"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """One size of step.

    Attributes:
      tokens: T.
      rows: R.
      longest: most tokens of one row; 1 for a step of decoding, where T is R.
      context: most tokens of a sequence, those of the step included.
      every: whether a token is drawn after every token, not only after a row's last: for drafts.
      greedy: every row takes its most likely token and wants no more. A GPU stops at each choice
        that a program makes, so that steps without options have programs without choices.
      steps: of decoding that the program takes by itself; a row takes part in its first `counts`.
        Above 1 only where all is greedy. Rows that take part in more of them come first.
      drafts: tokens of each row that the draft model guesses first, `counts` - 1 of a row's own;
        rows come as with steps. 0 where drafts come from the host or there are none.
    """

    tokens: int
    rows: int
    longest: int
    context: int
    every: bool = False
    greedy: bool = False
    steps: int = 1
    drafts: int = 0

    @property
    def places(self) -> int:
        """P: tokens that are drawn; of several steps all of a row's, then the next row's."""
        return self.tokens if self.every else self.rows * self.steps

    @property
    def name(self) -> str:
        """For the program's name."""
        how = "-every" * self.every + "-greedy" * self.greedy
        how += f"-n{self.steps}" * (self.steps > 1) + f"-d{self.drafts}" * (self.drafts > 0)
        return f"t{self.tokens}-r{self.rows}-l{self.longest}-s{self.context}{how}"

    def widths(self, memory: Memory) -> dict[str, int]:
        """Columns of the page table of every group."""
        size, out = memory.page_size, {}
        whole = -(-self.context // size)
        for group, left in memory.windows.items():
            span = max(self.longest, self.steps)
            out[group] = whole if left is None else min(whole, (left + span) // size + 2)
        return out

    def parts(self, memory: Memory) -> dict[str, tuple[int, ...]]:
        """Names and shapes of a step's integers, in their order in one array.

        `unread` marks rows whose one token is the last one drawn, `begins` those that start anew,
        `masked` places whose token a mask limits.
        """
        rows = ("counts", "starts", "slots", "prompts", "unread", "begins")
        out: dict[str, tuple[int, ...]] = {"ids": (self.tokens,)}
        out |= dict.fromkeys(rows, (self.rows,)) | {"masked": (self.places,)}
        for group, width in self.widths(memory).items():
            out[f"firsts:{group}"] = (self.rows,)
            out[f"pages:{group}"] = (self.rows, width)
        return out


def unpack(packed: Any, parts: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Parts of a step's integers by name; of a host array they are views."""
    out, place = {}, 0
    for name, shape in parts.items():
        size = math.prod(shape)
        out[name] = packed[place : place + size].reshape(shape)
        place += size
    return out


def shapes(
    *, tokens: int, sequences: int, longest: int, contexts: tuple[int, ...], greedy: int = 0
) -> tuple[Shape, ...]:
    """The table: decoding of 1, 2, 4, … sequences; mixed steps of 16, 64, … tokens for 1 or more.

    Args:
      tokens: most of a step.
      sequences: most of a step.
      longest: most tokens of one sequence in a step.
      contexts: lengths of sequences to have programs of their own for, rising.
      greedy: steps of the programs for decoding without options, 0 for none. They are for
        accelerators, where a few rows cost what one does: others are for 4, 16, … or 8, 64, … rows.
        Mixed steps of the most rows then have programs without options too.
    """
    require(tokens >= sequences, f"{tokens} tokens of a step hold no {sequences} sequences")
    powers = [1 << i for i in range((sequences - 1).bit_length() + 1)]
    decode = sorted({min(n, sequences) for n in powers})
    mixed_tokens = sorted({min(16 * 4**i, tokens) for i in range(12)})
    mixed_rows = sorted({min(8**i, sequences) for i in range(1 if greedy else 0, 5)})
    choosing = sorted({min(4**i, sequences) for i in range(len(decode))}) if greedy else decode
    out = []
    for context in contexts:
        kinds = [(choosing, False, 1)]
        kinds += [(choosing if greedy > 1 else decode, True, 1)] if greedy else []
        kinds += [(decode, True, greedy)] if greedy > 1 else []
        out += [
            Shape(tokens=n, rows=n, longest=1, context=context, greedy=plain, steps=steps)
            for rows, plain, steps in kinds
            for n in rows
        ]
        for t in mixed_tokens:
            most = max((r for r in mixed_rows if r <= t), default=1)
            twins = [True, False] if greedy and sequences > 1 else [False]
            out += [
                Shape(tokens=t, rows=r, longest=min(longest, t), context=context, greedy=plain)
                for r in mixed_rows
                if r <= t and (r == 1 or t >= sequences or r == most)
                for plain in (twins if r == most else [False])
            ]
    return tuple(out)


def verifying(
    *, tokens: int, sequences: int, drafts: int, context: int, greedy: bool = False
) -> tuple[Shape, ...]:
    """Steps of 2, 4, 8, … tokens that verify drafts.

    Args:
      tokens: most of a step.
      sequences: most of a step.
      drafts: most of one sequence.
      context: see `Shape`.
      greedy: whether steps without options have programs of their own.
    """
    lengths = sorted({min(2 << i, tokens) for i in range((tokens - 1).bit_length())})
    return tuple(
        Shape(
            tokens=n,
            rows=min(n, sequences),
            longest=min(n, 1 + drafts),
            context=context,
            every=True,
            greedy=plain,
        )
        for n in lengths
        for plain in ([True, False] if greedy else [False])
    )


def guessing(
    *, tokens: int, sequences: int, drafts: int, context: int, greedy: bool = False
) -> tuple[Shape, ...]:
    """Steps of 1, 4, 16, … rows in which a draft model guesses 1, 3, 7, … tokens of each.

    Args:
      tokens: most of a step.
      sequences: most of a step.
      drafts: most of one sequence.
      context: see `Shape`.
      greedy: whether steps without options have programs of their own.
    """
    return tuple(
        Shape(
            tokens=rows * (1 + count),
            rows=rows,
            longest=1 + count,
            context=context,
            every=True,
            greedy=plain,
            drafts=count,
        )
        for count in sizes(drafts)
        for rows in sorted({min(4**i, sequences, max(1, tokens // (1 + count))) for i in range(6)})
        for plain in ([True, False] if greedy else [False])
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Carry:
    """What the device keeps by slot beside the state.

    Attributes:
      last: [S] int32, the last token drawn.
      history: tokens seen, for penalties.
    """

    last: Slot
    history: Slot


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Options:
    """Sampling options by slot.

    Attributes:
      rows: `SamplingRows`, each [S].
      penalized: [S] booleans, whether any penalty is on.
      logprobs: [S] booleans, whether log probabilities are wanted.
      bias_ids: [S, BIASES] int32; past the vocabulary for none.
      bias: [S, BIASES] float32.
    """

    rows: Slot
    penalized: Slot
    logprobs: Slot
    bias_ids: Slot
    bias: Slot


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Drawn:
    """What a step drew.

    Attributes:
      tokens: [P] int32; -1 after a guess of the draft model that was wrong.
      logprobs: [P] float32 of the tokens, by the model's own distribution; 0 if nobody wants any.
      top_ids: [P, TOP] int32, the most likely tokens.
      top_logprobs: [P, TOP] float32.
    """

    tokens: Slot
    logprobs: Slot
    top_ids: Slot
    top_logprobs: Slot


def empty_options(slots: int, vocab: int) -> Options:
    """Host arrays of options that do nothing."""
    return Options(
        Sampling().rows(slots),
        np.zeros((slots,), np.bool_),
        np.zeros((slots,), np.bool_),
        np.full((slots, BIASES), vocab, np.int32),
        np.zeros((slots, BIASES), np.float32),
    )


def abstract_state(setup: Setup, memory: Memory, draft: Setup | None) -> tuple[Any, Carry]:
    """Shapes of ((state, state of the draft model or None), carry)."""

    def one(setup: Setup) -> Any:
        return paged_state(
            setup.spec,
            {group: count + 1 for group, count in memory.pages.items()},  # one that is nobody's
            memory.slots,
            page_size=memory.page_size,
            dtype=dtype_of(setup.policy.compute_dtype),
            kv_dtype=memory.kv_dtype,
            segments=setup.segments,
            array=setup.array,
        )

    state = one(setup), None if draft is None else one(draft)
    seen = (memory.slots, setup.spec.vocab)
    history = History(setup.array(seen, np.bool_, (None, None)), setup.ints(*seen))
    return state, Carry(setup.ints(memory.slots), history)


def step(
    setup: Setup,
    memory: Memory,
    shape: Shape,
    draft: Setup | None = None,
    *,
    held: Any = None,
) -> Program:
    """One step: (params, state, carry, options, integers, masks) -> (state, carry, `Drawn`).

    Params and state are pairs, of the model and of the draft model or None. Masks are [P, words]
    int32, a bit a token, those that may be drawn. `held` is `abstract_state`, where it is known.
    """

    def build() -> Any:
        from jaxllm.serve.steps import serve_step

        return serve_step((setup, draft), memory, shape)

    whole = lambda shape, dtype: setup.array(shape, dtype, (None,) * len(shape))  # noqa: E731
    options = jax.tree.map(
        lambda x: whole(x.shape, x.dtype), empty_options(memory.slots, setup.spec.vocab)
    )
    held, top = held or abstract_state(setup, memory, draft), (shape.places, TOP)
    drawn = Drawn(
        setup.ints(shape.places),
        whole(top[:1], np.float32),
        whole(top, np.int32),
        whole(top, np.float32),
    )
    size = sum(math.prod(part) for part in shape.parts(memory).values())
    depends = {
        "page_size": memory.page_size,
        "windows": sorted((g, w or -1) for g, w in memory.windows.items()),
        "shape": dataclasses.asdict(shape),
        "draft": None if draft is None else draft.depends(),
    }
    return setup.program(
        f"serve-{shape.name}",
        build,
        (
            (setup.params, None if draft is None else draft.params),
            *held,
            options,
            setup.ints(size),
            setup.ints(shape.places, words(setup.spec.vocab)),
        ),
        depends=depends,
        donate=(1, 2),
        out=(*held, drawn),
    )


def zeros(setup: Setup, memory: Memory, draft: Setup | None = None) -> Program:
    """An empty state and carry, made on the device: () -> (state, carry)."""

    held = abstract_state(setup, memory, draft)

    def build() -> Any:
        return lambda: jax.tree.map(lambda x: jax.numpy.zeros(x.shape, x.dtype), held)

    depends = {"pages": sorted(memory.pages.items()), "slots": memory.slots}
    depends |= {"page_size": memory.page_size, "kv_dtype": memory.kv_dtype}
    depends |= {"draft": None if draft is None else draft.depends()}
    return setup.program("serve-empty", build, (), depends=depends, out=held)
