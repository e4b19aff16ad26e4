"""x times a quantized matrix, and the gradient with respect to x; the matrix itself is constant."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxllm.core.choices import took
from jaxllm.core.qarray import CODES, QArray, dequantize_rows, half_rows, halves, scales
from jaxllm.core.qrows import row_blocks
from pallas_kernels.target import target

__all__ = [
    "KINDS",
    "blocks_obstacle",
    "codes_obstacle",
    "kernel_obstacle",
    "operands",
    "product_sizes",
    "quantized_product",
    "rounded",
    "unfit",
]

_BLOCK = 128  # inputs and outputs of a scale, of what our kernel for eight-bit floats takes
_STREAMED = ("int4", "uint4", "int8", "nf4")
"""Formats whose products take the streamed kernel for Hopper in the first layout too, as timed
(`docs/quantization.md`); the first kernel takes integers times float16."""
_TILE = 2**19
"""Values that a CPU unpacks at a time: what its second cache level holds in float32."""


def _precision(dtype: Any) -> jax.lax.Precision:
    wide = jnp.dtype(dtype) == jnp.float32
    return jax.lax.Precision.HIGHEST if wide else jax.lax.Precision.DEFAULT


def _product(x: Array, rows: Array, out_dtype: Any) -> Array:
    """x [..., I] times rows [O, I], transposed."""
    dims = (((x.ndim - 1,), (1,)), ((), ()))
    return jax.lax.dot_general(
        x, rows, dims, precision=_precision(x.dtype), preferred_element_type=out_dtype
    )


def _num_tiles(leaf: QArray) -> int:
    """In how many tiles of equal height a CPU takes the matrix."""
    outputs = leaf.num_outputs
    wanted = max(1, outputs * leaf.num_inputs // _TILE)
    return max(n for n in range(1, wanted + 1) if outputs % n == 0)


def _tiled(x: Array, leaf: QArray, out_dtype: Any) -> Array:
    """The product tile by tile of outputs, so that no unpacked matrix goes through memory.

    XLA unpacks a whole matrix into memory first, which takes eight times as long as a product with
    one that lies there in float32.
    """
    tiles = _num_tiles(leaf)
    outputs = leaf.num_outputs

    def cut(array: Array) -> Any:
        rows = row_blocks(array, outputs, leaf.rows)
        return rows.reshape(tiles, -1, rows.shape[-1])

    def one(_: None, tile: Any) -> Any:
        values, scale, offset = tile
        piece = QArray(
            values,
            scale,
            offset,
            format=leaf.format,
            shape=(leaf.num_inputs, values.shape[0]),
            group=leaf.group,
            version=leaf.version,
        )
        return None, _tile(x, piece)

    parts = (leaf.values, scales(leaf), leaf.offset)
    _, y = jax.lax.scan(one, None, jax.tree.map(cut, parts))
    return jnp.moveaxis(y, 0, -2).reshape(*x.shape[:-1], outputs).astype(out_dtype)


def _tile(x: Array, piece: QArray) -> Array:
    """x times one tile; the halves of planes one after the other, for joining them would copy."""
    if piece.version != 2:
        return _product(x, dequantize_rows(piece).astype(x.dtype), jnp.float32)
    low, high = (half_rows(piece, *half).astype(x.dtype) for half in halves(piece))
    left, right = jnp.split(x, 2, axis=-1)
    return _product(left, low, jnp.float32) + _product(right, high, jnp.float32)


def _whole(x: Array, leaf: QArray, out_dtype: Any) -> Array:
    rows = dequantize_rows(leaf)
    if math.prod(x.shape[:-1]) == 1:
        # One fusion that streams the packed values, where a matrix library reads unpacked ones.
        wide = rows.astype(x.dtype).astype(jnp.float32) * x.reshape(1, -1).astype(jnp.float32)
        return jnp.sum(wide, axis=1).reshape(*x.shape[:-1], -1).astype(out_dtype)
    return _product(x, rows.astype(x.dtype), out_dtype)


KINDS = {"fp8": "float8_e4m3fn"} | dict.fromkeys(("nf4", "fp4", "mxfp4", "bnb_fp4"), "table")
"""What our kernel calls formats that have other names there."""


def _kernel(version: int, kind: str, dtype: str) -> str:
    """The kernel for a layout version, a format and a dtype of rows on the platform at hand."""
    if target() == "tpu":
        return "mosaic_tpu"
    suits = kind in _STREAMED and dtype == "bfloat16"
    return "mosaic_gpu_streamed" if version == 3 or suits else "mosaic_gpu"


def unfit(
    dtype: str, kind: str, sizes: tuple[int, int, int], rows: int = 1, version: int = 1
) -> str | None:
    """Why our kernel for packed numbers cannot serve a kind of product here, or None.

    Args:
      dtype: of the activations.
      kind: format of the weights.
      sizes: outputs, inputs, and inputs of a group.
      rows: of the activations.
      version: layout of the weights.
    """
    platform = target()
    if platform not in ("gpu", "tpu", "interpreter"):
        return f"it needs a CUDA device or a TPU, this is {platform}"
    from pallas_kernels import quantized_matmul  # Pallas takes a third of a second to import

    options = {"dtype": dtype, "rows": rows, "kind": KINDS.get(kind, kind), "sizes": sizes}
    chosen = _kernel(version, kind, dtype)
    return quantized_matmul.unfit(chosen, platform=platform, **options)


def kernel_obstacle(x: Any, leaf: QArray) -> str | None:
    """Why our kernel cannot serve x [..., I] times a leaf, or None."""
    if not jax.sharding.get_abstract_mesh().empty:
        return "it runs on one device"
    if leaf.version == 2 or leaf.order is not None or leaf.lead:
        return "it takes one matrix in the first or third layout, its inputs in order"
    sizes = product_sizes(leaf)
    if sizes is None:
        return "its groups have one size"
    if target() == "tpu" and (leaf.version == 3 or leaf.offset is not None):
        return "it takes the first layout on a TPU, and no offsets"
    rows, dtype = _rows(x)
    return unfit(dtype, leaf.format, sizes, rows, leaf.version)


def product_sizes(leaf: QArray) -> tuple[int, int, int] | None:
    """Outputs, inputs and inputs of a scale of a leaf's matrices; None where these differ."""
    groups = leaf.scale.values if isinstance(leaf.scale, QArray) else leaf.scale
    count = groups.shape[-1]
    if count != 1 and leaf.num_inputs != count * leaf.group:
        return None
    return leaf.num_outputs, leaf.num_inputs, leaf.num_inputs // count


