"""Dense state: what each op of each layer remembers; slot s of keys and values holds position s."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxllm.core.tree import Segment
from jaxllm.spec.model import Block, ModelSpec
from jaxllm.spec.ops import (
    Attention,
    Convolution,
    InfiniAttention,
    LatentAttention,
    LinearAttention,
    SelectiveScan,
    StateSpaceDual,
)
from jaxllm.state.recur import ConvTail, Recurrence
from jaxllm.typing import AnyArray, Slot

__all__ = [
    "KINDS",
    "DenseKV",
    "Held",
    "LatentKV",
    "dense_state",
    "grow",
    "is_held",
    "layout",
    "state_axes",
    "write",
]


@dataclasses.dataclass(frozen=True)
class Held:
    """One array of an op's state: its shape, the name of each dim, and its dtype.

    A dtype of None is that of the whole state: keys and values follow the compute dtype, while
    recurrences name float32.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    dtype: Any = None

    def stack(self, repeats: int) -> Held:
        """The same array of a stack of layers."""
        return Held((repeats, *self.shape), ("layers", *self.axes), self.dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DenseKV:
    """Keys and values [B, S, K, H] of one attention; slots past the sequence hold anything."""

    capacity_dim: ClassVar[int] = -3
    k: Slot
    v: Slot


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LatentKV:
    """What latent attention keeps: [B, S, R] normed vectors, [B, S, P] shared rotated keys."""

    capacity_dim: ClassVar[int] = -2
    latent: Slot
    rotated: Slot


def _latent(op: LatentAttention, batch: int, capacity: int) -> LatentKV:
    axes = ("batch", "kv_length", None)
    vectors, keys = (batch, capacity, op.kv_rank), (batch, capacity, op.rope_dim)
    return LatentKV(Held(vectors, axes), Held(keys, axes))


def _keys_and_values(op: Attention, batch: int, capacity: int) -> DenseKV:
    shape = (batch, capacity, op.kv_heads, op.head_dim)
    held = Held(shape, ("batch", "kv_length", "kv_heads", "head_dim"))
    return DenseKV(held, held)


def _linear(op: LinearAttention, batch: int, capacity: int) -> dict[str, Any]:
    del capacity
    heads, rows, columns = op.state_shape
    axes = ("batch", "heads", None, None)
    state: dict[str, Any] = {
        "matrix": Recurrence(Held((batch, heads, rows, columns), axes, np.float32))
    }
    if op.feature == "favor":  # the greatest feature of a key so far, as a logarithm
        peak = Held((batch, op.key_heads), ("batch", "kv_heads"), np.float32)
        state["peak"] = Recurrence(peak)
    if op.conv is not None:
        key, value = (op.key_heads, op.key_dim), (op.heads, op.value_dim)
        for name, axis, shape in (
            ("query", "kv_heads", key),
            ("key", "kv_heads", key),
            ("value", "heads", value),
        ):
            axes = ("batch", None, axis, "head_dim")
            state[name] = ConvTail(Held((batch, op.conv - 1, *shape), axes))
    return state


def _infini(op: InfiniAttention, batch: int, capacity: int) -> dict[str, Any]:
    heads, dim = op.local.kv_heads, op.local.head_dim
    held = Held(
        (batch, heads, 2, dim, dim + 1), ("batch", "kv_heads", None, "head_dim", None), np.float32
    )
    return {"local": _keys_and_values(op.local, batch, capacity), "memory": Recurrence(held)}


def _selective(op: SelectiveScan, batch: int, capacity: int) -> dict[str, Any]:
    del capacity
    tail = Held((batch, op.conv - 1, op.channels), ("batch", None, "ffn"))
    state = Held((batch, op.channels, op.state), ("batch", "ffn", None), np.float32)
    return {"conv": ConvTail(tail), "scan": Recurrence(state)}


def _dual(op: StateSpaceDual, batch: int, capacity: int) -> dict[str, Any]:
    del capacity
    heads, groups = (op.heads, op.head_dim), (op.groups, op.state)
    x = Held((batch, op.conv - 1, *heads), ("batch", None, "heads", "head_dim"))
    group = Held((batch, op.conv - 1, *groups), ("batch", None, "kv_heads", None))
    axes = ("batch", "heads", "head_dim", None)
    state = Held((batch, *heads, op.state), axes, np.float32)
    tails = {"x": ConvTail(x), "b": ConvTail(group), "c": ConvTail(group)}
    return {**tails, "scan": Recurrence(state)}


def _convolution(op: Convolution, batch: int, capacity: int) -> dict[str, Any]:
    del capacity
    return {"conv": ConvTail(Held((batch, op.conv - 1, op.channels), ("batch", None, "ffn")))}


KINDS: dict[type, Callable[[Any, int, int], Any]] = {
    Attention: _keys_and_values,
    InfiniAttention: _infini,
    LatentAttention: _latent,
    LinearAttention: _linear,
    SelectiveScan: _selective,
    StateSpaceDual: _dual,
    Convolution: _convolution,
}
"""(op, batch, capacity) -> the op's state with a `Held` for every array; others remember nothing.

A class of state whose arrays have a slot a token says on which dim in `capacity_dim`.
"""


def is_held(x: Any) -> bool:
    """Whether x stands for an array of a state."""
    return isinstance(x, Held)


def _block_state(block: Block, make: Callable[[Any], Any]) -> dict[str, Any]:
    return {
        named.name: make(named.op)
        for sub in block.subs
        for named in sub.ops
        if type(named.op) in KINDS
    }


def layout(spec: ModelSpec, segments: tuple[Segment, ...], make: Callable[[Any], Any]) -> Any:
    """The tree of `Held`s that `make` gives for the ops that remember, stacked like the layers."""
    state: dict[str, Any] = {}
    for segment in segments:
        units = [_block_state(spec.block(segment.start + i), make) for i in range(segment.unit)]
        if segment.stacked:
            stack = lambda held, n=segment.repeats: held.stack(n)  # noqa: E731
            units = jax.tree.map(stack, units, is_leaf=is_held)
        state[segment.key] = (
            {str(i): unit for i, unit in enumerate(units)} if segment.unit > 1 else units[0]
        )
    return state


def _layout(spec: ModelSpec, segments: tuple[Segment, ...], batch: int, capacity: int) -> Any:
    return layout(spec, segments, lambda op: KINDS[type(op)](op, batch, capacity))


def dense_state(
    spec: ModelSpec,
    batch: int,
    capacity: int,
    *,
    dtype: Any,
    segments: tuple[Segment, ...] | None = None,
    abstract: bool = False,
) -> Any:
    """An empty state for `batch` sequences of up to `capacity` tokens.

    Args:
      spec: the model.
      batch: B.
      capacity: S.
      dtype: of what names none of its own, as keys and values.
      segments: as the parameters are stacked; canonical by default.
      abstract: shapes only.

    Returns:
      A tree shaped by the layers; host arrays (or `ShapeDtypeStruct`s).
    """

    make = jax.ShapeDtypeStruct if abstract else np.zeros
    return jax.tree.map(
        lambda held: make(held.shape, held.dtype or dtype),
        _layout(spec, segments or spec.segments, batch, capacity),
        is_leaf=is_held,
    )


def state_axes(spec: ModelSpec, segments: tuple[Segment, ...] | None = None) -> Any:
    """Logical axes of the state, a tree like it with tuples of names."""

    layout = _layout(spec, segments or spec.segments, 1, 1)
    return jax.tree.map(lambda held: held.axes, layout, is_leaf=is_held)


def grow(state: Any, capacity: int) -> Any:
    """The same state with room for `capacity` tokens a sequence."""

    def has_slots(held: Any) -> bool:
        return hasattr(held, "capacity_dim")

    def more(held: Any) -> Any:
        if not has_slots(held):
            return held
        dim = held.capacity_dim

        def pad(x: Float[AnyArray, "..."]) -> Float[Array, "..."]:
            widths = [(0, 0)] * x.ndim
            widths[dim] = (0, capacity - x.shape[dim])
            return jnp.pad(x, widths)

        return jax.tree.map(pad, held)

    return jax.tree.map(more, state, is_leaf=has_slots)


def write(
    cache: Float[AnyArray, "B S K H"],
    new: Float[Array, "B T K H"],
    positions: Int[AnyArray, "B T"],
    *,
    aligned: bool,
) -> Float[Array, "B S K H"]:
    """Put new keys or values into a cache at their positions.

    Rows that stand at the same positions take one slice update; others scatter, and positions past
    the capacity are dropped.
    """
    new = new.astype(cache.dtype)
    if aligned:
        return jax.lax.dynamic_update_slice(cache, new, (0, positions[0, 0], 0, 0))
    rows = jnp.arange(cache.shape[0], dtype=positions.dtype)[:, None]
    return jnp.asarray(cache).at[rows, positions].set(new, mode="drop", unique_indices=True)
