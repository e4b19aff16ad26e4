"""The verb, `hidden, state, aux = apply(spec, params, inputs, step, state, policy=…)`; helpers."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from jaxllm.core.policy import Policy
from jaxllm.core.qrows import quantized_axes
from jaxllm.core.sharding import named_sharding
from jaxllm.core.tree import Segment, flatten, map_leaves, segments_of, unflatten, unstacked_paths
from jaxllm.core.weights import AdaptedWeight, OutputsFirst, QArray
from jaxllm.nn import decoder
from jaxllm.nn.aux import Aux
from jaxllm.nn.decoder import Inputs
from jaxllm.spec.model import ModelSpec
from jaxllm.spec.param import Draw, ParamDef
from jaxllm.spec.table import model_table
from jaxllm.state.step import Step
from jaxllm.typing import AnyArray

__all__ = [
    "Aux",
    "Inputs",
    "apply",
    "hold",
    "init",
    "logical_axes",
    "param_shardings",
    "unembed",
]


def apply(
    spec: ModelSpec,
    params: Any,
    inputs: Inputs | Int[AnyArray, "B T"],
    step: Step,
    state: Any = None,
    *,
    policy: Policy,
) -> tuple[Float[Array, "B T D"], Any, Aux]:
    """One forward pass: training, prefill, decode and verification alike.

    Args:
      spec: the model.
      params: its parameters, in any layer layout.
      inputs: `Inputs`, or ids.
      step: where the tokens stand.
      state: what is remembered; None in training.
      policy: how to run.

    Returns:
      Hidden states after the final norm, the new state, by-products.

    Raises:
      WeightsError: a parameter is missing or of another shape than the spec says.
    """
    if not isinstance(inputs, Inputs):
        inputs = Inputs(inputs)
    return decoder.decode(spec, params, inputs, step, state, policy)


def unembed(
    spec: ModelSpec,
    params: Any,
    hidden: Float[Array, "B T D"],
    *,
    policy: Policy,
    adapter_ids: Int[AnyArray, "B"] | None = None,
) -> Float[Array, "B T V"]:
    """Logits of hidden states, in the logit dtype; only an adapted head reads `adapter_ids`."""
    return decoder.logits(spec, params, hidden, policy, adapter_ids)


_UNROLLED = 8
"""Layers of a stack that are drawn each by itself; XLA for GPUs takes minutes to fuse the draws of
48 into one stack, where a loop over them is compiled in no time."""


def _number(path: str) -> int:
    return zlib.crc32(path.encode())


def _stack(paths: Sequence[str], definition: ParamDef, key: Array, dtype: Any) -> Array:
    """The leaves of several layers, each what it would be by itself."""
    if len(paths) <= _UNROLLED:
        return jnp.stack([_draw(_number(path), definition, key, dtype) for path in paths])
    numbers = jnp.asarray([_number(path) for path in paths], jnp.uint32)
    return jax.lax.map(lambda number: _draw(number, definition, key, dtype), numbers)


def _draw(number: Any, definition: ParamDef, key: Array, dtype: Any) -> Array:
    dtype = jnp.float32 if definition.wide else dtype
    key = jax.random.fold_in(key, number)
    if definition.draw is not None:
        return _special(definition.draw, key, definition.shape).astype(dtype)
    if definition.std == 0:
        return jnp.full(definition.shape, definition.fill, dtype)
    draw = jax.random.normal(key, definition.shape, jnp.float32)
    return (draw * definition.std).astype(dtype)


def _special(draw: Draw, key: Array, shape: tuple[int, ...]) -> Array:
    """A draw by name; see `Draw`."""
    kind, low, high = draw
    if kind == "log_steps":
        steps = jnp.log(jnp.arange(1, shape[-1] + 1, dtype=jnp.float32))
        return jax.lax.broadcast_in_dim(steps, shape, (len(shape) - 1,))
    if kind == "log_uniform":
        return jnp.log(jax.random.uniform(key, shape, jnp.float32, low, high))
    if kind == "powers":
        steps = jnp.geomspace(low, high, shape[-1], dtype=jnp.float32)
        return jax.lax.broadcast_in_dim(steps, shape, (len(shape) - 1,))
    x = jnp.exp(jax.random.uniform(key, shape, jnp.float32, math.log(low), math.log(high)))
    return x + jnp.log(-jnp.expm1(-x))


def init(
    spec: ModelSpec,
    key: Key[Array, ""],
    *,
    dtype: Any = jnp.float32,
    segments: tuple[Segment, ...] | None = None,
    fused: bool = False,
) -> dict[str, Any]:
    """Fresh parameters, the same in every layout.

    An unfused leaf depends on the key and its unstacked path alone.

    Args:
      spec: the model.
      key: random key.
      dtype: of all leaves but those that are wide.
      segments: how layers are stacked; canonical by default.
      fused: draw query/key/value and gate/up as one matrix each.
    """

    def leaf(path: str, definition: ParamDef) -> Array:
        if definition.axes[0] != "layers":
            return _draw(_number(path), definition, key, dtype)
        return _stack(unstacked_paths(path), definition.unstack(), key, dtype)

    return map_leaves(leaf, model_table(spec, segments, fused))


def hold(spec: ModelSpec, params: Any, policy: Policy) -> Any:
    """Plain parameters with every matrix held as the policy says."""
    if policy.matrices == "canonical":
        return params
    table = model_table(spec, segments_of(params["layers"]), _fused(params["layers"]))
    definitions = dict(flatten(table))

    def leaf(path: str, array: AnyArray) -> Any:
        definition = definitions[path]
        inputs = definition.held_inputs(policy.matrices)
        if not inputs:
            return array
        held = array.transpose(definition.hold_order(policy.matrices))
        return OutputsFirst(held, inputs=inputs)

    return map_leaves(leaf, params)


def _fused(layers: Any) -> bool:
    names = {path.split(".")[-1] for path, _ in flatten(layers)}
    return bool(names & {"qkv", "gate_up"})


def _leaf_axes(leaf: Any, axes: tuple[str | None, ...]) -> Any:
    """Axes of every array of a leaf, derived from those of its values."""
    if isinstance(leaf, AdaptedWeight):
        lead = axes[:1] if axes[0] == "layers" else ()
        return AdaptedWeight(
            _leaf_axes(leaf.base, axes),
            (*lead, *[None] * (leaf.a.ndim - len(lead))),
            (*lead, *[None] * (leaf.b.ndim - len(lead))),
            scale=leaf.scale,
        )
    if isinstance(leaf, OutputsFirst):
        lead = int(axes[0] == "layers")
        stop = lead + leaf.inputs
        return OutputsFirst((*axes[:lead], *axes[stop:], *axes[lead:stop]), inputs=leaf.inputs)
    if isinstance(leaf, QArray):
        return quantized_axes(leaf, axes)
    return axes


def logical_axes(spec: ModelSpec, params: Any = None) -> Any:
    """A tree like `params` with a tuple of axis names for every array.

    Args:
      spec: the model.
      params: parameters whose layout and leaf kinds are followed; canonical and plain by default.
    """
    if params is None:
        return map_leaves(lambda _, d: d.axes, model_table(spec))
    table = model_table(spec, segments_of(params["layers"]), _fused(params["layers"]))
    axes = dict(flatten(table))
    return unflatten({path: _leaf_axes(leaf, axes[path].axes) for path, leaf in flatten(params)})


def param_shardings(spec: ModelSpec, params: Any, mesh: Any, policy: Policy) -> Any:
    """NamedSharding of every array of `params` (or of its shapes) on a mesh."""
    axes = logical_axes(spec, params)
    flat_axes = jax.tree.leaves(axes, is_leaf=lambda x: isinstance(x, tuple))
    arrays, structure = jax.tree.flatten(params)
    shardings = [
        named_sharding(mesh, a, policy.rules, x.shape)
        for a, x in zip(flat_axes, arrays, strict=True)
    ]
    return jax.tree.unflatten(structure, shardings)
