"""The closed table of inference programs: prefill buckets, decode, growth of the state, logits.

Every length is rounded up to a bucket (a power of two, at least 16 tokens or 256 slots), so the
number of programs is small and known. Building one imports the model's code; loading one does not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxllm.aot.program import Program
from jaxllm.core.config import to_dict
from jaxllm.core.policy import Policy
from jaxllm.core.precision import dtype_of
from jaxllm.core.sharding import named_sharding
from jaxllm.core.tree import Segment
from jaxllm.errors import UnsupportedError
from jaxllm.infer.sampling import Mode, Sampling
from jaxllm.ops.sampling import History
from jaxllm.spec.model import ModelSpec, Pooling
from jaxllm.state.dense import dense_state, state_axes
from jaxllm.typing import Slot

__all__ = [
    "Setup",
    "Tail",
    "bucket",
    "check_decodes",
    "decode",
    "embed",
    "grow",
    "logits",
    "prefill",
    "row_length",
    "score",
]


def bucket(length: int, least: int = 16) -> int:
    """The smallest power of two that holds `length` and `least`."""
    return 1 << (max(length, least) - 1).bit_length()


def check_decodes(spec: ModelSpec) -> None:
    """Refuse an encoder, whose tokens see those after them.

    Raises:
      UnsupportedError: it is one.
    """
    if not spec.decodes:
        raise UnsupportedError(
            "this model is an encoder: its tokens see those after them, so it neither generates "
            "nor predicts the next token; use embed, or logits of masked tokens"
        )


def row_length(spec: ModelSpec, tokens: int) -> int:
    """Tokens to which rows are padded, so that few programs serve all lengths.

    A power of two within the context; where a rope or a mask follows the length, as few more
    tokens as it allows.
    """
    if spec.length_unit is not None:
        return -(-tokens // spec.length_unit) * spec.length_unit
    return max(tokens, min(bucket(tokens), spec.context))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tail:
    """Where generation stands.

    Attributes:
      tokens: [B] int32, the last token of each row, not yet in the state.
      positions: [B] int32, its place; a further chunk of the prompt takes this place instead.
      history: tokens seen, for penalties; None where there are none.
    """

    tokens: Slot
    positions: Slot
    history: Slot | None = None


@dataclasses.dataclass(frozen=True)
class Setup:
    """What all programs of a loaded model share.

    Attributes:
      spec: the model.
      policy: how it runs.
      params: abstract parameters in the run's layout.
      segments: how its layers are stacked.
      mesh: devices, or None for one.
      options: compiler options.
      name: prefix of the programs' names.
    """

    spec: ModelSpec
    policy: Policy
    params: Any
    segments: tuple[Segment, ...]
    mesh: Any = None
    options: tuple[tuple[str, Any], ...] = ()
    name: str = "model"

    def depends(self, **more: Any) -> dict[str, Any]:
        """What every program of this model closes over, JSON-ready."""
        policy = to_dict(dataclasses.replace(self.policy, taps=frozenset()))
        taps = sorted(self.policy.taps)
        return {"spec": to_dict(self.spec), "policy": policy, "taps": taps, **more}

    def array(self, shape: tuple[int, ...], dtype: Any, axes: tuple[str | None, ...]) -> Any:
        """An abstract array, sharded by its axes when there is a mesh."""
        if self.mesh is None:
            return jax.ShapeDtypeStruct(shape, dtype)
        sharding = named_sharding(self.mesh, axes, self.policy.rules, shape)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def ints(self, *shape: int) -> Any:
        """An abstract integer array whose first dim is the batch."""
        return self.array(shape, np.int32, ("batch", *[None] * (len(shape) - 1)))

    def state(self, batch: int, capacity: int) -> Any:
        """The abstract state."""
        shapes = dense_state(
            self.spec,
            batch,
            capacity,
            dtype=dtype_of(self.policy.compute_dtype),
            segments=self.segments,
            abstract=True,
        )
        axes = state_axes(self.spec, self.segments)
        flat = jax.tree.leaves(axes, is_leaf=lambda x: isinstance(x, tuple))
        leaves, structure = jax.tree.flatten(shapes)
        arrays = [self.array(s.shape, s.dtype, a) for s, a in zip(leaves, flat, strict=True)]
        return jax.tree.unflatten(structure, arrays)

    def history(self, batch: int, mode: Mode) -> Any:
        """The abstract history, None where the mode needs none."""
        if mode != "penalize":
            return None
        shape = (batch, self.spec.vocab)
        axes = ("batch", None)
        return History(self.array(shape, np.bool_, axes), self.array(shape, np.int32, axes))

    def tail(self, batch: int, mode: Mode) -> Tail:
        """The abstract tail."""
        return Tail(self.ints(batch), self.ints(batch), self.history(batch, mode))

    def rows(self, batch: int) -> Any:
        """Abstract sampling rows."""
        rows = Sampling().rows(batch)
        return jax.tree.map(lambda x: self.array(x.shape, x.dtype, ("batch",)), rows)

    def program(self, name: str, build: Callable[[], Any], args: Any, **more: Any) -> Program:
        """A program of this model; `depends`, `donate` and `out` in `more`."""
        out = more.get("out")
        shardings = None
        if self.mesh is not None and out is not None:
            shardings = jax.tree.map(lambda x: x.sharding, out)
        return Program(
            name=f"{self.name}-{name}",
            build=build,
            args=args,
            depends=self.depends(**more.get("depends", {})),
            donate=more.get("donate", ()),
            out_shardings=shardings,
            mesh=self.mesh,
            options=self.options,
        )


def prefill(
    setup: Setup, *, batch: int, length: int, capacity: int, mode: Mode, fresh: bool
) -> Program:
    """Take in a bucket of prompt tokens and draw the next one.

    Fresh: (params, ids [B, T], lengths [B], rows) -> (state, tail). Otherwise the state and tail of
    the tokens before come after `params` and are donated.
    """
    depends = {"length": length, "capacity": capacity, "mode": mode, "fresh": fresh}

    def build() -> Any:
        from jaxllm.infer.steps import prefill_step

        return prefill_step(setup, capacity=capacity, mode=mode, fresh=fresh)

    state, tail = setup.state(batch, capacity), setup.tail(batch, mode)
    new = (setup.ints(batch, length), setup.ints(batch), setup.rows(batch))
    args = (setup.params, *(() if fresh else (state, tail)), *new)
    name = f"prefill-{'fresh' if fresh else 'chunk'}-{mode}-b{batch}-t{length}-s{capacity}"
    donate = () if fresh else (1, 2)
    return setup.program(name, build, args, depends=depends, donate=donate, out=(state, tail))


def decode(setup: Setup, *, batch: int, capacity: int, mode: Mode, tokens: int) -> Program:
    """Generate `tokens` tokens a row: (params, state, tail, rows) -> (state, tail, [B, tokens])."""

    def build() -> Any:
        from jaxllm.infer.steps import decode_steps

        return decode_steps(setup, mode=mode, tokens=tokens)

    state, tail = setup.state(batch, capacity), setup.tail(batch, mode)
    return setup.program(
        f"decode-{mode}-b{batch}-n{tokens}-s{capacity}",
        build,
        (setup.params, state, tail, setup.rows(batch)),
        depends={"mode": mode, "tokens": tokens},
        donate=(1, 2),
        out=(state, tail, setup.ints(batch, tokens)),
    )


def grow(setup: Setup, *, batch: int, capacity: int, to: int) -> Program:
    """A state with more room: state -> state."""

    def build() -> Any:
        from jaxllm.state.dense import grow as grow_state

        return lambda state: grow_state(state, to)

    return setup.program(
        f"grow-b{batch}-s{capacity}-to{to}",
        build,
        (setup.state(batch, capacity),),
        depends={"to": to},
        out=setup.state(batch, to),
    )


def logits(setup: Setup, *, batch: int, length: int) -> Program:
    """All logits: (params, ids [B, T]) -> [B, T, V] float32; an encoder takes lengths [B] as well.

    Raises:
      UnsupportedError: the model is a body without a head.
    """
    if not setup.spec.head.logits:
        raise UnsupportedError(
            "this model is a body without a head and has no logits; use embed, or load a "
            "checkpoint with a head"
        )

    def build() -> Any:
        from jaxllm.infer.steps import all_logits

        return all_logits(setup)

    axes = ("batch", "length", "vocab")
    out = setup.array((batch, length, setup.spec.vocab), np.float32, axes)
    new = (setup.ints(batch, length), *([] if setup.spec.decodes else [setup.ints(batch)]))
    return setup.program(f"logits-b{batch}-t{length}", build, (setup.params, *new), out=out)


def embed(setup: Setup, *, batch: int, length: int, pooling: Pooling) -> Program:
    """One vector a row: (params, ids [B, T], lengths [B]) -> [B, D] float32."""

    def build() -> Any:
        from jaxllm.infer.steps import pooled

        return pooled(setup, pooling)

    unit = "-unit" if pooling.normalize else ""
    return setup.program(
        f"embed-{pooling.by}{unit}-b{batch}-t{length}",
        build,
        (setup.params, setup.ints(batch, length), setup.ints(batch)),
        depends={"by": pooling.by, "normalize": pooling.normalize},
        out=setup.array((batch, setup.spec.width), np.float32, ("batch", None)),
    )


def score(setup: Setup, *, batch: int, length: int) -> Program:
    """Negative log likelihoods: (params, ids [B, T]) -> [B, T-1] float32 of each next token.

    Raises:
      UnsupportedError: the model is an encoder.
    """
    check_decodes(setup.spec)

    def build() -> Any:
        from jaxllm.infer.steps import next_token_nll

        return next_token_nll(setup)

    out = setup.array((batch, length - 1), np.float32, ("batch", None))
    args = (setup.params, setup.ints(batch, length))
    return setup.program(f"score-b{batch}-t{length}", build, args, out=out)
