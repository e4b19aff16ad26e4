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
PIECE = 64  # columns of a result that leave together


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles:
    """How a product is cut; any choice gives the same result.

    Attributes:
      halves: of 64 rows, that a consumer has.
      stages: blocks of inputs in flight.
      band: row tiles that share the values before the next outputs come, for the L2 cache.
      pair: two programs of a cluster have neighbouring outputs, and each brings half of the rows.
    """

    halves: int = 2
    stages: int = 4
    band: int = 16
    pair: bool = False

    @property
    def rows(self) -> int:
        """Of a program's tile."""
        return CONSUMERS * self.halves * HALF


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

    @property
    def down(self) -> int:
        return pl.cdiv(self.shape[0], self.tiles.rows)

    def for_tiles(self, body):
        """body(tile of rows, tile of outputs, steps before) over this program's share of tiles."""
        beside = 2 if self.tiles.pair else 1
        mate = lax.axis_index(PAIR) if self.tiles.pair else 0
        across, band = self.shape[2] // (beside * BLOCK), min(self.tiles.band, self.down)
        first, ctas = lax.axis_index("cta"), self.ctas // beside
        mine = lax.div(self.down * across - first + ctas - 1, ctas)

        def tile(i, _):
            index = first + i * ctas
            which = lax.div(index, band * across)
            height = jnp.minimum(self.down - which * band, band)
            within = index - which * band * across
            column = lax.div(within, height) * beside + mate
            body(which * band + lax.rem(within, height), column, i * self.steps)

        lax.fori_loop(0, mine, tile, None)

    def load(self, refs, smem, full, free):
        """The memory warpgroup's part."""

        def tile(row, column, before):
            own, outputs = (
                pl.ds(row * self.tiles.rows, self.tiles.rows),
                pl.ds(column * BLOCK, BLOCK),
            )

            def one(step, _):
                slot = lax.rem(before + step, self.tiles.stages)
                plgpu.barrier_wait(free["ring"].at[slot])
                deep = pl.ds(step * BLOCK, BLOCK)
                sources = {
                    "x": refs["x"].at[own, deep],
                    "values": refs["values"].at[outputs, deep],
                    "x_scale": refs["x_scale"].at[step, own],
                }
                for name, source in sources.items():
                    shared = PAIR if self.tiles.pair and name == "x" else None
                    target = smem[name].at[slot]
                    plgpu.copy_gmem_to_smem(source, target, full.at[slot], collective_axes=shared)

            lax.fori_loop(0, self.steps, one, None)

        self.for_tiles(tile)
        drain(free)

    def compute(self, refs, smem, full, free):
        """A consumer's part."""
        tiles, wg = self.tiles, lax.axis_index("wg")
        shape, first = (HALF, BLOCK), wg * tiles.halves * HALF
        for slot in range(tiles.stages):
            plgpu.barrier_arrive(free["ring"].at[slot])

        def tile(row, column, before):
            def one(step, carry):
                *sums, factor = carry
                slot = lax.rem(before + step, tiles.stages)
                following = refs["scale"][column, jnp.minimum(step + 1, self.steps - 1)]
                plgpu.barrier_wait(full.at[slot])
                out = []
                for half, total in enumerate(sums):
                    own = pl.ds(pl.multiple_of(first + half * HALF, HALF), HALF)
                    left, right = smem["x"].at[slot, own], smem["values"].at[slot]

                    def product(acc, left=left, right=right):
                        plgpu.wgmma(acc, left, right.T)
                        plgpu.wgmma_wait(0)
                        return acc[...]

                    found = pl.run_scoped(product, plgpu.ACC(shape, jnp.float32))
                    scale = plgpu.load(smem["x_scale"].at[slot, own], layout=ROW) * factor
                    out.append(total + found * along(scale, shape, 0))
                plgpu.barrier_arrive(free["ring"].at[slot])
                return *out, following

            empty = jnp.zeros(shape, jnp.float32)
            if not self.interpret:
                empty = plgpu.layout_cast(empty, SQUARE)
            carry = (*([empty] * tiles.halves), refs["scale"][column, 0])
            *sums, _ = lax.fori_loop(0, self.steps, one, carry)
            for half, total in enumerate(sums):
                self.send(
                    refs, smem["out"].at[wg], total, row * tiles.rows + first + half * HALF, column
                )

        self.for_tiles(tile)
        plgpu.wait_smem_to_gmem(0)

    def send(self, refs, shared, values, row, column):
        """Stores 64 rows by TMA, which leaves out what lies past the end."""
        values = values.astype(self.out_dtype)
        for i in range(0, BLOCK, PIECE):
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            shared[...] = values[:, i : i + PIECE]
            plgpu.commit_smem()
            target = refs["out"].at[pl.ds(row, HALF), pl.ds(column * BLOCK + i, PIECE)]
            plgpu.copy_smem_to_gmem(shared, target)

    def body(self, refs):
        stages = self.tiles.stages
        smem = {
            "x": swizzled((stages, self.tiles.rows, BLOCK), self.dtype),
            "values": swizzled((stages, BLOCK, BLOCK), self.dtype),
            "x_scale": plgpu.SMEM((stages, self.tiles.rows), jnp.float32),
            "out": swizzled((CONSUMERS, HALF, PIECE), self.out_dtype),
        }
        full = plgpu.Barrier(num_arrivals=3, num_barriers=stages)
        kind: dict[str, Any] = {"num_arrivals": CONSUMERS, "num_barriers": stages}
        if self.tiles.pair:
            free = {"ring": plgpu.ClusterBarrier(**kind, collective_axes=(PAIR,))}
        else:
            free = {"ring": plgpu.Barrier(**kind)}
        roles(self, refs, smem, full, free)


@lowered_once("tiles", "out_dtype")
def run(x, x_scale, values, scale, *, tiles: Tiles, out_dtype: str) -> jax.Array:
    """[M, O] of `out_dtype`; see `scaled_matmul` for the rest."""
    (count, inputs), outputs = x.shape, values.shape[0]
    down = pl.cdiv(count, tiles.rows)
    short = down * tiles.rows - count
    beside = 2 if tiles.pair else 1
    kernel = Kernel(
        shape=(count, inputs, outputs),
        dtype=jnp.dtype(x.dtype),
        out_dtype=jnp.dtype(out_dtype),
        tiles=tiles,
        ctas=min(processors() // beside * beside, down * (outputs // BLOCK)),
        interpret=interpreting(),
    )
    padded = jnp.pad(x_scale.T, ((0, 0), (0, short)))
    inputs = {"x": x, "x_scale": padded, "values": values, "scale": scale}
    (out,) = run_kernel(
        kernel,
        inputs,
        {"out": jax.ShapeDtypeStruct((count, outputs), kernel.out_dtype)},
        name="scaled_matmul",
        grid={"cta": kernel.ctas // 2, PAIR: 2} if tiles.pair else {"cta": kernel.ctas},
        interpret=kernel.interpret,
    )
    return out
