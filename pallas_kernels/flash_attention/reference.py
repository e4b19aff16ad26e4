"""Flash attention in plain jnp: the oracle, and what runs where no kernel does."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.flash_attention.bias import dense as by_function
from pallas_kernels.flash_attention.problem import Extras, Spec

__all__ = ["dense", "reference", "visible"]


def visible(spec: Spec, extras: Extras, *, batch: int, queries: int, keys: int) -> jax.Array:
    """Who sees whom, bool [B, T, S]."""
    rows = jnp.arange(queries, dtype=jnp.int32)[None, :, None]
    columns = jnp.arange(keys, dtype=jnp.int32)[None, None, :]
    seen = jnp.ones((batch, queries, keys), bool)
    if spec.banded:
        offset = extras.offset[:, None, None] if spec.offset is None else spec.offset
        distance = columns - rows - offset
        if spec.left is not None:
            seen &= distance >= -spec.left
        if spec.right is not None:
            seen &= distance <= spec.right
    if extras.query_segments is not None:
        seen &= extras.query_segments[:, :, None] == extras.key_segments[:, None, :]
    if extras.query_lengths is not None:
        seen &= rows < extras.query_lengths[:, None, None]
    if extras.key_lengths is not None:
        seen &= columns < extras.key_lengths[:, None, None]
    return seen


def reference(
    q: jax.Array, k: jax.Array, v: jax.Array, extras: Extras, *, spec: Spec
) -> tuple[jax.Array, jax.Array]:
    """softmax(cap(scale q kT) + mask, sinks) v in float32 (float64 where the inputs are).

    A row that sees nothing gives zeros and, without a sink, lse = -inf.

    Returns:
      out [B, T, N, Hv] in v's dtype; lse [B, N, T], the natural log of the softmax's sum, the
      sink's share included.
    """
    seen = visible(spec, extras, batch=q.shape[0], queries=q.shape[1], keys=k.shape[1])
    given = {"scale": spec.scale, "softcap": spec.softcap, "sinks": extras.sinks}
    return dense(q, k, v, seen[:, None], **given, bias=_biases(q, k, extras, spec))


def _biases(q: jax.Array, k: jax.Array, extras: Extras, spec: Spec) -> jax.Array | None:
    """What distances and a function add to the scores, float32 [B or 1, N, T, S]."""
    if extras.alibi_slopes is None and spec.bias is None:
        return None
    rows = jnp.arange(q.shape[1], dtype=jnp.int32)[None, :, None]
    columns = jnp.arange(k.shape[1], dtype=jnp.int32)[None, None, :]
    offset = extras.offset[:, None, None] if spec.offset is None else spec.offset
    added = jnp.zeros((), jnp.float32)
    if spec.bias is not None:
        added = by_function(spec.bias, rows + offset, columns, q.shape[2])
    if extras.alibi_slopes is not None:
        away = jnp.abs(columns - rows - offset).astype(jnp.float32)
        added = added - extras.alibi_slopes[None, :, None, None] * away[:, None]
    return added


def dense(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    seen: jax.Array,
    *,
    scale: float,
    softcap: float | None,
    sinks,
    bias: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`reference` under a mask pair by pair, bool [B, 1 or N, T, S].

    Args:
      bias: [B or 1, N, T, S], added to the scores.
    """
    batch, queries, heads, width = q.shape
    kv_heads = k.shape[2]
    wide = jnp.float64 if q.dtype == jnp.float64 else jnp.float32
    exact = jax.lax.Precision.HIGHEST
    # Past the lengths there may be anything, NaN too; 0 * NaN would reach the sums.
    used = jnp.any(seen, axis=(1, 2))[:, :, None, None]
    k, v = (jnp.where(used, x, jnp.zeros((), x.dtype)) for x in (k, v))
    q = jnp.where(jnp.any(seen, axis=(1, 3))[:, :, None, None], q, jnp.zeros((), q.dtype))
    rows = q.astype(wide).reshape(batch, queries, kv_heads, -1, width)
    scores = jnp.einsum("btkgh,bskh->bkgts", rows, k.astype(wide), precision=exact) * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    if bias is not None:
        bias = bias.reshape(bias.shape[0], kv_heads, -1, *bias.shape[2:])
        scores = scores + bias.astype(wide)
    by_group = (batch, 1, 1) if seen.shape[1] == 1 else (batch, kv_heads, -1)
    scores = jnp.where(seen.reshape(*by_group, *seen.shape[2:]), scores, -jnp.inf)
    peak = jnp.max(scores, axis=-1, keepdims=True, initial=-jnp.inf)
    if sinks is not None:
        sinks = sinks.astype(wide).reshape(1, kv_heads, -1, 1, 1)
        peak = jnp.maximum(peak, sinks)
    peak = jax.lax.stop_gradient(jnp.where(jnp.isfinite(peak), peak, 0.0))
    weights = jnp.exp(scores - peak)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    if sinks is not None:
        total = total + jnp.exp(sinks - peak)
    some = total > 0
    total = jnp.where(some, total, 1.0)
    lse = jnp.where(some, jnp.log(total) + peak, -jnp.inf)[..., 0]
    out = jnp.einsum("bkgts,bskh->btkgh", weights / total, v.astype(wide), precision=exact)
    out = out.reshape(batch, queries, heads, v.shape[-1]).astype(v.dtype)
    return out, lse.reshape(batch, heads, queries)
