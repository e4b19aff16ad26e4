"""Step: where the new tokens stand. It is data, so one program serves every position."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Key

from jaxllm.ops.flat import Flat
from jaxllm.typing import AnyArray, Slot

__all__ = [
    "Step",
    "dense_step",
    "flat_step",
    "real_tokens",
    "sequence_lengths",
    "training_step",
]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Step:
    """Positions and boundaries of the new tokens of a batch.

    Attributes:
      positions: [B, T] integers, the place of each token in its sequence. With a state they rise
        by one, and with segments by one inside of each segment that is not padding.
      segment_ids: [B, T] integers or None; packed documents, each one run of tokens, see only
        their own. 0 is padding: it enters no statistics.
      lengths: [B] integers or None; how many of the T tokens are real, the rest is padding.
      flat: `Flat` or None; a single row holds the new tokens of many sequences, each of which has
        its own state.
      page_table: a `PageTable` for each group of layers, or None; pages of a paged state.
      adapter_ids: [B] integers or None; 0 is no adapter.
      key: random key for dropout, or None.
      marks: [B, T] booleans or None; tokens that a mask makes global, or that form the prefix.
      fresh: static; positions are 0..T-1 in every row and nothing is remembered before them.
      aligned: static; all rows stand at the same positions.
    """

    positions: Slot
    segment_ids: Slot | None = None
    lengths: Slot | None = None
    flat: Slot | None = None
    page_table: Slot | None = None
    adapter_ids: Slot | None = None
    key: Slot | None = None
    marks: Slot | None = None
    fresh: bool = dataclasses.field(default=False, metadata={"static": True})
    aligned: bool = dataclasses.field(default=False, metadata={"static": True})


def training_step(
    batch: int,
    length: int,
    *,
    segment_ids: Int[AnyArray, "B T"] | None = None,
    positions: Int[AnyArray, "B T"] | None = None,
    adapter_ids: Int[AnyArray, "B"] | None = None,
    key: Key[Array, ""] | None = None,
) -> Step:
    """A step without state over whole rows; packed rows bring their segments and positions."""
    fresh = positions is None
    if fresh:
        positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
    return Step(
        positions,
        segment_ids=segment_ids,
        adapter_ids=adapter_ids,
        key=key,
        fresh=fresh,
        aligned=fresh,
    )


def dense_step(
    start: Int[AnyArray, "B"],
    length: int,
    *,
    fresh: bool = False,
    lengths: Int[AnyArray, "B"] | None = None,
) -> Step:
    """A step of `length` tokens that follow `start` remembered ones in a dense state.

    `fresh` promises that all starts are 0 and lets attention read the new keys alone.
    """
    positions = start[:, None] + jnp.arange(length, dtype=jnp.int32)[None]
    return Step(positions, lengths=lengths, fresh=fresh, aligned=fresh or start.shape[0] == 1)


def flat_step(flat: Flat, length: int, page_table: Mapping[str, Any] | None = None) -> Step:
    """A step of `length` tokens of many sequences, one after another in one row.

    Args:
      flat: whose they are.
      length: T, padding included.
      page_table: a `PageTable` for each group of layers.
    """
    owner = flat.owners(length)
    num_rows = flat.counts.shape[0]
    real, row = owner < num_rows, jnp.minimum(owner, num_rows - 1)
    return Step(
        jnp.where(real, flat.positions(length), 0)[None],
        segment_ids=jnp.where(real, row + 1, 0)[None],
        flat=flat,
        page_table=page_table,
    )


def real_tokens(step: Step) -> Bool[Array, "B T"] | None:
    """Which tokens are no padding, by lengths and segments; None for all."""
    real = None
    if step.lengths is not None:
        slots = jnp.arange(step.positions.shape[1], dtype=step.lengths.dtype)
        real = slots[None] < jnp.asarray(step.lengths)[:, None]
    if step.segment_ids is not None:
        inside = jnp.asarray(step.segment_ids) != 0
        real = inside if real is None else real & inside
    return real


def sequence_lengths(step: Step) -> Int[Array, "B t"]:
    """How many tokens each token's sequence has once those of the step are there.

    Returns:
      [B, T] where documents are packed (each is a run of equal segment ids), else [B, 1]; padding
      does not count.
    """
    positions = jnp.asarray(step.positions)
    slots = jnp.arange(positions.shape[1], dtype=jnp.int32)[None]
    if step.segment_ids is None:
        if step.lengths is not None:
            positions = jnp.where(slots < step.lengths[:, None], positions, 0)
        return positions.max(axis=1, keepdims=True) + 1
    ids = jnp.asarray(step.segment_ids)
    ends = jnp.pad(ids[:, 1:] != ids[:, :-1], ((0, 0), (0, 1)), constant_values=True)
    none = positions.shape[1] - 1
    last = jax.lax.cummin(jnp.where(ends, slots, none), axis=1, reverse=True)
    return jnp.take_along_axis(positions, last, axis=1) + 1
