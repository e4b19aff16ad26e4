"""The product in plain jax: unpack, then multiply."""

from __future__ import annotations

import jax
import jax.numpy as jnp

__all__ = ["dequantized", "reference"]


def dequantized(values: jax.Array, scale: jax.Array, offset: jax.Array | None) -> jax.Array:
    """float32 [O, K] of values [O, K] under scales (and offsets) [O, G]."""
    outputs, inputs = values.shape
    groups = scale.shape[1]
    wide = values.astype(jnp.float32).reshape(outputs, groups, inputs // groups)
    wide = wide * scale.astype(jnp.float32)[:, :, None]
    if offset is not None:
        wide = wide + offset.astype(jnp.float32)[:, :, None]
    return wide.reshape(outputs, inputs)


def reference(
    x: jax.Array, values: jax.Array, scale: jax.Array, offset: jax.Array | None
) -> jax.Array:
    """float32 [M, O]; the unpacked values are rounded to x's dtype."""
    w = dequantized(values, scale, offset).astype(x.dtype)
    wide = x.dtype == jnp.float32
    precision = jax.lax.Precision.HIGHEST if wide else jax.lax.Precision.DEFAULT
    dims = (((1,), (1,)), ((), ()))
    return jax.lax.dot_general(x, w, dims, precision=precision, preferred_element_type=jnp.float32)
