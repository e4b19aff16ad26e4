"""Matrix products over any kind of weight: the one place that dispatches on it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxllm.core.weights import AdaptedWeight, QArray, dequantize
from jaxllm.errors import ShapeError

__all__ = ["align", "dense", "einsum", "grouped", "take", "unembed"]


def align(vector: jax.Array, x: jax.Array) -> jax.Array:
    """A bias or scale with leading dims of 1, so that it has as many dims as x."""
    return jax.lax.expand_dims(vector, range(x.ndim - vector.ndim))


def dense(leaf: Any, dtype: Any) -> jax.Array:
    """The values of a plain or quantized leaf in the compute dtype."""
    return dequantize(leaf, dtype) if isinstance(leaf, QArray) else leaf.astype(dtype)


def _precision(dtype: Any) -> jax.lax.Precision:
    wide = jnp.dtype(dtype) == jnp.float32
    return jax.lax.Precision.HIGHEST if wide else jax.lax.Precision.DEFAULT


def _product(equation: str, x: jax.Array, w: jax.Array, out_dtype: Any) -> jax.Array:
    return jnp.einsum(
        equation, x, w, precision=_precision(x.dtype), preferred_element_type=out_dtype
    )


def einsum(
    equation: str,
    x: jax.Array,
    leaf: Any,
    *,
    dtype: Any,
    adapter_ids: jax.Array | None = None,
    out_dtype: Any = None,
) -> jax.Array:
    """`jnp.einsum(equation, x, w)` for a plain, quantized or adapted weight.

    Args:
      equation: explicit, for example `BTD,DNH->BTNH`; x starts with B.
      x: activations.
      leaf: the weight.
      dtype: compute dtype of both operands; float32 multiplies at full precision.
      adapter_ids: [B] integers, 0 for no adapter; only adapted weights read it.
      out_dtype: dtype of the result; `dtype` by default. Sums are accumulated in float32 at least.
    """
    out = dtype if out_dtype is None else out_dtype
    x = x.astype(dtype)
    if not isinstance(leaf, AdaptedWeight):
        return _product(equation, x, dense(leaf, dtype), out)
    y = einsum(equation, x, leaf.base, dtype=dtype, out_dtype=out)
    return y + _adapter(equation, x, leaf, adapter_ids).astype(out)


def _adapter(equation: str, x: jax.Array, leaf: AdaptedWeight, ids: Any) -> jax.Array:
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


def take(leaf: Any, ids: jax.Array, *, dtype: Any) -> jax.Array:
    """Rows of an embedding table [V, D] by ids [...], in the compute dtype."""
    if isinstance(leaf, AdaptedWeight):
        rows = take(leaf.base, ids, dtype=dtype)
        low = jnp.take(leaf.a[0], ids, axis=0).astype(dtype)
        return rows + leaf.scale * jnp.tensordot(low, leaf.b[0].astype(dtype), 1)
    if isinstance(leaf, QArray):
        if leaf.axis != -1:
            raise ShapeError(f"an embedding table is grouped along its last dim, not {leaf.axis}")
        zero = None if leaf.zero is None else jnp.take(leaf.zero, ids, axis=0)
        rows = (jnp.take(a, ids, axis=0) for a in (leaf.values, leaf.scale))
        return dequantize(QArray(*rows, zero, format=leaf.format, axis=-1, group=leaf.group), dtype)
    return jnp.take(leaf, ids, axis=0).astype(dtype)


def unembed(x: jax.Array, leaf: Any, *, tied: bool, dtype: Any, out_dtype: Any) -> jax.Array:
    """Logits [B, T, V] from hidden states [B, T, D]; a tied head is the embedding table [V, D]."""
    equation = "BTD,VD->BTV" if tied else "BTD,DV->BTV"
    return einsum(equation, x, leaf, dtype=dtype, out_dtype=out_dtype)


def grouped(x: jax.Array, leaf: Any, group_sizes: jax.Array, *, dtype: Any) -> jax.Array:
    """Rows sorted by group times that group's matrix: x [T, D], leaf [E, D, F] -> [T, F].

    `group_sizes` [E] are the rows of each group; rows past their sum give zeros.
    """
    if isinstance(leaf, AdaptedWeight):
        leaf = leaf.base + leaf.scale * jnp.einsum("EDR,ERF->EDF", leaf.a[0], leaf.b[0])
    return jax.lax.ragged_dot(
        x.astype(dtype), dense(leaf, dtype), group_sizes, precision=_precision(dtype)
    )
