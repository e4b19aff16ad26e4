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
UNROLLED = 4  # blocks of inputs between two of which a product may be on its way


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles:
    """How a product is cut; any choice gives the same result.

    Attributes:
      halves: of 64 rows, that a consumer has.
      blocks: of `width` outputs, that it has; one of the two is 1.
      width: outputs of one product: 128, or 192.
      ahead: a product is begun before the sums of the one before are added; for one half and block.
      stages: blocks of inputs in flight.
      band: row tiles that share the values before the next outputs come, for the L2 cache.
      shared: what two programs of a cluster share: `x` (they have neighbouring outputs), `values`
        (neighbouring rows) or nothing.
      piece: columns of a result that leave together.
      buffers: pieces on their way.
    """

    halves: int = 2
    blocks: int = 1
    width: int = BLOCK
    ahead: bool = False
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
        return self.blocks * self.width

    @property
    def span(self) -> int:
        """Outputs of a product that are sure to have one scale."""
        return BLOCK if self.width % BLOCK == 0 else HALF

    @property
    def beside(self) -> tuple[int, int]:
        """Tiles of rows and of outputs that a cluster has."""
        return 1 + (self.shared == "values"), 1 + (self.shared == "x")


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
        """body(tile of rows, tile of outputs, steps before) over this program's share of tiles."""
        down, across = self.tiles.beside
        mate = lax.axis_index(PAIR) if self.tiles.shared else 0
        high = pl.cdiv(self.shape[0], self.tiles.rows * down)
        wide = pl.cdiv(self.shape[2], self.tiles.outputs * across)
        band = min(max(1, self.tiles.band // down), high)
        first, ctas = lax.axis_index("cta"), self.ctas // (down * across)
        mine = lax.div(high * wide - first + ctas - 1, ctas)

        def tile(i, _):
            index = first + i * ctas
            which = lax.div(index, band * wide)
            height = jnp.minimum(high - which * band, band)
            within = index - which * band * wide
            row = which * band + lax.rem(within, height)
            column = lax.div(within, height)
            row = row * down + (mate if down > 1 else 0)
            column = column * across + (mate if across > 1 else 0)
            body(row, column, i * self.steps)

        lax.fori_loop(0, mine, tile, None)

    def load(self, refs, smem, full, free):
        """The memory warpgroup's part."""
        tiles = self.tiles
        high = tiles.rows // tiles.halves

        def tile(row, column, before):
            def one(step, _):
                slot = lax.rem(before + step, tiles.stages)
                plgpu.barrier_wait(free["ring"].at[slot])
                deep = pl.ds(step * BLOCK, BLOCK)

                def copy(name, source, target, part):
                    shared = PAIR if tiles.shared == name else None
                    barrier = full[part].at[slot]
                    plgpu.copy_gmem_to_smem(source, target, barrier, collective_axes=shared)

                whole = pl.ds(row * tiles.rows, tiles.rows)
                copy("x_scale", refs["x_scale"].at[step, whole], smem["x_scale"].at[slot], 0)
                for part in range(max(tiles.halves, tiles.blocks)):
                    if part < tiles.halves:
                        own = pl.ds(row * tiles.rows + part * high, high)
                        target = smem["x"].at[slot, pl.ds(part * high, high)]
                        copy("x", refs["x"].at[own, deep], target, part)
                    if part < tiles.blocks:
                        outputs = pl.ds(column * tiles.outputs + part * tiles.width, tiles.width)
                        target = smem["values"].at[slot, pl.ds(part * tiles.width, tiles.width)]
                        copy("values", refs["values"].at[outputs, deep], target, part)

            lax.fori_loop(0, self.steps, one, None)

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
            places = [lax.div(column * spans + i, 2) for i in range(spans)]
        if self.shape[2] % (tiles.outputs * tiles.beside[1]):
            places = [jnp.minimum(place, most) for place in places]
        return [scale[place, step] for place in places]

    def row_scale(self, smem, slot, half, wg):
        own = pl.ds(pl.multiple_of((half * CONSUMERS + wg) * HALF, HALF), HALF)
        return plgpu.load(smem["x_scale"].at[slot, own], layout=ROW)

    def multiply(self, acc, smem, slot, part, wg):
        """Begins a product; `part` is its half and block."""
        half, block = part
        own = pl.ds(pl.multiple_of((half * CONSUMERS + wg) * HALF, HALF), HALF)
        these = pl.ds(block * self.tiles.width, self.tiles.width)
        plgpu.wgmma(acc, smem["x"].at[slot, own], smem["values"].at[slot, these].T)

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

    def one_at_a_time(self, at, step, sums, factors):
        """Adds the products of a block of inputs, each when it is done."""
        smem, full, free, before, wg = at
        tiles = self.tiles
        slot = lax.rem(before + step, tiles.stages)
        parts = [(h, b) for h in range(tiles.halves) for b in range(tiles.blocks)]
        each, out = tiles.width // tiles.span, []
        for i, part in enumerate(parts):
            plgpu.barrier_wait(full[i].at[slot])

            def product(acc, part=part):
                self.multiply(acc, smem, slot, part, wg)
                scale = self.row_scale(smem, slot, part[0], wg)
                plgpu.wgmma_wait(0)
                return acc[...], scale

            found, scale = pl.run_scoped(product, plgpu.ACC((HALF, tiles.width), jnp.float32))
            if i == len(parts) - 1:
                plgpu.barrier_arrive(free["ring"].at[slot])
            mine = factors[part[1] * each : (part[1] + 1) * each]
            out += self.added(sums[i * each : (i + 1) * each], found, scale, mine)
        return out

    def one_ahead(self, at, step, sums, factors, following):
        """Adds some blocks of inputs; a product is on its way while the one before is added."""
        smem, full, free, before, wg = at
        tiles = self.tiles

        def product(u, total, factor, held):
            slot = lax.rem(before + step + u, tiles.stages)
            plgpu.barrier_wait(full[0].at[slot])

            def begun(acc):
                self.multiply(acc, smem, slot, (0, 0), wg)
                now = acc, slot, self.row_scale(smem, slot, 0, wg)
                later = following(step + u + 1)
                found = total if held is None else add(total, held, factor, 1)
                own = factors if held is None else later_of[u]
                later_of[u + 1] = later
                if u + 1 < self.unrolled:
                    return product(u + 1, found, own, now)
                return *add(found, now, own, 0), *later

            return pl.run_scoped(begun, plgpu.ACC((HALF, tiles.width), jnp.float32))

        later_of = {}

        def add(total, one, factor, wait_n):
            acc, slot, scale = one
            if self.interpret:
                found = acc[...]
            else:
                found = plgpu.wgmma_accumulator_load(acc, wait_n=wait_n)
            plgpu.barrier_arrive(free["ring"].at[slot])
            return self.added(total, found, scale, factor)

        return product(0, sums, factors, None)

    @property
    def unrolled(self) -> int:
        if not self.tiles.ahead:
            return 1
        return next(n for n in (UNROLLED, 2, 1) if self.steps % n == 0)

    def compute(self, refs, smem, full, free):
        """A consumer's part."""
        tiles, wg = self.tiles, lax.axis_index("wg")
        for slot in range(tiles.stages):
            plgpu.barrier_arrive(free["ring"].at[slot])
        each = tiles.width // tiles.span
        count = tiles.halves * tiles.blocks * each

        def tile(row, column, before):
            at = smem, full, free, before, wg

            def following(step):
                return self.factors(refs["scale"], column, step)

            def one(i, carry):
                step = i * self.unrolled
                sums, factors = list(carry[:count]), list(carry[count:])
                if tiles.ahead:
                    return self.one_ahead(at, step, sums, factors, following)
                later = following(step + 1)
                return *self.one_at_a_time(at, step, sums, factors), *later

            empty = jnp.zeros((HALF, tiles.span), jnp.float32)
            if not self.interpret:
                empty = plgpu.layout_cast(empty, SQUARE)
            carry = (*([empty] * count), *following(0))
            found = lax.fori_loop(0, self.steps // self.unrolled, one, carry)[:count]
            self.send(refs, smem["out"].at[wg], found, (row, column, wg))

        self.for_tiles(tile)
        plgpu.wait_smem_to_gmem(0)

    def send(self, refs, shared, sums, where):
        """Stores a consumer's results by TMA, which leaves out what lies past the end."""
        tiles, (row, column, wg) = self.tiles, where
        spans = tiles.width // tiles.span * tiles.blocks
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
        parts = max(tiles.halves, tiles.blocks)
        arrivals = [3] + [1] * (parts - 1)
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
    return out
