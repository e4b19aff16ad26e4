"""Masks on arrays: the dense oracle of a declared mask."""

from __future__ import annotations

import dataclasses

import jax
from jaxtyping import Bool, Int

from jaxllm.spec.mask import Causal, Mask, Row, allowed, draws
from jaxllm.typing import AnyArray, Slot

__all__ = ["Visibility", "visible"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Visibility:
    """What decides who sees whom: positions, segments and how many cache slots are filled.

    Attributes:
      query_positions: [B, T] integers.
      key_positions: [B, S] integers.
      query_segments: [B, T] integers or None; tokens see their own segment only.
      key_segments: [B, S] integers or None.
      key_lengths: [B] integers or None; keys at or past the length are not there.
      mask: the declared mask.
      aligned: whether both positions are 0..T-1 in every row, so that structure says it all.
      slots: whether key s stands at position s in every row, as in a dense cache, and the queries'
        positions rise by one.
      runs: whether keys and queries are the same tokens, whose positions rise by one inside of each
        segment, and each segment is one run.
      marks: [B, T] booleans or None; tokens, the same as the keys, that are global or of a prefix.
      heads: N, for masks that each head draws for itself.
    """

    query_positions: Slot
    key_positions: Slot
    query_segments: Slot | None = None
    key_segments: Slot | None = None
    key_lengths: Slot | None = None
    mask: Mask = dataclasses.field(default=Causal(), metadata={"static": True})
    aligned: bool = dataclasses.field(default=False, metadata={"static": True})
    slots: bool = dataclasses.field(default=False, metadata={"static": True})
    runs: bool = dataclasses.field(default=False, metadata={"static": True})
    marks: Slot | None = None
    heads: int | None = dataclasses.field(default=None, metadata={"static": True})


def visible(see: Visibility, heads: Int[AnyArray, "n"] | None = None) -> Bool[AnyArray, "B n T S"]:
    """Whether query t may attend to key s; n is 1 unless each head has a mask of its own.

    Args:
      see: positions, segments, lengths and the mask.
      heads: numbers of the heads wanted where each has its own; all by default.
    """
    query, key = see.query_positions[:, None, :, None], see.key_positions[:, None, None, :]
    head = None
    if draws(see.mask):
        numbers = jax.numpy.arange(see.heads) if heads is None else heads
        head = numbers[None, :, None, None]
    marks = None
    if see.marks is not None:
        marks = (see.marks[:, None, :, None], see.marks[:, None, None, :])
    row = Row(
        length=key.shape[-1], head=head, heads=see.heads, marks=marks, constant=jax.numpy.asarray
    )
    out = allowed(see.mask, query, key, row)
    if see.query_segments is not None and see.key_segments is not None:
        same = see.query_segments[:, :, None] == see.key_segments[:, None, :]
        out = out & same[:, None]
    if see.key_lengths is not None:
        slots = jax.lax.broadcasted_iota(
            see.key_lengths.dtype, (*out.shape[:1], 1, 1, out.shape[3]), 3
        )
        out = out & (slots < see.key_lengths[:, None, None, None])
    return out
