"""XLA's own form, `jax.lax.ragged_dot`."""

from __future__ import annotations

import jax
import jax.numpy as jnp

__all__ = ["ragged"]


def ragged(
    lhs: jax.Array, rhs: jax.Array, sizes: jax.Array, *, transpose_rhs: bool = False
) -> jax.Array:
    """As `reference`, save that rows past the groups' end must be finite for the gradient."""
    rhs = jnp.swapaxes(rhs, 1, 2) if transpose_rhs else rhs
    return jax.lax.ragged_dot(lhs, rhs, sizes)
