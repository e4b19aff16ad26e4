"""Attention over keys and values in pages.

Queries stand in blocks of one sequence each. `mosaic_gpu` and `mosaic_tpu` are our kernels: they
read what each sequence holds. In plain jnp, `loop` walks over as many pages as the longest sequence
has and keeps running softmax statistics, so its work follows what is remembered; `gather` reads the
whole width of the table at once, without a loop that the host must follow.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxllm.core.choices import took
from jaxllm.core.config import nearest
from jaxllm.errors import ConfigError, UnsupportedError
from jaxllm.ops.attention import Scores
from jaxllm.ops.flash import band
from jaxllm.ops.flat import Flat, QueryBlocks, query_blocks
from jaxllm.ops.pages import PageTable, Pool
from jaxllm.spec.mask import Mask, Row, allowed
from pallas_kernels.target import target

__all__ = [
    "IMPLEMENTATIONS",
    "KERNELS",
    "obstacle",
    "paged_attention",
]

KERNELS = ("mosaic_gpu", "mosaic_tpu")

STRIDE = 128
"""Keys that a turn of the loop reads."""


@dataclasses.dataclass(frozen=True)
class _Problem:
    """What every turn reads: queries [M, K, G Q, H], pages, table of the blocks' rows."""

    q: Array
    pool: Pool
    pages: Array
    firsts: Array
    blocks: QueryBlocks
    mask: Mask
    scores: Scores


def _columns(problem: _Problem, start: Any, number: int) -> tuple[Array, Array, Any, Array]:
    """(keys, values, scales, positions) of `number` columns of the table, from `start`.

    Scales are those of keys and of values [M, K, S] each, or None.
    """
    pool = problem.pool
    size, width = pool.k.shape[1], problem.pages.shape[1]
    column = start + jnp.arange(number, dtype=jnp.int32)
    page = jnp.take(problem.pages, column, axis=1, mode="clip")  # [M, number]
    number_of = problem.firsts[:, None] + column[None]
    places = number_of[..., None] * size + jnp.arange(size, dtype=jnp.int32)[None, None]
    # A column past the table repeats its last one: no query may see it.
    places = jnp.where((column < width)[None, :, None], places, jnp.iinfo(jnp.int32).max)
    places = places.reshape(places.shape[0], -1)
    k = jnp.take(pool.k, page, axis=0, mode="clip")
    k = k.reshape(k.shape[0], -1, *k.shape[3:]).astype(problem.q.dtype)
    if pool.v is None:
        return k, k[..., : pool.value_width], None, places
    v = jnp.take(pool.v, page, axis=0, mode="clip")
    v = v.reshape(v.shape[0], -1, *v.shape[3:]).astype(problem.q.dtype)
    if pool.scales is None:
        return k, v, None, places
    both = jnp.take(pool.scales, page, axis=0, mode="clip")  # [M, number, K, 2, Z]
    both = both.transpose(3, 0, 2, 1, 4).reshape(2, page.shape[0], both.shape[2], -1)
    return k, v, both, places


def _turn(problem: _Problem, carry: Any, start: Any, number: int) -> Any:
    """Running (peak, total, sum of values) after `number` more columns."""
    peak, total, out = carry
    k, v, scales, places = _columns(problem, start, number)
    blocks, scores, q = problem.blocks, problem.scores, problem.q
    exact = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    seen = allowed(problem.mask, blocks.positions[:, :, None], places[:, None, :], Row())
    seen = seen & blocks.real[:, :, None]
    v = jnp.where(jnp.any(seen, axis=1)[:, :, None, None], v, jnp.zeros_like(v))  # may be NaN
    dots = jnp.einsum("BKMH,BSKH->BKMS", q, k, precision=exact, preferred_element_type=jnp.float32)
    if scales is not None:
        dots = dots * scales[0][:, :, None]
    dots = dots.reshape(*dots.shape[:2], -1, *seen.shape[1:]) * scores.scale
    if scores.softcap is not None:
        dots = scores.softcap * jnp.tanh(dots / scores.softcap)
    dots = jnp.where(seen[:, None, None], dots, -jnp.inf)
    dots = dots.reshape(*q.shape[:3], -1)
    higher = jnp.maximum(peak, jnp.max(dots, axis=-1, keepdims=True))
    level = jnp.where(jnp.isfinite(higher), higher, 0.0)
    weights, fade = jnp.exp(dots - level), jnp.exp(peak - level)
    total = total * fade + jnp.sum(weights, axis=-1, keepdims=True)
    if scales is not None:
        there = jnp.any(seen, axis=1)[:, None, None]
        weights = weights * jnp.where(there, scales[1][:, :, None], 0.0)
    found = jnp.einsum(
        "BKMS,BSKH->BKMH",
        weights.astype(v.dtype),
        v,
        precision=exact,
        preferred_element_type=jnp.float32,
    )
    return higher, total, out * fade + found


