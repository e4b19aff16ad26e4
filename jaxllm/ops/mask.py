"""Masks on arrays: the dense oracle of a declared mask."""

from __future__ import annotations

import dataclasses

import jax
from jaxtyping import Bool

from jaxllm.spec.mask import Causal, Mask, allowed
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
      slots: whether key s stands at position s in every row, as in a dense cache.
    """

    query_positions: Slot
    key_positions: Slot
    query_segments: Slot | None = None
    key_segments: Slot | None = None
    key_lengths: Slot | None = None
    mask: Mask = dataclasses.field(default=Causal(), metadata={"static": True})
    aligned: bool = dataclasses.field(default=False, metadata={"static": True})
    slots: bool = dataclasses.field(default=False, metadata={"static": True})


def visible(see: Visibility) -> Bool[AnyArray, "B T S"]:
    """Whether query t may attend to key s."""
    query, key = see.query_positions[:, :, None], see.key_positions[:, None, :]
    out = allowed(see.mask, query, key)
    if see.query_segments is not None and see.key_segments is not None:
        out = out & (see.query_segments[:, :, None] == see.key_segments[:, None, :])
    if see.key_lengths is not None:
        slots = jax.lax.broadcasted_iota(see.key_lengths.dtype, out.shape, 2)
        out = out & (slots < see.key_lengths[:, None, None])
    return out
