"""Matrix products over any kind of weight: the one place that dispatches on it."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxllm.core.precision import at_least_float32
from jaxllm.core.weights import (
    AdaptedWeight,
    OutputsFirst,
    QArray,
    dequantize,
    logical_shape,
    plain,
)
from jaxllm.errors import ShapeError
from jaxllm.ops.grouped import grouped_product
from jaxllm.ops.marks import marked
from jaxllm.ops.packed_experts import packed_obstacle, packed_product
from jaxllm.ops.quantized import quantized_product
from jaxllm.typing import AnyArray

__all__ = [
    "absorbed",
    "align",
    "dense",
    "einsum",
    "expanded",
    "grouped",
    "is_adapted",
    "precision",
    "take",
    "unembed",
]


def align(vector: Float[AnyArray, "..."], x: Float[Array, "..."]) -> Float[Array, "..."]:
    """A bias or scale with leading dims of 1, so that it has as many dims as x."""
    return jax.lax.expand_dims(vector, range(x.ndim - vector.ndim))


def dense(leaf: Any, dtype: Any) -> Float[Array, "..."]:
    """The values of a plain, outputs-first or quantized leaf, [*inputs, *outputs]."""
    if isinstance(leaf, QArray):
        return dequantize(leaf, dtype)
    return jnp.asarray(plain(leaf)).astype(dtype)


def precision(dtype: Any) -> jax.lax.Precision:
    """Of products with operands of a dtype: float32 takes no shortcut."""
    wide = jnp.dtype(dtype) == jnp.float32
    return jax.lax.Precision.HIGHEST if wide else jax.lax.Precision.DEFAULT


def _product(equation: str, x: Array, w: Any, out_dtype: Any) -> Array:
    if jnp.dtype(out_dtype) != x.dtype:
        return _widened(equation, out_dtype, x, w)
    return _contract(equation, x, w, out_dtype)


def _contract(equation: str, x: Array, w: Array, out_dtype: Any) -> Array:
    return jnp.einsum(
        equation, x, w, precision=precision(x.dtype), preferred_element_type=out_dtype
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _widened(equation: str, out_dtype: Any, x: Array, w: Array) -> Array:
    """A product with a result wider than its operands (logits), differentiated in their dtype.

    jax would multiply the wide cotangent by a narrow operand: a matmul in float32, many times
    slower. The gradient of w is summed in float32 at least.
    """
    return _contract(equation, x, w, out_dtype)


def _widened_forward(equation: str, out_dtype: Any, x: Array, w: Array) -> Any:
    return _contract(equation, x, w, out_dtype), (x, w)


def _widened_backward(equation: str, out_dtype: Any, kept: Any, cotangent: Array) -> Any:
    del out_dtype
    x, w = kept
    operands, result = equation.split("->")
    left, right = operands.split(",")
    cotangent = cotangent.astype(x.dtype)
    d_x = _contract(f"{result},{right}->{left}", cotangent, w, x.dtype)
    d_w = _contract(f"{left},{result}->{right}", x, cotangent, at_least_float32(w.dtype))
    return d_x, d_w.astype(w.dtype)


_widened.defvjp(_widened_forward, _widened_backward)


@marked("product")
def _rows_times(
    x: Float[Array, "rows I"], w: Float[AnyArray, "O I"], *, out_dtype: Any
) -> Float[Array, "rows O"]:
    """x times w transposed.

    One row is written as a multiply and a sum: XLA makes one fusion of it that streams w once,
    where a call of a matrix library for one row is a third slower on an H100.
    """
    if x.shape[0] == 1:
        wide = x.astype(jnp.float32) * w.astype(jnp.float32)
        return jnp.sum(wide, axis=1)[None].astype(out_dtype)
    return _product("RI,OI->RO", x, w, out_dtype)


@marked("packed")
def _packed_rows_times(
    x: Float[Array, "... I"], *arrays: AnyArray, leaf: Any, out_dtype: Any
) -> Float[Array, "... O"]:
    """x times the quantized matrix whose arrays and tree are given, transposed."""
    return quantized_product(x, jax.tree.unflatten(leaf, arrays), out_dtype)


def _matrix(x: Array, leaf: Any, inputs: int, out_dtype: Any) -> Array:
    """x [*batch, *inputs] times a leaf -> [*batch, *outputs], as a product of two matrices.

    (XLA transposes a weight for a contraction over two dims; folded into one dim it does not.)
    """
    shape = logical_shape(leaf)
    outputs = shape[inputs:]
    batch, width = x.shape[: x.ndim - inputs], math.prod(shape[:inputs])
    if isinstance(leaf, QArray):
        # On a mesh tokens stay a dim of their own, as below.
        folded = jax.sharding.get_abstract_mesh().empty
        x = x.reshape(-1, width) if folded else x.reshape(*batch, width)
        arrays, tree = jax.tree.flatten(leaf)
        y = _packed_rows_times(x, *arrays, leaf=tree, out_dtype=out_dtype)
        return jnp.reshape(y, (*batch, *outputs))
    if isinstance(leaf, OutputsFirst):
        w = leaf.values.reshape(-1, width).astype(x.dtype)
        y = _rows_times(x.reshape(-1, width), w, out_dtype=out_dtype)
    else:
        w = dense(leaf, x.dtype).reshape(width, -1)
        # On a mesh tokens stay a dim of their own, which a sum over devices can be scattered on.
        folded = jax.sharding.get_abstract_mesh().empty
        lead = "R" if folded else "BTUW"[: len(batch)]
        x = x.reshape(-1, width) if folded else x.reshape(*batch, width)
        y = _product(f"{lead}I,IO->{lead}O", x, w, out_dtype)
    return y.reshape(*batch, *outputs)


def einsum(
    equation: str,
    x: Float[Array, "B ..."],
    leaf: Any,
    *,
    dtype: Any,
    adapter_ids: Int[AnyArray, "B"] | None = None,
    out_dtype: Any = None,
) -> Float[Array, "B ..."]:
    """`jnp.einsum(equation, x, w)` for a plain, outputs-first, quantized or adapted weight.

    Args:
      equation: `[batch][inputs],[inputs][outputs]->[batch][outputs]`, for example
        `BTNH,NHD->BTD`; the batch begins with B.
      x: activations.
      leaf: the weight.
      dtype: compute dtype of both operands; float32 multiplies at full precision.
      adapter_ids: 0 for no adapter; only adapted weights read it.
      out_dtype: dtype of the result; `dtype` by default. Sums are accumulated in float32 at least.
    """
    out = dtype if out_dtype is None else out_dtype
    x = x.astype(dtype)
    left, right = equation.split("->")[0].split(",")
    if not isinstance(leaf, AdaptedWeight):
        return _matrix(x, leaf, sum(c in left for c in right), out)
    y = einsum(equation, x, leaf.base, dtype=dtype, out_dtype=out)
    return y + _adapter(equation, x, leaf, adapter_ids).astype(out)


def _adapter(equation: str, x: Array, leaf: AdaptedWeight, ids: Any) -> Array:
    """scale * (x a) b, each row with its own adapter."""
    operands, result = equation.split("->")
    left, right = operands.split(",")
    inputs = "".join(c for c in right if c in left)
    outputs = "".join(c for c in right if c not in left)
    a, b = leaf.a.astype(x.dtype), leaf.b.astype(x.dtype)
    middle = "".join(c for c in left if c not in inputs) + "R"
    if ids is None:
        low = _product(f"{left},{inputs}R->{middle}", x, a[0], x.dtype)
        return leaf.scale * _product(f"{middle},R{outputs}->{result}", low, b[0], x.dtype)
    index = jnp.maximum(ids - 1, 0)
    low = _product(f"{left},{left[0]}{inputs}R->{middle}", x, a[index], x.dtype)
    low = jnp.where((ids > 0).reshape(-1, *[1] * (low.ndim - 1)), low, jnp.zeros_like(low))
    update = _product(f"{middle},{left[0]}R{outputs}->{result}", low, b[index], x.dtype)
    return leaf.scale * update


def take(
    leaf: Any,
    ids: Int[AnyArray, "*dims"],
    *,
    dtype: Any,
    adapter_ids: Int[AnyArray, "B"] | None = None,
) -> Float[Array, "*dims D"]:
    """Rows of an embedding table [V, D] by ids, in the compute dtype.

    `adapter_ids` as in `einsum`, for ids [B, T].

    Raises:
      ShapeError: a quantized matrix that is no table.
    """
    if isinstance(leaf, AdaptedWeight):
        rows = take(leaf.base, ids, dtype=dtype)
        if adapter_ids is None:
            low, b = jnp.take(leaf.a[0], ids, axis=0).astype(dtype), leaf.b[0].astype(dtype)
            return rows + leaf.scale * _product("...R,RD->...D", low, b, dtype)
        index = jnp.maximum(adapter_ids - 1, 0)
        low = leaf.a[index[:, None], ids].astype(dtype)
        low = jnp.where((adapter_ids > 0)[:, None, None], low, jnp.zeros_like(low))
        return rows + leaf.scale * _product("BTR,BRD->BTD", low, leaf.b[index].astype(dtype), dtype)
    if isinstance(leaf, QArray):
        return dequantize(_rows_of(leaf, jnp.asarray(ids)), dtype)
    if isinstance(leaf, OutputsFirst):
        return jnp.moveaxis(jnp.take(leaf.values, ids, axis=-1), 0, -1).astype(dtype)
    return jnp.take(leaf, ids, axis=0).astype(dtype)


def _rows_of(leaf: QArray, ids: Array) -> QArray:
    """Rows of a quantized table, as tables of one row."""
    if leaf.inputs:
        raise ShapeError("a matrix [inputs, outputs] has no rows to take; quantize with inputs=0")

    def row(array: Any, rows: int) -> Any:
        where = jnp.minimum(ids // rows, array.shape[-2] - 1)
        return jnp.take(array, where, axis=-2)[..., None, :]

    def cut(node: QArray) -> QArray:
        scale, offset = node.scale, node.offset
        scale = cut(scale) if isinstance(scale, QArray) else row(scale, node.rows)
        offset = None if offset is None else row(offset, node.rows)
        shape = (1, node.shape[-1]) if not node.inputs else (node.shape[0], 1)
        values = row(node.values, 1)
        return dataclasses.replace(
            node, values=values, scale=scale, offset=offset, shape=shape, rows=1
        )

    one = cut(leaf)
    return dataclasses.replace(one, shape=(leaf.shape[-1],))


def _transposed(table: Any) -> Any:
    """An embedding table [V, D] of any kind as a head [D, V]."""
    if isinstance(table, AdaptedWeight):
        a, b = (jnp.swapaxes(x, -1, -2) for x in (table.b, table.a))
        return AdaptedWeight(_transposed(table.base), a, b, scale=table.scale)
    if isinstance(table, OutputsFirst):
        return table.values
    if isinstance(table, QArray):
        return dataclasses.replace(table, shape=table.shape[::-1], inputs=1)
    return OutputsFirst(table, inputs=1)


def unembed(
    x: Float[Array, "B T D"],
    leaf: Any,
    *,
    tied: bool,
    dtype: Any,
    out_dtype: Any,
    adapter_ids: Int[AnyArray, "B"] | None = None,
) -> Float[Array, "B T V"]:
    """Logits from hidden states; a tied head is the embedding table [V, D], else leaf is [D, V]."""
    leaf = _transposed(leaf) if tied else leaf
    return einsum("BTD,DV->BTV", x, leaf, dtype=dtype, out_dtype=out_dtype, adapter_ids=adapter_ids)


def grouped(
    x: Float[Array, "T D"],
    leaf: Any,
    group_sizes: Int[Array, "E"],
    *,
    dtype: Any,
    equal: bool = False,
    implementation: str = "auto",
) -> Float[Array, "T F"]:
    """Rows sorted by group times that group's matrix of leaf [E, D, F].

    Args:
      x: rows in the order of their groups.
      leaf: the weight of any kind.
      group_sizes: rows of each group; rows past their sum give zeros.
      dtype: compute dtype of both operands.
      equal: promises that all groups have T / E rows: one batched product.
      implementation: of the product otherwise; see `jaxllm.ops.grouped`.
    """
    if isinstance(leaf, QArray) and implementation == "auto":
        if packed_obstacle(x.shape[0], str(jnp.dtype(dtype)), leaf) is None:
            return packed_product(x.astype(dtype), leaf, group_sizes)
    w = expanded(leaf, dtype)
    if equal:
        rows = x.astype(dtype).reshape(w.shape[0], -1, x.shape[-1])
        return _product("ECD,EDF->ECF", rows, w, dtype).reshape(-1, w.shape[-1])
    options = {"precision": precision(dtype), "implementation": implementation}
    return grouped_product(x.astype(dtype), w, group_sizes, **options)


def absorbed(
    leaf: Any, dims: int, *, dtype: Any
) -> tuple[Float[Array, "R N H"], Float[Array, "R N V"]]:
    """A weight [R, N, H + V] of any kind as those of its first `dims` outputs a head and the rest.

    Latent attention multiplies queries by the one and what it finds by the other; an adapter, the
    first, is merged.
    """
    if isinstance(leaf, AdaptedWeight):
        a, b = (jnp.asarray(x)[0].astype(jnp.float32) for x in (leaf.a, leaf.b))
        update = _product("RK,KNH->RNH", a, b, jnp.float32)
        whole = (dense(leaf.base, jnp.float32) + leaf.scale * update).astype(dtype)
    else:
        whole = dense(leaf, dtype)
    return whole[..., :dims], whole[..., dims:]


def is_adapted(leaf: Any) -> bool:
    """Whether a weight brings adapters, of which rows may choose one each."""
    return isinstance(leaf, AdaptedWeight)


def expanded(leaf: Any, dtype: Any) -> Float[Array, "E ..."]:
    """The values of experts' matrices or biases of any kind; an adapter, the first, is merged."""
    if isinstance(leaf, AdaptedWeight):
        a, b = (jnp.asarray(x)[0].astype(jnp.float32) for x in (leaf.a, leaf.b))
        update = _product("EDR,ERF->EDF", a, b, jnp.float32)
        return (dense(leaf.base, jnp.float32) + leaf.scale * update).astype(dtype)
    return dense(leaf, dtype)
