"""Linear attention chunk by chunk: matrix products within a chunk, the matrix carried between.

With G_i = sum of log decays g_1..g_i of a chunk and (a . b)_ij = sum over channels of
a_i b_j exp(g_{j+1} + ... + g_i), which is 0 where j > i:

    u = v, or by the delta rule (I + beta (k . k) without its diagonal)^-1 beta (v - (k exp G) S)
    o = (q exp G) S + (q . k) u
    S <- diag(exp G_C) S + (k exp(G_C - G))^T u

All exponents are sums of log decays taken one by one, never differences of sums: they are 0 or
less, nothing overflows, and a log decay of minus infinity forgets exactly.
Sources: arXiv 2312.06635 (blocks within a chunk), 2406.06484 (the triangular system).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxllm.ops.chunks import over_chunks
from pallas_kernels.triangular import inverse

__all__ = ["CHUNK", "chunked"]

CHUNK = 64
"""Tokens of a chunk."""
BLOCK = 16
"""Tokens of a block, within which decays a channel are taken pair by pair."""


def chunked(
    qkv: tuple[Float[Array, "B T N M"], Float[Array, "B T N M"], Float[Array, "B T N H"]],
    log_decay: Float[Array, "B T N ..."] | None,
    beta: Float[Array, "B T N"] | None,
    state: Float[Array, "B N M H"],
    *,
    precision: jax.lax.Precision,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N M H"]]:
    """What `reference` gives, for any T.

    Args:
      qkv: queries, keys, values, a key head a head.
      log_decay: a head or a channel, 0 or less, or None.
      beta: strengths of the delta rule, or None.
      state: the matrices before.
      precision: of the matrix products.
    """
    size = _chunk_size(qkv[2].shape[1])

    def product(equation: str, a: Array, b: Array) -> Array:
        return jnp.einsum(equation, a, b, precision=precision)

    def one(state: Array, chunk: Any) -> tuple[Array, Array]:
        q, k, v, decay, beta = jax.tree.map(lambda x: jnp.moveaxis(x, 2, 1), chunk)
        pairs = _pairs(decay, k, product)
        reads, writes, kept, keys_in = q, k, None, k
        if decay is not None:
            wide = decay if decay.ndim == k.ndim else decay[..., None]
            since = jnp.exp(_sums(wide, -2))
            reads, keys_in = q * since, k * since
            writes = k * jnp.exp(_sums_after(wide, -2))
            kept = since[..., -1, :]
        if beta is not None:
            beta = beta[..., None]
            v = beta * (v - product("BNCM,BNMH->BNCH", keys_in, state))
            v = product("BNCc,BNcH->BNCH", inverse(beta * pairs(k, k, False)), v)
        out = product("BNCM,BNMH->BNCH", reads, state)
        out = out + product("BNCc,BNcH->BNCH", pairs(q, k, True), v)
        if kept is not None:
            state = state * kept[..., None]
        state = state + product("BNCM,BNCH->BNMH", writes, v)
        return state, jnp.moveaxis(out, 1, 2)

    return over_chunks(one, state, (*qkv, log_decay, beta), size)


def _chunk_size(length: int) -> int:
    if length <= BLOCK:
        return length
    return min(CHUNK, -(-length // BLOCK) * BLOCK)


def _sums(x: Array, axis: int) -> Array:
    """Sums up to each place, its own value included."""
    return jnp.cumsum(x, axis=axis)


def _sums_after(x: Array, axis: int) -> Array:
    """Sums from the place after each one to the end."""
    later = jax.lax.slice_in_dim(x, 1, None, axis=axis)
    sums = jnp.flip(jnp.cumsum(jnp.flip(later, axis), axis=axis), axis)
    return jnp.concatenate([sums, jnp.zeros_like(jax.lax.slice_in_dim(x, 0, 1, axis=axis))], axis)


def _between(x: Float[Array, "*dims C"]) -> Float[Array, "*dims C C"]:
    """[i, j] = x_{j+1} + ... + x_i, each sum by itself; 0 where j >= i."""
    size = x.shape[-1]
    below = jax.lax.expand_dims(np.tri(size, k=-1, dtype=bool), range(x.ndim - 1))
    rows = jnp.broadcast_to(x[..., :, None], (*x.shape, size))
    return jnp.cumsum(jnp.where(below, rows, np.zeros((), x.dtype)), axis=-2)


def _lower(x: Array, diagonal: bool) -> Array:
    """x [..., C, C] with zeros above the diagonal, or on it as well."""
    mask = np.tri(x.shape[-1], k=0 if diagonal else -1, dtype=bool)
    mask = jax.lax.expand_dims(mask, range(x.ndim - 2))
    return jnp.where(mask, x, np.zeros((), x.dtype))


def _pairs(
    decay: Array | None, k: Array, product: Callable[..., Array]
) -> Callable[[Array, Array, bool], Array]:
    """(a, b, diagonal) -> (a . b) of a chunk [B, N, C, C], lower triangles."""
    plain = lambda a, b: product("BNCM,BNcM->BNCc", a, b)  # noqa: E731
    if decay is None:
        return lambda a, b, diagonal: _lower(plain(a, b), diagonal)
    if decay.ndim < k.ndim:
        weights = jnp.exp(_between(decay))
        return lambda a, b, diagonal: _lower(plain(a, b) * weights, diagonal)
    blocks = _by_channel(decay, product)
    return lambda a, b, diagonal: _lower(blocks(a, b), diagonal)


def _by_channel(
    decay: Float[Array, "B N C M"], product: Callable[..., Array]
) -> Callable[[Array, Array], Array]:
    """Products weighed channel by channel, in blocks.

    Of two blocks a_i takes its decay since its block began and b_j that up to there; within a block
    every pair takes its own.
    """
    size = decay.shape[2]
    width = min(BLOCK, size)
    count = size // width

    def cut(x: Array) -> Array:
        return x.reshape(*x.shape[:2], count, width, x.shape[-1])

    g = cut(decay)
    since = jnp.exp(_sums(g, -2))
    # [block of b, place, block of a]: from a key to the end of its block, and over whole blocks.
    totals = jnp.moveaxis(g.sum(axis=-2), -1, -2)
    skipped = jnp.moveaxis(_whole_blocks(totals), -3, -1)  # [..., a, b, M]
    ahead = _sums_after(g, -2)[..., None, :, :, :] + skipped[..., :, :, None, :]
    before = np.tri(count, k=-1, dtype=bool)[:, :, None, None]
    before = jax.lax.expand_dims(before, range(2))
    ahead = jnp.exp(jnp.where(before, ahead, -np.asarray(np.inf, decay.dtype)))
    within = jnp.exp(jnp.moveaxis(_between(jnp.moveaxis(g, -1, -2)), -3, -1))  # [..., C, c, M]
    same = jax.lax.expand_dims(np.eye(count, dtype=bool)[:, None, :, None], range(2))

    def blocks(a: Array, b: Array) -> Array:
        a, b = cut(a), cut(b)
        far = product("BNACM,BNAbcM->BNACbc", a * since, b[..., None, :, :, :] * ahead)
        near = jnp.sum(a[..., :, None, :] * b[..., None, :, :] * within, axis=-1)
        out = jnp.where(same, near[..., :, :, None, :], far)
        return out.reshape(*out.shape[:2], size, size)

    return blocks


def _whole_blocks(totals: Float[Array, "*dims A"]) -> Float[Array, "*dims A A"]:
    """[a, b] = sum of the totals of the blocks after b and before a."""
    shifted = jnp.concatenate([jnp.zeros_like(totals[..., :1]), totals[..., :-1]], axis=-1)
    below = np.tri(totals.shape[-1], k=-2, dtype=bool)
    below = jax.lax.expand_dims(below, range(totals.ndim - 1))
    rows = jnp.broadcast_to(shifted[..., :, None], (*totals.shape, totals.shape[-1]))
    return jnp.cumsum(jnp.where(below, rows, np.zeros((), totals.dtype)), axis=-2)
