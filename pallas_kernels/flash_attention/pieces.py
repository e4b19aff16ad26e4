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
from pallas_kernels.warpgroups import CONSUMERS, LOG2E, ROW, SQUARE, along, iota, multiply, swizzled

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

COLUMN = plgpu.Layout.WGMMA.reduce(0)


def capped(scores: jax.Array, spec: Spec) -> tuple[jax.Array, float]:
    """(x, factor): factor * x are the scores in units of log2 e."""
    if spec.softcap is None:
        return scores, spec.scale * LOG2E
    return jnp.tanh(scores * (spec.scale / spec.softcap)), spec.softcap * LOG2E


@dataclasses.dataclass(frozen=True)
class Spare:
    """A consumer's memory for what the interpreter cannot do; empty on a device.

    It knows neither a left operand in registers nor a store to an accumulator: there, sums are
    plain memory, and a product is made from nothing and added.
    """

    sums: tuple[object, ...] = ()
    stage: object | None = None

    @staticmethod
    def kinds(shape: Shape, stage: tuple[int, int], *sums: tuple[int, int]) -> dict:
        """What to allocate, by name."""
        if not shape.interpret:
            return {}
        kinds = {f"sum{i}": plgpu.SMEM((CONSUMERS, *x), jnp.float32) for i, x in enumerate(sums)}
        return kinds | {"stage": swizzled((CONSUMERS, *stage), shape.dtype)}

    @classmethod
    def of(cls, smem: dict, wg) -> Spare:
        """A warpgroup's part of what `kinds` named."""
        if "stage" not in smem:
            return cls()
        sums = sorted(name for name in smem if name.startswith("sum"))
        return cls(tuple(smem[name].at[wg] for name in sums), smem["stage"].at[wg])

    def zeroed(self, body, *shapes: tuple[int, int]):
        """body(*accumulators), float32 zeros that `add` adds to."""
        if self.stage is None:
            return pl.run_scoped(body, *(plgpu.ACC(shape, jnp.float32) for shape in shapes))
        for ref in self.sums:
            ref[...] = jnp.zeros(ref.shape, jnp.float32)
        return body(*self.sums[: len(shapes)])

    def add(self, acc, left: jax.Array, right) -> None:
        """acc += left @ right, begun and not waited for; `left` is in registers, `right` a ref."""
        if self.stage is None:
            multiply(acc, left, right)
            return

        def run(fresh):
            multiply(fresh, left, right, self.stage)
            return fresh[...]

        acc[...] = acc[...] + pl.run_scoped(run, plgpu.ACC(acc.shape, jnp.float32))


def drain(free: dict) -> None:
    """Waits until everything that was loaded was also used, so that no barrier ends half-way."""
    for barrier in free.values():
        if not barrier.shape:
            plgpu.barrier_wait(barrier)
            continue
        for slot in range(barrier.shape[0]):
            plgpu.barrier_wait(barrier.at[slot])


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
