# Types of jax's Mosaic GPU objects are not public.
# pyright: reportPrivateImportUsage=false, reportAbstractUsage=false, reportIndexIssue=false, reportAttributeAccessIssue=false, reportCallIssue=false
"""What the forward and backward kernels for Hopper share."""

from __future__ import annotations

import dataclasses
import functools
import heapq
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.flash_attention.bias import Bias, evaluate
from pallas_kernels.flash_attention.padding import pad
from pallas_kernels.flash_attention.problem import Extras
from pallas_kernels.flash_attention.ranges import BOTH, HIGH, LOW, Walk, runs
from pallas_kernels.warpgroups import (
    COLUMN,
    CONSUMERS,
    LOG2E,
    ROW,
    SQUARE,
    Spare,
    along,
    capped,
    drain,
    iota,
    pass_over,
    slot_of,
    swizzled,
)

__all__ = [
    "COLUMN",
    "CONSUMERS",
    "LOG2E",
    "ROW",
    "SQUARE",
    "Shape",
    "Spare",
    "along",
    "biases",
    "capped",
    "data_of_walk",
    "drain",
    "iota",
    "keeper",
    "pass_over",
    "same_segment",
    "slot_of",
    "swizzled",
]

SECTION_BYTES = 24 << 20  # keys and values that are read again and again: half of an H100's L2
TILE_COSTS = 192  # what a tile costs beside its blocks, in keys


def keeper(walk: Walk, refs, batch, rows):
    """keep(place, position, ends)() says which pairs of a block see each other.

    What each row sees is two numbers, found once a tile; a block compares them with its columns.
    The first call reads from memory what it needs; the second may stand behind a product, where
    something runs beside it.

    Args:
      batch: number of the sequence.
      rows: first row and number of rows.
    """
    first_row, count = rows
    shape = (count, walk.block)
    at = None
    if walk.spec.banded:  # layout inference never ends on a vector that nothing uses
        at = plgpu.broadcasted_iota(jnp.int32, (count,), 0, layout=ROW) + first_row
    low, high = walk.ends(at, walk.facts(batch, refs))
    if walk.packed:
        where = [refs["runs"].at[batch, i, pl.ds(first_row, count)] for i in range(2)]
        start, end = (plgpu.load(x, layout=ROW, optimized=False) for x in where)
        low = start if low is None else jnp.maximum(low, start)
        high = end if high is None else jnp.minimum(high, end)
        low, high = (plgpu.layout_cast(x, ROW) for x in (low, high))

    def keep(place, position, ends=BOTH):
        first_column = walk.block_at(place, position, refs) * walk.block
        pattern = walk.pattern(place, position, rows, ends, refs)

        def seen():
            tests, columns = [], iota(shape, 1)

            def within(bound):  # of each row, or of all
                bound = bound - first_column
                return along(bound, shape, 0) if jnp.ndim(bound) else bound

            if low is not None and ends != HIGH:
                tests.append(columns >= within(low))
            if high is not None and ends != LOW:
                tests.append(columns <= within(high))
            if pattern is not None:
                tests.append(_unpacked(pattern, shape))
            both = functools.reduce(operator.and_, tests) if tests else None
            if not walk.segmented or walk.packed:
                return both
            names = ("query_segments", "key_segments")
            names = names[::-1] if walk.transposed else names
            return same_segment(refs, names, (batch, first_row, first_column), shape, both)

        return seen

    return keep


def biases(walk: Walk, refs, batch, rows):
    """bias(place, position)(): what is added to a block's scores, in units of log2 e, or None.

    Args:
      batch: number of the sequence.
      rows: first row and number of rows.
    """
    parts = []
    if "alibi_slopes" in walk.names:
        parts.append(_distances(walk, refs, batch, rows))
    if walk.spec.bias is not None:
        parts.append(_by_function(walk.spec.bias, walk, refs, batch, rows))

    def bias(place, position):
        those = [part(place, position) for part in parts]
        return lambda: functools.reduce(operator.add, [x() for x in those]) if those else None

    return bias


def _by_function(function: Bias, walk: Walk, refs, batch, rows):
    (first_row, count), offset = rows, walk.facts(batch, refs)[0]
    shape = (count, walk.block)

    def bias(place, position):
        first_column = walk.block_at(place, position, refs) * walk.block
        firsts, dims = (first_row + offset, first_column), (0, 1)
        if walk.transposed:
            firsts, dims = (first_column + offset, first_row), (1, 0)

        def added():
            at = [lambda i=i: iota(shape, dims[i]) + firsts[i] for i in range(2)]
            return evaluate(function, shape, (*at, lambda: place[2])) * LOG2E

        return added

    return bias


