"""What a walk over chunks reads: all that is within a chunk, in plain jnp for all chunks at once.

With s_i the sum of log2 of the decays since a chunk of C tokens began (a head or a channel) and
(a . b)_ij = sum over channels of a_i b_j 2^(s_i - s_j), 0 where j > i or of another sequence:

    T = (I + beta (k . k) without its diagonal)^-1 beta     the delta rule; else the identity
    u = T v - T (k 2^s) S                                   what is written
    o = (q 2^s) S + (q . k) u                               what is read
    S <- 2^(s_C) S + (k 2^(s_C - s))^T u

Sources: arXiv 2406.06484 (the triangular system), 2412.06464 (gated), 2510.26692 (by channel).
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.ssd.chunks import padded
from pallas_kernels.triangular import inverse

__all__ = ["SIZE", "Inside", "plain_inverse", "reached", "within"]

SIZE = 64
"""Tokens of a chunk."""
BLOCK = 16
"""Tokens of a block, within which decays a channel are taken pair by pair."""
_LOG2E = np.float32(1.4426950408889634)
_LN2 = np.float32(0.6931471805599453)
_FLOOR = np.float32(-150.0)  # 2^-150 is 0 in float32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Inside:
    """A call's tokens in C chunks of Q, T rounded up; all but `held` in the dtype of the values.

    Attributes:
      reads: [B, N, C Q, M], q 2^s.
      writes: [B, N, C Q, M], k 2^(s_C - s).
      seen: [B, N, C Q, Q], (q . k).
      given: [B, N, C Q, H], T v, or v without the delta rule.
      erased: [B, N, C Q, M], -T (k 2^s); None without the delta rule.
      held: float32 [B, N, C, M], 2^(s_C).
    """

    reads: jax.Array
    writes: jax.Array
    seen: jax.Array
    given: jax.Array
    erased: jax.Array | None
    held: jax.Array

    def there(self, **more: jax.Array | None) -> dict[str, jax.Array]:
        """Arrays by name with others beside or instead of them, without those that are None."""
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: x for name, x in (own | more).items() if x is not None}

    def kinds(self) -> dict[str, jax.ShapeDtypeStruct]:
        """What walks give: values of `tokens`, the narrow matrices of all chunks, the `last`."""
        batch, heads, chunks, state = self.held.shape
        width, dtype = self.given.shape[-1], self.given.dtype
        return {
            "tokens": jax.ShapeDtypeStruct(self.given.shape, dtype),
            "states": jax.ShapeDtypeStruct((batch, heads, chunks, state, width), dtype),
            "last": jax.ShapeDtypeStruct((batch, heads, state, width), jnp.float32),
        }


def _cut(x: jax.Array) -> jax.Array:
    """[B, T, N, ...] -> [B, N, C, Q, ...]."""
    x = padded(x, 1, SIZE)
    x = jnp.moveaxis(x, 2, 1)
    return x.reshape(*x.shape[:2], -1, SIZE, *x.shape[3:])


def _joined(x: jax.Array) -> jax.Array:
    """[B, N, C, Q, X] -> [B, N, C Q, X]."""
    return x.reshape(*x.shape[:2], -1, x.shape[-1])


def _since_begin(number: jax.Array) -> jax.Array:
    """int32 [B, C, Q]: how many sequences began in a token's chunk up to it."""
    number = jnp.pad(number, ((0, 0), (0, -number.shape[1] % SIZE)), mode="edge")
    number = number.reshape(number.shape[0], -1, SIZE)
    return number - jnp.pad(number[:, :-1, -1:], ((0, 0), (1, 0), (0, 0)))


def reached(number: jax.Array | None) -> jax.Array | None:
    """int32 [B, C Q], not 0 where a sequence began in a token's chunk up to it; None for None."""
    if number is None:
        return None
    return _since_begin(number).reshape(number.shape[0], -1)


def plain_inverse(below: jax.Array, dtype: jnp.dtype, interpret: bool = False) -> jax.Array:
    """(I + below)^-1 in plain jnp, rounded to a dtype."""
    del interpret
    return inverse(below).astype(dtype)


