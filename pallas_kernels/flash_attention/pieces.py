# Types of jax's Mosaic GPU objects are not public.
# pyright: reportPrivateImportUsage=false, reportAbstractUsage=false, reportIndexIssue=false, reportAttributeAccessIssue=false, reportCallIssue=false
"""What the forward and backward kernels for Hopper share."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.flash_attention.problem import Spec
from pallas_kernels.flash_attention.ranges import Walk
from pallas_kernels.warpgroups import (
    COLUMN,
    CONSUMERS,
    LOG2E,
    ROW,
    SQUARE,
    Spare,
    along,
    drain,
    iota,
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
    "capped",
    "drain",
    "iota",
    "same_segment",
    "swizzled",
]


def capped(scores: jax.Array, spec: Spec) -> tuple[jax.Array, float]:
    """(x, factor): factor * x are the scores in units of log2 e."""
    if spec.softcap is None:
        return scores, spec.scale * LOG2E
    return jnp.tanh(scores * (spec.scale / spec.softcap)), spec.softcap * LOG2E


def keeper(walk: Walk, refs, batch, rows):
    """Which pairs of a block see each other: a function of the block's first column.

    Args:
      rows: first row and number of rows.
    """
    first_row, count = rows
    shape = (count, walk.block)
    facts = walk.facts(batch, refs)

    def keep(first_column):
        at, columns = iota(shape, 0) + first_row, iota(shape, 1) + first_column
        seen = walk.seen(at, columns, facts)
        if not walk.segmented:
            return seen
        names = ("query_segments", "key_segments")
        names = names[::-1] if walk.transposed else names
        return same_segment(refs, names, (batch, first_row, first_column), shape, seen)

    return keep


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

    @property
    def group(self) -> int:
        """Query heads of one kv head."""
        return self.heads // self.kv_heads

    def tile(self, walk: Walk, index):
        """(sequence, tile of queries, head): a sequence's tiles with most blocks come first."""
        rest, head = lax.div(index, self.heads), lax.rem(index, self.heads)
        row = lax.rem(rest, walk.tiles)
        if walk.heavy_last:
            row = walk.tiles - 1 - row
        return lax.div(rest, walk.tiles), row, head

    def for_tiles(self, walk: Walk, ctas: int, body, start):
        """Runs body(index, carry) over this program's share of all tiles."""
        count = self.batch * walk.tiles * self.heads
        cta = lax.axis_index("cta")
        if ctas >= count:
            return body(cta, start)
        mine = lax.div(count - 1 - cta, ctas) + 1
        return lax.fori_loop(0, mine, lambda i, carry: body(cta + i * ctas, carry), start)