def codes_obstacle(leaf: QArray) -> str | None:
    """Why the kernel for a decoding step's products cannot take a leaf's codes, or None."""
    if leaf.format not in ("int4", "uint4") or leaf.offset is not None or leaf.activations:
        return f"it takes int4 and uint4 without offsets, not {leaf.format}"
    if leaf.version == 2 or leaf.order is not None or leaf.lead:
        return "it takes one matrix in the first or third layout, its inputs in order"
    if isinstance(leaf.scale, QArray) or leaf.rows != 1 or product_sizes(leaf) is None:
        return "it takes a scale for each output and group"
    return None


def operands(leaf: QArray) -> tuple[Array, Array, Array | None]:
    """Values, scales and offsets of a leaf as our kernels take them: a number for each row."""

    def per_row(array: Any) -> Array:
        return jnp.asarray(row_blocks(array, leaf.num_outputs, leaf.rows))

    scale = scales(leaf) if isinstance(leaf.scale, QArray) else leaf.scale
    offset = None if leaf.offset is None else per_row(leaf.offset)
    return jnp.asarray(leaf.values), per_row(scale), offset


def _rows(x: Any) -> tuple[int, str]:
    return math.prod(x.shape[:-1]), str(x.dtype)


def _by_kernel(x: Array, leaf: QArray, out_dtype: Any) -> Array:
    from pallas_kernels.quantized_matmul import quantized_matmul

    y = quantized_matmul(
        x.reshape(-1, x.shape[-1]),
        *operands(leaf),
        table=CODES.get(leaf.format, ()),
        arranged=leaf.version == 3,
        out_dtype=str(jnp.dtype(out_dtype)),
        implementation=_kernel(leaf.version, leaf.format, str(x.dtype)),
    )
    return y.reshape(*x.shape[:-1], -1)


def rounded(x: Float[Array, "... H"], dtype: Any) -> tuple[Array, Float[Array, "... 1"]]:
    """(codes of x in int8 or float8_e4m3fn, their float32 scales): a scale for each last dim.

    codes * scale is x within scale / 2 (int8: 1/254 of the largest number), or within 1/16 of each
    number and 1/458752 of the largest (fp8).
    """
    wide = x.astype(jnp.float32)
    whole = jnp.issubdtype(dtype, jnp.integer)
    top = 127.0 if whole else 448.0
    peak = jnp.max(jnp.abs(wide), axis=-1, keepdims=True)
    scale = jnp.where(peak == 0, 1.0, peak / top)
    scaled = wide / scale
    return (jnp.round(scaled) if whole else scaled).astype(dtype), scale


def _both_rounded(x: Array, leaf: QArray, out_dtype: Any) -> Array:
    """x rounded as the values are, with a scale a token: XLA has cuBLASLt multiply eight bits."""
    whole = leaf.format == "int8"
    codes, scale = rounded(x, leaf.values.dtype)
    sums = jax.lax.dot_general(
        codes,
        jnp.asarray(leaf.values),
        (((x.ndim - 1,), (1,)), ((), ())),
        preferred_element_type=jnp.int32 if whole else jnp.float32,
    )
    per_output = row_blocks(scales(leaf), leaf.num_outputs, leaf.rows)[:, 0]
    y = sums.astype(jnp.float32) * scale * jax.lax.expand_dims(per_output, range(sums.ndim - 1))
    return y.astype(out_dtype)


