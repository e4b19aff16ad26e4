"""The oracle of `decode_attention` in plain jnp: rotate, write, attend in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.decode_attention.problem import Problem

__all__ = ["reference", "turned"]


def turned(x: jax.Array, turns: jax.Array | None) -> jax.Array:
    """x [B, n, H] rotated: x * turns[:, 0] + (x with its halves swapped) * turns[:, 1]."""
    if turns is None:
        return x
    wide = x.astype(jnp.float32)
    swapped = jnp.roll(wide, x.shape[-1] // 2, axis=-1)
    return (wide * turns[:, :1] + swapped * turns[:, 1:]).astype(x.dtype)


def _paged(qkv, k, v, positions, turns, pages, *, problem: Problem):
    """By way of a dense cache of all columns of the table."""
    table, firsts = pages
    count, size, kv_heads, width = k.shape
    keys, values = (
        jnp.take(x, table, axis=0, mode="clip").reshape(table.shape[0], -1, kv_heads, width)
        for x in (k, v)
    )
    offset = firsts * size
    used = positions >= 0
    places = jnp.where(used, positions - offset, 0)
    out, *dense = reference(qkv, keys, values, places, turns, problem=problem)
    out = jnp.where(used[:, None, None], out, jnp.zeros_like(out))
    rows = jnp.arange(table.shape[0])
    column = jnp.clip(places // size, 0, table.shape[1] - 1)
    page = jnp.where(used, table[rows, column], count)
    k, v = (
        pool.at[page, places % size].set(new[rows, places], mode="drop")
        for pool, new in zip((k, v), dense, strict=True)
    )
    return out, k, v


def reference(
    qkv: jax.Array,
    k: jax.Array,
    v: jax.Array,
    positions: jax.Array,
    turns: jax.Array | None,
    pages: tuple[jax.Array, jax.Array] | None = None,
    *,
    problem: Problem,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See `decode_attention`."""
    if pages is not None:
        return _paged(qkv, k, v, positions, turns, pages, problem=problem)
    heads, kv_heads = problem.heads, k.shape[2]
    q, new_k, new_v = jnp.split(qkv, (heads, heads + kv_heads), axis=1)
    q, new_k = turned(q, turns), turned(new_k, turns)
    rows = jnp.arange(k.shape[0])
    k, v = (old.at[rows, positions].set(new, mode="drop") for old, new in ((k, new_k), (v, new_v)))
    slots = jnp.arange(k.shape[1])[None]
    seen = slots <= positions[:, None]
    keys, values = (
        jnp.where(seen[..., None, None], x, jnp.zeros((), x.dtype)).astype(jnp.float32)
        for x in (k, v)
    )
    if problem.window is not None:
        seen = seen & (slots >= positions[:, None] - problem.window)
    group = heads // kv_heads
    grouped = q.astype(jnp.float32).reshape(q.shape[0], kv_heads, group, q.shape[2])
    scores = jnp.einsum("bkgh,bskh->bkgs", grouped, keys) * problem.scale
    if problem.softcap is not None:
        scores = jnp.tanh(scores / problem.softcap) * problem.softcap
    weights = jax.nn.softmax(jnp.where(seen[:, None, None], scores, -jnp.inf), axis=-1)
    out = jnp.einsum("bkgs,bskh->bkgh", weights, values)
    return out.reshape(q.shape).astype(qkv.dtype), k, v
