"""RMSNorm and LayerNorm, statistics in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxllm.ops.linear import align
from jaxllm.ops.marks import marked
from jaxllm.spec.ops import QKNorm
from jaxllm.typing import AnyArray

__all__ = ["layer_norm", "qk_norm", "rms_norm"]


@marked("norm")
def rms_norm(
    x: Float[Array, "*dims D"], scale: Float[AnyArray, "D"], *, eps: float, offset: float = 0.0
) -> Float[Array, "*dims D"]:
    """x / sqrt(mean(x^2) + eps) * (offset + scale), in float32, cast back to x's dtype.

    Source: arXiv 1910.07467.
    """
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + eps)
    return (y * align(scale.astype(jnp.float32) + offset, y)).astype(x.dtype)


def qk_norm(
    x: Float[Array, "B T N H"], scale: Float[AnyArray, "..."] | None, norm: QKNorm
) -> Float[Array, "B T N H"]:
    """Norm queries or keys as the spec says, in float32, cast back to x's dtype.

    Args:
      x: queries or keys.
      scale: [H] (`over` head), [N, H], or None for none.
      norm: what is normed over, and how.
    """
    dims = (-2, -1) if norm.over == "full" else (-1,)
    y = x.astype(jnp.float32)
    if norm.type == "layer":
        y = y - jnp.mean(y, axis=dims, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=dims, keepdims=True) + norm.eps)
    if scale is not None:
        y = y * align(scale.astype(jnp.float32) + norm.offset, y)
    return y.astype(x.dtype)


def layer_norm(
    x: Float[Array, "*dims D"],
    scale: Float[AnyArray, "D"],
    bias: Float[AnyArray, "D"] | None,
    *,
    eps: float,
    offset: float = 0.0,
) -> Float[Array, "*dims D"]:
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
