"""The gated norm in plain jnp, for any shape and device."""

from __future__ import annotations

import jax
import jax.numpy as jnp

__all__ = ["reference"]


def reference(y, x, z, d, scale, *, eps: float, before_gate: bool) -> jax.Array:
    """[rows, groups, W] from y, x and z of this shape, and d and scale [groups, W]."""
    d, scale = d[None], scale[None]
    wide = y.astype(jnp.float32) + d * x.astype(jnp.float32)
    gate = jax.nn.silu(z.astype(jnp.float32))
    u = wide if before_gate else wide * gate
    u = u * jax.lax.rsqrt(jnp.mean(jnp.square(u), axis=-1, keepdims=True) + eps) * scale
    return (u * gate if before_gate else u).astype(y.dtype)
