# Types of jax's Mosaic GPU objects are not public.
# pyright: reportPrivateImportUsage=false, reportAbstractUsage=false, reportIndexIssue=false, reportAttributeAccessIssue=false, reportCallIssue=false
"""x times packed integers on Hopper: the weights are the register operand, x lies in shared memory.

A program makes some hundred outputs of all rows of x, over its share of the inputs. Its warpgroups
each widen a tile of packed values in registers and multiply it by x transposed (D = W xT, so that
the 64 rows of the instruction are outputs and few rows of x cost little); one more loads. The sums
of one group are scaled when they are whole, which is less work than scaling the values, and keeps
these exact.
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
from pallas_kernels.warpgroups import ROW, along, multiply

__all__ = ["Tiles", "run"]

OUTPUTS = 64  # rows of one product: what a warpgroup's instruction has
_UPCAST = {4: plgpu.Layout.WGMMA_UPCAST_4X, 8: plgpu.Layout.WGMMA_UPCAST_2X}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiles:
    """How a product is cut; any choice gives the same result up to rounding.

    Attributes:
      inputs: of one step; whole groups, or a divisor of one.
      stages: steps in flight.
      splits: programs that share the inputs of a tile; their sums are added afterwards.
      warpgroups: that compute in a program.
      tall: tiles of 64 outputs of each of them.
    """

    inputs: int = 128
    stages: int = 4
    splits: int = 1
    warpgroups: int = 2
    tall: int = 1


def _bits(dtype) -> int:
    return 4 if "4" in str(dtype) else 8


def _swizzled(width: int, bits: int) -> tuple:
    swizzle = plgpu.find_swizzle(width * bits)
    tiling = plgpu.TilingTransform((8, 8 * swizzle // bits))
    return tiling, plgpu.SwizzleTransform(swizzle)


@dataclasses.dataclass(frozen=True)
class Product:
    """One compiled kernel."""

    rows: int
    group: int
    tiles: Tiles
    bits: int
    turned: bool
    interpret: bool

    def widened(self, w_smem, dtype):
        w = plgpu.load(w_smem, layout=None if self.interpret else _UPCAST[self.bits])
        if not self.interpret and self.bits == 4:  # values move between lanes while they are small
            w = plgpu.layout_cast(w, plgpu.Layout.WGMMA)
        w = w.astype(dtype)
        if not self.interpret and self.bits == 8:
            w = plgpu.layout_cast(w, plgpu.Layout.WGMMA)
        return w

    def step(self, at, w_smem, x_smem, totals, *, scale, start, first, stage=None):
        """Adds what one tile of inputs gives to the sums [64, rows]."""
        width = min(self.group, self.tiles.inputs)
        groups = self.tiles.inputs // width
        per_group = self.group // width
        pairs = [(r, g) for r in range(self.tiles.tall) for g in range(groups)]
        wg = lax.axis_index("wg")

        def product(*accs):
            scales = []
            for (r, g), acc in zip(pairs, accs, strict=True):
                row = (wg * self.tiles.tall + r) * OUTPUTS
                index = lax.div((start + at[0]) * groups + g, per_group)
                one = scale.at[pl.ds(first + row, OUTPUTS), index]
                layout = None if self.interpret else ROW
                scales.append(plgpu.load(one, layout=layout, optimized=False))
                columns = pl.ds(g * width, width)
                w = self.widened(w_smem.at[pl.ds(row, OUTPUTS), columns], x_smem.dtype)
                at_stage = None if stage is None else stage.at[wg]
                multiply(acc, w, x_smem.at[:, columns].T, at_stage)
                if stage is not None:
                    plgpu.wgmma_wait(0)
            plgpu.wgmma_wait(0)
            return [acc[...] for acc in accs], scales

        shape = plgpu.ACC((OUTPUTS, self.rows), jnp.float32)
        parts, scales = pl.run_scoped(product, *[shape] * len(pairs))
        totals = list(totals)
        for (r, _), part, one in zip(pairs, parts, scales, strict=True):
            totals[r] += part * along(one.astype(jnp.float32), part.shape, 0)
        return tuple(totals)

    def body(self, values, scale, x, out, out_smem, stage=None):
        tile, split = lax.axis_index("tile"), lax.axis_index("split")
        tiles, width = self.tiles, self.tiles.inputs
        steps = x.shape[1] // width // tiles.splits
        start = split * steps
        high = OUTPUTS * tiles.tall * tiles.warpgroups
        first = tile * high

        def compute(pipeline):
            totals = pipeline(tuple(self.zeros() for _ in range(tiles.tall)))
            wg = lax.axis_index("wg")
            for r, total in enumerate(totals):
                part = out_smem.at[wg * tiles.tall + r]
                rows = pl.ds(first + (wg * tiles.tall + r) * OUTPUTS, OUTPUTS)
                if self.turned:
                    part.T[...] = total.astype(out.dtype)
                    plgpu.commit_smem()
                    part = part.at[pl.ds(0, out.shape[1])]
                    plgpu.copy_smem_to_gmem(part, out.at[split, :, rows])
                else:
                    part[...] = total
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(part, out.at[split, rows])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        pipeline = plgpu.emit_pipeline_warp_specialized(
            functools.partial(self.step, scale=scale, start=start, first=first, stage=stage),
            grid=(steps,),
            in_specs=[
                plgpu.BlockSpec(
                    (high, width),
                    lambda k: (tile, start + k),
                    transforms=_swizzled(min(width, self.group), self.bits),
                ),
                plgpu.BlockSpec(
                    (self.rows, width), lambda k: (0, start + k), transforms=_swizzled(width, 16)
                ),
            ],
            max_concurrent_steps=min(tiles.stages, steps),
            wg_axis="wg",
            num_compute_wgs=tiles.warpgroups,
            memory_registers=40,
            compute_context=compute,
        )
        pipeline(values, x)

    def zeros(self):
        sums = jnp.zeros((OUTPUTS, self.rows), jnp.float32)
        return sums if self.interpret else plgpu.layout_cast(sums, plgpu.Layout.WGMMA)


@lowered_once("tiles", "interpret", "out_dtype")
def run(
    x: jax.Array,
    values: jax.Array,
    scale: jax.Array,
    *,
    tiles: Tiles = Tiles(),
    out_dtype=jnp.float32,
    interpret: bool = False,
) -> jax.Array:
    """[M, O] of x [M, K] times values [O, K] under scales [O, G].

    O is a multiple of 64 x tall x warpgroups, M at most 256; `tiles.inputs` divides the group or the
    other way round, and the splits divide the steps.
    """
    (count, inputs), outputs = x.shape, values.shape[0]
    group = inputs // scale.shape[1]
    bits = _bits(values.dtype)
    rows = -(-count // 8) * 8
    if interpret:
        x = jnp.pad(x, ((0, rows - count), (0, 0)))
    # Only values of 16 bits can be turned round on the way to shared memory.
    turned = tiles.splits == 1 and jnp.dtype(out_dtype).itemsize == 2
    kernel = Product(rows, group, tiles, bits, turned, interpret)
    parts = tiles.tall * tiles.warpgroups
    if turned:
        out_type = jax.ShapeDtypeStruct((1, count, outputs), out_dtype)
        scratch = {"out_smem": plgpu.SMEM((parts, rows, OUTPUTS), out_dtype)}
    else:
        out_type = jax.ShapeDtypeStruct((tiles.splits, outputs, rows), jnp.float32)
        scratch = {"out_smem": plgpu.SMEM((parts, OUTPUTS, rows), jnp.float32)}
    if interpret:
        width = min(group, tiles.inputs)
        scratch["stage"] = plgpu.SMEM(
            (tiles.warpgroups, OUTPUTS, width), x.dtype, transforms=_swizzled(width, 16)
        )
    sums = plgpu.kernel(
        kernel.body,
        out_type=out_type,
        grid=(outputs // (OUTPUTS * parts), tiles.splits),
        grid_names=("tile", "split"),
        num_threads=tiles.warpgroups + 1,
        thread_name="wg",
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="quantized_matmul",
        interpret=plgpu.InterpretGPUParams() if interpret else False,
    )(values, scale, x)
    return sums[0] if turned else jnp.sum(sums, axis=0).T[:count].astype(out_dtype)
