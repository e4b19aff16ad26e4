"""Quantized tensors of a file as leaves in the run's layout, and leaves as tensors of a file.

Rows are cut, joined and put in order; no value is unpacked.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import jax
import numpy as np

from jaxllm.core.layouts import as_held
from jaxllm.core.packing import packed_arrays, packed_facts
from jaxllm.core.qarray import QArray, dequantize
from jaxllm.core.qrows import join_rows, take_rows
from jaxllm.core.tree import unstacked_paths
from jaxllm.errors import UnsupportedError
from jaxllm.spec.param import ParamDef
from jaxllm.spec.table import FUSED, layer_paths
from jaxllm.zoo.packed_source import Source
from jaxllm.zoo.reader import Reader, TensorInfo
from jaxllm.zoo.safetensors import TensorSource, array_info
from jaxllm.zoo.table import Entry, join

__all__ = ["METHOD", "PackedReader", "fused_parts", "packed_leaf", "packed_tensors"]

METHOD = "jaxllm"
"""`quant_method` of our own layout."""


@dataclass(frozen=True)
class PackedReader:
    """A reader in which some tensors are quantized; those it gives as leaves, outputs first.

    Attributes:
      base: the file's own reader.
      tensors: what a model finds: a quantized tensor under the name of the plain one.
      leaves: name -> what makes the leaf.
      inputs_first: names of those whose plain tensor would be [in, out].
    """

    base: Reader
    tensors: Mapping[str, TensorInfo] = field(repr=False)
    leaves: Mapping[str, Callable[[], QArray]] = field(repr=False)
    inputs_first: frozenset[str] = frozenset()

    @classmethod
    def over(cls, source: Source) -> PackedReader:
        """A reader with the leaves of a source in place of the tensors that they are made of."""
        tensors = {n: info for n, info in source.reader.tensors.items() if n not in source.used}
        for name, (shape, _) in source.leaves.items():
            tensors[name] = TensorInfo(shape, "quantized", math.prod(shape))
        makers = {name: make for name, (_, make) in source.leaves.items()}
        turned = frozenset(source.inputs_first)
        return cls(source.reader, MappingProxyType(tensors), MappingProxyType(makers), turned)

    @property
    def metadata(self) -> Mapping[str, Any]:
        """The file's own."""
        return self.base.metadata

    @property
    def files(self) -> tuple[Any, ...]:
        """The files that hold the tensors."""
        return self.base.files

    def leaf(self, name: str) -> QArray | None:
        """A quantized tensor as a leaf of numpy arrays; None for a plain one."""
        return self.leaves[name]() if name in self.leaves else None

    def read(self, name: str) -> np.ndarray:
        """A tensor as floats, as the plain one would be."""
        leaf = self.leaf(name)
        if leaf is None:
            return self.base.read(name)
        values = np.asarray(jax.jit(dequantize, static_argnums=1)(leaf, np.float32))
        turned = bool(leaf.inputs) and name not in self.inputs_first
        return values.swapaxes(-1, -2) if turned else values


def fused_parts(path: str) -> list[str]:
    """The unfused paths behind a possibly fused one; none where it is no fused one."""
    parent, _, name = path.rpartition(".")
    stem, bias = (name.removesuffix("_bias"), "_bias") if name.endswith("_bias") else (name, "")
    return [f"{parent}.{part}{bias}" for part in FUSED.get(stem, ())]


def _thin(definition: ParamDef) -> ParamDef:
    """A matrix of one input, whose values can be the numbers of its outputs."""
    thin = (1,) * definition.inputs + definition.shape[definition.inputs :]
    return dataclasses.replace(definition, shape=thin)


def _of_entry(reader: Any, entry: Entry, definition: ParamDef) -> QArray | None:
    """The leaf of one tensor: the whole matrix, one expert of it, or a stack of all."""
    give = getattr(reader, "leaf", None)
    leaf = None if give is None else give(entry.disk)
    if leaf is None:
        return None
    turned = entry.disk in getattr(reader, "inputs_first", ())
    if entry.form in ("conv", "same") or (entry.form == "in_out") != turned:
        raise UnsupportedError(f"{entry.disk}: is quantized, and no matrix [outputs, inputs]")
    one = definition.unstack() if definition.lead else definition
    outputs = np.arange(leaf.values.shape[-2])
    if definition.inputs:
        form = "linear" if turned else entry.form
        alone = dataclasses.replace(entry, form=form, index=None)
        rows = alone.to_ours(outputs[:, None], _thin(one)).reshape(-1)
        leaf = leaf if np.array_equal(rows, outputs) else take_rows(leaf, rows)
    return dataclasses.replace(leaf, shape=one.shape, inputs=one.inputs)


