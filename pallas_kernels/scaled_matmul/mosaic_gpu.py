# Types of jax's Mosaic GPU objects are not public.
# pyright: reportPrivateImportUsage=false, reportAbstractUsage=false, reportIndexIssue=false, reportAttributeAccessIssue=false, reportCallIssue=false
"""The product on Hopper: one warpgroup loads, two multiply (Pallas, Mosaic GPU backend).

The tensor cores sum eight-bit products with few bits, so that each block of 128 inputs is summed by
itself, and its sums are added in float32 with both sides' scales: the very places where the scales
change. As many programs as processors walk over the tiles; while one consumer adds, the other one
multiplies.
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
from pallas_kernels.target import interpreting, processors
from pallas_kernels.warpgroups import (
    CONSUMERS,
    PAIR,
    ROW,
    SQUARE,
    along,
    drain,
    roles,
    run_kernel,
    swizzled,
)

__all__ = ["BLOCK", "Tiles", "run"]

BLOCK = 128  # inputs, and outputs, of one scale of the values
HALF = 64  # rows of one product


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles:
    """How a product is cut; any choice gives the same result.

    Attributes:
      halves: of 64 rows, that a consumer has; one product after the other.
      parts: outputs of the products that a consumer begins together; 128, or what has 192 in all.
      ahead: blocks of inputs between two of which a product is begun before the sums of the one
        before are added, for one half; 0: never.
      stages: blocks of inputs in flight.
      band: row tiles that share the values before the next outputs come, for the L2 cache.
      shared: what two programs of a cluster share: `x` (they have neighbouring outputs), `values`
        (neighbouring rows) or nothing.
      piece: columns of a result that leave together.
      buffers: pieces on their way.
    """

    halves: int = 2
    parts: tuple[int, ...] = (BLOCK,)
    ahead: int = 0
    stages: int = 4
    band: int = 16
    shared: str = ""
    piece: int = 64
    buffers: int = 1

    @property
    def rows(self) -> int:
        """Of a program's tile."""
        return CONSUMERS * self.halves * HALF

    @property
    def outputs(self) -> int:
        """Of a program's tile."""
        return sum(self.parts)

    @property
    def span(self) -> int:
        """Outputs that are sure to have one scale, and lie in one product."""
        return math.gcd(*self.parts, HALF if self.outputs % BLOCK else BLOCK)

    @property
    def beside(self) -> tuple[int, int]:
        """Tiles of rows and of outputs that a cluster has."""
        return 1 + (self.shared == "values"), 1 + (self.shared == "x")


