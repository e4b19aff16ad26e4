"""The product in plain jax: unpack, then multiply."""

from __future__ import annotations

import jax
import jax.numpy as jnp

__all__ = ["dequantized", "numbers", "reference"]


def numbers(values: jax.Array, table: tuple[float, ...]) -> jax.Array:
    """What codes stand for: a tree of selects, which any device does faster than it gathers."""
    if not table:
        return values.astype(jnp.float32)
    codes = values.astype(jnp.uint8)
    level = [jnp.float32(number) for number in table]
    for bit in range(4):
        odd = (codes & jnp.uint8(1 << bit)) != 0
        level = [jnp.where(odd, level[i + 1], level[i]) for i in range(0, len(level), 2)]
    return level[0]


def dequantized(
    values: jax.Array,
    scale: jax.Array,
    offset: jax.Array | None,
    table: tuple[float, ...] = (),
) -> jax.Array:
    """float32 [O, K] of values [O, K] under scales (and offsets) [O, G]."""
    outputs, inputs = values.shape
    groups = scale.shape[1]
    wide = numbers(values, table).reshape(outputs, groups, inputs // groups)
    wide = wide * scale.astype(jnp.float32)[:, :, None]
    if offset is not None:
        wide = wide + offset.astype(jnp.float32)[:, :, None]
    return wide.reshape(outputs, inputs)


def reference(
    x: jax.Array,
    values: jax.Array,
    scale: jax.Array,
    offset: jax.Array | None,
    table: tuple[float, ...] = (),
) -> jax.Array:
    """float32 [M, O]; the unpacked values are rounded to x's dtype."""
    w = dequantized(values, scale, offset, table).astype(x.dtype)
    wide = x.dtype == jnp.float32
    precision = jax.lax.Precision.HIGHEST if wide else jax.lax.Precision.DEFAULT
    dims = (((1,), (1,)), ((), ()))
    return jax.lax.dot_general(x, w, dims, precision=precision, preferred_element_type=jnp.float32)