def _stacked(leaves: Sequence[QArray]) -> QArray | None:
    """Leaves on a new leading dim, or None where they differ in kind."""

    def kind(leaf: QArray) -> Any:
        arrays, structure = jax.tree.flatten(leaf)
        return structure, [(a.shape, str(a.dtype)) for a in arrays]

    if any(kind(leaf) != kind(leaves[0]) for leaf in leaves):
        return None
    return jax.tree.map(lambda *arrays: np.stack(arrays), *leaves)


def _of_layer(
    checkpoint: Any, sources: Mapping[str, list[Entry]], path: str, held: ParamDef
) -> QArray | None:
    """The (possibly fused) leaf of one layer; None where any of it is plain."""
    paths = layer_paths(checkpoint.spec)
    parts: list[QArray] = []
    for part in fused_parts(path) or [path]:
        found = []
        for entry in sources[part]:
            leaf = _of_entry(checkpoint.reader, entry, paths[part])
            if leaf is None:
                return None
            found.append(leaf)
        whole = _stacked(found) if sources[part][0].index is not None else found[0]
        if whole is None:
            return None
        parts.append(whole)
    if len(parts) == 1:
        return parts[0]
    one = held.unstack() if held.lead else held
    return join_rows(parts, one.shape, one.inputs)


def packed_leaf(
    checkpoint: Any,
    sources: Mapping[str, list[Entry]],
    path: str,
    definition: ParamDef,
    *,
    codes: str,
) -> QArray | None:
    """A leaf in the run's layout, or None where it must be plain.

    Args:
      checkpoint: the source.
      sources: unstacked path -> tensors.
      path: in the run's layout.
      definition: of that leaf.
      codes: how its values are held, as `Policy.codes` says.

    Raises:
      UnsupportedError: parts that differ in a way that no joined leaf has.
    """
    stacked = definition.axes[0] == "layers"
    one = definition.unstack() if stacked else definition
    leaves: list[QArray] = []
    for layer in unstacked_paths(path):
        leaf = _of_layer(checkpoint, sources, layer, one)
        if leaf is None:
            return None
        leaves.append(as_held(leaf, codes))
    return _stacked(leaves) if stacked else leaves[0]


def packed_tensors(
    parts: list[Entry],
    read: Callable[[str], QArray],
    definitions: Mapping[str, ParamDef],
    facts: dict[str, Any],
) -> Iterator[TensorSource]:
    """The arrays of a quantized tensor in our layout on disk; their facts go into `facts`."""
    held = []
    for entry in parts:
        definition, leaf = definitions[entry.path], read(entry.path)
        if entry.index is not None:
            at = entry.index
            leaf = jax.tree.map(lambda a, at=at: a[at], leaf)
        one = definition.unstack() if definition.lead else definition
        if definition.inputs:
            thin = _thin(one)
            numbers = np.arange(thin.size).reshape(thin.shape)
            alone = dataclasses.replace(entry, form=_outputs_first(entry), index=None)
            rows = alone.to_disk(numbers, thin).reshape(-1)
            leaf = leaf if np.array_equal(rows, np.arange(len(rows))) else take_rows(leaf, rows)
        held.append(leaf)
    whole = held[0]
    if len(held) > 1:
        whole = join_rows(held, (whole.num_inputs, sum(x.num_outputs for x in held)), 1)
        if parts[0].groups > 1:
            ends = np.cumsum([x.num_outputs for x in held])
            rows = np.split(np.arange(ends[-1]), ends[:-1])
            whole = take_rows(whole, join(parts, rows, 0))
    inputs = definitions[parts[0].path].inputs
    shape = (whole.num_inputs, whole.values.shape[-2])
    whole = dataclasses.replace(
        whole, shape=shape if inputs else shape[::-1], inputs=min(inputs, 1)
    )
    name = parts[0].disk
    facts[name] = packed_facts(whole) | {"inputs_first": parts[0].form == "in_out"}
    for part, array in packed_arrays(whole).items():
        yield f"{name}.{part}", array_info(array), functools.partial(np.asarray, array)


def _outputs_first(entry: Entry) -> Any:
    return "linear" if entry.form == "in_out" else entry.form
