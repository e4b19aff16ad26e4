"""Queries as the kernels hold them: rows of one head of keys, query by query."""

from __future__ import annotations

import jax
import jax.numpy as jnp

__all__ = ["queries_of", "rows_of"]


def rows_of(q: jax.Array, heads: int, *, unit: int, most: int | None = None) -> jax.Array:
    """[M, Q, N, H] -> [M, K, R, H]: queries by heads of a key head.

    Args:
      q: queries.
      heads: K.
      unit: R is a multiple of it.
      most: above so many rows, of this.
    """
    count, queries, num_heads, width = q.shape
    rows = queries * num_heads // heads
    short = -rows % unit
    if most is not None and rows + short > most:
        short = -rows % most
    q = q.reshape(count, queries, heads, -1, width).transpose(0, 2, 1, 3, 4)
    q = q.reshape(count, heads, -1, width)
    return jnp.pad(q, ((0, 0), (0, 0), (0, short), (0, 0)))


def queries_of(
    out: jax.Array, lse: jax.Array, shape: tuple[int, ...]
) -> tuple[jax.Array, jax.Array]:
    """(out [M, Q, N, V], lse [M, Q, N]) from rows [M, K, R, V] and [M, K, R] without padding.

    Args:
      out, lse: of the rows.
      shape: of the queries, [M, Q, N, H].
    """
    count, queries, num_heads = shape[:3]
    heads = out.shape[1]
    out = out.reshape(count, heads, queries, num_heads // heads, -1).transpose(0, 2, 1, 3, 4)
    lse = lse.reshape(count, heads, queries, num_heads // heads).transpose(0, 2, 1, 3)
    return out.reshape(count, queries, num_heads, -1), lse.reshape(count, queries, num_heads)
