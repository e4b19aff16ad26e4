# Types of jax's Mosaic GPU objects are not public.
# pyright: reportPrivateImportUsage=false, reportAbstractUsage=false
"""What the kernels for Hopper share: their warpgroups, and layouts of memory and registers."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

__all__ = [
    "CONSUMERS",
    "LOG2E",
    "ROW",
    "SQUARE",
    "along",
    "clear",
    "iota",
    "multiply",
    "roles",
    "swizzled",
]

CONSUMERS = 2  # warpgroups that compute; one more loads
SQUARE = plgpu.Layout.WGMMA
ROW = SQUARE.reduce(1)  # one value a row of an accumulator
LOG2E = math.log2(math.e)
_WIDTH = 64  # columns that are cleared at a time


def swizzled(shape: tuple[int, ...], dtype) -> object:
    """Shared memory in the widest layout that TMA and WGMMA agree on."""
    bits = jnp.finfo(dtype).bits
    swizzle = plgpu.find_swizzle(shape[-1] * bits)
    transforms = (
        plgpu.TilingTransform((8, 8 * swizzle // bits)),
        plgpu.SwizzleTransform(swizzle),
    )
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def iota(shape: tuple[int, int], dim: int) -> jax.Array:
    """Indices along `dim` in the layout of an accumulator."""
    return plgpu.broadcasted_iota(jnp.int32, shape, dim, layout=SQUARE)


def along(vector: jax.Array, shape: tuple[int, ...], dim: int) -> jax.Array:
    """A vector along `dim` of a matrix, repeated along the other."""
    return lax.broadcast_in_dim(vector, shape, [dim])


def clear(block, low: jax.Array | int, high: jax.Array | int) -> None:
    """Zeros in a block of shared memory outside of rows [low, high); to be committed."""
    zero = jnp.zeros((), block.dtype)
    for i in range(0, block.shape[1], _WIDTH):
        part = block.at[:, pl.ds(i, _WIDTH)]
        shape = (block.shape[0], _WIDTH)
        row = iota(shape, 0)
        part[...] = jnp.where((row >= low) & (row < high), part[...], zero)


def multiply(acc, left: jax.Array, right, stage=None) -> None:
    """acc += left @ right with `left` in registers, begun and not waited for.

    Args:
      stage: shared memory of left's shape for the interpreter, which knows no operand in registers;
        None on a device.
    """
    if stage is not None:
        stage[...] = left
        plgpu.commit_smem()
        left = stage
    plgpu.wgmma(acc, left, right)


def roles(kernel, refs, smem, full, free):
    """Gives each warpgroup its part: the last one loads, the others compute."""

    def scoped(smem, full, free):
        wg = lax.axis_index("wg")

        @pl.when(wg < CONSUMERS)
        def _():
            plgpu.set_max_registers(240, action="increase")
            kernel.compute(refs, smem, full, free)

        @pl.when(wg == CONSUMERS)
        def _():
            plgpu.set_max_registers(24, action="decrease")
            kernel.load(refs, smem, full, free)

    pl.run_scoped(scoped, smem, full, free, collective_axes="wg")
