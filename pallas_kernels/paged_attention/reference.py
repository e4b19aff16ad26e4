"""Attention over pages in plain jnp: every page of the table is gathered."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.paged_attention.problem import Problem

__all__ = ["reference", "widened"]


def widened(codes: jax.Array, scales: jax.Array) -> jax.Array:
    """Pages [P, Z, K, H] in float32 from codes in 8 bits and their scales [P, K, Z]."""
    return codes.astype(jnp.float32) * scales.transpose(0, 2, 1)[..., None]


def reference(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    table: jax.Array,
    firsts: jax.Array,
    blocks: tuple[jax.Array, jax.Array, jax.Array],
    problem: Problem,
) -> tuple[jax.Array, jax.Array]:
    """(out [M, Q, N, V], lse float32 [M, Q, N]); see `paged_attention`."""
    rows, starts, counts = blocks
    size, heads = k.shape[1:3]
    count, queries = q.shape[:2]
    # [M, S, K, H] and the places of the keys [M, S].
    keys, values = (
        jnp.take(x, table[rows], axis=0, mode="clip")
        .reshape(count, -1, heads, x.shape[-1])
        .astype(jnp.float32)
        for x in (k, v)
    )
    column = firsts[rows][:, None] + jnp.arange(table.shape[1], dtype=jnp.int32)[None]
    key = (column[..., None] * size + jnp.arange(size, dtype=jnp.int32)[None, None]).reshape(
        count, -1
    )
    at = jnp.arange(queries, dtype=jnp.int32)[None]
    query = starts[:, None] + at
    seen = (key[:, None] <= query[..., None]) & (at < counts[:, None])[..., None]
    if problem.window is not None:
        seen = seen & (key[:, None] >= query[..., None] - problem.window)
    exact = jax.lax.Precision.HIGHEST
    grouped = q.reshape(count, queries, heads, -1, q.shape[-1]).astype(jnp.float32)
    scores = jnp.einsum("mqkgh,mskh->mkgqs", grouped, keys, precision=exact) * problem.scale
    if problem.softcap is not None:
        scores = problem.softcap * jnp.tanh(scores / problem.softcap)
    scores = jnp.where(seen[:, None, None], scores, -jnp.inf)
    peak = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - jnp.where(jnp.isfinite(peak), peak, 0.0))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights = weights / jnp.where(total == 0, 1.0, total)
    known = jnp.any(seen, axis=1)[..., None, None]
    values = jnp.where(known, values, 0.0)  # what was never written may be NaN
    out = jnp.einsum("mkgqs,mskv->mqkgv", weights, values, precision=exact)
    lse = jnp.where(total > 0, peak + jnp.log(total), -jnp.inf)[..., 0]
    out = out.reshape(count, queries, -1, v.shape[-1]).astype(q.dtype)
    return out, lse.transpose(0, 3, 1, 2).reshape(count, queries, -1)
