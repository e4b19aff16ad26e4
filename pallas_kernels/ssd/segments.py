"""Checks of the ids that say where sequences begin."""

from __future__ import annotations

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from pallas_kernels.errors import ShapeError

__all__ = ["check_segments"]


def check_segments(op: str, ids: jax.Array, shape: tuple[int, int]) -> None:
    """Refuse ids that go back, where they can be seen; data on a device is taken as it is.

    Args:
      op: its name, for messages.
      shape: B and T.

    Raises:
      ShapeError: another shape, no integers, negative ids or ids that go back.
    """
    if ids.shape != shape or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ShapeError(f"{op}: segment_ids must be integers {shape}, not {ids.dtype} {ids.shape}")
    if isinstance(ids, jax.core.Tracer | jax.ShapeDtypeStruct) or not ids.size:
        return
    seen = np.asarray(ids)  # jnp would trace where what stands around is traced
    if np.min(seen) < 0 or np.any(seen[:, 1:] < seen[:, :-1]):
        raise ShapeError(f"{op}: segment_ids must be from 0 on and never go back along a sequence")
