"""Rows sorted by group times quantized matrices of the groups, without unpacking them."""

from __future__ import annotations

import jax
from jaxtyping import Array, Float, Int

from jaxllm.core.choices import took
from jaxllm.core.qarray import CODES, QArray
from jaxllm.ops.quantized import KINDS, operands, product_sizes
from pallas_kernels.target import target

__all__ = ["packed_obstacle", "packed_product"]

ROWS = 64
"""Rows a group, on average, up to which the packed matrices are read; past them unpacking once and
multiplying in the compute dtype does less work."""


def packed_obstacle(rows: int, dtype: str, leaf: QArray) -> str | None:
    """Why the kernel for packed experts cannot serve rows times a leaf [E, D, F], or None."""
    if target() not in ("gpu", "interpreter"):
        return f"it needs a CUDA device, this is {target()}"
    if not jax.sharding.get_abstract_mesh().empty:
        return "it runs on one device"
    if len(leaf.lead) != 1 or leaf.version == 2 or leaf.order is not None or leaf.activations:
        return "it takes one stack of matrices in the first or third layout, inputs in order"
    if rows > ROWS * leaf.lead[0]:
        return f"it is for up to {ROWS} rows an expert, not {rows} of {leaf.lead[0]}"
    sizes = product_sizes(leaf)
    if sizes is None:
        return "its groups have one size"
    from pallas_kernels.quantized_matmul import grouped_unfit  # Pallas takes a while to import

    return grouped_unfit(dtype=dtype, kind=KINDS.get(leaf.format, leaf.format), sizes=sizes)


def packed_product(
    x: Float[Array, "R I"], leaf: QArray, sizes: Int[Array, "E"]
) -> Float[Array, "R O"]:
    """y[r] = x[r] w[group of r] in x's dtype, as `jaxllm.ops.grouped.grouped_product`.

    Args:
      x: rows in the order of their groups.
      leaf: experts' matrices that `packed_obstacle` has nothing against.
      sizes: rows of each group; rows past their sum give zeros.
    """
    from pallas_kernels.quantized_matmul import grouped_quantized_matmul

    took("experts", "packed")
    return grouped_quantized_matmul(
        x,
        operands(leaf),
        sizes,
        table=CODES.get(leaf.format, ()),
        arranged=leaf.version == 3,
        implementation="mosaic_gpu",
        out_dtype=str(x.dtype),
    )
