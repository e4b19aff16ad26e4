"""`paged_attention`: checks, the choice of an implementation, and the merge of parts."""

from __future__ import annotations

import dataclasses
import functools
import operator

import jax
import jax.numpy as jnp

from pallas_kernels.choice import Choice, choose
from pallas_kernels.errors import ShapeError
from pallas_kernels.paged_attention.mosaic_gpu import ROWS, Tiles, attend
from pallas_kernels.paged_attention.mosaic_gpu_latent import attend_latent
from pallas_kernels.paged_attention.mosaic_tpu import attend_tpu, unfit_tpu
from pallas_kernels.paged_attention.problem import Problem
from pallas_kernels.paged_attention.reference import reference, widened
from pallas_kernels.paged_attention.rows import queries_of
from pallas_kernels.target import interpreting, not_hopper, processors, target

__all__ = ["IMPLEMENTATIONS", "explain", "paged_attention", "splits_for", "unfit"]

IMPLEMENTATIONS = ("mosaic_gpu", "mosaic_tpu", "reference")
CODES = {"int8": 127.0, "float8_e4m3fn": 448.0}
"""Dtypes of pages of 8 bits, and the largest number of each."""
_PROGRAMS = 4  # that should stand on a processor
_LEAST = 256  # keys of a part that are worth a program


def unfit(
    *,
    dtype: str,
    widths: tuple[int, int],
    page_size: int,
    platform: str,
    latent: bool = False,
    codes: bool = False,
    implementation: str = "mosaic_gpu",
) -> str | None:
    """Why a kernel cannot serve a kind of call, or None.

    Args:
      dtype: of queries, and of pages unless they are of 8 bits.
      widths: of a head's keys and values.
      page_size: tokens a page.
      platform: of `target`.
      latent: whether values are the keys' first dims.
      codes: whether pages are of 8 bits with scales.
      implementation: the kernel's name.
    """
    if implementation == "mosaic_tpu":
        facts = {"dtype": dtype, "widths": widths, "page_size": page_size, "platform": platform}
        return unfit_tpu(**facts, latent=latent, codes=codes)
    if platform not in ("gpu", "interpreter"):
        return f"it needs a CUDA device, this is {platform}"
    if codes:
        if latent:
            return "it takes latent keys in the dtype of the queries, not in 8 bits"
        if dtype != "bfloat16" or page_size == 16:
            return (
                "pages of 8 bits go with queries in bfloat16 and have 32, 64 or 128 tokens, found "
                f"{dtype} and {page_size}"
            )
    if dtype not in ("bfloat16", "float16"):
        return f"it takes bfloat16 and float16, not {dtype}"
    if latent:
        if widths[0] % 64 or widths[0] > 576 or widths[1] % 128 or widths[1] > 512:
            return (
                "it takes shared keys of up to 576 dims, a multiple of 64, of which up to 512, a "
                f"multiple of 128, are values, not {widths[0]} and {widths[1]}"
            )
        if page_size not in (16, 32, 64):
            return f"it takes pages of 16, 32 and 64 tokens of latent keys, not {page_size}"
        return not_hopper(platform)
    if any(width % 64 or width > 256 for width in widths):
        return f"it takes heads of 64, 128, 192 and 256, not {widths[0]} and {widths[1]}"
    if page_size not in (16, 32, 64, 128):
        return f"it takes pages of 16, 32, 64 and 128 tokens, not {page_size}"
    return not_hopper(platform)