def _distances(walk: Walk, refs, batch, rows):
    first_row, count = rows
    shape, offset = (count, walk.block), walk.facts(batch, refs)[0]
    first = first_row - offset if walk.transposed else first_row + offset
    at = plgpu.broadcasted_iota(jnp.int32, (count,), 0, layout=ROW) + first

    def bias(place, position):
        first_column = walk.block_at(place, position, refs) * walk.block
        slope = refs["alibi_slopes"][batch, place[2]] * -LOG2E

        def added():
            away = along(at - first_column, shape, 0) - iota(shape, 1)
            return jnp.abs(away.astype(jnp.float32)) * slope

        return added

    return bias


def _unpacked(words, shape) -> jax.Array:
    """Bits of 32 columns a word, one word a row each, as booleans of a block."""
    part = (shape[0], 32)
    bits = [lax.shift_right_logical(along(word, part, 0), iota(part, 1)) & 1 for word in words]
    return jnp.concatenate(bits, axis=1) != 0


def same_segment(refs, names, place, shape, seen):
    """`seen`, and rows and columns of one segment.

    Args:
      names: of the ids of rows and of columns among refs.
      place: sequence, first row, first column.
      seen: bool of `shape`, or None for all.
    """
    batch, *first = place
    ids = []
    for dim, (name, layout) in enumerate(zip(names, (ROW, COLUMN), strict=True)):
        where = refs[name].at[batch, pl.ds(first[dim], shape[dim])]
        ids.append(along(plgpu.load(where, layout=layout, optimized=False), shape, dim))
    same = ids[0] == ids[1]
    return same if seen is None else seen & same


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes that a kernel is compiled for."""

    batch: int
    heads: int
    kv_heads: int
    width: int
    value_width: int
    dtype: jnp.dtype
    interpret: bool

    @classmethod
    def of(cls, q: jax.Array, v: jax.Array, interpret: bool) -> Shape:
        """Of q [B, T, N, H] and v [B, S, K, Hv]."""
        return cls(
            batch=q.shape[0],
            heads=q.shape[2],
            kv_heads=v.shape[2],
            width=q.shape[3],
            value_width=v.shape[3],
            dtype=jnp.dtype(q.dtype),
            interpret=interpret,
        )

    @property
    def group(self) -> int:
        """Query heads of one kv head."""
        return self.heads // self.kv_heads

    def section(self, walk: Walk) -> int:
        """Pairs of a sequence and a head whose tiles are next to each other.

        Their keys and values stay in the L2 cache, and there are enough of them that the programs
        which run at once have tiles of about one length.
        """
        most = max(1, SECTION_BYTES // self.bytes_of_keys(walk))
        whole = self.batch * self.kv_heads
        return self.group * max(n for n in range(1, min(most, whole) + 1) if whole % n == 0)

    def in_section(self, walk: Walk) -> int:
        """Tiles of a section."""
        return self.section(walk) * walk.tiles

    def tile(self, walk: Walk, index: Any) -> tuple[Any, Any, Any]:
        """(sequence, tile of queries, head): a section's tiles with most blocks come first."""
        host = isinstance(index, np.ndarray)
        div, rem = (np.floor_divide, np.remainder) if host else (lax.div, lax.rem)
        pairs = self.section(walk)
        section, rest = div(index, pairs * walk.tiles), rem(index, pairs * walk.tiles)
        row = div(rest, pairs)
        if walk.heavy_last:
            row = walk.tiles - 1 - row
        pair = section * pairs + rem(rest, pairs)
        return div(pair, self.heads), row, rem(pair, self.heads)

    def turns(self, walk: Walk, ctas: int, table: jax.Array | None = None) -> dict[str, jax.Array]:
        """Which tiles each program takes, as an array for the kernel; none where each takes one.

        Made on the host as if a program that is done took the next tile: int32 [ctas, 2 + most],
        the number of its tiles, and their indices.

        Args:
          table: bounds of tiles that are data, by which the device deals out; see `Walk.table`.
        """
        if ctas >= self.batch * walk.tiles * self.heads:
            return {}
        if table is not None and self.together(walk):
            return {"turns": _dealt(self, walk, ctas, table)}
        return {"turns": jnp.asarray(_turns(self, walk, ctas))}

    def together(self, walk: Walk) -> bool:
        """Whether tiles of all sections may run at once: heads of a group share what they read."""
        keys = self.batch * self.kv_heads * self.bytes_of_keys(walk)
        return keys <= 2 * self.group * SECTION_BYTES

    def bytes_of_keys(self, walk: Walk) -> int:
        """Of the keys and values of a sequence and kv head."""
        return walk.columns * (self.width + self.value_width) * self.dtype.itemsize

    def for_tiles(self, refs, walk: Walk, ctas: int, body, start):
        """Runs body(index, carry) over this program's share of all tiles."""
        cta = lax.axis_index("cta")
        if ctas >= self.batch * walk.tiles * self.heads:
            return body(cta, start)

        def one(i, carry):
            index, carry = carry
            following = refs["turns"][cta, i + 2]  # it comes while this tile is worked on
            return following, body(index, carry)

        return lax.fori_loop(0, refs["turns"][cta, 0], one, (refs["turns"][cta, 1], start))[1]

    def share(self, refs, walk: Walk, ctas: int):
        """How many tiles are this program's."""
        if ctas >= self.batch * walk.tiles * self.heads:
            return jnp.int32(1)
        return refs["turns"][lax.axis_index("cta"), 0]


