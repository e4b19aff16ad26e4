"""Mixture of experts as a module: route, send tokens to their experts, sum by weight."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from jaxllm.core.policy import Policy
from jaxllm.errors import UnsupportedError
from jaxllm.nn.aux import LayerAux
from jaxllm.nn.experts import Experts
from jaxllm.nn.leaf import leaves_of
from jaxllm.nn.remat import keep
from jaxllm.ops.linear import is_adapted
from jaxllm.ops.routing import Routing, load_balance, loads, route, router_z
from jaxllm.spec import ops as spec_ops
from jaxllm.state.step import Step, real_tokens

__all__ = ["MoE"]

_ROUTER = ("router", "router_bias", "balance_bias")
_LATENT = ("latent_down", "latent_down_bias", "latent_up", "latent_up_bias")


class MoE(nn.Module):
    """y = sum of weight_e expert_e(x) over the A experts that the router chooses.

    With a latent width the experts see x W_down, and W_up takes their sum back. No token is
    dropped, unless `Policy.expert_capacity` bounds the tokens of an expert.
    """

    op: spec_ops.MoE
    policy: Policy

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], *, step: Step, state: Any, aux: LayerAux
    ) -> tuple[Float[Array, "B T D"], Any]:
        """x -> (update of x, the state as it was)."""
        op, name = self.op, str(self.name)
        leaves = leaves_of(self, x.shape[-1], step, aux)
        logits = leaves.product("router", x, "BTD,DE->BTE", dtype=jnp.float32)
        bias = leaves["balance_bias"] if op.router.balance_bias else None
        routing, real = route(logits, op, bias), real_tokens(step)
        weights = {leaf: leaves[leaf] for leaf in leaves.names if leaf not in _ROUTER + _LATENT}
        if step.adapter_ids is not None and any(map(is_adapted, weights.values())):
            raise UnsupportedError(
                f"experts of {name!r} have adapters, and rows cannot choose theirs by adapter_ids; "
                "leave adapter_ids out, or the experts without adapters"
            )
        experts = routing.experts
        if real is not None and self.policy.expert_capacity is not None:
            experts = jnp.where(real[..., None], experts, op.experts)  # padding takes no slot
        to = Routing(experts, routing.weights, None)
        if op.latent is not None:
            x = keep(leaves.product("latent_down", x, "BTD,DR->BTR"))
        update, dropped = Experts(op, self.policy)(x, to, weights)
        if op.latent is not None:
            update = leaves.product("latent_up", keep(update), "BTR,RD->BTD")
        aux.stats[f"{name}.dropped"] = dropped
        _report(name, logits, routing, real, aux)
        return keep(update), state


def _report(
    name: str,
    logits: Float[Array, "B T E"],
    routing: Routing,
    real: Bool[Array, "B T"] | None,
    aux: LayerAux,
) -> None:
    """Losses, and how many real tokens chose each expert."""
    aux.lose("load_balance", load_balance(routing, real))
    aux.lose("sequence_balance", load_balance(routing, real, by_row=True))
    aux.lose("router_z", router_z(logits, real))
    aux.stats[f"{name}.load"] = jnp.sum(loads(routing.experts, logits.shape[-1], real), axis=0)
