"""Quantized and adapted versions of a toy's unstacked parameters."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.core.tree import map_leaves
from jaxllm.core.weights import (
    AdaptedWeight,
    QArray,
    Scheme,
    attach,
    dequantize,
    is_leaf,
    logical_shape,
    merge_adapter,
    quantize,
)
from tests.contracts.specs import quick

# Contracted dims of the matrices in a layer, by name.
INPUTS = {"q": 1, "k": 1, "v": 1, "o": 2, "gate": 1, "up": 1, "down": 1}


def matrix(path: str) -> str | None:
    """The name of a layer's matrix, or None for any other path."""
    name = path.split(".")[-1]
    return name if path.startswith("layers.") and name in INPUTS else None


def quantized(weights: Any, *, plain: tuple[int, ...] = (), format: str = "int4") -> Any:
    """Unstacked parameters with quantized matrices, in groups of 4, in all layers but `plain` ones.

    `up` brings offsets where the format knows them.
    """

    def leaf(path: str, w: Any) -> Any:
        name = matrix(path)
        if name is None or int(path.split(".")[1]) in plain:
            return w
        symmetric = name != "up" or format not in ("int8", "int4")
        scheme = Scheme(format=format, group=4, symmetric=symmetric)
        return quantize(w, scheme, inputs=INPUTS[name])

    return on_host(lambda w: map_leaves(leaf, w), weights)


def on_host(change: Callable[[Any], Any], weights: Any) -> Any:
    """A changed tree as host arrays: one program, and no more when it is taken apart."""
    return jax.tree.map(np.asarray, quick(change)(weights))


def expand(w: Any) -> Any:
    """A quantized leaf as the plain array that it stands for."""
    return dequantize(w, jnp.float32) if isinstance(w, QArray) else w


def dequantized(weights: Any) -> Any:
    """The same parameters with plain float32 leaves."""
    return on_host(lambda tree: jax.tree.map(expand, tree, is_leaf=is_leaf), weights)


def merged(weights: Any, adapter: int = 0) -> Any:
    """The same parameters with one of their adapters merged into plain arrays."""
    merge = lambda w: merge_adapter(w, adapter) if isinstance(w, AdaptedWeight) else w  # noqa: E731
    return on_host(lambda tree: jax.tree.map(merge, tree, is_leaf=is_leaf), weights)


def fresh_adapters(weights: Any, rank: int = 3) -> Any:
    """Unstacked parameters with adapters as `attach` makes them, on every matrix of the layers."""

    def leaf(path: str, w: Any) -> Any:
        name = matrix(path)
        if name is None:
            return w
        return attach(w, jax.random.key(len(path)), rank=rank, inputs=INPUTS[name], alpha=6.0)

    return on_host(lambda w: map_leaves(leaf, w), weights)


def adapted(weights: Any, *, adapters: int = 1, rank: int = 3) -> Any:
    """Unstacked parameters with trained (randomly drawn) adapters on every matrix of the layers.

    Args:
      adapters: how many to choose from by `adapter_ids`.
      rank: R.
    """
    random = np.random.default_rng(3)

    def leaf(path: str, w: Any) -> Any:
        name = matrix(path)
        if name is None:
            return w
        shape, inputs = logical_shape(w), INPUTS[name]
        sizes = (adapters, *shape[:inputs], rank), (adapters, rank, *shape[inputs:])
        a, b = (random.standard_normal(size).astype(np.float32) / 8 for size in sizes)
        return AdaptedWeight(w, a, b, scale=2.0)

    return map_leaves(leaf, weights)
