"""RMSNorm and LayerNorm, statistics in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxllm.ops.linear import align

__all__ = ["layer_norm", "rms_norm"]


def rms_norm(x: jax.Array, scale: jax.Array, *, eps: float, offset: float = 0.0) -> jax.Array:
    """x / sqrt(mean(x^2) + eps) * (offset + scale), in float32, cast back to x's dtype.

    Source: arXiv 1910.07467.
    """
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + eps)
    return (y * align(scale.astype(jnp.float32) + offset, y)).astype(x.dtype)


def layer_norm(
    x: jax.Array,
    scale: jax.Array,
    bias: jax.Array | None,
    *,
    eps: float,
    offset: float = 0.0,
) -> jax.Array:
    """(x - mean) / sqrt(var + eps) * (offset + scale) + bias, in float32, cast back to x's dtype.

    Source: arXiv 1607.06450.
    """
    y = x.astype(jnp.float32)
    y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + eps)
    y = y * align(scale.astype(jnp.float32) + offset, y)
    if bias is not None:
        y = y + align(bias.astype(jnp.float32), y)
    return y.astype(x.dtype)
