"""Reading a product-key memory: the best of all pairs of half-keys, and the values under them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

__all__ = ["best_pairs"]


def best_pairs(
    scores: Float[Array, "*dims 2 K"], active: int
) -> tuple[Float[Array, "*dims A"], Int[Array, "*dims A"]]:
    """The best sums of a score of the first set and one of the second, and which pair i K + j.

    Exact: whoever is among the best `active` sums has both halves among the best `active` of their
    sets, for each better half would give a better sum.

    Args:
      scores: of the half-keys of both sets.
      active: how many pairs, 1 to K^2.
    """
    count = scores.shape[-1]
    near = min(active, count)
    best, halves = jax.lax.top_k(scores, near)
    sums = best[..., 0, :, None] + best[..., 1, None, :]
    found, at = jax.lax.top_k(sums.reshape(*sums.shape[:-2], near * near), active)
    first = jnp.take_along_axis(halves[..., 0, :], at // near, axis=-1)
    second = jnp.take_along_axis(halves[..., 1, :], at % near, axis=-1)
    return found, first * count + second
