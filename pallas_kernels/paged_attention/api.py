"""`paged_attention`: checks, the choice of an implementation, and the merge of parts."""

from __future__ import annotations

import functools
import operator

import jax
import jax.numpy as jnp

from pallas_kernels.choice import Choice, choose
from pallas_kernels.errors import ShapeError
from pallas_kernels.paged_attention.fits import CODES, unfit
from pallas_kernels.paged_attention.mosaic_gpu import ROWS, Tiles, attend
from pallas_kernels.paged_attention.mosaic_gpu_few import MOST, attend_few
from pallas_kernels.paged_attention.mosaic_gpu_latent import attend_latent
from pallas_kernels.paged_attention.mosaic_gpu_whole import Blocks, attend_whole
from pallas_kernels.paged_attention.mosaic_tpu import attend_tpu
from pallas_kernels.paged_attention.problem import Problem
from pallas_kernels.paged_attention.reference import reference, widened
from pallas_kernels.paged_attention.rows import queries_of
from pallas_kernels.target import interpreting, processors, target

__all__ = ["IMPLEMENTATIONS", "explain", "paged_attention", "splits_for", "unfit"]

IMPLEMENTATIONS = ("mosaic_gpu", "mosaic_tpu", "reference")
_PROGRAMS = 3  # that stand on a processor
_LEAST = 256  # keys of a part that are worth a program


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
        few = (1, 4) if codes else (1, 2, 4)
        if name == "mosaic_tpu" and k.shape[2] % 8 and k.shape[2] not in few:
            return (
                f"it takes {', '.join(map(str, few))} or a multiple of 8 heads of keys (XLA lays "
                f"others out so that all pages would be copied first), not {k.shape[2]}"
            )
        if latent and k.shape[2] != 1:
            return f"it takes one head of keys that hold the values, not {k.shape[2]}"
        widths = (q.shape[-1], v if latent else v.shape[-1])
        facts = {"page_size": k.shape[1], "platform": target(), "latent": latent}
        facts |= {"codes": codes, "implementation": name}
        return unfit(dtype=str(q.dtype), widths=widths, **facts)

    instead = "implementation='auto' or 'reference'"
    return choose("paged_attention", implementation, IMPLEMENTATIONS, obstacle, instead)


def splits_for(programs: int, keys: int, each: int = _PROGRAMS) -> int:
    """Parts of a sequence's pages: as many as the processors take at once, or a tenth more.

    Args:
      programs: of one part.
      keys: that the table's width can hold.
      each: programs of a processor.
    """
    splits, room = 1, 1.1 * each * processors()
    while programs * 2 * splits <= room and keys // (2 * splits) >= _LEAST:
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


def _check(q, k, v, table, firsts, blocks, queries) -> None:
    if isinstance(v, int):
        if not 0 < v <= k.shape[-1]:
            raise ShapeError(f"paged_attention: {v} of the keys' {k.shape[-1]} dims are no values")
        v = jax.ShapeDtypeStruct((*k.shape[:-1], v), k.dtype)
    if (queries is None) != (q.ndim == 4 and len(blocks) == 3) or (
        queries is not None and (q.ndim != 3 or len(blocks) != 4 or queries < 1)
    ):
        raise ShapeError(
            "paged_attention takes q [M, Q, N, H] with (rows, starts, counts) of blocks, or q "
            "[T, N, H] with (rows, starts, counts, begins) and the number of queries of a block; "
            f"found {q.shape}, {len(blocks)} arrays of blocks and queries {queries}"
        )
    if k.ndim != 4 or v.ndim != 4:
        raise ShapeError(
            "paged_attention takes pools k [P, Z, K, H] and v [P, Z, K, V], found "
            f"{k.shape} and {v.shape}"
        )
    if k.shape[:3] != v.shape[:3] or k.shape[3] != q.shape[-1] or q.shape[-2] % k.shape[2]:
        raise ShapeError(
            "paged_attention: pools have the same pages and heads, keys the queries' width, and "
            f"query heads are a multiple of key heads; found q {q.shape}, k {k.shape}, v {v.shape}"
        )
    rows = table.shape[0] if table.ndim == 2 else -1
    count = q.shape[:1] if queries is None else blocks[0].shape[:1]
    if firsts.shape != (rows,) or any(x.shape != count for x in blocks):
        raise ShapeError(
            "paged_attention takes a table [rows, W], firsts [rows], and rows, starts and counts "
            f"[M] of the M blocks; found {table.shape}, {firsts.shape} and "
            f"{', '.join(str(x.shape) for x in blocks)} for M = {count}"
        )


