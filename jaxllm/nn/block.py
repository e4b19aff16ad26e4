"""One layer: residual updates in order, each an op (or several in parallel) between its norms."""

from __future__ import annotations

import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Key

from jaxllm.core.policy import Policy
from jaxllm.core.sharding import constrain
from jaxllm.nn.attention import Attention
from jaxllm.nn.aux import Aux, LayerAux
from jaxllm.nn.infini import InfiniAttention
from jaxllm.nn.latent import LatentAttention
from jaxllm.nn.leaf import Leaves
from jaxllm.nn.linear_attention import LinearAttention
from jaxllm.nn.memory import Memory
from jaxllm.nn.mlp import MLP, Linear
from jaxllm.nn.moe import MoE
from jaxllm.nn.state_space import Convolution, SelectiveScan, StateSpaceDual
from jaxllm.ops.norm import layer_norm, rms_norm
from jaxllm.spec import ops as spec_ops
from jaxllm.spec.model import Block as BlockSpec
from jaxllm.spec.model import Sub
from jaxllm.spec.op_table import norm_table
from jaxllm.state.step import Step
from jaxllm.typing import Slot

__all__ = ["Block", "Norm", "dropout"]

MODULES = {
    spec_ops.Attention: Attention,
    spec_ops.LatentAttention: LatentAttention,
    spec_ops.InfiniAttention: InfiniAttention,
    spec_ops.MLP: MLP,
    spec_ops.Linear: Linear,
    spec_ops.MoE: MoE,
    spec_ops.LinearAttention: LinearAttention,
    spec_ops.SelectiveScan: SelectiveScan,
    spec_ops.StateSpaceDual: StateSpaceDual,
    spec_ops.Convolution: Convolution,
    spec_ops.Memory: Memory,
}


def dropout(
    x: Float[Array, "*dims"], rate: float, key: Key[Array, ""] | None
) -> Float[Array, "*dims"]:
    """Zero each value with probability `rate` and scale the rest by 1 / (1 - rate)."""
    if rate == 0 or key is None:
        return x
    keep = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(keep, x / (1 - rate), jnp.zeros_like(x))


def _seen(sub: Sub, x: Array, embedded: Array | None, aside: Array | None) -> Array:
    """What the ops of a residual update read."""
    if sub.reads == "hidden":
        return x
    if sub.reads == "embedded":
        assert embedded is not None  # `run` has seen to it
        return jnp.concatenate([x, embedded], axis=-1)
    assert aside is not None  # the spec has seen to it
    return aside if sub.reads == "aside" else x + aside


class Norm(nn.Module):
    """RMSNorm or LayerNorm over the last dim."""

    norm: spec_ops.Norm
    policy: Policy

    @nn.compact
    def __call__(self, x: Float[Array, "*dims D"]) -> Float[Array, "*dims D"]:
        """x normed, in its own dtype."""
        norm = self.norm
        leaves = Leaves(self, norm_table(norm, x.shape[-1]), policy=self.policy)
        if norm.type == "rms":
            return rms_norm(x, leaves["scale"], eps=norm.eps, offset=norm.offset)
        bias = leaves["bias"] if norm.bias else None
        return layer_norm(x, leaves["scale"], bias, eps=norm.eps, offset=norm.offset)


class Block(nn.Module):
    """x <- x + scale * out(sum of ops(in(x))) for every sub."""

    block: BlockSpec
    policy: Policy
    taps: frozenset[str] = frozenset()

    def _norm(self, norm: spec_ops.Norm | None, name: str, x: Array) -> Array:
        return x if norm is None else Norm(norm, self.policy, name=name)(x)

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        given: tuple[Step, Slot | None],
        state: Any,
        key: Key[Array, ""] | None,
    ) -> tuple[Float[Array, "B T D"], tuple[Any, Aux]]:
        """Run one layer.

        Args:
          x: hidden states.
          given: where the tokens stand; the embedding [B, T, D], or None where no layer reads it.
          state: dict op name -> state, or None.
          key: dropout key of this layer, or None.

        Returns:
          (hidden states, (new state, by-products by local name)).
        """
        (step, embedded), aside = given, None
        aux, new_state = LayerAux(self.taps), {}
        rules, residual = self.policy.rules, ("batch", "sequence", None)
        for index, sub in enumerate(self.block.subs):
            # Sequence parallel: norms, dropout and sums see a part of the tokens, ops see all.
            seen = _seen(sub, x, embedded, aside)
            inner = constrain(
                self._norm(sub.norm_in, f"{sub.name}_norm", seen), ("batch", "length", None), rules
            )
            updates: list[Array] = []
            for named in sub.ops:
                module = MODULES[type(named.op)](named.op, self.policy, name=named.name)
                held = None if state is None else state.get(named.name)
                own = self._norm(named.norm_in, f"{named.name}_norm", inner)
                own = own if named.scale_in == 1.0 else own * named.scale_in
                y, held = module(own, step=step, state=held, aux=aux)
                y = y if named.scale == 1.0 else y * named.scale
                if held is not None:
                    new_state[named.name] = held
                updates.append(y)
            y = constrain(functools.reduce(operator.add, updates), residual, rules)
            y = self._norm(sub.norm_out, f"{sub.name}_out_norm", y)
            y = dropout(
                y, self.policy.dropout, None if key is None else jax.random.fold_in(key, index)
            )
            y = y if sub.scale == 1.0 else y * sub.scale
            if sub.aside:
                aside = y
                continue
            kept = inner if sub.skip_normed else x
            x = (kept if sub.skip_scale == 1.0 else kept * sub.skip_scale) + y
            x = self._norm(sub.norm_after, f"{sub.name}_after_norm", x)
            x = constrain(x, residual, rules)
        return x, (None if state is None else new_state, aux.found)
