"""Batch: what one training step sees."""

from __future__ import annotations

import dataclasses

import jax

from jaxllm.typing import Slot

__all__ = ["Batch"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Rows of tokens and what to predict.

    Attributes:
      tokens: [B, T] int32.
      targets: [B, T] int32, the token that follows each position.
      weights: [B, T] float32; 0 leaves a position out of the loss.
      segment_ids: [B, T] int32 or None; packed documents see only their own.
      positions: [B, T] int32 or None; 0..T-1 where None.
    """

    tokens: Slot
    targets: Slot
    weights: Slot
    segment_ids: Slot | None = None
    positions: Slot | None = None