def explain(q, k, v, *, implementation: str = "auto") -> Choice:
    """Which implementation `paged_attention` takes for a call, and why.

    Args:
      q, k, v: arrays or `jax.ShapeDtypeStruct`; v may be a number.

    Raises:
      UnsupportedError: the named one cannot serve it.
    """

    def obstacle(name: str) -> str | None:
        if name == "reference":
            return None
        latent, codes = isinstance(v, int), str(k.dtype) in CODES
        if not codes and k.dtype != q.dtype:
            return f"it takes pages in the dtype of the queries, not {k.dtype} and {q.dtype}"
        if name == "mosaic_tpu" and k.shape[2] % 8 and k.shape[2] not in (1, 2, 4):
            return (
                "it takes 1, 2, 4 or a multiple of 8 heads of keys (XLA lays others out so that "
                f"all pages would be copied first), not {k.shape[2]}"
            )
        if latent and k.shape[2] != 1:
            return f"it takes one head of keys that hold the values, not {k.shape[2]}"
        widths = (q.shape[-1], v if latent else v.shape[-1])
        facts = {"page_size": k.shape[1], "platform": target(), "latent": latent}
        facts |= {"codes": codes, "implementation": name}
        return unfit(dtype=str(q.dtype), widths=widths, **facts)

    instead = "implementation='auto' or 'reference'"
    return choose("paged_attention", implementation, IMPLEMENTATIONS, obstacle, instead)


def splits_for(programs: int, keys: int) -> int:
    """Parts of a sequence's pages, so that every processor has programs to switch between.

    Args:
      programs: of one part.
      keys: that the table's width can hold.
    """
    splits = 1
    while programs * splits < _PROGRAMS * processors() and keys // (2 * splits) >= _LEAST:
        splits *= 2
    return splits


def _check_scales(k, v, scales) -> None:
    coded = str(k.dtype) in CODES
    if coded != (scales is not None) or (not isinstance(v, int) and v.dtype != k.dtype):
        raise ShapeError(
            f"paged_attention: keys and values in {' or '.join(CODES)} come with scales, others "
            f"without; found {k.dtype} and {getattr(v, 'dtype', k.dtype)} "
            f"with{'out' if scales is None else ''} scales"
        )
    wanted = (k.shape[0], k.shape[2], 2, k.shape[1])
    if scales is not None and (scales.shape != wanted or scales.dtype != jnp.float32):
        raise ShapeError(
            f"paged_attention: scales [P, K, 2, Z] are float32 {wanted}, found {scales.dtype} "
            f"{scales.shape}"
        )


def _check(q, k, v, table, firsts, blocks) -> None:
    if isinstance(v, int):
        if not 0 < v <= k.shape[-1]:
            raise ShapeError(f"paged_attention: {v} of the keys' {k.shape[-1]} dims are no values")
        v = jax.ShapeDtypeStruct((*k.shape[:-1], v), k.dtype)
    if q.ndim != 4 or k.ndim != 4 or v.ndim != 4:
        raise ShapeError(
            "paged_attention takes q [M, Q, N, H], k [P, Z, K, H] and v [P, Z, K, V], found "
            f"{q.shape}, {k.shape} and {v.shape}"
        )
    if k.shape[:3] != v.shape[:3] or k.shape[3] != q.shape[3] or q.shape[2] % k.shape[2]:
        raise ShapeError(
            "paged_attention: pools have the same pages and heads, keys the queries' width, and "
            f"query heads are a multiple of key heads; found q {q.shape}, k {k.shape}, v {v.shape}"
        )
    rows = table.shape[0] if table.ndim == 2 else -1
    if firsts.shape != (rows,) or any(x.shape != q.shape[:1] for x in blocks):
        raise ShapeError(
            "paged_attention takes a table [rows, W], firsts [rows], and rows, starts and counts "
            f"[M] of the M blocks; found {table.shape}, {firsts.shape} and "
            f"{', '.join(str(x.shape) for x in blocks)} for M = {q.shape[0]}"
        )