@dataclasses.dataclass(frozen=True)
class At:
    """Where a consumer is: memory, barriers, slot, itself, and the values' scales."""

    smem: dict
    full: tuple
    free: dict
    slot: Any
    wg: Any
    factors: list


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One compiled kernel.

    Attributes:
      shape: rows, inputs, outputs.
      ctas: programs.
    """

    shape: tuple[int, int, int]
    dtype: jnp.dtype
    out_dtype: jnp.dtype
    tiles: Tiles
    ctas: int
    interpret: bool

    @property
    def steps(self) -> int:
        return self.shape[1] // BLOCK

    def for_tiles(self, body):
        """body(tile of rows, tile of outputs, slot) -> slot, over this program's share of tiles."""
        down, across = self.tiles.beside
        mate = lax.axis_index(PAIR) if self.tiles.shared else 0
        high = pl.cdiv(self.shape[0], self.tiles.rows * down)
        wide = pl.cdiv(self.shape[2], self.tiles.outputs * across)
        band = min(max(1, self.tiles.band // down), high)
        first, ctas = lax.axis_index("cta"), self.ctas // (down * across)
        mine = lax.div(high * wide - first + ctas - 1, ctas)

        def tile(i, slot):
            index = first + i * ctas
            which = lax.div(index, band * wide)
            height = jnp.minimum(high - which * band, band)
            within = index - which * band * wide
            row = which * band + lax.rem(within, height)
            column = lax.div(within, height)
            row = row * down + (mate if down > 1 else 0)
            column = column * across + (mate if across > 1 else 0)
            return body(row, column, slot)

        lax.fori_loop(0, mine, tile, jnp.int32(0))

    def after(self, slot, count=1):
        """The slot so many blocks of inputs later, at most as many as there are slots."""
        stages, slot = self.tiles.stages, slot + count
        if stages & (stages - 1) == 0:
            return slot & (stages - 1)
        return jnp.where(slot >= stages, slot - stages, slot)

    def load(self, refs, smem, full, free):
        """The memory warpgroup's part."""
        tiles = self.tiles
        high = tiles.rows // tiles.halves

        def tile(row, column, slot):
            def one(step, slot):
                plgpu.barrier_wait(free["ring"].at[slot])
                deep = pl.ds(step * BLOCK, BLOCK)

                def copy(name, source, target, part):
                    shared = PAIR if tiles.shared == name else None
                    barrier = full[part].at[slot]
                    plgpu.copy_gmem_to_smem(source, target, barrier, collective_axes=shared)

                whole = pl.ds(row * tiles.rows, tiles.rows)
                copy("x_scale", refs["x_scale"].at[step, whole], smem["x_scale"].at[slot], 0)
                outputs = pl.ds(column * tiles.outputs, tiles.outputs)
                copy("values", refs["values"].at[outputs, deep], smem["values"].at[slot], 0)
                for half in range(tiles.halves):
                    own = pl.ds(row * tiles.rows + half * high, high)
                    target = smem["x"].at[slot, pl.ds(half * high, high)]
                    copy("x", refs["x"].at[own, deep], target, half)
                return self.after(slot)

            return lax.fori_loop(0, self.steps, one, slot)

        self.for_tiles(tile)
        drain(free)

    def factors(self, scale, column, step):
        """The values' scales for each span of outputs of a tile."""
        tiles, most = self.tiles, self.shape[2] // BLOCK - 1
        step = jnp.minimum(step, self.steps - 1)
        spans = tiles.outputs // tiles.span
        if tiles.span == BLOCK:
            places = [column * spans + i for i in range(spans)]
        else:
            places = [lax.div(column * spans + i, BLOCK // tiles.span) for i in range(spans)]
        if self.shape[2] % (tiles.outputs * tiles.beside[1]):
            places = [jnp.minimum(place, most) for place in places]
        return [scale[place, step] for place in places]

    def row_scale(self, smem, slot, half, wg):
        own = pl.ds(pl.multiple_of((half * CONSUMERS + wg) * HALF, HALF), HALF)
        return plgpu.load(smem["x_scale"].at[slot, own], layout=ROW)

    def multiply(self, acc, at, slot, half, column):
        """Begins a product of 64 rows and the outputs from `column` on."""
        own = pl.ds(pl.multiple_of((half * CONSUMERS + at.wg) * HALF, HALF), HALF)
        these = pl.ds(column, acc.shape[1])
        plgpu.wgmma(acc, at.smem["x"].at[slot, own], at.smem["values"].at[slot, these].T)

    def found(self, acc, wait_n):
        """A product's sums, when at most `wait_n` others are on their way."""
        return acc[...] if self.interpret else plgpu.wgmma_accumulator_load(acc, wait_n=wait_n)

    def added(self, sums, found, row_scale, factors):
        """The sums of each span, with a product's added."""
        span = self.tiles.span
        pieces = [found[:, i * span : (i + 1) * span] for i in range(len(sums))]
        if len(sums) == 1:
            pieces = [found]
        return [
            total + piece * along(row_scale * factor, piece.shape, 0)
            for total, piece, factor in zip(sums, pieces, factors, strict=True)
        ]

    @property
    def places(self):
        """(first output, first span, spans) of each product that is begun together with others."""
        starts = [sum(self.tiles.parts[:i]) for i in range(len(self.tiles.parts))]
        span = self.tiles.span
        widths = zip(starts, self.tiles.parts, strict=True)
        return [(start, start // span, width // span) for start, width in widths]

    def together(self, at, sums, factors):
        """Adds a block of inputs: the products of each half of the rows, begun together."""
        tiles, slot = self.tiles, at.slot
        out, each = [], tiles.outputs // tiles.span
        for half in range(tiles.halves):
            plgpu.barrier_wait(at.full[half].at[slot])

            def products(*accs, half=half):
                for acc, (start, _, _) in zip(accs, self.places, strict=True):
                    self.multiply(acc, at, slot, half, start)
                row_scale, own = self.row_scale(at.smem, slot, half, at.wg), []
                for i, (_, first, count) in enumerate(self.places):
                    found = self.found(accs[i], len(accs) - 1 - i)
                    if half == tiles.halves - 1 and i == len(accs) - 1:
                        plgpu.barrier_arrive(at.free["ring"].at[slot])
                    these = slice(half * each + first, half * each + first + count)
                    own += self.added(sums[these], found, row_scale, factors[first : first + count])
                return own

            accs = [plgpu.ACC((HALF, width), jnp.float32) for width in tiles.parts]
            out += pl.run_scoped(products, *accs)
        return out

    def one_ahead(self, at, step, sums, following):
        """Adds some blocks of inputs; a product is on its way while the one before is added.

        following: step -> the values' scales.
        """
        tiles, parts = self.tiles, len(self.tiles.parts)
        factors, sums, kept = {}, list(sums), {}

        def add(i, wait_n):
            acc, slot, row_scale = kept[i]
            _, first, count = self.places[i % parts]
            found = self.found(acc, wait_n)
            if i % parts == parts - 1:
                plgpu.barrier_arrive(at.free["ring"].at[slot])
            own = factors[i // parts][first : first + count]
            sums[first : first + count] = self.added(
                sums[first : first + count], found, row_scale, own
            )

        def product(i):
            u, part = divmod(i, parts)
            slot = self.after(at.slot, u)
            if part == 0:
                factors[u] = following(step + u) if u else at.factors
                plgpu.barrier_wait(at.full[0].at[slot])

            def begun(acc):
                self.multiply(acc, at, slot, 0, self.places[part][0])
                same = kept[i - 1][2] if part else self.row_scale(at.smem, slot, 0, at.wg)
                kept[i] = acc, slot, same
                if i:
                    add(i - 1, 1)
                if i + 1 < self.unrolled * parts:
                    return product(i + 1)
                later = following(step + self.unrolled)
                add(i, 0)
                return self.after(slot), *sums, *later

            return pl.run_scoped(begun, plgpu.ACC((HALF, tiles.parts[part]), jnp.float32))

        return product(0)

    @property
    def unrolled(self) -> int:
        return math.gcd(self.steps, self.tiles.ahead or 1)

    def compute(self, refs, smem, full, free):
        """A consumer's part."""
        tiles, wg = self.tiles, lax.axis_index("wg")
        for slot in range(tiles.stages):
            plgpu.barrier_arrive(free["ring"].at[slot])
        count = tiles.halves * tiles.outputs // tiles.span

        def tile(row, column, slot):
            def following(step):
                return self.factors(refs["scale"], column, step)

            def one(i, carry):
                step = i * self.unrolled
                slot, *carry = carry
                sums, factors = carry[:count], carry[count:]
                at = At(smem, full, free, slot, wg, factors)
                if tiles.ahead:
                    return self.one_ahead(at, step, sums, following)
                later = following(step + 1)
                return self.after(slot), *self.together(at, sums, factors), *later

            empty = jnp.zeros((HALF, tiles.span), jnp.float32)
            if not self.interpret:
                empty = plgpu.layout_cast(empty, SQUARE)
            carry = (slot, *([empty] * count), *following(0))
            slot, *found = lax.fori_loop(0, self.steps // self.unrolled, one, carry)
            self.send(refs, smem["out"].at[wg], found[:count], (row, column, wg))
            return slot

        self.for_tiles(tile)
        plgpu.wait_smem_to_gmem(0)

    def send(self, refs, shared, sums, where):
        """Stores a consumer's results by TMA, which leaves out what lies past the end."""
        tiles, (row, column, wg) = self.tiles, where
        spans = tiles.outputs // tiles.span
        turn = 0
        for at, total in enumerate(sums):
            half, span = divmod(at, spans)
            values = total.astype(self.out_dtype)
            down = pl.ds(row * tiles.rows + (half * CONSUMERS + wg) * HALF, HALF)
            for i in range(0, tiles.span, tiles.piece):
                buffer = shared.at[turn % tiles.buffers]
                plgpu.wait_smem_to_gmem(tiles.buffers - 1, wait_read_only=True)
                buffer[...] = values[:, i : i + tiles.piece]
                plgpu.commit_smem()
                across = pl.ds(column * tiles.outputs + span * tiles.span + i, tiles.piece)
                plgpu.copy_smem_to_gmem(buffer, refs["out"].at[down, across])
                turn += 1

    def body(self, refs):
        tiles = self.tiles
        stages = tiles.stages
        smem = {
            "x": swizzled((stages, tiles.rows, BLOCK), self.dtype),
            "values": swizzled((stages, tiles.outputs, BLOCK), self.dtype),
            "x_scale": plgpu.SMEM((stages, tiles.rows), jnp.float32),
            "out": swizzled((CONSUMERS, tiles.buffers, HALF, tiles.piece), self.out_dtype),
        }
        arrivals = [3] + [1] * (tiles.halves - 1)
        full = tuple(plgpu.Barrier(num_arrivals=n, num_barriers=stages) for n in arrivals)
        kind: dict[str, Any] = {"num_arrivals": CONSUMERS, "num_barriers": stages}
        if tiles.shared:
            free = {"ring": plgpu.ClusterBarrier(**kind, collective_axes=(PAIR,))}
        else:
            free = {"ring": plgpu.Barrier(**kind)}
        roles(self, refs, smem, full, free)


@lowered_once("tiles", "out_dtype")
def run(x, x_scale, values, scale, *, tiles: Tiles, out_dtype: str) -> jax.Array:
    """[M, O] of `out_dtype`; see `scaled_matmul` for the rest."""
    asked = x.shape[0]
    if asked > 8:  # less than a tile of eight rows or whole ones are what TMA takes
        x, x_scale = (jnp.pad(z, ((0, -asked % 8), (0, 0))) for z in (x, x_scale))
    (count, inputs), outputs = x.shape, values.shape[0]
    down, across = tiles.beside
    high = pl.cdiv(count, tiles.rows * down)
    short = high * down * tiles.rows - count
    pairs = high * pl.cdiv(outputs, tiles.outputs * across)
    kernel = Kernel(
        shape=(count, inputs, outputs),
        dtype=jnp.dtype(x.dtype),
        out_dtype=jnp.dtype(out_dtype),
        tiles=tiles,
        ctas=min(processors() // (down * across), pairs) * down * across,
        interpret=interpreting(),
    )
    padded = jnp.pad(x_scale.T, ((0, 0), (0, short)))
    inputs = {"x": x, "x_scale": padded, "values": values, "scale": scale}
    (out,) = run_kernel(
        kernel,
        inputs,
        {"out": jax.ShapeDtypeStruct((count, outputs), kernel.out_dtype)},
        name="scaled_matmul",
        grid={"cta": kernel.ctas // 2, PAIR: 2} if tiles.shared else {"cta": kernel.ctas},
        interpret=kernel.interpret,
    )
    return out[:asked]