def within(q, k, v, log_decay, beta, number, *, solve=plain_inverse) -> Inside:
    """Differentiable by all but `number`.

    Args:
      q, k: [B, T, K, M]; v: [B, T, N, H], of one dtype.
      log_decay: [B, T, N] or [B, T, N, M], or None for no decay.
      beta: [B, T, N], or None without the delta rule.
      number: int32 [B, T], sequences that began up to a token, or None.
      solve: (below [..., Q, Q], dtype) -> (I + below)^-1.
    """
    dtype, repeats = v.dtype, v.shape[2] // k.shape[2]
    q, k, v = (_cut(x) for x in (q, k, v))
    keep = np.tri(SIZE, dtype=bool)[None, None, None]
    last = start = None
    if number is not None:
        inside = _since_begin(number)
        keep = keep & (inside[..., :, None] == inside[..., None, :])[:, None]
        start = (inside == 0)[:, None, ..., None]  # reached by the state before the chunk
        last = (inside == inside[..., -1:])[:, None, ..., None]
    sums = _sums(log_decay, v.shape)
    if sums.shape[-1] == 1:
        seen, above = _by_head(q, k, sums, keep, (repeats, beta is not None))
        q, k = (jnp.repeat(x, repeats, axis=1) for x in (q, k))
    else:
        q, k = (jnp.repeat(x, repeats, axis=1) for x in (q, k))
        seen, above = _by_channel(q, k, sums, keep, beta is not None)

    def scaled(x, exponents, where):
        factor = jnp.exp2(exponents)
        factor = factor if where is None else jnp.where(where, factor, jnp.zeros_like(factor))
        return (x.astype(jnp.float32) * factor).astype(dtype)

    end = sums[..., -1:, :]
    held = jnp.exp2(end[..., 0, :])
    if start is not None:
        held = jnp.where(start[..., -1, :], held, jnp.zeros_like(held))
    given, erased = v, None
    if above is not None:
        given, erased = _delta(above, _cut(beta), (v, scaled(k, sums, start)), solve)
        erased = _joined(erased)
    return Inside(
        reads=_joined(scaled(q, sums, start)),
        writes=_joined(scaled(k, end - sums, last)),
        seen=_joined(seen.astype(dtype)),
        given=_joined(given),
        erased=erased,
        held=jnp.broadcast_to(held, (*k.shape[:3], k.shape[-1])),
    )


def _delta(pairs, beta, values, solve) -> tuple[jax.Array, jax.Array]:
    """T v and -T keys, of (k . k) below its diagonal and (v, keys)."""
    (v, keys), beta = values, beta.astype(jnp.float32)
    solved = solve(beta[..., None] * pairs, v.dtype).astype(jnp.float32)
    solved = (solved * beta[..., None, :]).astype(v.dtype)
    return _product(solved, v, v.dtype), -_product(solved, keys, v.dtype)


def _sums(log_decay: jax.Array | None, shape: tuple[int, ...]) -> jax.Array:
    """float32 [B, N, C, Q, 1 or M]: sums of log2 of the decays since the chunk began.

    Below what float32 knows a decay is 0 anyway: sums stay small, and their differences exact.
    """
    if log_decay is None:
        return jnp.zeros((1, 1, 1, SIZE, 1), jnp.float32)
    decay = _cut(log_decay.astype(jnp.float32))
    decay = decay[..., None] if decay.ndim < len(shape) else decay
    return jnp.cumsum(jnp.maximum(decay * _LOG2E, _FLOOR), axis=3)


def _product(a: jax.Array, b: jax.Array, dtype=jnp.float32) -> jax.Array:
    """a @ b of the last two dims, summed in float32 and rounded to a dtype at once."""
    return jnp.matmul(a, b, preferred_element_type=dtype)


def _below(weights: jax.Array) -> jax.Array:
    """Zeros on the diagonal, too."""
    strict = lax.expand_dims(np.tri(SIZE, k=-1, dtype=bool), range(weights.ndim - 2))
    return jnp.where(strict, weights, jnp.zeros_like(weights))