def blocks_obstacle(x: Any, leaf: QArray, out_dtype: Any) -> str | None:
    """Why our kernel for eight bits on both sides cannot serve x [..., I] times a leaf, or None."""
    if target() not in ("gpu", "interpreter"):
        return f"it needs a CUDA device, this is {target()}"
    if not jax.sharding.get_abstract_mesh().empty:
        return "it runs on one device"
    sides, blocks = (leaf.num_outputs, leaf.num_inputs), (leaf.rows, leaf.group)
    if blocks != (_BLOCK, _BLOCK) or any(side % _BLOCK for side in sides) or leaf.lead:
        return f"it takes one matrix in blocks of 128 x 128, not {sides} in blocks of {blocks}"
    from pallas_kernels import scaled_matmul  # Pallas takes a third of a second to import

    rows, name = math.prod(x.shape[:-1]), str(jnp.dtype(out_dtype))
    return scaled_matmul.unfit("mosaic_gpu", rows=rows, out_dtype=name, platform=target())


def _blocks_rounded(x: Array, leaf: QArray, out_dtype: Any) -> Array:
    """x rounded in blocks of a token's inputs, times values in blocks: by our kernel for products
    of eight bits (`pallas_kernels.scaled_matmul`), or unpacked again."""
    edge = [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % leaf.group)]
    blocks = jnp.pad(x, edge).reshape(*x.shape[:-1], -1, leaf.group)
    codes, scale = rounded(blocks, leaf.values.dtype)
    if blocks_obstacle(x, leaf, out_dtype) is None:
        from pallas_kernels.scaled_matmul import scaled_matmul

        took("packed product", "scaled_matmul")
        y = scaled_matmul(
            codes.reshape(-1, leaf.num_inputs),
            scale.reshape(-1, leaf.num_inputs // _BLOCK),
            jnp.asarray(leaf.values),
            scales(leaf),
            out_dtype=str(jnp.dtype(out_dtype)),
            implementation="mosaic_gpu",
        )
        return y.reshape(*x.shape[:-1], -1)
    took("packed product", "blocks_rounded")
    wide = (codes.astype(jnp.float32) * scale).reshape(*x.shape[:-1], -1)
    wide = wide[..., : x.shape[-1]].astype(x.dtype)
    return _tiled(wide, leaf, out_dtype) if _on_cpu() else _whole(wide, leaf, out_dtype)


def _on_cpu() -> bool:
    return target() in ("cpu", "interpreter") and jax.sharding.get_abstract_mesh().empty


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def quantized_product(
    x: Float[Array, "... I"], leaf: QArray, out_dtype: Any
) -> Float[Array, "... O"]:
    """x times the matrix of a leaf that is not stacked.

    A leaf with `activations` multiplies x rounded; the gradient takes no notice of that.
    Values are unpacked in x's dtype and sums kept in float32. The gradient with respect to x is
    computed from the packed values again, so that a backward pass keeps no unpacked matrix; the
    leaf has none.

    Args:
      x: activations in the compute dtype.
      leaf: a matrix with `inputs` of at least 1.
      out_dtype: dtype of the result.
    """
    # Or a loop over tokens would have the matrix unpacked before it, and be read from memory.
    x, leaf = jax.lax.optimization_barrier((x, leaf))
    if leaf.activations:
        if leaf.scale.shape[-1] > 1:
            return _blocks_rounded(x, leaf, out_dtype)
        took("packed product", "both_rounded")
        return _both_rounded(x, leaf, out_dtype)
    if kernel_obstacle(x, leaf) is None:
        took("packed product", _kernel(leaf.version, leaf.format, str(x.dtype)))
        return _by_kernel(x, leaf, out_dtype)
    took("packed product", "tiled" if _on_cpu() else "whole")
    if not _on_cpu():
        return _whole(x, leaf, out_dtype)
    if leaf.order is not None:
        x = jnp.take(x, leaf.order, axis=-1)
    return _tiled(x, leaf, out_dtype)


def _forward(x: Array, leaf: QArray, out_dtype: Any) -> Any:
    return quantized_product(x, leaf, out_dtype), (leaf, x[..., :0])


def _backward(out_dtype: Any, kept: Any, dy: Array) -> Any:
    del out_dtype
    leaf, like = kept
    rows = dequantize_rows(leaf).astype(like.dtype)
    dx = jax.lax.dot_general(
        dy.astype(like.dtype),
        rows,
        (((dy.ndim - 1,), (0,)), ((), ())),
        precision=_precision(like.dtype),
        preferred_element_type=like.dtype,
    )
    return dx, None


quantized_product.defvjp(_forward, _backward)
