"""Causal depthwise convolution over time: every channel by itself, over its last W inputs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxllm.core.precision import at_least_float32
from jaxllm.ops.linear import align
from jaxllm.typing import AnyArray

__all__ = ["causal_conv", "next_tail", "since_start"]


def since_start(starts: Bool[AnyArray, "B T"], far: int) -> Int[Array, "B T"]:
    """How many tokens stand between each token and the last start at or before it.

    Where there is none, `far` more than the tokens before it in the row.
    """
    places = jnp.arange(starts.shape[1], dtype=jnp.int32)[None]
    last = jax.lax.cummax(jnp.where(starts, places, -far), axis=1)
    return places - last


def causal_conv(
    x: Float[Array, "B T *C"],
    kernel: Float[AnyArray, "W *C"],
    bias: Float[AnyArray, "*C"] | None = None,
    *,
    tail: Float[AnyArray, "B W-1 *C"] | None = None,
    starts: Bool[AnyArray, "B T"] | None = None,
) -> Float[Array, "B T *C"]:
    """y[t] = bias + sum over j of kernel[W - 1 - j] x[t - j], no further back than the last start.

    Sums are taken in float32 at least; the result has x's dtype. T may be anything from 1.

    Args:
      x: inputs.
      kernel: its last row is that of the token itself.
      bias: of every channel.
      tail: the W - 1 inputs before; zeros by default.
      starts: tokens before which nothing is seen, be it NaN; None for none.
    """
    length, width = x.shape[1], kernel.shape[0]
    wide = at_least_float32(x.dtype)
    padded = _after(tail, x, width)
    age = None if starts is None else since_start(starts, width)
    total = jnp.zeros(x.shape, wide) if bias is None else align(bias.astype(wide), x)
    for back in range(width):
        part = jax.lax.slice_in_dim(padded, width - 1 - back, width - 1 - back + length, axis=1)
        if age is not None and back:
            seen = jax.lax.expand_dims(age >= back, range(2, x.ndim))
            part = jnp.where(seen, part, jnp.zeros_like(part))
        total = total + part.astype(wide) * align(kernel[width - 1 - back].astype(wide), x)
    return jnp.broadcast_to(total, x.shape).astype(x.dtype)


def next_tail(
    x: Float[Array, "B T *C"],
    tail: Float[AnyArray, "B w *C"],
    *,
    starts: Bool[AnyArray, "B T"] | None = None,
    lengths: Int[AnyArray, "B"] | None = None,
) -> Float[Array, "B w *C"]:
    """The last w inputs after x, zeros before the last start: the `tail` of the next tokens.

    Args:
      x: inputs.
      tail: those before.
      starts: as in `causal_conv`.
      lengths: how many of the T inputs are real; the rest is padding and never enters.
    """
    held, length = tail.shape[1], x.shape[1]
    if held == 0:
        return jnp.asarray(tail)
    padded = _after(tail, x, held + 1).astype(tail.dtype)
    if starts is None and lengths is None:
        return padded[:, length:]
    ends = jnp.full((x.shape[0],), length, jnp.int32) if lengths is None else lengths
    places = ends[:, None].astype(jnp.int32) + jnp.arange(held, dtype=jnp.int32)[None]
    out = jnp.take_along_axis(padded, jax.lax.expand_dims(places, range(2, x.ndim)), axis=1)
    if starts is None:
        return out
    at = jnp.arange(length, dtype=jnp.int32)[None]
    begun = jnp.where(starts & (at < ends[:, None]), at, -held).max(axis=1, keepdims=True)
    seen = jax.lax.expand_dims(places - held >= begun, range(2, x.ndim))
    return jnp.where(seen, out, jnp.zeros_like(out))


def _after(tail: Float[AnyArray, "B w *C"] | None, x: Array, width: int) -> Array:
    """x with the width - 1 inputs before it."""
    if tail is None:
        return jnp.pad(x, ((0, 0), (width - 1, 0), *[(0, 0)] * (x.ndim - 2)))
    return jnp.concatenate([tail.astype(x.dtype), x], axis=1)
