"""Quantized tensors of a file as leaves in the run's layout, and leaves as tensors of a file.

Rows are cut, joined and put in order; no value is unpacked.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import jax
import numpy as np

from jaxllm.core.layouts import as_planes
from jaxllm.core.packing import packed_arrays, packed_facts
from jaxllm.core.qarray import QArray, dequantize
from jaxllm.core.qrows import join_rows, take_rows
from jaxllm.errors import UnsupportedError
from jaxllm.spec.param import ParamDef
from jaxllm.zoo.reader import Reader, TensorInfo
from jaxllm.zoo.table import Entry

__all__ = ["PackedReader", "leaf_tensors", "packed_layer", "packed_leaf"]

METHOD = "jaxllm"
"""`quant_method` of our own layout."""


@dataclass(frozen=True)
class PackedReader:
    """A reader in which some tensors are quantized; those it gives as [out, in] leaves.

    Attributes:
      base: the file's own reader.
      tensors: what a model finds: a quantized tensor under the name of the plain one.
      leaves: name -> what makes the leaf.
    """

    base: Reader
    tensors: Mapping[str, TensorInfo] = field(repr=False)
    leaves: Mapping[str, Callable[[], QArray]] = field(repr=False)

    @classmethod
    def over(
        cls,
        base: Reader,
        leaves: Mapping[str, tuple[tuple[int, ...], Callable[[], QArray]]],
        used: set[str],
    ) -> PackedReader:
        """A reader with (logical shape, leaf) by name in place of the tensors `used`."""
        tensors = {name: info for name, info in base.tensors.items() if name not in used}
        tensors |= {
            name: TensorInfo(shape, "quantized", math.prod(shape))
            for name, (shape, _) in leaves.items()
        }
        makers = {name: make for name, (_, make) in leaves.items()}
        return cls(base, MappingProxyType(tensors), MappingProxyType(makers))

    @property
    def metadata(self) -> Mapping[str, Any]:
        """The file's own."""
        return self.base.metadata

    @property
    def files(self) -> tuple[Any, ...]:
        """The files that hold the tensors."""
        return self.base.files

    def leaf(self, name: str) -> QArray | None:
        """A quantized tensor as a leaf of numpy arrays, [out, in] held; None for a plain one."""
        return self.leaves[name]() if name in self.leaves else None

    def read(self, name: str) -> np.ndarray:
        """A tensor as floats, [out, in] where it is a matrix."""
        leaf = self.leaf(name)
        if leaf is None:
            return self.base.read(name)
        values = np.asarray(jax.jit(dequantize, static_argnums=1)(leaf, np.float32))
        return values.swapaxes(-1, -2) if leaf.inputs else values


def _rows(entry: Entry, definition: ParamDef, outputs: int) -> np.ndarray:
    """Which rows on disk are the leaf's, in its order."""
    if entry.form in ("in_out", "conv", "same"):
        raise UnsupportedError(f"{entry.disk}: a quantized tensor in the form {entry.form}")
    if not definition.inputs:
        return np.arange(outputs)
    thin = (1,) * definition.inputs + definition.shape[definition.inputs :]
    one = dataclasses.replace(definition, shape=thin)
    return entry.to_ours(np.arange(outputs)[:, None], one).reshape(-1)


def packed_leaf(reader: Any, entry: Entry, definition: ParamDef) -> QArray | None:
    """The leaf that an entry fills, or None where its tensor is not quantized."""
    give = getattr(reader, "leaf", None)
    leaf = None if give is None else give(entry.disk)
    if leaf is None:
        return None
    rows = _rows(entry, definition, leaf.values.shape[-2])
    if not np.array_equal(rows, np.arange(leaf.values.shape[-2])):
        leaf = take_rows(leaf, rows)
    shape = definition.shape
    return dataclasses.replace(leaf, shape=shape, inputs=definition.inputs)


def _kind(leaf: QArray) -> Any:
    arrays, structure = jax.tree.flatten(leaf)
    return structure, [(a.shape, str(a.dtype)) for a in arrays]


def packed_layer(
    layers: list[list[QArray | None]], definition: ParamDef, *, stacked: bool, planes: bool
) -> QArray | None:
    """A leaf of the run's layout from its parts layer by layer, or None where it must be plain.

    Args:
      layers: for each layer the parts that are held as one.
      definition: of the leaf of one layer, as it is held.
      stacked: whether layers have a leading dim.
      planes: four bits in layout version 2.

    Raises:
      UnsupportedError: the parts differ in a way that no joined leaf has.
    """
    found = [part for parts in layers for part in parts]
    if any(part is None for part in found):
        return None
    leaves = []
    for parts in layers:
        whole: Any = parts[0]
        if len(parts) > 1:
            whole = join_rows(parts, definition.shape, definition.inputs)  # pyright: ignore
        leaves.append(as_planes(whole) if planes else whole)
    if not stacked:
        return leaves[0]
    if any(_kind(leaf) != _kind(leaves[0]) for leaf in leaves):
        return None
    return jax.tree.map(lambda *arrays: np.stack(arrays), *leaves)


def leaf_tensors(
    parts: list[Entry], leaves: list[QArray], definitions: Mapping[str, ParamDef]
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """(arrays, facts) of the tensor that leaves of numpy arrays fill, in our layout on disk."""
    held = []
    for entry, leaf in zip(parts, leaves, strict=True):
        definition = definitions[entry.path]
        if definition.inputs:
            outputs = definition.shape[definition.inputs :]
            thin = (1,) * definition.inputs + outputs
            one = dataclasses.replace(definition, shape=thin)
            index = np.arange(math.prod(outputs)).reshape(thin)
            rows = entry.to_disk(index, one).reshape(-1)
            if not np.array_equal(rows, np.arange(len(rows))):
                leaf = take_rows(leaf, rows)
        held.append(leaf)
    whole = held[0]
    if len(held) > 1:
        whole = join_rows(held, (whole.num_inputs, sum(x.num_outputs for x in held)), 1)
    inputs = definitions[parts[0].path].inputs
    shape = (whole.num_inputs, whole.values.shape[-2])
    shape = shape if inputs else shape[::-1]
    whole = dataclasses.replace(whole, shape=shape, inputs=min(inputs, 1))
    return packed_arrays(whole), packed_facts(whole)
