# Types of jax's Mosaic GPU objects are not public.
# pyright: reportPrivateImportUsage=false, reportAttributeAccessIssue=false
"""What becomes of the rows of a block that are not the group's."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, vector

from pallas_kernels.warpgroups import SQUARE, iota

__all__ = ["store_inside"]


def store_inside(target, values: jax.Array, bounds: tuple, *, interpret: bool) -> None:
    """Stores some rows and the first columns of a consumer's values, each thread its own.

    Args:
      target: an array in the device's memory, of which only what is inside need be there.
      values: in the layout of an accumulator.
      bounds: first row, end of the rows, end of the columns.
      interpret: all of the target is there, and read.
    """
    if interpret:
        shape = (values.shape[0], values.shape[1])
        row, column = iota(shape, 0), iota(shape, 1)
        inside = (row >= bounds[0]) & (row < bounds[1]) & (column < bounds[2])
        target[...] = jnp.where(inside, values, target[...])
        return
    splat = plgpu.Layout.WG_SPLAT

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), SQUARE, splat, splat, splat))
    def run(_, target, values, *bounds):
        index = ir.IndexType.get()
        low, high, end = (arith.index_cast(index, x.registers.item()) for x in bounds)

        def less(x, y):
            return arith.cmpi(arith.CmpIPredicate.slt, x, y)

        places = values.layout.thread_idxs(values.shape)
        for (row, column), register in zip(places, values.registers.flat, strict=True):
            inside = arith.andi(less(row, high), less(column, end))
            inside = arith.andi(inside, arith.cmpi(arith.CmpIPredicate.sge, row, low))
            with utils.when(inside):
                vector.store(register, target, [row, column])

    run(target, values, *bounds)
