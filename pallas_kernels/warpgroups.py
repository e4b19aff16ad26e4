# Types of jax's Mosaic GPU objects are not public.
# pyright: reportPrivateImportUsage=false, reportAbstractUsage=false
"""What the kernels for Hopper share: their warpgroups, and layouts of memory and registers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

__all__ = ["CONSUMERS", "SQUARE", "iota", "roles", "swizzled"]

CONSUMERS = 2  # warpgroups that compute; one more loads
SQUARE = plgpu.Layout.WGMMA


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
