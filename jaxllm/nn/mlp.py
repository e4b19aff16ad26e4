"""Feed-forward as a module."""

from __future__ import annotations

from typing import Any

import jax
from flax import linen as nn
from jaxtyping import Array, Float

from jaxllm.core.policy import Policy
from jaxllm.core.sharding import constrain
from jaxllm.nn.aux import LayerAux
from jaxllm.nn.leaf import leaves_of
from jaxllm.nn.remat import keep
from jaxllm.ops.activation import mlp_hidden
from jaxllm.spec import ops as spec_ops
from jaxllm.state.step import Step

__all__ = ["MLP", "Linear"]


class MLP(nn.Module):
    """down(act(gate_scale gate x) * up x) when gated, else down(act(up x)).

    Source: arXiv 2002.05202.
    """

    op: spec_ops.MLP
    policy: Policy

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], *, step: Step, state: Any, aux: LayerAux
    ) -> tuple[Float[Array, "B T D"], Any]:
        """x -> (update of x, the state as it was)."""
        op = self.op
        leaves = leaves_of(self, x.shape[-1], step, aux)
        if op.gated:
            gate, up = leaves.project("gate_up", x, "BTD,DF->BTF")
        else:
            gate, up = None, leaves.product("up", x, "BTD,DF->BTF")
        if op.adapter_rank is not None:
            low = leaves.product("adapter_a", x, "BTD,DR->BTR")
            up = up + leaves.product("up_adapter_b", low, "BTR,RF->BTF")
            if gate is not None:
                gate = gate + leaves.product("gate_adapter_b", low, "BTR,RF->BTF")
        hidden = mlp_hidden(op, keep(up), None if gate is None else keep(gate))
        hidden = constrain(hidden, ("batch", "length", "ffn"), self.policy.rules)
        out = keep(leaves.product("down", hidden, "BTF,FD->BTD"))
        if op.out_gate:
            out = out * jax.nn.sigmoid(keep(leaves.product("out_gate", x, "BTD,DO->BTO")))
        return out, state


class Linear(nn.Module):
    """W x."""

    op: spec_ops.Linear
    policy: Policy

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], *, step: Step, state: Any, aux: LayerAux
    ) -> tuple[Float[Array, "B T D"], Any]:
        """x -> (update of x, the state as it was)."""
        leaves = leaves_of(self, x.shape[-1], step, aux)
        return keep(leaves.product("kernel", x, "BTD,DE->BTE")), state