@functools.lru_cache(maxsize=64)
def _turns(shape: Shape, walk: Walk, ctas: int) -> np.ndarray:
    count = shape.batch * walk.tiles * shape.heads
    _, row, head = shape.tile(walk, np.arange(count))
    visits = walk.visits()
    if len(visits) > shape.heads:  # heads of a group take turns in one program
        visits = visits.reshape(shape.heads, -1, walk.tiles).sum(axis=1)
    visits = np.broadcast_to(visits, (shape.heads, walk.tiles))
    cost = visits[head, row] * walk.block + TILE_COSTS
    lists: list[list[int]] = [[] for _ in range(ctas)]
    free = [(0, cta) for cta in range(ctas)]
    order = np.arange(count)
    if walk.uneven:  # the longest of a section come first, or of all
        section = order // count if shape.together(walk) else order // shape.in_section(walk)
        order = np.lexsort((-cost, section))
    for index in order:
        time, cta = heapq.heappop(free)
        lists[cta].append(int(index))
        heapq.heappush(free, (time + int(cost[index]), cta))
    out = np.zeros((ctas, 2 + max(len(x) for x in lists)), np.int32)
    for cta, mine in enumerate(lists):
        out[cta, : 1 + len(mine)] = [len(mine), *mine]
    return out


def _dealt(shape: Shape, walk: Walk, ctas: int, table: jax.Array) -> jax.Array:
    """`turns` of tiles whose bounds are data: the longest first, there and back."""
    bounds = table.reshape(-1, 4)  # of every tile of every sequence
    visits = bounds[:, 3] - bounds[:, 0]
    at = jnp.arange(len(bounds), dtype=jnp.int32)
    longer, alike = visits[None] > visits[:, None], visits[None] == visits[:, None]
    rank = jnp.sum(longer | (alike & (at[None] < at[:, None])), axis=1, dtype=jnp.int32)
    order = jnp.sum(jnp.where(rank[None] == at[:, None], at[None], 0), axis=1, dtype=jnp.int32)
    place, index_of = _there_and_back(shape, walk, ctas)
    tile, head = np.divmod(np.maximum(place, 0), shape.heads)
    turns = jnp.asarray(index_of)[order[tile], head]
    number = np.sum(place >= 0, axis=1, keepdims=True, dtype=np.int32)
    return jnp.concatenate([jnp.asarray(number), turns], axis=1)


@functools.lru_cache(maxsize=64)
def _there_and_back(shape: Shape, walk: Walk, ctas: int) -> tuple[np.ndarray, np.ndarray]:
    """(place in the order of each program's tiles or -1 [ctas, 1 + most], index of each tile of a
    sequence and head [B * tiles, heads])."""
    count = shape.batch * walk.tiles * shape.heads
    turn, cta = np.arange(-(-count // ctas) + 1), np.arange(ctas)[:, None]
    place = turn * ctas + np.where(turn % 2 == 0, cta, ctas - 1 - cta)
    batch, row, head = shape.tile(walk, np.arange(count))
    index_of = np.zeros((shape.batch * walk.tiles, shape.heads), np.int32)
    index_of[batch * walk.tiles + row, head] = np.arange(count)
    return np.where(place < count, place, -1), index_of


def data_of_walk(walk: Walk, extras: Extras, *, rows: int, columns: int) -> dict:
    """What a kernel reads to know who sees whom, by name.

    Args:
      rows, columns: multiples that segment ids of queries and keys are padded to.
    """
    out = {"info": walk.info(extras), "table": walk.table(extras)}
    out["alibi_slopes"] = extras.alibi_slopes
    if walk.packed:
        out["runs"] = pad(runs(extras.query_segments), 2, walk.tile)
    elif walk.segmented:
        out["query_segments"] = pad(extras.query_segments, 1, rows, -1)
        out["key_segments"] = pad(extras.key_segments, 1, columns, -2)
    return {name: x for name, x in out.items() if x is not None}