def paged_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array | int,
    table: jax.Array,
    firsts: jax.Array,
    blocks: tuple[jax.Array, ...],
    *,
    queries: int | None = None,
    scales: jax.Array | None = None,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    implementation: str = "auto",
) -> tuple[jax.Array, jax.Array]:
    """Causal attention of blocks of queries, each over the pages of its own sequence.

    A block is one token that is decoded, a few that are verified, or a part of a prompt.

    Args:
      q: [M, Q, N, H]; query i of block m stands at starts[m] + i. Or [T, N, H], all queries one
        after another, with `queries` and with `begins`: those of block m begin at begins[m].
      k, v: pools of pages [P, Z, K, H] and [P, Z, K, V]; the queries' own are written already. A
        number V in place of values takes the first V dims of the keys (latent attention).
      table: int32 [rows, W], pages of each sequence. Columns past its end may hold any number.
      firsts: int32 [rows], which page of its sequence stands in column 0.
      blocks: (row, start, count), each int32 [M]: whose a block is, the place of its first query,
        and how many of its Q queries there are; 0 for a block that is not used. With q of three
        dims (row, start, count, begin); every token is in one block. A block whose keys all stand
        before place 0 (start + count <= 0) sees none: for padding.
      queries: Q where q is [T, N, H], None else.
      scales: float32 [P, K, 2, Z] of keys and of values in int8 or float8_e4m3fn, which stand for
        that many times their scale; None for pages in q's dtype.
      scale: factor on the scores; H^-1/2 by default.
      window: keys before a query that it sees, None for all.
      softcap: scores become softcap * tanh(scores / softcap).
      implementation: `auto`, `mosaic_gpu` (Hopper), `mosaic_tpu` or `reference`.

    Returns:
      (out [M, Q, N, V] in q's dtype, lse float32 [M, Q, N]: the log of the sum of exponentials).
      Queries that are not there get zeros and -inf. [T, N, V] and [T, N] for q of three dims;
      tokens of no block get anything.

    Raises:
      ShapeError: arguments that do not fit. UnsupportedError: an implementation that cannot serve
        the call, with the reason.
    """
    _check(q, k, v, table, firsts, blocks, queries)
    _check_scales(k, v, scales)
    problem = Problem(
        scale=q.shape[-1] ** -0.5 if scale is None else scale, window=window, softcap=softcap
    )
    choice = explain(q, k, v, implementation=implementation).name
    pages = (table.astype(jnp.int32), firsts.astype(jnp.int32))
    pages = (*pages, tuple(x.astype(jnp.int32) for x in blocks))
    call = {
        "reference": _by_reference,
        "mosaic_tpu": _on_tpu,
        "mosaic_gpu": functools.partial(_on_hopper, queries=None),
    }[choice]
    call = functools.partial(call, problem=problem)
    if queries is None:
        out, lse = call(q, (k, v, scales), pages)
    elif choice == "mosaic_gpu":
        out, lse = call(q, (k, v, scales), pages, queries=queries)
    else:
        out, lse = _by_block(call, q, (k, v, scales), pages, queries)
    return out.astype(q.dtype), lse


def _by_reference(q, pools, pages, problem: Problem) -> tuple[jax.Array, jax.Array]:
    k, v, scales = pools
    v = k[..., :v] if isinstance(v, int) else v
    if scales is not None:
        k, v = widened(k, scales[:, :, 0]), widened(v, scales[:, :, 1])
    table, firsts, blocks = pages
    return reference(q, k, v, table, firsts, blocks, problem)


def _on_tpu(q, pools, pages, problem: Problem) -> tuple[jax.Array, jax.Array]:
    k, v, scales = pools
    how = {"scales": scales, "problem": problem, "interpret": interpreting()}
    out, lse = attend_tpu(q, k, v, *pages, **how)
    rows = q.shape[1] * q.shape[2] // k.shape[2]
    return queries_of(out[:, :, :rows], lse[:, :, :rows], q.shape)


def form_of(rows: int, splits: int, *, latent: bool = False) -> str:
    """How a call is done: `latent`, `few` rows, `whole` sequences or `parts`.

    Args:
      rows: queries by heads of a key head.
      splits: of a sequence's pages.
      latent: whether values are the keys' first dims.
    """
    if latent:
        return "latent"
    if rows <= MOST:
        return "few"
    return "whole" if splits == 1 else "parts"