def _masked_power(exponents: jax.Array, keep) -> jax.Array:
    """2^exponents where `keep`, else 0, with no gradient there."""
    return jnp.exp2(jnp.where(keep, exponents, -np.float32(np.inf)))


def _by_head(q, k, sums, keep, kind: tuple[int, bool]):
    """(q . k), and (k . k) below its diagonal by the delta rule: [B, N, C, Q, Q]."""
    repeats, delta = kind
    left = _masked_power(sums - sums.mT, keep)
    seen = jnp.repeat(_product(q, k.mT), repeats, axis=1) * left
    if not delta:
        return seen, None
    return seen, _below(jnp.repeat(_product(k, k.mT), repeats, axis=1) * left)


def _near(sums: jax.Array) -> jax.Array:
    """What is left of j's channels when i reads it, within blocks: [..., A, Q, M] to [..., A, i, j,
    M]."""
    order = np.tri(BLOCK, dtype=bool)[None, None, None, :, :, None]
    return _masked_power(sums[..., :, None, :] - sums[..., None, :, :], order)


def _by_chunk(one, *arrays):
    """one(arrays of a chunk) over dim 2, chunk after chunk: triples (i, j, channel) of all would
    not fit into memory."""
    found = lax.map(lambda z: one(*z), tuple(jnp.moveaxis(x, 2, 0) for x in arrays))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 2), found)


@jax.custom_vjp
def _close(a: jax.Array, b: jax.Array, sums: jax.Array) -> jax.Array:
    """(a . b) within blocks [B, N, C, A, Q, M]: [B, N, C, A, i, j]."""

    def one(a, b, sums):
        return jnp.sum(a[..., :, None, :] * b[..., None, :, :] * _near(sums), axis=-1)

    return _by_chunk(one, a, b, sums)


def _close_forward(a, b, sums):
    return _close(a, b, sums), (a, b, sums)


def _close_backward(kept, pull):
    """A sum stands at i with the sign of a, at j with that of b: no more than a da - b db."""
    a, b, sums = kept

    def one(a, b, sums, pull):
        left = pull[..., None] * _near(sums)
        da = jnp.sum(left * b[..., None, :, :], axis=-2)
        return da, jnp.sum(left * a[..., :, None, :], axis=-3)

    da, db = _by_chunk(one, a, b, sums, pull)
    return da, db, _LN2 * (a * da - b * db)


_close.defvjp(_close_forward, _close_backward)


def _by_channel(q, k, sums, keep, delta: bool):
    """As `_by_head` with decays a channel, block by block.

    Of two blocks a_i takes its decay since its block began and b_j that up to there; within a block
    every pair takes its own.
    """
    count = SIZE // BLOCK
    blocks = (*sums.shape[:3], count, BLOCK, sums.shape[-1])
    cut = sums.reshape(blocks)
    begin = jnp.pad(cut[..., :-1, -1:, :], ((0, 0),) * 3 + ((1, 0), (0, 0), (0, 0)))
    since = jnp.exp2(cut - begin)  # [..., block of i, i, M]
    before = np.tri(count, k=-1, dtype=bool).repeat(BLOCK, axis=1)[..., None]  # [block of i, j, 1]
    ahead = _masked_power(begin - sums[..., None, :, :], before[None, None, None])
    same = np.eye(count, dtype=bool)[None, None, None, :, None, :, None]
    wide_k = k.astype(jnp.float32)
    far_k = (wide_k[..., None, :, :] * ahead).astype(k.dtype)  # [..., block of i, j, M]

    def pairs(a):
        a = a.reshape(blocks).astype(jnp.float32)
        far = _product((a * since).astype(k.dtype), far_k.mT)  # [..., block, i, Q]
        close = _close(a, wide_k.reshape(blocks), cut)
        far = far.reshape(*far.shape[:-1], count, BLOCK)
        both = jnp.where(same, close[..., None, :], far)
        both = both.reshape(*both.shape[:3], SIZE, SIZE)
        return jnp.where(keep, both, jnp.zeros_like(both))

    return pairs(q), _below(pairs(k)) if delta else None
