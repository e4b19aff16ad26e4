"""Keys and values summed over the length, for attention of linear cost."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxllm.errors import ShapeError
from jaxllm.ops.linear import dense, einsum
from jaxllm.typing import AnyArray

__all__ = ["project_length"]


def project_length(
    x: Float[Array, "B T K H"],
    weights: Any,
    lengths: Int[AnyArray, "B"] | None,
) -> Float[Array, "B rows K H"]:
    """sum_t weights[t, r] x[t]: the same sums for all heads. Source: arXiv 2006.04768.

    Args:
      x: keys or values.
      weights: [length, rows], a row a position; rows past T are not used.
      lengths: tokens of each row that count, the rest is padding; None for all.

    Raises:
      ShapeError: there are more tokens than rows of weights.
    """
    tokens = x.shape[1]
    table = dense(weights, x.dtype)
    if tokens > table.shape[0]:
        raise ShapeError(f"{tokens} tokens exceed the {table.shape[0]} of the length projection")
    if lengths is not None:
        real = jnp.arange(tokens, dtype=jnp.int32)[None] < lengths[:, None]
        x = jnp.where(real[:, :, None, None], x, jnp.zeros_like(x))
    sums = einsum("BKHT,TR->BKHR", x.transpose(0, 2, 3, 1), table[:tokens], dtype=x.dtype)
    return sums.transpose(0, 3, 1, 2)