def tiles_for(form: str, splits: int, *, width: int, page: int, codes: bool) -> Tiles:
    """How a call is cut.

    Args:
      form: of `form_of`.
      splits: of a sequence's pages.
      width: of a head's keys.
      page: tokens of it.
      codes: whether pages are of 8 bits.
    """
    if form == "latent":
        return Tiles(stages=2 if width > 384 else 3, splits=splits)
    if form == "few":
        # Three programs of a processor, of 64 KB each: less where codes are widened in more.
        held = 2 * width * max(page, 64) * (1 if codes else 2)
        return Tiles(stages=max(2, min(4, (1 if codes else 2) * 32768 // held)), splits=splits)
    if codes:  # what widens must run beside what waits: two programs share a processor, or more
        return Tiles(stages=2, splits=splits, leaving=64)
    return Tiles(stages=4 if width * page <= 128 * 64 else 2, splits=splits)


def _on_hopper(q, pools, pages, problem: Problem, queries: int | None):
    """(out, lse): [M, Q, N, V] and [M, Q, N] of q [M, Q, N, H], or of q [T, N, H] as it."""
    (k, v, scales), (table, firsts, blocks) = pools, pages
    latent, heads = isinstance(v, int), k.shape[2]
    count, num_heads, width = blocks[0].shape[0], q.shape[-2], q.shape[-1]
    most, group = queries or q.shape[1], num_heads // heads
    programs = count * heads * -(-most * group // ROWS)
    splits = splits_for(programs, table.shape[1] * k.shape[1], 1 if latent else _PROGRAMS)
    form = form_of(most * group, splits, latent=latent)
    tiles = tiles_for(form, splits, width=width, page=k.shape[1], codes=scales is not None)
    options = {"problem": problem, "tiles": tiles, "interpret": interpreting()}
    if queries and (splits > 1 or latent):
        call = functools.partial(_on_hopper, problem=problem, queries=None)
        return _by_block(call, q, pools, pages, queries)
    if latent:
        out, lse = attend_latent(q, k, table, firsts, blocks[:3], value_width=v, **options)
        return _merged(out, lse, q.shape)
    if form == "parts":
        out, lse = attend(q, k, v, table, firsts, blocks[:3], scales=scales, **options)
        return _merged(out, lse, q.shape)
    tokens = q.shape[0] if queries else count * most
    options["shape"] = Blocks(queries=most, group=group, tokens=tokens, flat=bool(queries))
    q = q.reshape(tokens, num_heads, width)
    if form == "whole":
        out, lse = attend_whole(q, pools, pages, **options)
    else:
        out, lse = attend_few(q, pools, pages, **options)
        if splits > 1:
            return _merged(out, lse, (count, most, num_heads))
        lse = lse.reshape(count, heads, most, group).transpose(0, 2, 1, 3)
        lse = lse.reshape(count, most, num_heads)
    if queries:
        return out, _to_tokens(lse, pages[2], tokens, -jnp.inf)
    return out.reshape(count, most, num_heads, -1), lse


def _merged(out, lse, shape) -> tuple[jax.Array, jax.Array]:
    """Those of queries of a shape from those of rows of parts."""
    rows = shape[1] * shape[2] // out.shape[2]
    return queries_of(*merge(out[:, :, :, :rows], lse[:, :, :, :rows]), shape)


def _tokens(blocks, queries: int, tokens: int) -> jax.Array:
    """[M, Q], the token of each query, clipped."""
    place = blocks[3][:, None] + jnp.arange(queries, dtype=jnp.int32)[None]
    return jnp.clip(place, 0, tokens - 1)


def _to_tokens(x, blocks, tokens: int, nothing: float) -> jax.Array:
    """[T, ...] of what blocks of queries [M, Q, ...] hold."""
    at = jnp.arange(x.shape[1], dtype=jnp.int32)[None]
    place = jnp.where(at < blocks[2][:, None], blocks[3][:, None] + at, tokens)
    empty = jnp.full((tokens, *x.shape[2:]), nothing, x.dtype)
    return empty.at[place].set(x, mode="drop")


def _by_block(call, q, pools, pages, queries: int) -> tuple[jax.Array, jax.Array]:
    """(out [T, N, V], lse [T, N]) of q [T, N, H] by what takes and gives whole blocks."""
    *table, blocks = pages
    by_block = q[_tokens(blocks, queries, q.shape[0])]
    out, lse = call(by_block, pools, (*table, blocks[:3]))
    out, lse = (
        _to_tokens(x, blocks, q.shape[0], nothing)
        for x, nothing in ((out.astype(q.dtype), 0.0), (lse, -jnp.inf))
    )
    return out, lse


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
