"""Latent attention as a module: short vectors, norms, rotation, attention through the state."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from jaxllm.core.policy import Policy
from jaxllm.core.sharding import constrain
from jaxllm.nn.aux import LayerAux
from jaxllm.nn.leaf import leaves_of
from jaxllm.nn.remat import keep
from jaxllm.ops.norm import rms_norm
from jaxllm.ops.rope import apply_rope
from jaxllm.spec import ops as spec_ops
from jaxllm.state.latent import attend_latent
from jaxllm.state.step import Step, sequence_lengths

__all__ = ["LatentAttention"]


class LatentAttention(nn.Module):
    """out = softmax(scale [q, rot q'] [k, rot k']T + mask) v, with k and v linear in norm(x W_kv).

    The shared key k' is linear in x, queries in x or in norm(x W_q).
    """

    op: spec_ops.LatentAttention
    policy: Policy

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], *, step: Step, state: Any, aux: LayerAux
    ) -> tuple[Float[Array, "B T D"], Any]:
        """(x, the op's state) -> (update of x, new state)."""
        op, policy = self.op, self.policy
        leaves = leaves_of(self, x.shape[-1], step, aux)
        if op.q_rank is None:
            q = keep(leaves.product("q", x, "BTD,DNH->BTNH"))
        else:
            low = keep(leaves.product("q_down", x, "BTD,DR->BTR"))
            low = rms_norm(low, leaves["q_norm"], eps=op.eps)
            q = keep(leaves.product("q_up", low, "BTR,RNH->BTNH"))
        q = constrain(q, ("batch", "length", "heads", "head_dim"), policy.rules)
        low = keep(leaves.product("kv_down", x, "BTD,DR->BTR"))
        latent, rotated = low[..., : op.kv_rank], low[..., op.kv_rank :]
        latent = rms_norm(latent, leaves["kv_norm"], eps=op.eps)
        if op.rope is not None:
            lengths = sequence_lengths(step) if op.rope.follows_length else None
            turned = apply_rope(q[..., op.nope_dim :], step.positions, op.rope, lengths=lengths)
            q = jnp.concatenate([q[..., : op.nope_dim], turned], axis=-1)
            rotated = apply_rope(rotated[:, :, None], step.positions, op.rope, lengths=lengths)
            rotated = rotated[:, :, 0]
        out, state = attend_latent(
            state,
            (q, latent, rotated),
            leaves["kv_up"],
            step=step,
            op=op,
            policy=policy,
        )
        out = constrain(out, ("batch", "length", "heads", "head_dim"), policy.rules)
        return keep(leaves.product("o", keep(out, "attention"), "BTNV,NVD->BTD")), state
