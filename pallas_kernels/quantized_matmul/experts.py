# Types of jax's Mosaic GPU objects are not public.
# pyright: reportPrivateImportUsage=false, reportAbstractUsage=false, reportIndexIssue=false, reportAttributeAccessIssue=false, reportCallIssue=false
"""Rows sorted by group times that group's matrix of packed numbers: experts of few rows.

Rows are laid out in blocks of one group each. A program of one warpgroup makes 64 outputs of one
block, as the kernel of `mosaic_gpu` does: the weights are the register operand. Blocks that hold no
row end at once, so that only the matrices of groups with rows are read.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.once import lowered_once
from pallas_kernels.quantized_matmul.order import natural, stored
from pallas_kernels.quantized_matmul.streamed import (
    CHUNK,
    OUTPUTS,
    Coding,
    Product,
    Share,
    Tiles,
    bits_of,
    layouts,
)

__all__ = ["Blocks", "blocks", "by_blocks", "rows_of_block"]

STAGES = 6


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Blocks:
    """Rows of a call in blocks of one group each.

    Attributes:
      owner: int32 [n], the group of each block; -1 for a block without rows.
      row: int32 [n, block], the row of each place; the number of rows where there is none.
      place: int32 [rows], the place of each row, counted over all blocks; -1 of no group's.
    """

    owner: jax.Array
    row: jax.Array
    place: jax.Array


def rows_of_block(rows: int, groups: int) -> int:
    """Rows of a block: 8 to 64, twice what a group has on average, so that most have one block."""
    block = 8
    while block < 64 and block * groups < 2 * rows:
        block *= 2
    return block


def blocks(sizes: jax.Array, rows: int, block: int) -> Blocks:
    """The blocks of groups of `sizes` [E] rows.

    Sizes that are data are taken as they are: a negative one counts as 0, groups end with the rows.
    Sums and searches are comparisons of all with all, which XLA makes few small kernels of.
    """
    groups = sizes.shape[0]
    upto = jnp.arange(groups)[:, None] >= jnp.arange(groups)[None]
    sums = lambda counts: jnp.sum(jnp.where(upto, counts[None], 0), axis=1)  # noqa: E731
    stops = jnp.minimum(sums(jnp.maximum(sizes.astype(jnp.int32), 0)), rows)
    starts = jnp.concatenate([jnp.zeros(1, jnp.int32), stops[:-1]])
    each = -(-(stops - starts) // block)
    ends = sums(each)
    place = jnp.arange(min(groups, rows) + rows // block, dtype=jnp.int32)
    owner = jnp.sum(ends[None] <= place[:, None], 1).astype(jnp.int32)
    inside = jnp.minimum(owner, groups - 1)
    row = starts[inside] + (place - (ends - each)[inside]) * block
    row = row[:, None] + jnp.arange(block, dtype=jnp.int32)[None]
    there = (owner < groups)[:, None] & (row < stops[inside][:, None])
    at = jnp.arange(rows, dtype=jnp.int32)
    group = jnp.minimum(jnp.sum(stops[None] <= at[:, None], 1), groups - 1)
    found = (ends - each)[group] * block + at - starts[group]
    found = jnp.where(at < stops[-1], found, -1)
    return Blocks(jnp.where(there[:, 0], owner, -1), jnp.where(there, row, rows), found)


@dataclasses.dataclass(frozen=True)
class Experts:
    """One compiled kernel."""

    product: Product
    steps: int

    def body(self, owners, values, scale, x, out, out_smem, stage=None):
        owner = owners[lax.axis_index("block")]

        @pl.when(owner >= 0)
        def _():
            self.block(owner, values, scale, x, out, out_smem, stage)

    def block(self, owner, values, scale, x, out, out_smem, stage):
        product, tiles = self.product, self.product.tiles
        width, block = tiles.inputs, lax.axis_index("block")
        outputs = pl.ds(lax.axis_index("tile") * OUTPUTS, OUTPUTS)
        scales = scale.at[owner, outputs]

        def step(at, w_smem, x_smem, total):
            return product.products(w_smem, x_smem, total, (scales, None, None), at[0], stage)

        pipeline = plgpu.emit_pipeline(
            step,
            grid=(self.steps,),
            in_specs=[
                plgpu.BlockSpec(
                    (OUTPUTS, width),
                    lambda k: (0, k),
                    transforms=layouts(min(width, CHUNK), product.bits),
                ),
                plgpu.BlockSpec(
                    (tiles.rows, width),
                    lambda k: (0, k),
                    transforms=layouts(min(width, product.group), 16),
                ),
            ],
            max_concurrent_steps=min(tiles.stages, self.steps),
            init_carry=product.zeros(),
        )
        total = pipeline(values.at[owner, outputs], x.at[block])
        if product.turned:
            out_smem.T[...] = total.astype(out.dtype)
            to = out.at[block, :, outputs]
        else:
            out_smem[...] = total
            to = out.at[block, outputs]
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_smem, to)
        plgpu.wait_smem_to_gmem(0)


@lowered_once("coding", "out_dtype", "interpret")
def by_blocks(
    x: jax.Array,
    values: jax.Array,
    scale: jax.Array,
    owner: jax.Array,
    *,
    coding: Coding,
    out_dtype=jnp.bfloat16,
    interpret: bool = False,
) -> jax.Array:
    """[n, M, O] of x [n, M, K] times values [E, O, K] of each block's group, scales [E, O, G].

    M is 8 to 64 and a multiple of 8, O of 64. What blocks of owner -1 get is undefined.
    """
    (count, rows, inputs), outputs = x.shape, values.shape[1]
    group = inputs // scale.shape[2]
    width = 128 if inputs % 128 == 0 else (64 if inputs % 64 == 0 else 32)
    tiles = Tiles(inputs=width, stages=STAGES, steps=inputs // width, warpgroups=1, rows=rows)
    turned = jnp.dtype(out_dtype).itemsize == 2
    share = Share(outputs // OUTPUTS, inputs // width, inputs // width)
    product = Product(group, tiles, share, coding, bits_of(values.dtype), turned, interpret)
    if interpret == coding.arranged:  # the interpreter widens codes where they are
        x = (stored if interpret else natural)(x, coding.kind)
    shape = (rows, OUTPUTS) if turned else (OUTPUTS, rows)
    scratch = {"out_smem": plgpu.SMEM(shape, out_dtype)}
    if interpret:
        part = min(group, width, CHUNK)
        transforms = layouts(part, 16)
        scratch["stage"] = plgpu.SMEM((OUTPUTS, part), x.dtype, transforms=transforms)
    full = (count, rows, outputs) if turned else (count, outputs, rows)
    found = plgpu.kernel(
        Experts(product, inputs // width).body,
        out_type=jax.ShapeDtypeStruct(full, out_dtype),
        grid=(count, outputs // OUTPUTS),
        grid_names=("block", "tile"),
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="quantized_experts",
        interpret=plgpu.InterpretGPUParams() if interpret else False,
    )(owner, values, scale, x)
    return found if turned else found.swapaxes(1, 2)