def _loop(problem: _Problem, carry: Any, last: Array) -> Any:
    number = max(1, STRIDE // problem.pool.k.shape[1])
    turns = -(-last // number)
    body = lambda i, c: _turn(problem, c, i * number, number)  # noqa: E731
    return jax.lax.fori_loop(0, turns, body, carry)


def _gather(problem: _Problem, carry: Any, last: Array) -> Any:
    del last
    return _turn(problem, carry, jnp.int32(0), problem.pages.shape[1])


IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {"loop": _loop, "gather": _gather}
"""(problem, initial statistics, columns that the longest sequence needs) -> statistics."""


def obstacle(
    *,
    dtype: str,
    widths: tuple[int, int],
    page_size: int,
    mask: Mask,
    latent: bool = False,
    codes: bool = False,
    kernel: str = KERNELS[0],
) -> str | None:
    """Why a kernel cannot serve a kind of call, or None.

    Args:
      dtype: of queries, and of pages that are not of 8 bits.
      widths: of a head's keys and values.
      page_size: tokens a page.
      mask: who sees whom.
      latent: whether values are the first dims of one shared head of keys.
      codes: whether pages are of 8 bits.
      kernel: its name.
    """
    platform = target()
    if kernel == KERNELS[0] and platform not in ("gpu", "interpreter"):
        return f"it needs a CUDA device, this is {platform}"
    sides = band(mask)
    if sides is None or sides[1] != 0:
        return f"it takes the last tokens before a query, or all, not {mask}"
    from pallas_kernels.paged_attention import unfit

    facts = {"page_size": page_size, "platform": platform, "latent": latent, "codes": codes}
    return unfit(dtype=dtype, widths=widths, implementation=kernel, **facts)


def _obstacle(q: Array, pool: Pool, mask: Mask, kernel: str) -> str | None:
    codes = pool.scales is not None
    if not codes and pool.k.dtype != q.dtype:
        return f"it takes pages of the queries' dtype, not {pool.k.dtype} and {q.dtype}"
    facts = {"page_size": pool.k.shape[1], "mask": mask, "codes": codes, "kernel": kernel}
    facts |= {"latent": pool.v is None, "widths": (q.shape[-1], pool.value_width)}
    return obstacle(dtype=str(q.dtype), **facts)


def _choose(name: str, unfit: Callable[[str], str | None]) -> str:
    """An implementation's name; `unfit` says why a kernel cannot serve the call, or None."""
    if name in KERNELS:
        reason = unfit(name)
        if reason is not None:
            raise UnsupportedError(f"paged attention {name!r}: {reason}; use 'auto'")
    if name == "auto":
        reason = unfit(KERNELS[0])
        if target() == "tpu":
            reason = "mosaic_tpu has never run on a TPU: it is there by name"
        plain = "loop" if jax.default_backend() == "cpu" else "gather"
        name = KERNELS[0] if reason is None else plain
        why = f"no kernel: {reason}" if reason else "it reads what each sequence holds"
        took("paged attention", name, why)
        return name
    names = ("auto", *KERNELS, *IMPLEMENTATIONS)
    if name not in names:
        raise ConfigError(f"paged attention {name!r} is unknown; {nearest(name, names)}")
    took("paged attention", name)
    return name


def _by_kernel(
    q: Array,
    pool: Pool,
    table: PageTable,
    blocks: QueryBlocks,
    mask: Mask,
    scores: Scores,
    *,
    implementation: str,
) -> Array:
    """[1, T, N, V]; the queries of a block lie one after another."""
    from pallas_kernels.paged_attention import paged_attention as kernel

    sides = band(mask)
    assert sides is not None
    size = blocks.token.shape[1]
    places = [jnp.asarray(x) for x in (blocks.row, blocks.starts, blocks.counts)]
    more: dict[str, Any] = {}
    if size > 1:
        places, more = [*places, jnp.asarray(blocks.begins)], {"queries": size}
    out, lse = kernel(
        q[0] if size > 1 else q[0][:, None],
        pool.k,
        pool.value_width if pool.v is None else pool.v,
        jnp.asarray(table.pages),
        jnp.asarray(table.firsts),
        tuple(places),
        scales=pool.scales,
        scale=scores.scale,
        window=sides[0],
        softcap=scores.softcap,
        implementation=implementation,
        **more,
    )
    if size == 1:
        out, lse = out[:, 0], lse[:, 0]
    if scores.sinks is None:
        return out[None]
    share = jax.nn.sigmoid(lse - scores.sinks.astype(jnp.float32)[None])
    return (out.astype(jnp.float32) * share[..., None]).astype(out.dtype)[None]


def paged_attention(
    q: Float[Array, "1 T N H"],
    pool: Pool,
    table: PageTable,
    flat: Flat,
    *,
    mask: Mask,
    scores: Scores,
    implementation: str = "auto",
) -> Float[Array, "1 T N V"]:
    """softmax(cap(scale q kT) + mask, sinks) v, each token over the pages of its own sequence.

    Args:
      q: queries of a flat batch, whose keys and values are in the pages already.
      pool: keys and values.
      table: pages of every row.
      flat: whose the tokens are.
      mask: who sees whom, by positions; no query sees ahead.
      scores: scale, soft-cap and sinks.
      implementation: `auto`, a name of `KERNELS` or of `IMPLEMENTATIONS`.

    Returns:
      In q's dtype; padding holds anything finite.

    Raises:
      ConfigError: no such implementation. UnsupportedError: a kernel, named, cannot serve.
    """
    length, heads, width = q.shape[1:]
    blocks = query_blocks(flat, length)

    pool = jax.tree.map(jnp.asarray, pool)
    chosen = _choose(implementation, lambda kernel: _obstacle(q, pool, mask, kernel))
    if chosen in KERNELS:
        return _by_kernel(q, pool, table, blocks, mask, scores, implementation=chosen)
    kv_heads = pool.k.shape[2]
    num_blocks, size = blocks.token.shape
    by_block = q[0][blocks.token].reshape(num_blocks, size, kv_heads, -1, width)
    by_block = by_block.transpose(0, 2, 3, 1, 4).reshape(num_blocks, kv_heads, -1, width)
    problem = _Problem(
        by_block,
        pool,
        table.pages[blocks.row],
        jnp.asarray(table.firsts)[blocks.row],
        blocks,
        mask,
        scores,
    )
    empty = (
        jnp.full((*by_block.shape[:3], 1), -jnp.inf, jnp.float32),
        jnp.zeros((*by_block.shape[:3], 1), jnp.float32),
        jnp.zeros((*by_block.shape[:3], pool.value_width), jnp.float32),
    )
    ends = (flat.starts + flat.counts - 1) // pool.k.shape[1] + 1 - table.firsts
    last = jnp.minimum(jnp.max(jnp.where(flat.counts > 0, ends, 0)), table.pages.shape[1])
    peak, total, out = IMPLEMENTATIONS[chosen](problem, empty, last)
    out = _finish(peak, total, out, scores)
    out = out.reshape(num_blocks, kv_heads, -1, size, pool.value_width).transpose(0, 3, 1, 2, 4)
    out = out.reshape(num_blocks, size, heads, pool.value_width).astype(q.dtype)
    return out[blocks.block, blocks.place][None]


def _finish(peak: Array, total: Array, out: Array, scores: Scores) -> Array:
    """Sums of values over their weights; a sink takes its share."""
    if scores.sinks is not None:
        groups = scores.sinks.astype(jnp.float32).reshape(1, peak.shape[1], -1, 1, 1)
        sink = jnp.broadcast_to(
            groups, (1, *groups.shape[1:3], peak.shape[2] // groups.shape[2], 1)
        )
        sink = sink.reshape(1, *peak.shape[1:])
        level = jnp.maximum(peak, sink)
        fade = jnp.exp(peak - level)
        total, out = total * fade + jnp.exp(sink - level), out * fade
    return out / jnp.where(total == 0, 1.0, total)
