# Types of jax's Mosaic GPU objects are not public.
# pyright: reportPrivateImportUsage=false, reportAbstractUsage=false, reportIndexIssue=false, reportAttributeAccessIssue=false, reportCallIssue=false
"""x times packed integers on Hopper: the weights are the register operand, x lies in shared memory.

A program of one warpgroup makes 64 outputs of all rows of x, over its share of the inputs: it loads
a tile of packed values, widens it in registers and multiplies it by x transposed (D = W xT, so that
the 64 rows of the instruction are outputs and few rows of x cost little). The sums of one group are
scaled when they are whole, which is less work than scaling the values, and keeps these exact.
Several small programs share a processor: one widens while others wait for memory or products.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.once import lowered_once
from pallas_kernels.quantized_matmul.streamed import bits_of, layouts
from pallas_kernels.warpgroups import COLUMN, ROW, along, multiply

__all__ = ["Tiles", "run"]

OUTPUTS = 64  # rows of one product: what a warpgroup's instruction has
_UPCAST = {4: plgpu.Layout.WGMMA_UPCAST_4X, 8: plgpu.Layout.WGMMA_UPCAST_2X}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles:
    """How a product is cut; any choice gives the same result up to rounding.

    Attributes:
      inputs: of one step; a divisor of the group, or the group.
      stages: steps in flight.
      splits: programs that share the inputs of a tile; their sums are added afterwards.
    """

    inputs: int = 128
    stages: int = 4
    splits: int = 1


@dataclasses.dataclass(frozen=True)
class Product:
    """One compiled kernel."""

    rows: int
    group: int
    tiles: Tiles
    bits: int
    interpret: bool

    def step(self, at, w_smem, x_smem, total, *, scale_of, shift_of, stage=None):
        """Adds what one tile of inputs gives to the sums [64, rows]."""
        row, column = (None, None) if self.interpret else (ROW, COLUMN)
        scale = plgpu.load(scale_of(at[0]), layout=row, optimized=False)
        if shift_of is not None:
            offset, sums = shift_of(at[0])
            offset = plgpu.load(offset, layout=row, optimized=False).astype(jnp.float32)
            sums = plgpu.load(sums, layout=column, optimized=False)
            total += along(offset, total.shape, 0) * along(sums, total.shape, 1)
        w = plgpu.load(w_smem, layout=None if self.interpret else _UPCAST[self.bits])
        if not self.interpret and self.bits == 4:  # values move between lanes while they are small
            w = plgpu.layout_cast(w, plgpu.Layout.WGMMA)
        w = w.astype(x_smem.dtype)
        if not self.interpret and self.bits == 8:
            w = plgpu.layout_cast(w, plgpu.Layout.WGMMA)

        def product(acc):
            multiply(acc, w, x_smem.T, stage)
            plgpu.wgmma_wait(0)
            return acc[...]

        part = pl.run_scoped(product, plgpu.ACC((OUTPUTS, self.rows), jnp.float32))
        return total + part * along(scale.astype(jnp.float32), part.shape, 0)

    def body(self, values, scale, x, *refs, out_smem, stage=None):
        *shift, out = refs
        tile, split = lax.axis_index("tile"), lax.axis_index("split")
        width, tiles = self.tiles.inputs, self.tiles
        steps = x.shape[1] // width // tiles.splits
        per_group = self.group // width
        start = split * steps
        rows = pl.ds(tile * OUTPUTS, OUTPUTS)
        # A number of each row; the sectors they come with hold those of the next steps.
        scale_at = lambda ref, k: ref.at[rows, lax.div(start + k, per_group)]  # noqa: E731
        scale_of = functools.partial(scale_at, scale)
        shift_of = None
        if shift:
            offset, sums = shift
            shift_of = lambda k: (scale_at(offset, k), sums.at[start + k])  # noqa: E731
        pipeline = plgpu.emit_pipeline(
            functools.partial(self.step, scale_of=scale_of, shift_of=shift_of, stage=stage),
            grid=(steps,),
            in_specs=[
                plgpu.BlockSpec(
                    (OUTPUTS, width),
                    lambda k: (0, start + k),
                    transforms=layouts(width, self.bits),
                ),
                plgpu.BlockSpec(
                    (self.rows, width), lambda k: (0, start + k), transforms=layouts(width, 16)
                ),
            ],
            max_concurrent_steps=min(tiles.stages, steps),
            init_carry=self.zeros(),
        )
        total = pipeline(values.at[rows], x)
        out_smem[...] = total
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_smem, out.at[split, rows])
        plgpu.wait_smem_to_gmem(0)

    def zeros(self):
        sums = jnp.zeros((OUTPUTS, self.rows), jnp.float32)
        return sums if self.interpret else plgpu.layout_cast(sums, plgpu.Layout.WGMMA)


@lowered_once("tiles", "interpret")
def run(
    x: jax.Array,
    values: jax.Array,
    scale: jax.Array,
    offset: jax.Array | None = None,
    *,
    tiles: Tiles = Tiles(),
    interpret: bool = False,
) -> jax.Array:
    """float32 [M, O] of x [M, K] times values [O, K] under scales, and offsets if any, [O, G].

    O is a multiple of 64, M of 8 and at most 256; `tiles.inputs` divides the group, and the splits
    divide the steps.
    """
    (count, inputs), outputs = x.shape, values.shape[0]
    group = inputs // scale.shape[1]
    bits = bits_of(values.dtype)
    kernel = Product(count, group, tiles, bits, interpret)
    out_type = jax.ShapeDtypeStruct((tiles.splits, outputs, count), jnp.float32)
    scratch = {"out_smem": plgpu.SMEM((OUTPUTS, count), jnp.float32)}
    if interpret:
        scratch["stage"] = plgpu.SMEM(
            (OUTPUTS, tiles.inputs), x.dtype, transforms=layouts(tiles.inputs, 16)
        )
    shift = ()
    if offset is not None:
        shift = offset, jnp.sum(x.astype(jnp.float32).reshape(count, -1, tiles.inputs), axis=2).T
    sums = plgpu.kernel(
        kernel.body,
        out_type=out_type,
        grid=(outputs // OUTPUTS, tiles.splits),
        grid_names=("tile", "split"),
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="quantized_matmul",
        interpret=plgpu.InterpretGPUParams() if interpret else False,
    )(values, scale, x, *shift)
    return jnp.sum(sums, axis=0).T
