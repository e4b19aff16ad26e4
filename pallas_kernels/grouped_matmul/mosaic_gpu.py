# Types of jax's Mosaic GPU objects are not public.
# pyright: reportPrivateImportUsage=false, reportAbstractUsage=false, reportIndexIssue=false, reportAttributeAccessIssue=false, reportCallIssue=false
"""The grouped products on Hopper: one warpgroup loads, two multiply (Pallas, Mosaic GPU backend).

As many programs as processors walk over the tiles of the result. The memory warpgroup brings the
two operands' blocks into a ring of shared memory with TMA, tiles ahead of the products; each of two
consumers holds its half of a tile in registers. Two kernels share this frame: `Rows`, whose tiles
are rows of one group each, and `Groups`, whose tiles are parts of a group's matrix.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.grouped_matmul.masks import store_inside
from pallas_kernels.grouped_matmul.tables import FIRST, GROUP, HEIGHT, ROW, START, STOP, UNIT, Map
from pallas_kernels.once import lowered_once
from pallas_kernels.warpgroups import CONSUMERS, PAIR, clear, roles, run_kernel, swizzled

__all__ = ["Tiles", "outer", "product"]

PIECE = 64  # rows and columns of a result that leave together


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles:
    """How a product is cut and scheduled; any choice gives the same result up to rounding.

    Attributes:
      rows: of a program's tile, a multiple of 64; of 128 where `split` is "rows".
      columns: of it, a multiple of 64; of 128 where `split` is "columns".
      depth: of one step of the sums, a multiple of 16; a multiple of 64 is fastest.
      stages: steps in flight.
      split: which side the two consumers share out.
      slots: pieces of 64 x 64 results that are on their way out, a consumer.
      band: row tiles that share the matrix before the next columns come, for the L2 cache.
      pair: two programs of a cluster have neighbouring tiles of "rows" or "columns", and each
        brings half of what both read.
    """

    rows: int = 128
    columns: int = 256
    depth: int = 64
    stages: int = 4
    split: str = "rows"
    slots: int = 2
    band: int = 16
    pair: str | None = None

    @property
    def own(self) -> tuple[int, int]:
        """Rows and columns of one consumer."""
        if self.split == "rows":
            return self.rows // CONSUMERS, self.columns
        return self.rows, self.columns // CONSUMERS

    @property
    def span(self) -> tuple[int, int]:
        """Rows and columns of the programs of a cluster."""
        rows = self.rows * (2 if self.pair == "rows" else 1)
        return rows, self.columns * (2 if self.pair == "columns" else 1)


@dataclasses.dataclass(frozen=True)
class Place:
    """A tile: its group, first row and column of the result, the group's rows, and steps.

    TMA reads and writes from a multiple of `UNIT` rows on: a group's first tile, or step, may begin
    in the rows of the groups before, as its last may end in those of the groups after.
    """

    group: jax.Array
    row: jax.Array
    column: jax.Array
    start: jax.Array
    stop: jax.Array
    steps: jax.Array


@dataclasses.dataclass(frozen=True)
class Frame:
    """One compiled kernel: what is the same for both products.

    Attributes:
      shape: rows, inputs, outputs, groups of the call.
      ctas: programs.
    """

    shape: tuple[int, int, int, int]
    dtype: jnp.dtype
    tiles: Tiles
    ctas: int
    interpret: bool

    # What a product says of itself: how its operands lie in shared memory, its tiles, their parts.

    def lhs_shape(self) -> tuple[int, int]:
        raise NotImplementedError

    def rhs_shape(self) -> tuple[int, int]:
        raise NotImplementedError

    def count(self, refs):
        raise NotImplementedError

    def place(self, refs, index) -> Place:
        raise NotImplementedError

    def sources(self, refs, place: Place, step):
        raise NotImplementedError

    def multiply(self, acc, lhs, rhs, place: Place, step, wg):
        raise NotImplementedError

    def store(self, refs, slots, values, place: Place, wg):
        raise NotImplementedError

    # ---- the frame ----------------------------------------------------------------------------

    def for_tiles(self, refs, body):
        """body(place, steps before) -> steps after, over this program's share of all tiles."""
        ctas = self.ctas // (2 if self.tiles.pair else 1)
        first = lax.axis_index("cta")
        mine = lax.div(self.count(refs) - first + ctas - 1, ctas)

        def tile(i, step):
            place = self.place(refs, first + i * ctas)
            body(place, step)
            return step + place.steps

        lax.fori_loop(0, mine, tile, jnp.int32(0))

    def load(self, refs, smem, full, free):
        """The memory warpgroup's part."""
        tiles = self.tiles

        def tile(place, before):
            def one(step, _):
                slot = lax.rem(before + step, tiles.stages)
                plgpu.barrier_wait(free.at[slot])
                both = self.sources(refs, place, step)
                for name, where, shared in zip(("lhs", "rhs"), both, self.shared(), strict=True):
                    plgpu.copy_gmem_to_smem(
                        where,
                        smem[name].at[slot],
                        full.at[slot],
                        collective_axes=PAIR if shared else None,
                    )

            lax.fori_loop(0, place.steps, one, None)

        self.for_tiles(refs, tile)
        for slot in range(tiles.stages):  # so that no barrier ends half-way
            plgpu.barrier_wait(free.at[slot])

    def shared(self) -> tuple[bool, bool]:
        """Whether a cluster's programs read the same block of lhs, of rhs."""
        return self.tiles.pair == "columns", self.tiles.pair == "rows"

    def compute(self, refs, smem, full, free):
        """A consumer's part."""
        tiles, wg = self.tiles, lax.axis_index("wg")
        for slot in range(tiles.stages):
            plgpu.barrier_arrive(free.at[slot])

        def tile(place, before):
            slot_of = lambda step: lax.rem(before + step, tiles.stages)  # noqa: E731

            def sums(acc):
                def one(step, _):
                    slot = slot_of(step)
                    plgpu.barrier_wait(full.at[slot])
                    lhs, rhs = smem["lhs"].at[slot], smem["rhs"].at[slot]
                    self.multiply(acc, lhs, rhs, place, step, wg)
                    plgpu.wgmma_wait(1)  # the step before is done: its memory is free

                    @pl.when(step > 0)
                    def _():
                        plgpu.barrier_arrive(free.at[slot_of(step - 1)])

                lax.fori_loop(0, place.steps, one, None)
                return acc[...].astype(self.dtype)

            values = pl.run_scoped(sums, plgpu.ACC(tiles.own, jnp.float32))

            @pl.when(place.steps > 0)
            def _():
                plgpu.barrier_arrive(free.at[slot_of(place.steps - 1)])

            self.store(refs, smem["out"].at[wg], values, place, wg)

        self.for_tiles(refs, tile)
        plgpu.wait_smem_to_gmem(0)

    def part(self, wg) -> tuple:
        """A consumer's first row and column in its program's tile."""
        rows, columns = self.tiles.own
        if self.tiles.split == "rows":
            return pl.multiple_of(wg * rows, rows), 0
        return 0, pl.multiple_of(wg * columns, columns)

    def send(self, slots, values, first: tuple, out):
        """Stores a consumer's values by TMA, which leaves out what lies past the array's ends.

        Mosaic drops the index of pieces along columns where the array has one such piece, so that
        later ones would land on the first: they are left out here.

        Args:
          first: row and column of the values.
          out: the array they are part of.
        """
        narrow = self.shape[2] == PIECE
        places = [
            (down, right)
            for down in range(0, values.shape[0], PIECE)
            for right in range(0, PIECE if narrow else values.shape[1], PIECE)
        ]

        def run():
            for i, (down, right) in enumerate(places):
                slot = slots.at[i % self.tiles.slots]
                plgpu.wait_smem_to_gmem(self.tiles.slots - 1, wait_read_only=True)
                slot[...] = values[down : down + PIECE, right : right + PIECE]
                plgpu.commit_smem()
                row, column = first[0] + down, first[1] + right
                plgpu.copy_smem_to_gmem(slot, out.at[pl.ds(row, PIECE), pl.ds(column, PIECE)])

        pl.when(first[1] == 0)(run) if narrow else run()

    def mate(self, which: str):
        """0 or 1: which of the two programs along a side this is."""
        return lax.axis_index(PAIR) if self.tiles.pair == which else 0

    def body(self, refs):
        tiles = self.tiles
        smem = {
            "lhs": swizzled((tiles.stages, *self.lhs_shape()), self.dtype),
            "rhs": swizzled((tiles.stages, *self.rhs_shape()), self.dtype),
            "out": swizzled((CONSUMERS, tiles.slots, PIECE, PIECE), self.dtype),
        }
        full = plgpu.Barrier(num_arrivals=2, num_barriers=tiles.stages)
        if tiles.pair:
            free = plgpu.ClusterBarrier(
                num_arrivals=CONSUMERS, num_barriers=tiles.stages, collective_axes=(PAIR,)
            )
        else:
            free = plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=tiles.stages)

        roles(self, refs, smem, full, free)

    def call(self, name: str, inputs: dict, out: tuple[int, ...]) -> jax.Array:
        """Runs the kernel."""
        grid = {"cta": self.ctas // 2, PAIR: 2} if self.tiles.pair else {"cta": self.ctas}
        outputs = {"out": jax.ShapeDtypeStruct(out, self.dtype)}
        (found,) = run_kernel(self, inputs, outputs, name=name, grid=grid, interpret=self.interpret)
        return found


@dataclasses.dataclass(frozen=True)
class Rows(Frame):
    """out[r] = lhs[r] rhs[group of r], or rhs transposed."""

    transpose: bool

    def lhs_shape(self) -> tuple[int, int]:
        return self.tiles.rows, self.tiles.depth

    def rhs_shape(self) -> tuple[int, int]:
        depth, columns = self.tiles.depth, self.tiles.columns
        return (columns, depth) if self.transpose else (depth, columns)

    def columns(self) -> int:
        return pl.cdiv(self.shape[2], self.tiles.span[1])

    def count(self, refs):
        return refs["count"][0] * self.columns()

    def place(self, refs, index) -> Place:
        table, tiles = refs["table"], self.tiles
        # Some row tile of the band that the tile lies in: it knows where its band begins.
        some = lax.div(index, self.columns())
        first, height = table[FIRST, some], table[HEIGHT, some]
        within = index - first * self.columns()
        tile = first + lax.rem(within, height)
        column = lax.div(within, height) * tiles.span[1] + self.mate("columns") * tiles.columns
        group = table[GROUP, tile]
        steps = pl.cdiv(self.shape[1], tiles.depth)
        return Place(
            group=group,
            row=pl.multiple_of(table[ROW, tile], UNIT) + self.mate("rows") * tiles.rows,
            column=column,
            start=table[START, tile],
            stop=table[STOP, tile],
            steps=jnp.where(group < self.shape[3], jnp.int32(steps), 0),
        )

    def sources(self, refs, place: Place, step):
        tiles = self.tiles
        deep = pl.ds(step * tiles.depth, tiles.depth)
        across = pl.ds(place.column, tiles.columns)
        lhs = refs["lhs"].at[pl.ds(place.row, tiles.rows), deep]
        where = (across, deep) if self.transpose else (deep, across)
        return lhs, refs["rhs"].at[(place.group, *where)]

    def multiply(self, acc, lhs, rhs, place: Place, step, wg):
        del place, step
        rows, columns = self.tiles.own
        row, column = self.part(wg)
        if self.tiles.split == "rows":
            lhs = lhs.at[pl.ds(row, rows)]
        else:
            across = pl.ds(column, columns)
            rhs = rhs.at[across] if self.transpose else rhs.at[:, across]
        plgpu.wgmma(acc, lhs, rhs.T if self.transpose else rhs)

    def store(self, refs, slots, values, place: Place, wg):
        """By TMA where all rows are the group's own, else by threads, each for itself."""
        rows = self.tiles.own[0]
        row, column = (x + y for x, y in zip((place.row, place.column), self.part(wg), strict=True))
        low, high = place.start - row, place.stop - row
        whole = (low <= 0) & (high >= rows)
        out = refs["out"]

        @pl.when(whole)
        def _():
            self.send(slots, values, (row, column), out)

        @pl.when(jnp.logical_not(whole) & (high > 0))
        def _():
            where = out.at[pl.ds(row, rows), pl.ds(column, values.shape[1])]
            bounds = (low, high, self.shape[2] - column)
            store_inside(where, values, bounds, interpret=self.interpret)


@dataclasses.dataclass(frozen=True)
class Groups(Frame):
    """out[g] = lhs[rows of g]T rhs[rows of g]; shape is rows, inputs, outputs, groups."""

    def lhs_shape(self) -> tuple[int, int]:
        return self.tiles.depth, self.tiles.rows

    def rhs_shape(self) -> tuple[int, int]:
        return self.tiles.depth, self.tiles.columns

    def grid(self) -> tuple[int, int]:
        """Tiles down and across a group's matrix."""
        rows, columns = self.tiles.span
        return pl.cdiv(self.shape[1], rows), pl.cdiv(self.shape[2], columns)

    def count(self, refs):
        down, across = self.grid()
        return jnp.int32(down * across * self.shape[3])

    def place(self, refs, index) -> Place:
        tiles = self.tiles
        down, across = self.grid()
        group, rest = lax.div(index, down * across), lax.rem(index, down * across)
        band = lax.div(rest, tiles.band * across)
        height = jnp.minimum(tiles.band, down - band * tiles.band)
        within = rest - band * tiles.band * across
        row, column = band * tiles.band + lax.rem(within, height), lax.div(within, height)
        start, stop = refs["table"][0, group], refs["table"][1, group]
        return Place(
            group=group,
            row=row * tiles.span[0] + self.mate("rows") * tiles.rows,
            column=column * tiles.span[1] + self.mate("columns") * tiles.columns,
            start=start,
            stop=stop,
            steps=jnp.where(stop > start, pl.cdiv(stop - begin(start), tiles.depth), 0),
        )

    def sources(self, refs, place: Place, step):
        tiles = self.tiles
        deep = pl.ds(begin(place.start) + step * tiles.depth, tiles.depth)
        lhs = refs["lhs"].at[deep, pl.ds(place.row, tiles.rows)]
        return lhs, refs["rhs"].at[deep, pl.ds(place.column, tiles.columns)]

    def multiply(self, acc, lhs, rhs, place: Place, step, wg):
        rows, columns = self.tiles.own
        row, column = self.part(wg)
        if self.tiles.split == "rows":
            lhs = lhs.at[:, pl.ds(row, rows)]
        else:
            rhs = rhs.at[:, pl.ds(column, columns)]
        first = begin(place.start) + step * self.tiles.depth
        low, high = place.start - first, place.stop - first

        # What both consumers read both clear, alike: each waits for its own writes only.
        @pl.when((low > 0) | (high < self.tiles.depth))
        def _():
            clear(lhs, low, high)
            clear(rhs, low, high)
            plgpu.commit_smem()

        plgpu.wgmma(acc, lhs.T, rhs)

    def store(self, refs, slots, values, place: Place, wg):
        row, column = (x + y for x, y in zip((place.row, place.column), self.part(wg), strict=True))
        self.send(slots, values, (row, column), refs["out"].at[place.group])


@lowered_once("transpose", "tiles", "processors", "interpret")
def product(
    lhs: jax.Array,
    rhs: jax.Array,
    tables: Map,
    *,
    transpose: bool,
    tiles: Tiles,
    processors: int = 132,
    interpret: bool = False,
) -> jax.Array:
    """out[r] = lhs[r] rhs[group of r] (rhs transposed with `transpose`); zeros for no group.

    Args:
      lhs: [R, I]. rhs: [E, I, O], or [E, O, I] with `transpose`.
      tables: of `row_tiles` for these tiles.
      processors: of the device.
    """
    outputs = rhs.shape[1 if transpose else 2]
    shape = (lhs.shape[0], lhs.shape[1], outputs, rhs.shape[0])
    kernel = Rows(shape, jnp.dtype(lhs.dtype), tiles, even(processors), interpret, transpose)
    inputs = {"lhs": lhs, "rhs": rhs, "table": tables.table, "count": tables.count}
    # The interpreter writes no part of a tile.
    more = tiles.span if interpret else (0, 0)
    out = kernel.call("grouped_matmul", inputs, (lhs.shape[0] + more[0], outputs + more[1]))
    return out[: lhs.shape[0], :outputs]


@lowered_once("tiles", "processors", "interpret")
def outer(
    lhs: jax.Array,
    rhs: jax.Array,
    bounds: jax.Array,
    *,
    tiles: Tiles,
    processors: int = 132,
    interpret: bool = False,
) -> jax.Array:
    """out[g] = lhs[rows of g]T rhs[rows of g], [E, I, O]; zeros for a group without rows.

    Args:
      lhs: [R, I]. rhs: [R, O].
      bounds: int32 [2, E], first row and end of each group.
      processors: of the device.
    """
    shape = (lhs.shape[0], lhs.shape[1], rhs.shape[1], bounds.shape[1])
    kernel = Groups(shape, jnp.dtype(lhs.dtype), tiles, even(processors), interpret)
    inputs = {"lhs": lhs, "rhs": rhs, "table": bounds}
    return kernel.call("grouped_matmul_groups", inputs, (shape[3], shape[1], shape[2]))


def begin(start):
    """The row from which a group's rows are read."""
    return pl.multiple_of(lax.div(start, UNIT) * UNIT, UNIT)


def even(processors: int) -> int:
    """As many programs as can stand in pairs."""
    return processors // 2 * 2
