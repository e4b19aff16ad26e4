"""Quantized and adapted versions of a toy's unstacked parameters."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.core.tree import map_leaves
from jaxllm.core.weights import AdaptedWeight, QArray, attach, dequantize, is_leaf, quantize

# Contracted dims of the matrices in a layer, by name.
INPUTS = {"q": 1, "k": 1, "v": 1, "o": 2, "gate": 1, "up": 1, "down": 1}


def matrix(path: str) -> str | None:
    """The name of a layer's matrix, or None for any other path."""
    name = path.split(".")[-1]
    return name if path.startswith("layers.") and name in INPUTS else None


def quantized(weights: Any, *, plain: tuple[int, ...] = (), format: str = "int4") -> Any:
    """Unstacked parameters with int4 matrices, in groups of 4, in all layers but `plain` ones.

    `up` brings zero points.
    """

    def leaf(path: str, w: Any) -> Any:
        name = matrix(path)
        if name is None or int(path.split(".")[1]) in plain:
            return w
        axis = -3 if name in "qkv" else -2  # along an input dim
        return quantize(w, format, axis=axis, group=4, symmetric=name != "up")

    return map_leaves(leaf, weights)


def dequantized(weights: Any) -> Any:
    """The same parameters with plain float32 leaves."""
    expand = lambda w: dequantize(w, jnp.float32) if isinstance(w, QArray) else w  # noqa: E731
    return jax.tree.map(expand, weights, is_leaf=is_leaf)


def adapted(weights: Any, *, adapters: int = 1, fresh: bool = False, rank: int = 3) -> Any:
    """Unstacked parameters with low-rank adapters on every matrix of the layers.

    Args:
      adapters: how many to choose from by `adapter_ids`.
      fresh: as `attach` makes them; otherwise trained, that is drawn at random.
      rank: R.
    """
    random = np.random.default_rng(3)

    def leaf(path: str, w: Any) -> Any:
        name = matrix(path)
        if name is None:
            return w
        key = jax.random.key(len(path))
        out = attach(w, key, rank=rank, inputs=INPUTS[name], alpha=2.0 * rank)
        if fresh:
            return out
        draw = lambda x: jnp.asarray(  # noqa: E731
            random.standard_normal((adapters, *x.shape[1:]), np.float32) / 8
        )
        return AdaptedWeight(w, draw(out.a), draw(out.b), scale=out.scale)

    return map_leaves(leaf, weights)
