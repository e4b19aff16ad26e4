"""Lengths that are no multiple of a tile."""

from __future__ import annotations

import jax
import jax.numpy as jnp

__all__ = ["pad"]


def pad(x: jax.Array, axis: int, to: int, value: int | float = 0) -> jax.Array:
    """Appends `value` along an axis up to the next multiple of `to`."""
    short = -x.shape[axis] % to
    if not short:
        return x
    widths = [(0, short if i == axis else 0) for i in range(x.ndim)]
    return jnp.pad(x, widths, constant_values=value)
