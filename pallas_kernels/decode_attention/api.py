"""`decode_attention`: checks, and the choice of an implementation."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.choice import Choice, choose
from pallas_kernels.decode_attention.mosaic_gpu import MOST_GROUP, Tiles, attend, tiles_for
from pallas_kernels.decode_attention.problem import Problem
from pallas_kernels.decode_attention.reference import reference
from pallas_kernels.errors import ShapeError
from pallas_kernels.target import interpreting, not_hopper, processors, target

__all__ = ["IMPLEMENTATIONS", "Choice", "Problem", "decode_attention", "explain", "unfit"]


def unfit(
    implementation: str,
    *,
    dtype: str,
    width: int,
    group: int,
    slots: int | None = None,
    page: int | None = None,
    platform: str | None = None,
) -> str | None:
    """Why an implementation cannot serve a kind of call, or None: what can be said without arrays.

    Args:
      implementation: one of `IMPLEMENTATIONS`.
      dtype: of queries, keys and values.
      width: H, of a head.
      group: query heads of a key head.
      slots: S of a dense cache.
      page: tokens of a page.
      platform: of `pallas_kernels.target`; by default what is traced for.
    """
    if implementation == "reference":
        return None
    platform = platform or target()
    if platform == "tpu":
        return "there is no kernel for a TPU"
    if platform not in ("gpu", "interpreter"):
        return f"it needs a CUDA device, this is {platform}"
    if dtype not in ("bfloat16", "float16"):
        return f"it takes bfloat16 and float16, not {dtype}"
    if width not in (64, 128):
        return f"it takes heads of 64 or 128, not {width}"
    if group > MOST_GROUP:
        return f"it takes up to {MOST_GROUP} query heads of a key head, not {group}"
    if page is not None and page not in (16, 32, 64, 128):
        return f"it takes pages of 16, 32, 64 or 128 tokens, not {page}"
    if slots is not None and slots % 8:  # which a copy's rows are
        return f"it takes caches of a multiple of 8 slots, not {slots}"
    return not_hopper(platform)


def _kernel(qkv, k, v, positions, turns, pages, *, problem: Problem):
    interpret = interpreting()
    slots = k.shape[1] if pages is None else pages[0].shape[1] * k.shape[1]
    programs = qkv.shape[0] * k.shape[2]
    # The interpreter does not read other programs' memory.
    tiles = Tiles() if interpret else tiles_for(programs, slots, processors())
    options = {"problem": problem, "tiles": tiles, "interpret": interpret}
    return attend(qkv, k, v, positions, turns, pages, **options)


_RUN = {"mosaic_gpu": _kernel, "reference": reference}
IMPLEMENTATIONS = tuple(_RUN)


def explain(qkv, k, *, heads: int, paged: bool = False, implementation: str = "auto") -> Choice:
    """Which implementation `decode_attention` takes for a call, and why.

    Args:
      qkv, k: arrays or `jax.ShapeDtypeStruct`s.
      heads: N.
      paged: whether k is a pool of pages.

    Raises:
      UnsupportedError: as `decode_attention`.
    """
    _, slots, kv_heads, width = k.shape
    facts = {"dtype": str(k.dtype), "width": width, "group": heads // kv_heads}
    facts |= {"page": slots} if paged else {"slots": slots}

    def obstacle(name: str) -> str | None:
        if name != "reference" and qkv.dtype != k.dtype:
            return f"it takes a cache of the queries' dtype, not {k.dtype} beside {qkv.dtype}"
        return unfit(name, **facts)

    return choose("decode_attention", implementation, IMPLEMENTATIONS, obstacle, "'auto'")


def decode_attention(
    qkv: jax.Array,
    k: jax.Array,
    v: jax.Array,
    positions: jax.Array,
    *,
    problem: Problem,
    turns: jax.Array | None = None,
    pages: tuple[jax.Array, jax.Array] | None = None,
    implementation: str = "auto",
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """softmax(scale q kT) v of one new token a sequence, whose key and value are remembered.

    Queries and the new keys are rotated first: y = x cos + (x with its halves swapped) (-sin, sin).
    A sequence of p tokens has them in slots 0 to p - 1; the new one goes to slot p, or nowhere past
    the last one.

    Args:
      qkv: [B, N + 2 K, H]: queries, keys and values of the new tokens.
      k, v: [B, S, K, H], the caches, or pools [P, Z, K, H] of pages; what lies past the new token
        may hold anything. The kernel writes in place where the program gives them away.
      positions: [B] int32, p of each sequence, at least 0; with pages -1 where there is no token,
        which finds zeros and writes nothing.
      problem: heads, scale, window and soft-cap.
      turns: [B, 2, H] float32: cosines, and signed sines; None leaves all as it is.
      pages: (table [B, W], firsts [B]) int32: column j of a row is the page that holds the tokens
        of number firsts + j of its sequence; None for dense caches.
      implementation: `auto`, `mosaic_gpu` (Hopper: bfloat16 or float16, heads of 64 or 128, up to
        8 query heads of a key head) or `reference`.

    Returns:
      (out [B, N, H] in qkv's dtype, k, v). They have no derivative: they are for decoding.

    Raises:
      ShapeError: arguments that do not fit; UnsupportedError: the implementation, named, cannot
        serve.
    """
    heads, rows = problem.heads, qkv.shape[0]
    found = f"found qkv {qkv.shape}, k {k.shape}, v {v.shape}"
    if qkv.ndim != 3 or k.ndim != 4 or k.shape != v.shape or (pages is None and k.shape[0] != rows):
        raise ShapeError(f"decode_attention takes qkv [B, N + 2 K, H], k and v alike; {found}")
    _, _, kv_heads, width = k.shape
    if qkv.shape != (rows, heads + 2 * kv_heads, width) or heads % kv_heads:
        wanted = (rows, f"{heads} + 2 x {kv_heads}", width)
        raise ShapeError(f"decode_attention takes qkv {wanted} of {heads} query heads; {found}")
    if positions.shape != (rows,) or not jnp.issubdtype(positions.dtype, jnp.integer):
        shown = f"{positions.shape} {positions.dtype}"
        raise ShapeError(f"positions are [B] = ({rows},) integers, found {shown}")
    if turns is not None and turns.shape != (rows, 2, width):
        raise ShapeError(f"turns are [B, 2, H] = {(rows, 2, width)}, found {turns.shape}")
    if pages is not None and (pages[0].shape[:1] != (rows,) or pages[1].shape != (rows,)):
        shown = f"{pages[0].shape} and {pages[1].shape}"
        raise ShapeError(f"pages are a table [B, W] and firsts [B] of {rows} rows, found {shown}")
    how = {"heads": heads, "paged": pages is not None, "implementation": implementation}
    run = _RUN[explain(qkv, k, **how).name]
    return run(qkv, k, v, positions.astype(jnp.int32), turns, pages, problem=problem)
