"""The decoder: embed, run the layers, norm; logits apart, so that a loss can run over chunks."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxllm.core.config import require
from jaxllm.core.policy import Policy
from jaxllm.core.sharding import constrain, mesh_axes, with_axes
from jaxllm.errors import ShapeError, UnsupportedError
from jaxllm.nn.aux import Aux
from jaxllm.nn.block import Norm, dropout
from jaxllm.nn.leaf import checked
from jaxllm.nn.stack import Carry, run
from jaxllm.ops import linear
from jaxllm.ops.activation import activation
from jaxllm.spec.model import ModelSpec
from jaxllm.spec.table import model_table
from jaxllm.state.step import Step
from jaxllm.typing import AnyArray, Slot

__all__ = ["Inputs", "decode", "embed", "logits"]

EMBED_KEY = 1_000_003
"""Folded into the dropout key for embeddings; layers fold in their own number."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Inputs:
    """Token ids, or given embeddings at marked positions (images, soft prompts).

    Attributes:
      ids: [B, T] integers; what stands at marked positions is ignored.
      embeds: [B, T, D] or None.
      is_embed: [B, T] booleans or None; where to take `embeds`.
      types: [B, T] integers or None; types of the tokens, 0 for all by default.
    """

    ids: Slot
    embeds: Slot | None = None
    is_embed: Slot | None = None
    types: Slot | None = None


def _end(spec: ModelSpec, params: Any, group: str, name: str) -> Any:
    """A leaf outside of the layers, checked."""
    shape = model_table(spec)[group][name].shape
    return checked(params.get(group, {}).get(name), shape, f"{group}.{name}")


def _rows(
    table: Any, ids: Int[AnyArray, "B T"], policy: Policy, adapter_ids: Slot | None = None
) -> Float[Array, "B T D"]:
    """Rows of a table by ids, where the table's width is split too.

    Its devices then each take their part of the rows of all of them and exchange parts. Left to
    itself XLA gathers the table, and its gradient is as large.
    """
    split = mesh_axes(policy.rules, "width")
    others = tuple(axis for axis in mesh_axes(policy.rules, "batch") if axis not in split)
    apart = with_axes(policy.rules, batch=others)
    ids = constrain(ids, ("batch", "length"), apart)
    x = linear.take(table, ids, dtype=policy.compute_dtype, adapter_ids=adapter_ids)
    x = constrain(x, ("batch", "length", "width"), apart)
    return constrain(x, ("batch", "length", None), policy.rules)


def embed(
    spec: ModelSpec, params: Any, inputs: Inputs, step: Step, policy: Policy
) -> Float[Array, "B T D"]:
    """Hidden states before the first layer."""
    table = _end(spec, params, "embed", "table")
    x = _rows(table, inputs.ids, policy, step.adapter_ids)
    if spec.embedding.scale != 1.0:
        x = x * jnp.asarray(spec.embedding.scale, x.dtype)
    if inputs.embeds is not None:
        if inputs.is_embed is None:
            raise ShapeError("inputs: embeds need is_embed, which marks their positions")
        x = jnp.where(inputs.is_embed[..., None], inputs.embeds.astype(x.dtype), x)
    if spec.embedding.positions is not None:
        # Padding may stand past the end; a row that is no number would reach the real tokens.
        places = step.positions + spec.embedding.position_offset
        places = jnp.clip(places, 0, spec.embedding.positions - 1)
        table = _end(spec, params, "embed", "positions")
        x = x + _rows(table, places, policy)
    x = _add_types(spec, params, inputs, x, policy)
    if spec.embedding.norm is not None:
        norm = Norm(spec.embedding.norm, policy)
        x = jnp.asarray(norm.apply({"params": params.get("embed_norm", {})}, x))
    key = None if step.key is None else jax.random.fold_in(step.key, EMBED_KEY)
    x = dropout(x, policy.dropout, key)
    return constrain(x, ("batch", "sequence", None), policy.rules)


def _add_types(
    spec: ModelSpec, params: Any, inputs: Inputs, x: Float[Array, "B T D"], policy: Policy
) -> Float[Array, "B T D"]:
    """x with the rows of the tokens' types added."""
    if spec.embedding.types is None:
        if inputs.types is not None:
            raise ShapeError("inputs: this model has no token types; leave `types` out")
        return x
    table = _end(spec, params, "embed", "types")
    types = jnp.zeros(x.shape[:2], jnp.int32) if inputs.types is None else inputs.types
    return x + _rows(table, types, policy)


def decode(
    spec: ModelSpec, params: Any, inputs: Inputs, step: Step, state: Any, policy: Policy
) -> tuple[Float[Array, "B T D"], Any, Aux]:
    """Hidden states after the final norm, the new state, and by-products."""
    carry = Carry(embed(spec, params, inputs, step, policy), step, shared=params.get("shared"))
    carry, state = run(spec, params["layers"], carry, state, policy=policy)
    unknown = sorted(policy.taps - carry.aux.taps.keys())
    require(not unknown, f"taps: no matrix is at {', '.join(unknown)}; write layers.0.mlp.down")
    hidden = carry.hidden
    if spec.final_norm is not None:
        norm = Norm(spec.final_norm, policy)
        hidden = norm.apply({"params": params.get("final_norm", {})}, hidden)
    hidden = constrain(jnp.asarray(hidden), ("batch", "length", None), policy.rules)
    return hidden, state, carry.aux


def _transform(
    spec: ModelSpec, params: Any, hidden: Float[Array, "B T D"], policy: Policy
) -> Float[Array, "B T D"]:
    """Hidden states as the head wants them: norm(act(x W + b)) where it transforms them."""
    transform = spec.head.transform
    if transform is None:
        return hidden
    kernel = _end(spec, params, "head", "dense")
    out = linear.einsum("BTD,DE->BTE", hidden, kernel, dtype=policy.compute_dtype)
    if transform.bias:
        bias = jnp.asarray(_end(spec, params, "head", "dense_bias"))
        out = out + linear.align(bias.astype(out.dtype), out)
    norm = Norm(transform.norm, policy)
    out = norm.apply({"params": params.get("head_norm", {})}, activation(transform.activation, out))
    return jnp.asarray(out)


def logits(
    spec: ModelSpec,
    params: Any,
    hidden: Float[Array, "B T D"],
    policy: Policy,
    adapter_ids: Int[AnyArray, "B"] | None = None,
) -> Float[Array, "B T V"]:
    """Logits of hidden states, in the logit dtype."""
    if not spec.head.logits:
        raise UnsupportedError("this model is a body without a head: it has no logits")
    hidden = _transform(spec, params, hidden, policy)
    tied = spec.head.tied
    out = linear.unembed(
        hidden,
        _end(spec, params, "embed", "table") if tied else _end(spec, params, "head", "kernel"),
        tied=tied,
        dtype=policy.compute_dtype,
        out_dtype=policy.logit_dtype,
        adapter_ids=adapter_ids,
    )
    if spec.head.bias:
        bias = jnp.asarray(_end(spec, params, "head", "bias"))
        out = out + linear.align(bias.astype(out.dtype), out)
    if spec.head.scale != 1.0:
        out = out * jnp.asarray(spec.head.scale, out.dtype)
    if spec.head.softcap is not None:
        cap = jnp.asarray(spec.head.softcap, out.dtype)
        out = cap * jnp.tanh(out / cap)
    return constrain(out, ("batch", "length", "vocab"), policy.rules)
