"""Infini-attention as a module: attention within segments beside a memory of those before."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from jaxllm.core.policy import Policy
from jaxllm.core.sharding import constrain
from jaxllm.nn.aux import LayerAux
from jaxllm.nn.leaf import leaves_of
from jaxllm.nn.remat import keep
from jaxllm.ops.infini import read_memory
from jaxllm.ops.linear import align
from jaxllm.ops.rope import apply_rope
from jaxllm.spec import ops as spec_ops
from jaxllm.state import recur
from jaxllm.state.attend import attend
from jaxllm.state.step import Step, real_tokens, sequence_lengths

__all__ = ["InfiniAttention"]


class InfiniAttention(nn.Module):
    """out = W_o ((1 - g) local + g memory), with g the sigmoid of a learned logit a head."""

    op: spec_ops.InfiniAttention
    policy: Policy

    def _memory(self, qkv: Any, state: Any, step: Step) -> tuple[Array, Any]:
        """What the memory gives, and the memory after the tokens."""
        real = real_tokens(step)
        real = jnp.ones(step.positions.shape, bool) if real is None else real
        begins = (jnp.asarray(step.positions) % self.op.segment == 0) & real
        flags = (begins, recur.sequence_starts(step), real)
        before = recur.initial(state, step)
        found, after = read_memory(qkv, before, flags, delta=self.op.delta)
        return found, recur.carry(state, after)

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], *, step: Step, state: Any, aux: LayerAux
    ) -> tuple[Float[Array, "B T D"], Any]:
        """(x, the op's state) -> (update of x, new state)."""
        op, policy = self.op.local, self.policy
        leaves = leaves_of(self, x.shape[-1], step, aux)
        q, k, v = (keep(y) for y in leaves.project("qkv", x, "BTD,DNH->BTNH"))
        held = {"local": None, "memory": None} if state is None else state
        found, memory = recur.in_rows(held["memory"], (q, k, v), self._memory, step=step)
        if op.rope is not None:
            lengths = sequence_lengths(step) if op.rope.follows_length else None
            q, k = (apply_rope(y, step.positions, op.rope, lengths=lengths) for y in (q, k))
        by_head = ("batch", "length", "heads", "head_dim")
        by_kv_head = ("batch", "length", "kv_heads", "head_dim")
        q = constrain(q, by_head, policy.rules)
        k, v = constrain(k, by_kv_head, policy.rules), constrain(v, by_kv_head, policy.rules)
        out, local = attend(held["local"], (q, k, v), step=step, op=op, policy=policy)
        share = jax.nn.sigmoid(leaves["share"].astype(jnp.float32))[:, None]
        share = align(share, found)
        out = (out.astype(jnp.float32) * (1.0 - share) + found * share).astype(x.dtype)
        out = keep(constrain(out, by_head, policy.rules), "attention")
        update = keep(leaves.product("o", out, "BTNH,NHD->BTD"))
        return update, None if state is None else {"local": local, "memory": memory}
