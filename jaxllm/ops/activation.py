"""Activations by name, and what an MLP makes of its projections."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxllm.ops.marks import marked
from jaxllm.spec.mlp import MLP

__all__ = ["ACTIVATIONS", "activation", "mlp_hidden"]

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
}


def activation(name: str, x: Float[Array, "*dims"]) -> Float[Array, "*dims"]:
    """The named activation, elementwise."""
    return ACTIVATIONS[name](x)


def mlp_hidden(
    mlp: MLP, up: Float[Array, "*dims F"], gate: Float[Array, "*dims F"] | None = None
) -> Float[Array, "*dims F"]:
    """What an MLP's `down` gets: act(gate_scale gate) * (up + offset), or act(up) without a gate.

    Before, the clamp bounds the activation's input from above and a gated `up` on both sides.
    """
    return _hidden(up, mlp=mlp) if gate is None else _hidden(up, gate, mlp=mlp)


@marked("hidden")
def _hidden(up: Array, gate: Array | None = None, *, mlp: MLP) -> Array:
    x = up if gate is None else gate
    x = x if gate is None or mlp.gate_scale == 1.0 else x * mlp.gate_scale
    if mlp.clamp is not None:
        x = jnp.minimum(x, jnp.asarray(mlp.clamp, x.dtype))
    x = activation(mlp.activation, x) if mlp.gain == 1 else x * jax.nn.sigmoid(x * mlp.gain)
    if gate is None:
        return x
    if mlp.clamp is not None:
        up = jnp.clip(up, -mlp.clamp, mlp.clamp)
    return x * (up + mlp.up_offset if mlp.up_offset else up)
