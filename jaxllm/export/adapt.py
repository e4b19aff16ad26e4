"""Adds an adapter of a bundle to its weights; stands alone on numpy and jax, beside runtime.py."""

import jax
import numpy as np

__all__ = ["adapt", "adapted"]


def adapt(bundle, name):
    """Add an adapter that a bundle keeps apart to its weights; the programs stay as they are.

    Args:
      bundle: a `runtime.Bundle`.
      name: one of `bundle.way["adapters"]`.
    """
    updates = bundle.way["adapters"][name]
    for i, row in enumerate(bundle.way["parameters"]):
        if row[0] in updates:
            new = adapted(bundle, row, updates[row[0]])
            bundle.weights[i] = jax.device_put(new, bundle.weights[i].sharding)


def adapted(bundle, row, factors):
    """W + A B in float32, in the dtype of W: of one array in a manifest, layer by layer.

    A is [layers, rows, R] and B [layers, R, columns], of the dims of W as they lie.
    """
    base, left, right = map(bundle.array, (row, *factors))
    new = np.empty_like(base)
    shape = (len(left), left.shape[1], right.shape[2])
    for old, target, a, b in zip(base.reshape(shape), new.reshape(shape), left, right, strict=True):
        target[...] = old.astype(np.float32) + a @ b
    return new
