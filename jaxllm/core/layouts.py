"""Layout versions of quantized values; each holds the same numbers."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxllm.core.qarray import NIBBLES, QArray, in_natural_order, in_stored_order, value_dtype

__all__ = ["as_held", "as_operand", "as_planes", "as_values", "has_planes"]


def has_planes(leaf: QArray) -> bool:
    """Whether a leaf of version 1 can be held as version 2: no group is cut in the middle."""
    width = leaf.values.shape[-1]
    groups = leaf.scale.values if isinstance(leaf.scale, QArray) else leaf.scale
    whole = groups.shape[-1] == 1 or width % (2 * leaf.group) == 0
    return leaf.version == 1 and leaf.format in NIBBLES and width % 2 == 0 and whole


def _module(array: Any) -> Any:
    return np if isinstance(array, np.ndarray) else jnp


def as_planes(leaf: QArray) -> QArray:
    """A leaf of four bits in version 2, or as it is where that cannot be."""
    if not has_planes(leaf):
        return leaf
    module = _module(leaf.values)
    codes = leaf.values.astype(module.int8)
    codes = (codes + module.int8(8) if leaf.format == "int4" else codes).astype(module.uint8)
    middle = codes.shape[-1] // 2
    packed = codes[..., :middle] | (codes[..., middle:] << module.uint8(4))
    return dataclasses.replace(leaf, values=packed, version=2)


def as_values(leaf: QArray) -> QArray:
    """A leaf in version 1."""
    if leaf.version == 1:
        return leaf
    if leaf.version == 3:
        return dataclasses.replace(leaf, values=in_natural_order(leaf.values, leaf), version=1)
    module = _module(leaf.values)
    low, high = leaf.values & module.uint8(15), leaf.values >> module.uint8(4)
    codes = module.concatenate([low, high], axis=-1).astype(module.int8)
    codes = codes - module.int8(8) if leaf.format == "int4" else codes
    return dataclasses.replace(leaf, values=codes.astype(value_dtype(leaf.format)), version=1)


def as_operand(leaf: QArray) -> QArray:
    """One matrix of version 1 in version 3, or as it is where no kernel reads that."""
    known = leaf.format in ("int8", "int4", "uint4", "fp8") or leaf.format in NIBBLES
    whole = leaf.values.shape[-1] % 32 == 0 and leaf.num_outputs % 64 == 0
    plain = leaf.version == 1 and not leaf.lead and leaf.order is None and not leaf.activations
    if not (plain and known and whole):
        return leaf
    return dataclasses.replace(leaf, values=in_stored_order(leaf.values, leaf), version=3)


def as_held(leaf: QArray, codes: str) -> QArray:
    """A leaf of version 1 as `Policy.codes` says."""
    return {"planes": as_planes, "operand": as_operand}.get(codes, lambda same: same)(leaf)
