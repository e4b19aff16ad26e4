"""One parameter of a loaded model by its unstacked path, whatever the layout of the run."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from jaxllm.core.layouts import as_values
from jaxllm.core.qrows import take_rows
from jaxllm.core.tree import flatten, layer_tree, segments_of, unstacked_paths
from jaxllm.core.weights import QArray, dequantize, plain
from jaxllm.spec.model import ModelSpec
from jaxllm.spec.table import FUSED, fused_part, layer_paths

__all__ = ["host_leaf", "plain_leaf", "quantized_paths"]


def _host(leaf: Any) -> Any:
    """A leaf with its arrays on the host."""
    return jax.tree.map(np.asarray, leaf)


def host_leaf(spec: ModelSpec, params: Any, path: str) -> Any:
    """A leaf on the host, unfused: a canonical array, or a `QArray` of layout version 1."""
    *parents, name = path.split(".")
    if parents[0] != "layers":
        return _canonical(functools.reduce(lambda tree, key: tree[key], parents, params)[name])
    layer = int(parents[1])
    segment = next(s for s in segments_of(params["layers"]) if s.start <= layer < s.stop)
    take = lambda leaf, i: jax.tree.map(lambda a: np.asarray(a)[i], leaf)  # noqa: E731
    leaves = layer_tree(segment, params["layers"][segment.key], layer, take)[parents[2]]
    if name in leaves:
        return _canonical(leaves[name])
    fused, cut = fused_part(spec, path)
    leaf = _canonical(leaves[fused.rpartition(".")[2]])
    if not isinstance(leaf, QArray):
        return np.ascontiguousarray(leaf[cut])
    definition = layer_paths(spec)[path]
    definition = definition.unstack() if definition.lead else definition
    outputs = leaf.shape[leaf.inputs :]
    rows = np.arange(leaf.num_outputs).reshape((1,) * leaf.inputs + outputs)[cut].reshape(-1)
    part = take_rows(leaf, rows)
    return dataclasses.replace(part, shape=definition.shape, inputs=definition.inputs)


def quantized_paths(params: Any) -> set[str]:
    """Unstacked, unfused paths of all leaves that are quantized."""
    found = set()
    for path, leaf in flatten(params):
        if isinstance(leaf, QArray):
            for one in unstacked_paths(path):
                parent, _, name = one.rpartition(".")
                found |= {f"{parent}.{part}" for part in FUSED.get(name, (name,))}
    return found


def _canonical(leaf: Any) -> Any:
    leaf = _host(leaf)
    return as_values(leaf) if isinstance(leaf, QArray) else np.ascontiguousarray(plain(leaf))


def plain_leaf(leaf: Any) -> np.ndarray:
    """A leaf of `host_leaf` as an array; a quantized one in float32."""
    if not isinstance(leaf, QArray):
        return leaf
    return np.asarray(jax.jit(dequantize, static_argnums=1)(leaf, np.float32))
