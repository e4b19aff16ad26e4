"""Inverses of triangular matrices in matrix products alone."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

__all__ = ["inverse"]


@jax.custom_jvp
def inverse(below: jax.Array) -> jax.Array:
    """(I + below)^-1 of matrices [..., C, C] with zeros on and above the diagonal; exact products.

    Blocks on the diagonal double until they are the whole: the inverse of [[A, 0], [B, D]] has
    -D^-1 B A^-1 below. A triangular solve is a call of LAPACK a matrix on a CPU, whose threads
    fight over the cores.

    Args:
      below: float32 or wider.
    """
    size = below.shape[-1]
    place = np.arange(size)
    found = jnp.broadcast_to(jnp.eye(size, dtype=below.dtype), below.shape)
    width = 1
    while width < size:
        block = place // width
        joined = (block[:, None] % 2 == 1) & (block[:, None] == block[None] + 1)
        joined = lax.expand_dims(joined, range(below.ndim - 2))
        part = jnp.where(joined, below, np.zeros((), below.dtype))
        found = found - _exact(_exact(found, part), found)
        width *= 2
    return found


@inverse.defjvp
def _inverse_jvp(
    primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    found = inverse(*primals)
    return found, -_exact(_exact(found, tangents[0]), found)


def _exact(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)