def paged_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array | int,
    table: jax.Array,
    firsts: jax.Array,
    blocks: tuple[jax.Array, jax.Array, jax.Array],
    *,
    scales: jax.Array | None = None,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    implementation: str = "auto",
) -> tuple[jax.Array, jax.Array]:
    """Causal attention of blocks of queries, each over the pages of its own sequence.

    A block is one token that is decoded, a few that are verified, or a part of a prompt.

    Args:
      q: [M, Q, N, H]; query i of block m stands at starts[m] + i.
      k, v: pools of pages [P, Z, K, H] and [P, Z, K, V]; the queries' own are written already. A
        number V in place of values takes the first V dims of the keys (latent attention).
      table: int32 [rows, W], pages of each sequence. Columns past its end may hold any number.
      firsts: int32 [rows], which page of its sequence stands in column 0.
      blocks: (row, start, count), each int32 [M]: whose a block is, the place of its first query,
        and how many of its Q queries there are; 0 for a block that is not used.
      scales: float32 [P, K, 2, Z] of keys and of values in int8 or float8_e4m3fn, which stand for
        that many times their scale; None for pages in q's dtype.
      scale: factor on the scores; H^-1/2 by default.
      window: keys before a query that it sees, None for all.
      softcap: scores become softcap * tanh(scores / softcap).
      implementation: `auto`, `mosaic_gpu` (Hopper), `mosaic_tpu` or `reference`.

    Returns:
      (out [M, Q, N, V] in q's dtype, lse float32 [M, Q, N]: the log of the sum of exponentials).
      Queries that are not there get zeros and -inf.

    Raises:
      ShapeError: arguments that do not fit. UnsupportedError: an implementation that cannot serve
        the call, with the reason.
    """
    _check(q, k, v, table, firsts, blocks)
    _check_scales(k, v, scales)
    problem = Problem(
        scale=q.shape[-1] ** -0.5 if scale is None else scale, window=window, softcap=softcap
    )
    choice = explain(q, k, v, implementation=implementation).name
    if choice == "reference":
        v = k[..., :v] if isinstance(v, int) else v
        if scales is not None:
            k, v = widened(k, scales[:, :, 0]), widened(v, scales[:, :, 1])
        return reference(q, k, v, table, firsts, blocks, problem)
    pages = (table.astype(jnp.int32), firsts.astype(jnp.int32))
    pages = (*pages, tuple(x.astype(jnp.int32) for x in blocks))
    if choice == "mosaic_tpu":
        out, lse = attend_tpu(q, k, v, *pages, problem=problem, interpret=interpreting())
    else:
        out, lse = _on_hopper(q, (k, v, scales), pages, problem)
    rows = q.shape[1] * q.shape[2] // k.shape[2]
    out, lse = queries_of(out[:, :, :rows], lse[:, :, :rows], q.shape)
    return out.astype(q.dtype), lse


def _on_hopper(q, pools, pages, problem: Problem) -> tuple[jax.Array, jax.Array]:
    """(out [M, K, R, V], lse [M, K, R])."""
    (k, v, scales), table = pools, pages[0]
    count, queries, num_heads, width = q.shape
    heads = k.shape[2]
    group = num_heads // heads
    programs = count * heads * -(-queries * group // ROWS)
    tiles = Tiles(
        stages=4 if width * k.shape[1] <= 128 * 64 else 2,
        splits=splits_for(programs, table.shape[1] * k.shape[1]),
        leaving=128 if scales is None else 64,  # so that two programs share a processor
    )
    options = {"problem": problem, "tiles": tiles, "interpret": interpreting()}
    if isinstance(v, int):
        options["tiles"] = dataclasses.replace(tiles, stages=2 if width > 384 else 3)
        out, lse = attend_latent(q, k, *pages, value_width=v, **options)
    else:
        out, lse = attend(q, k, v, *pages, scales=scales, **options)
    rows = queries * group
    return merge(out[:, :, :, :rows], lse[:, :, :, :rows])


def merge(out: jax.Array, lse: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(out [...], lse [...]) of all keys from those of parts [S, ..., V] and [S, ...]; exact.

    Part by part, without a reduction: a GPU so does all of it in one kernel.
    """
    if out.shape[0] == 1:
        return out[0], lse[0]
    peak = functools.reduce(jnp.maximum, lse)
    level = jnp.where(jnp.isfinite(peak), peak, 0.0)
    weights = [jnp.exp(part - level) for part in lse]
    total = functools.reduce(operator.add, weights)
    whole = jnp.where(total > 0, peak + jnp.log(total), -jnp.inf)
    sums = functools.reduce(
        operator.add,
        (x.astype(jnp.float32) * weight[..., None] for x, weight in zip(out, weights, strict=True)),
    )
    return sums / jnp.where(total == 0, 1.0, total)[..., None], whole
