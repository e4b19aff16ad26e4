# Types of jax's Mosaic GPU objects are not public.
# pyright: reportPrivateImportUsage=false, reportAbstractUsage=false, reportIndexIssue=false, reportAttributeAccessIssue=false, reportCallIssue=false
"""Attention over pages on Hopper: many small programs, each with a part of one sequence's pages.

A program is one warpgroup. It holds up to 64 rows (queries x heads of one key head) and brings the
pages of its part, one head of each, into a ring of shared memory with TMA. What bounds the kernel
is reading pages, so several programs share a processor: one computes while others wait. Parts of
one sequence are merged afterwards by their log-sums.

Pages of 8 bits come as they are, with a scale a token and head. A step's codes are widened through
registers into one tile of 16 bits; scales of keys go into the scores, those of values into the
weights.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.once import lowered_once
from pallas_kernels.paged_attention.problem import Problem
from pallas_kernels.paged_attention.rows import rows_of
from pallas_kernels.warpgroups import (
    COLUMN,
    LOG2E,
    ROW,
    along,
    capped,
    clear,
    iota,
    multiply,
    swizzled,
    weighed,
)

__all__ = ["ROWS", "UNIT", "Kernel", "Tiles", "attend", "folded", "known_of"]

ROWS = 64  # of a program: what a warpgroup's instruction has
UNIT = 8  # rows that leave together


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles:
    """How a call is cut; any choice gives the same result up to rounding.

    Attributes:
      stages: steps in flight.
      splits: programs that share a sequence's pages.
      leaving: columns of the result that leave together; less shared memory for more waits.
      keys: of a step, at least; whole pages.
      apart: whether keys and values of a step come and go by themselves (few rows alone).
    """

    stages: int = 4
    splits: int = 1
    leaving: int = 128
    keys: int = 64
    apart: bool = False


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One compiled kernel: rows R of a block and key head, in tiles of 64.

    Attributes:
      group: query heads of a key head.
      codes: of pages of 8 bits.
    """

    problem: Problem
    rows: int
    group: int
    pool: tuple[int, ...]  # pages, tokens a page, heads, width
    value_width: int
    table_width: int
    dtype: jnp.dtype
    tiles: Tiles
    interpret: bool
    codes: jnp.dtype | None = None

    @property
    def pages(self) -> int:
        """Of a step."""
        return max(1, self.tiles.keys // self.pool[1])

    @property
    def keys(self) -> int:
        """Of a step."""
        return self.pages * self.pool[1]

    @property
    def row_tiles(self) -> int:
        return pl.cdiv(self.rows, ROWS)

    @property
    def rows_out(self) -> int:
        """Rows of a tile that leave."""
        return min(ROWS, self.rows)

    @property
    def leaving(self) -> int:
        """Columns of the result that leave together."""
        return math.gcd(self.tiles.leaving, self.value_width)

    def place(self, index):
        """(block, tile of rows, split, head) of a program; heads of the same pages side by side."""
        index, head = lax.div(index, self.pool[2]), lax.rem(index, self.pool[2])
        index, split = lax.div(index, self.tiles.splits), lax.rem(index, self.tiles.splits)
        return lax.div(index, self.row_tiles), lax.rem(index, self.row_tiles), split, head

    def about(self, refs, block):
        """(place of a block's first query, end of its keys, its first page, its row)."""
        start, count, owner = (refs[name][block] for name in ("starts", "counts", "rows"))
        end = jnp.where(count > 0, start + count, 0)
        return start, end, refs["firsts"][owner], owner

    def places(self, refs, block, tile):
        """The place of each row's query, -1 for none."""
        row = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=ROW) + tile * ROWS
        query = row if self.group == 1 else lax.div(row, jnp.int32(self.group))
        start, count = refs["starts"][block], refs["counts"][block]
        return jnp.where(query < count, query + start, -1)

    def bounds(self, refs, block, split):
        """(first column, steps) of a program's part of a block's pages."""
        size = self.pool[1]
        start, end, first, _ = self.about(refs, block)
        low = jnp.int32(0)
        if self.problem.window is not None:
            low = lax.div(jnp.maximum(start - self.problem.window, 0), size) - first
        low = jnp.maximum(low, 0)
        columns = jnp.maximum(lax.div(end + (size - 1), size) - first - low, 0)
        steps = lax.div(columns + (self.pages - 1), self.pages)
        share = lax.div(steps + (self.tiles.splits - 1), self.tiles.splits)
        mine = jnp.minimum(share, jnp.maximum(steps - split * share, 0))
        return low + split * share * self.pages, mine

    def numbers(self, refs, owner, column):
        """Pages of the step that begins at a column of the table."""
        last, known = self.table_width - 1, self.pool[0] - 1
        columns = [jnp.minimum(column + i, last) for i in range(self.pages)]
        return [jnp.clip(refs["table"][owner, at], 0, known) for at in columns]

    def bring(self, refs, smem, full, head, pages, slot, sides=(0, 1)):
        """Begins to copy a step's keys (side 0), values, or both."""
        size = self.pool[1]
        for side in sides:
            name, arrived = "kv"[side], self.arrived_at(full, slot, side)
            for i, page in enumerate(pages):
                shared = smem[name].at[slot, pl.ds(i * size, size)]
                plgpu.copy_gmem_to_smem(refs[name].at[page, :, head], shared, arrived)
            if self.codes is None:
                continue
            for i, page in enumerate(pages):
                shared = smem["scales"].at[slot, side, pl.ds(i * size, size)]
                theirs = refs["scales"].at[page, head, side]
                plgpu.copy_gmem_to_smem(theirs, shared, arrived)

    def arrived_at(self, full, slot, side):
        """The barrier of a step's keys or values."""
        return full.at[slot + side * self.tiles.stages if self.tiles.apart else slot]

    @property
    def scratch(self) -> int:
        """Bytes of shared memory for reductions over warps."""
        return 2048

    def held(self):
        """Shared memory by name, but for pages of 8 bits."""
        smem = {
            "q": swizzled((ROWS, self.pool[3]), self.dtype),
            "out": swizzled((ROWS, self.leaving), jnp.float32),
            "lse": plgpu.SMEM((ROWS,), jnp.float32),
        }
        if self.interpret:
            smem["stage"] = swizzled((ROWS, self.keys), self.dtype)
        if self.codes is not None:
            widest = max(self.pool[3], self.value_width)
            smem["wide"] = swizzled((self.keys, widest), self.dtype)
        return smem

    @property
    def asks(self) -> int:
        """Copies that bring a tile's queries."""
        return 1

    def body(self, refs):
        kind, stages = self.codes or self.dtype, self.tiles.stages
        smem = self.held() | {
            "k": swizzled((stages, self.keys, self.pool[3]), kind),
            "v": swizzled((stages, self.keys, self.value_width), kind),
        }
        copies = 2
        if self.codes is not None:
            copies = 4
            smem["scales"] = plgpu.SMEM((stages, 2, self.keys), jnp.float32)
        parts = 2 if self.tiles.apart else 1
        full = plgpu.Barrier(num_arrivals=copies * self.pages // parts, num_barriers=stages * parts)
        pl.run_scoped(
            lambda smem, full, asked: self.program(refs, smem, full, asked),
            smem,
            full,
            plgpu.Barrier(num_arrivals=self.asks),
        )

    def program(self, refs, smem, full, asked):
        block, tile, split, head = self.place(lax.axis_index("cta"))
        stages = self.tiles.stages
        _, end, first, owner = self.about(refs, block)
        column, steps = self.bounds(refs, block, split)

        for slot in range(stages):

            @pl.when(slot < steps)
            def _(slot=slot):
                pages = self.numbers(refs, owner, column + slot * self.pages)
                self.bring(refs, smem, full, head, pages, slot)

        self.ask(refs, smem, asked, (block, tile, head))
        places = self.places(refs, block, tile)
        plgpu.barrier_wait(asked)
        self.arrived(smem)

        def step(i, carry):
            slot = lax.rem(i, stages)
            begins = column + i * self.pages
            coming = self.numbers(refs, owner, begins + stages * self.pages)
            plgpu.barrier_wait(self.arrived_at(full, slot, 0))
            left = end - (first + begins) * self.pool[1]  # keys of the step that were written

            def refill(sides):
                @pl.when(i + stages < steps)
                def _():
                    self.bring(refs, smem, full, head, coming, slot, sides)

            def values():
                if self.tiles.apart:
                    plgpu.barrier_wait(self.arrived_at(full, slot, 1))
                if self.codes is None:
                    self.keep(smem["v"].at[slot], left)

            if self.tiles.apart:
                return self.fold(smem, slot, places, (end, left), carry, (refill, values))
            values()
            carry = self.fold(smem, slot, places, (end, left), carry)
            refill((0, 1))
            return carry

        found = lax.fori_loop(0, steps, step, self.nothing())
        self.hand_out(refs, smem, found, (block, tile, split, head))

    def ask(self, refs, smem, asked, at):
        """Brings a tile's queries."""
        block, tile, head = at
        shared = smem["q"].at[pl.ds(0, self.rows_out)]
        theirs = refs["q"].at[block, head, pl.ds(tile * ROWS, self.rows_out)]
        plgpu.copy_gmem_to_smem(theirs, shared, asked)

    def arrived(self, smem):
        """What is to be done with queries that came."""

    def finished(self, found):
        """(result, log-sums) of sums, peaks and totals."""
        out, peak, total = found
        some = total > 0.0
        out = out * along(jnp.where(some, 1.0 / total, 0.0), out.shape, 0)
        return out, jnp.where(some, peak * (1.0 / LOG2E) + jnp.log(total), -jnp.inf)

    def hand_out(self, refs, smem, found, at):
        """Writes a part's result in float32."""
        block, tile, split, head = at
        out, smem["lse"][...] = self.finished(found)
        own, whole = pl.ds(tile * ROWS, self.rows_out), pl.ds(0, self.rows_out)
        place = (split, block, head, own)
        for i in range(0, self.value_width, self.leaving):
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            smem["out"][...] = out[:, i : i + self.leaving]
            plgpu.commit_smem()
            target = refs["out"].at[(*place, pl.ds(i, self.leaving))]
            plgpu.copy_smem_to_gmem(smem["out"].at[whole], target)
        plgpu.copy_smem_to_gmem(smem["lse"].at[whole], refs["lse"].at[place])
        plgpu.wait_smem_to_gmem(0)

    def run(self, inputs, outputs, programs: int):
        """Runs the kernel: its outputs, in order.

        Args:
          inputs: arrays by name.
          outputs: `jax.ShapeDtypeStruct`s by name.
          programs: how many.
        """

        def body(*refs):
            self.body(dict(zip((*inputs, *outputs), refs, strict=True)))

        return plgpu.kernel(
            body,
            out_type=tuple(outputs.values()),
            grid=(programs,),
            grid_names=("cta",),
            compiler_params=plgpu.CompilerParams(
                approx_math=True, reduction_scratch_bytes=self.scratch
            ),
            kernel_name="paged_attention",
            interpret=plgpu.InterpretGPUParams() if self.interpret else False,
        )(*inputs.values())

    def nothing(self):
        """Sums, peaks and totals before any key."""
        out = jnp.zeros((ROWS, self.value_width), jnp.float32)
        peak, total = jnp.full((ROWS,), -jnp.inf, jnp.float32), jnp.zeros((ROWS,), jnp.float32)
        if self.interpret:
            return out, peak, total
        cast = plgpu.layout_cast
        return cast(out, plgpu.Layout.WGMMA), cast(peak, ROW), cast(total, ROW)

    def keep(self, values, left):
        """Zeros behind the first `left` values, which were never written and may be NaN."""

        @pl.when(left < self.keys)
        def _():
            clear(values, 0, left)
            plgpu.commit_smem()

    def widened(self, smem, name, slot):
        """Shared memory with what a step's codes stand for, but for their scales."""
        codes = smem[name].at[slot]
        wide = smem["wide"].at[:, pl.ds(0, codes.shape[1])]
        if self.interpret:
            wide[...] = codes[...].astype(self.dtype)
        else:
            found = plgpu.load(codes, layout=plgpu.Layout.WGMMA_UPCAST_2X)
            if self.codes == jnp.float8_e4m3fn:  # Hopper widens pairs of them to float16
                found = found.astype(jnp.float16).astype(jnp.float32)
            wide[...] = found.astype(self.dtype)
        plgpu.commit_smem()
        return wide

    def scales(self, smem, slot, left):
        """Of a step's keys and values; 0 for values that were never written."""
        keys, values = (
            plgpu.load(smem["scales"].at[slot, side], layout=COLUMN) for side in range(2)
        )
        place = plgpu.broadcasted_iota(jnp.int32, (self.keys,), 0, layout=COLUMN)
        return keys, jnp.where(place < left, values, 0.0)

    def fold(self, smem, slot, places, ends, carry):
        """Sums with one more step's keys; `ends` are that of all keys, and how many are left."""
        out, *statistics = carry
        end, left = ends
        k, v, scales = smem["k"].at[slot], smem["v"].at[slot], None
        if self.codes is not None:
            scales = self.scales(smem, slot, left)
            k = self.widened(smem, "k", slot)
        found = folded(self, smem["q"], k, places, end - left, statistics, scales)
        weights, decay, higher, total = found
        if self.codes is not None:  # the keys were read: their place is free
            v = self.widened(smem, "v", slot)
            self.keep(v, left)

        def sums(acc):
            multiply(acc, weights.astype(self.dtype), v, smem.get("stage"))
            plgpu.wgmma_wait(0)
            return acc[...]

        found = pl.run_scoped(sums, plgpu.ACC(out.shape, jnp.float32))
        return out * along(decay, out.shape, 0) + found, higher, total


def folded(kernel: Kernel, q, k, places, begin, statistics, scales=None):
    """(weights, factor of what was summed before, peak, total) of one more step's keys.

    Args:
      q, k: shared memory.
      places: of the rows' queries.
      begin: place of the first key.
      statistics: (peak, total) before.
      scales: of keys, and of values, which the weights are multiplied by.
    """
    peak, total = statistics
    problem, shape = kernel.problem, (ROWS, kernel.keys)

    def product(acc):
        plgpu.wgmma(acc, q, k.T)
        plgpu.wgmma_wait(0)
        return acc[...]

    scores = pl.run_scoped(product, plgpu.ACC(shape, jnp.float32))
    if scales is not None:
        scores = scores * along(scales[0], shape, 1)
    scores, factor = capped(scores, problem.scale, problem.softcap)
    key, query = iota(shape, 1) + begin, along(places, shape, 0)
    seen = key <= query
    if problem.window is not None:
        seen = seen & (key >= query - problem.window)
    weights, decay, higher = weighed(scores * factor, seen, peak, 1)
    total = total * decay + jnp.sum(weights, axis=1)
    if scales is not None:
        weights = weights * along(scales[1], shape, 1)
    return weights, decay, higher, total


def known_of(q, pools, pages) -> tuple[dict[str, Any], dict[str, Any]]:
    """(what a kernel is told of its pools, its inputs by name) of a call's q, pools and pages."""
    (k, v, scales), (table, firsts, blocks) = pools, pages
    facts = {
        "pool": k.shape,
        "value_width": v.shape[3],
        "table_width": table.shape[1],
        "dtype": jnp.dtype(q.dtype),
        "codes": None if scales is None else jnp.dtype(k.dtype),
    }
    names = dict(zip(("rows", "starts", "counts", "begins"), blocks, strict=False))
    inputs = {"q": q, "k": k, "v": v, "table": table, "firsts": firsts} | names
    return facts, inputs | ({} if scales is None else {"scales": scales})


@lowered_once("problem", "tiles", "interpret")
def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    table: jax.Array,
    firsts: jax.Array,
    blocks: tuple[jax.Array, jax.Array, jax.Array],
    *,
    scales: jax.Array | None = None,
    problem: Problem,
    tiles: Tiles,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Out float32 [S, M, K, R, V] and lse float32 [S, M, K, R] of S parts of the pages.

    R is queries by heads of a key head, query by query, rounded up to a multiple of 8, above 64 of
    64.

    Args:
      q, k, v, table, firsts, blocks, scales: of `paged_attention`.
    """
    heads, group = k.shape[2], q.shape[2] // k.shape[2]
    q = rows_of(q, heads, unit=UNIT, most=ROWS)
    facts, inputs = known_of(q, (k, v, scales), (table, firsts, blocks))
    kernel = Kernel(
        problem=problem,
        rows=q.shape[2],
        group=group,
        tiles=tiles,
        interpret=interpret,
        **facts,
    )
    lead = (tiles.splits, *q.shape[:3])
    outputs = {
        "out": jax.ShapeDtypeStruct((*lead, v.shape[3]), jnp.float32),
        "lse": jax.ShapeDtypeStruct(lead, jnp.float32),
    }

    return kernel.run(inputs, outputs, q.shape[0] * kernel.row_tiles * tiles.splits * heads)
