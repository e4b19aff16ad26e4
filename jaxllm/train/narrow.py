"""Optimizers over narrow parameters: moments in the parameters' dtype, updates in float32."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxllm.core.precision import at_least_float32

__all__ = ["in_float32"]


def _wide(tree: Any) -> Any:
    def widen(x: jax.Array) -> jax.Array:
        floating = jnp.issubdtype(x.dtype, jnp.floating)
        return x.astype(at_least_float32(x.dtype)) if floating else x

    return jax.tree.map(widen, tree)


def in_float32(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """The same transformation, computed in float32; its state keeps the dtypes that it began with.

    The casts cost nothing: XLA makes one elementwise loop of them and the update.
    """

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, new = inner.update(_wide(updates), _wide(state), _wide(params))
        return updates, jax.tree.map(lambda x, old: x.astype(old.dtype), new, state)

    return optax.GradientTransformation(inner.init, update)
