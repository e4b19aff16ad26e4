"""Leaves of `params` beside the plain array: quantized (`QArray`) and adapted (`AdaptedWeight`).

Every array of a leaf carries the leading layers axis when stacked; everything else is static, so a
leaf survives jit, scan over layers, sharding and checkpoints as one pytree.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jaxllm.core.qarray import QArray, dequantize
from jaxllm.core.quantize import Scheme, quantize
from jaxllm.typing import Slot

__all__ = [
    "AdaptedWeight",
    "Leaf",
    "OutputsFirst",
    "QArray",
    "Scheme",
    "attach",
    "dequantize",
    "logical_shape",
    "merge_adapter",
    "plain",
    "quantize",
]


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
    return (*leaf.lead, *leaf.shape) if isinstance(leaf, QArray) else tuple(leaf.shape)


def plain(leaf: Any) -> Any:
    """The array [*inputs, *outputs] of a plain or outputs-first leaf that is not stacked."""
    if not isinstance(leaf, OutputsFirst):
        return leaf
    dims = range(leaf.values.ndim)
    return leaf.values.transpose(*dims[-leaf.inputs :], *dims[: -leaf.inputs])


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
    dtype = jnp.float32 if isinstance(base, QArray) else base.dtype
    w = dequantize(base, jnp.float32) if isinstance(base, QArray) else base.astype(jnp.float32)
    a, b = (x[adapter].astype(jnp.float32) for x in (leaf.a, leaf.b))
    update = jnp.tensordot(a, b, 1, precision=jax.lax.Precision.HIGHEST)
    return (w + leaf.scale * update).astype(dtype)
