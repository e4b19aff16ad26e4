"""Leaves of `params` beside the plain array: quantized (`QArray`) and adapted (`AdaptedWeight`).

Every array of a leaf carries the leading layers axis when stacked; everything else is static, so a
leaf survives jit, scan over layers, sharding and checkpoints as one pytree.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jaxllm.core.config import nearest
from jaxllm.errors import ConfigError, ShapeError
from jaxllm.typing import AnyArray, Slot

__all__ = [
    "AdaptedWeight",
    "Leaf",
    "OutputsFirst",
    "QArray",
    "attach",
    "dequantize",
    "logical_shape",
    "merge_adapter",
    "plain",
    "quantize",
]

_BITS: dict[str, tuple[Any, int]] = {"int8": (jnp.int8, 127), "int4": (jnp.int4, 7)}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class OutputsFirst:
    """A plain matrix held as [*outputs, *inputs], as a product of few rows reads it best.

    Attributes:
      values: the array.
      inputs: number of input dims (the last ones of `values`).
    """

    values: Slot
    inputs: int = dataclasses.field(default=1, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QArray:
    """Integers with a scale (and zero point) for each group along one dim.

    Attributes:
      values: integers of the leaf's logical shape.
      scale: float32, the logical shape with dim `axis` divided by `group`.
      zero: like `scale`, or None when symmetric; a value means `(values - zero) * scale`.
      format: `int8` or `int4`.
      axis: the grouped dim, counted from the end so that stacking does not move it.
      group: length of a group along `axis`.
      version: layout version of `values`; 1 is the logical order.
    """

    values: Slot
    scale: Slot
    zero: Slot | None = None
    format: Literal["int8", "int4"] = dataclasses.field(default="int8", metadata={"static": True})
    axis: int = dataclasses.field(default=-1, metadata={"static": True})
    group: int = dataclasses.field(default=1, metadata={"static": True})
    version: int = dataclasses.field(default=1, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AdaptedWeight:
    """A base weight and low-rank updates: y = x W + scale * (x a) b.

    Attributes:
      base: plain array or `QArray`.
      a: [adapters, *inputs, R].
      b: [adapters, R, *outputs].
      scale: alpha / R, the same for all adapters of the leaf.

    With `Step.adapter_ids` a row uses adapter `id - 1`, and 0 means none; without, all rows use the
    first. Source: arXiv 2106.09685.
    """

    base: Any
    a: Slot
    b: Slot
    scale: float = dataclasses.field(default=1.0, metadata={"static": True})


Leaf = jax.Array | OutputsFirst | QArray | AdaptedWeight


def is_leaf(value: Any) -> bool:
    """Whether a value is a leaf of its own kind; for `is_leaf=` of tree functions."""
    return isinstance(value, (OutputsFirst, QArray, AdaptedWeight))


def logical_shape(leaf: Any) -> tuple[int, ...]:
    """The shape that the model sees, whatever the leaf stores."""
    if isinstance(leaf, AdaptedWeight):
        return logical_shape(leaf.base)
    if isinstance(leaf, OutputsFirst):
        shape = tuple(leaf.values.shape)
        return (*shape[-leaf.inputs :], *shape[: -leaf.inputs])
    return tuple(leaf.values.shape) if isinstance(leaf, QArray) else tuple(leaf.shape)


def plain(leaf: Any) -> Any:
    """The array [*inputs, *outputs] of a plain or outputs-first leaf that is not stacked."""
    if not isinstance(leaf, OutputsFirst):
        return leaf
    dims = range(leaf.values.ndim)
    return leaf.values.transpose(*dims[-leaf.inputs :], *dims[: -leaf.inputs])


def _grouped(shape: tuple[int, ...], axis: int, group: int) -> tuple[int, ...]:
    dim = len(shape) + axis
    return (*shape[:dim], shape[dim] // group, group, *shape[dim + 1 :])


def quantize(
    w: Float[AnyArray, "..."],
    format: str,
    *,
    axis: int,
    group: int | None = None,
    symmetric: bool = True,
) -> QArray:
    """Round to nearest, one scale a group.

    Symmetric: scale = max |w| / 127 (int8) or / 7 (int4). Otherwise the range min..max is spread
    over all 2^bits values and `zero` is the (float) position of 0.

    Args:
      w: the weight.
      format: `int8` or `int4`.
      axis: dim that is grouped, negative.
      group: length of a group; the whole dim by default.
      symmetric: no zero points.

    Raises:
      ConfigError: unknown format; ShapeError: the group does not divide the dim.
    """
    if format not in _BITS:
        raise ConfigError(f"format {format!r} is unknown; {nearest(format, _BITS)}")
    dtype, high = _BITS[format]
    size = group or w.shape[axis]
    if axis >= 0 or w.shape[axis] % size:
        raise ShapeError(f"group {size} does not divide dim {axis} of {w.shape}")
    x = w.astype(jnp.float32).reshape(_grouped(w.shape, axis, size))
    reduce = x.ndim + axis
    if symmetric:
        scale = jnp.max(jnp.abs(x), axis=reduce, keepdims=True) / high
        zero = None
    else:
        low, top = jnp.min(x, reduce, keepdims=True), jnp.max(x, reduce, keepdims=True)
        # A group of one value is that value times one step, whatever the value.
        scale = jnp.where(top == low, jnp.abs(low), (top - low) / (2 * high + 1))
        zero = -high - 1 - low / jnp.where(scale == 0, 1.0, scale)
    safe = jnp.where(scale == 0, 1.0, scale)
    q = jnp.clip(jnp.round(x / safe + (0.0 if zero is None else zero)), -high - 1, high)
    squeeze = lambda a: None if a is None else jnp.squeeze(a, reduce)  # noqa: E731
    return QArray(
        q.reshape(w.shape).astype(dtype),
        jnp.squeeze(scale, reduce),
        squeeze(zero),
        format=format,  # pyright: ignore[reportArgumentType]
        axis=axis,
        group=size,
    )


def dequantize(leaf: QArray, dtype: Any) -> Float[Array, "..."]:
    """The values that a `QArray` stands for."""
    shape = leaf.values.shape
    x = leaf.values.astype(jnp.float32).reshape(_grouped(shape, leaf.axis, leaf.group))
    dim = x.ndim + leaf.axis
    if leaf.zero is not None:
        x = x - jnp.expand_dims(leaf.zero, dim)
    return (x * jnp.expand_dims(leaf.scale, dim)).reshape(shape).astype(dtype)


def attach(
    leaf: Any, key: Key[Array, ""], *, rank: int, inputs: int, alpha: float
) -> AdaptedWeight:
    """A leaf with a fresh adapter: `a` normal with std 1/R, `b` zero, so that nothing changes yet.

    Args:
      leaf: the base weight [*inputs, *outputs], not stacked.
      key: random key.
      rank: R.
      inputs: number of leading dims that are contracted.
      alpha: scale x rank.
    """
    shape = logical_shape(leaf)
    a = jax.random.normal(key, (1, *shape[:inputs], rank), jnp.float32) / rank
    b = jnp.zeros((1, rank, *shape[inputs:]), jnp.float32)
    return AdaptedWeight(leaf, a, b, scale=alpha / rank)


def merge_adapter(leaf: AdaptedWeight, adapter: int = 0) -> Float[Array, "..."]:
    """The plain weight W + scale * a b of one adapter of an unstacked leaf."""
    base = plain(leaf.base)
    dtype = base.scale.dtype if isinstance(base, QArray) else base.dtype
    w = dequantize(base, jnp.float32) if isinstance(base, QArray) else base.astype(jnp.float32)
    a, b = (x[adapter].astype(jnp.float32) for x in (leaf.a, leaf.b))
    update = jnp.tensordot(a, b, 1, precision=jax.lax.Precision.HIGHEST)
    return (w + leaf.scale * update).astype(dtype)
