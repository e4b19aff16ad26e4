"""The grouped products in plain jnp: what the kernels are compared with."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.grouped_matmul.tables import group_bounds

__all__ = ["reference"]


def reference(
    lhs: jax.Array, rhs: jax.Array, sizes: jax.Array, *, transpose_rhs: bool = False
) -> jax.Array:
    """[R, O]: each row times the matrix of its group, summed in float32 at least.

    One group at a time over all rows: E times the work, and no more memory than one result.
    Autodiff gives its gradient.
    """
    wide = jnp.promote_types(lhs.dtype, jnp.float32)
    exact = jax.lax.Precision.HIGHEST if lhs.dtype == wide else jax.lax.Precision.DEFAULT
    rows = jnp.arange(lhs.shape[0], dtype=jnp.int32)[:, None]
    contract = (((1,), (1 if transpose_rhs else 0,)), ((), ()))

    def one(total, group):
        matrix, (start, end) = group
        inside = (rows >= start) & (rows < end)
        # Rows of others are cleared before, not after: NaN there must not reach the gradient.
        own = jnp.where(inside, lhs, jnp.zeros((), lhs.dtype))
        y = jax.lax.dot_general(own, matrix, contract, precision=exact, preferred_element_type=wide)
        return total + jnp.where(inside, y, jnp.zeros((), wide)), None

    outputs = rhs.shape[1 if transpose_rhs else 2]
    bounds = group_bounds(sizes, lhs.shape[0])
    start = jnp.zeros((lhs.shape[0], outputs), wide)
    out, _ = jax.lax.scan(one, start, (rhs, bounds.T))
    return out.astype(lhs.dtype)
