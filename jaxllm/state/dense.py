"""Dense state: one array of keys and one of values a layer, slot s holds position s."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxllm.core.tree import Segment
from jaxllm.spec.model import Block, ModelSpec
from jaxllm.spec.ops import Attention
from jaxllm.typing import AnyArray, Slot

__all__ = ["DenseKV", "dense_state", "grow", "state_axes", "write"]

KV_AXES = ("batch", "kv_length", "kv_heads", "head_dim")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DenseKV:
    """Keys and values [B, S, K, H] of one attention; slots past the sequence hold anything."""

    k: Slot
    v: Slot


def _block_state(block: Block, make: Callable[[Attention], Any]) -> dict[str, Any]:
    return {
        named.name: make(named.op)
        for sub in block.subs
        for named in sub.ops
        if isinstance(named.op, Attention)
    }


def _build(spec: ModelSpec, segments: tuple[Segment, ...], make: Callable[..., Any]) -> Any:
    state: dict[str, Any] = {}
    for segment in segments:
        lead = (segment.repeats,) if segment.stacked else ()
        units = [
            _block_state(spec.block(segment.start + i), lambda op, lead=lead: make(op, lead))
            for i in range(segment.unit)
        ]
        state[segment.key] = (
            {str(i): unit for i, unit in enumerate(units)} if segment.unit > 1 else units[0]
        )
    return state


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
      dtype: of keys and values.
      segments: as the parameters are stacked; canonical by default.
      abstract: shapes only.

    Returns:
      A tree shaped by the layers; host arrays (or `ShapeDtypeStruct`s).
    """

    def make(op: Attention, lead: tuple[int, ...]) -> DenseKV:
        shape = (*lead, batch, capacity, op.kv_heads, op.head_dim)
        one = jax.ShapeDtypeStruct(shape, dtype) if abstract else np.zeros(shape, dtype)
        return DenseKV(one, one)

    return _build(spec, segments or spec.segments, make)


def state_axes(spec: ModelSpec, segments: tuple[Segment, ...] | None = None) -> Any:
    """Logical axes of the state, a tree like it with tuples of names."""

    def make(op: Attention, lead: tuple[int, ...]) -> DenseKV:
        axes = ("layers", *KV_AXES) if lead else KV_AXES
        return DenseKV(axes, axes)

    return _build(spec, segments or spec.segments, make)


def grow(state: Any, capacity: int) -> Any:
    """The same state with room for `capacity` tokens a sequence."""

    def pad(x: Float[AnyArray, "*L B S K H"]) -> Float[Array, "*L B capacity K H"]:
        widths = [(0, 0)] * x.ndim
        widths[-3] = (0, capacity - x.shape[-3])
        return jnp.pad(x, widths)

    return jax.tree.map(pad, state)


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
