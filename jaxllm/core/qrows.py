"""Quantized matrices along their dims: cutting and joining outputs, names of the held dims."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.core.qarray import QArray
from jaxllm.errors import UnsupportedError
from jaxllm.typing import AnyArray

__all__ = ["join_rows", "quantized_axes", "row_blocks", "take_rows"]


def row_blocks(array: AnyArray, outputs: int, rows: int) -> AnyArray:
    """Something per block of rows as something per row."""
    if array.shape[-2] == outputs:
        return array
    module = np if isinstance(array, np.ndarray) else jnp
    if array.shape[-2] == 1:
        return module.broadcast_to(array, (*array.shape[:-2], outputs, array.shape[-1]))
    return module.repeat(array, rows, axis=-2)[..., :outputs, :]


def _per_row(leaf: QArray) -> QArray:
    """The same leaf with everything per row, so that any rows may be cut out or joined."""
    outputs = leaf.values.shape[-2]
    if isinstance(leaf.scale, QArray):
        scale = _per_row(leaf.scale)
    else:
        scale = row_blocks(leaf.scale, outputs, leaf.rows)
    offset = None if leaf.offset is None else row_blocks(leaf.offset, outputs, leaf.rows)
    return dataclasses.replace(leaf, scale=scale, offset=offset, rows=1)


def take_rows(leaf: QArray, rows: Any) -> QArray:
    """The leaf of some outputs, in the order of an index or slice; its shape becomes (I, O)."""
    leaf = _per_row(leaf)
    inputs = leaf.num_inputs
    order = leaf.order

    def cut(node: QArray) -> QArray:
        scale = cut(node.scale) if isinstance(node.scale, QArray) else node.scale[..., rows, :]
        offset = None if node.offset is None else node.offset[..., rows, :]
        values = node.values[..., rows, :]
        shape = (node.values.shape[-1], values.shape[-2])
        return dataclasses.replace(node, values=values, scale=scale, offset=offset, shape=shape)

    out = cut(dataclasses.replace(leaf, order=None))
    return dataclasses.replace(out, order=order, shape=(inputs, out.values.shape[-2]), inputs=1)


def _same_kind(leaves: list[QArray]) -> bool:
    statics = {
        (a.format, a.group, a.version, a.inputs, a.activations, a.offset is None) for a in leaves
    }
    dtypes = {tuple(str(x.dtype) for x in jax.tree.leaves(leaf)) for leaf in leaves}
    return len(statics) == 1 and len(dtypes) == 1


def _in_blocks(leaves: list[QArray]) -> bool:
    """Whether blocks of rows stay whole when the leaves are put one after the other."""
    rows = leaves[0].rows
    plain = all(leaf.rows == rows and not isinstance(leaf.scale, QArray) for leaf in leaves)
    return rows > 1 and plain and all(leaf.num_outputs % rows == 0 for leaf in leaves)


def join_rows(leaves: list[QArray], shape: tuple[int, ...], inputs: int) -> QArray:
    """Several leaves of one input as one, one after the other; `shape` is the logical shape.

    Raises:
      UnsupportedError: they differ in format or in the order of their inputs.
    """
    orders = [np.asarray(leaf.order) for leaf in leaves if leaf.order is not None]
    same_order = len(orders) in (0, len(leaves)) and all((o == orders[0]).all() for o in orders)
    if not _same_kind(leaves) or not same_order:
        raise UnsupportedError(
            "projections that are quantized in different ways cannot be held as one matrix; "
            "load with a policy of fused=False"
        )
    parts = [dataclasses.replace(leaf, order=None) for leaf in leaves]
    parts = parts if _in_blocks(parts) else [_per_row(part) for part in parts]
    module = np if isinstance(parts[0].values, np.ndarray) else jnp
    joined = jax.tree.map(
        lambda *arrays: module.concatenate(arrays, axis=-2),
        *[_neutral(part) for part in parts],
    )
    order = leaves[0].order
    joined = _reshaped(joined)
    return dataclasses.replace(joined, order=order, shape=shape, inputs=inputs)


def _neutral(leaf: QArray) -> QArray:
    """Without shapes, so that leaves of different heights have one structure."""
    scale = _neutral(leaf.scale) if isinstance(leaf.scale, QArray) else leaf.scale
    return dataclasses.replace(leaf, scale=scale, shape=(), order=None)


def _reshaped(leaf: QArray) -> QArray:
    scale = _reshaped(leaf.scale) if isinstance(leaf.scale, QArray) else leaf.scale
    return dataclasses.replace(leaf, scale=scale, shape=tuple(leaf.values.shape[-2:][::-1]))


def quantized_axes(leaf: QArray, axes: tuple[str | None, ...]) -> QArray:
    """A leaf with the names of its arrays' dims, from those of its logical ones.

    Dims that are held as one have the first name among them.
    """
    lead = len(axes) - len(leaf.shape)
    stop = lead + (leaf.inputs or len(leaf.shape) - 1)
    first = lambda names: next((name for name in names if name is not None), None)  # noqa: E731
    one, other = first(axes[lead:stop]), first(axes[stop:])
    outputs, inputs = (other, one) if leaf.inputs else (one, other)
    held = (*axes[:lead], outputs, inputs)

    def name(node: QArray) -> QArray:
        return dataclasses.replace(
            node,
            values=held,
            scale=name(node.scale) if isinstance(node.scale, QArray) else held,
            offset=None if node.offset is None else held,
            order=None if node.order is None else (*axes[:lead], None),
        )

    return name(leaf)
