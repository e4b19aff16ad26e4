"""Softmax attention as a module: project, rotate, attend through the state, project back."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from jaxllm.core.policy import Policy
from jaxllm.core.sharding import constrain
from jaxllm.nn.aux import LayerAux
from jaxllm.nn.leaf import Leaves, leaves_of
from jaxllm.nn.remat import keep
from jaxllm.ops.linformer import project_length
from jaxllm.ops.norm import qk_norm
from jaxllm.ops.rope import apply_rope, query_temperature
from jaxllm.spec import ops as spec_ops
from jaxllm.spec.mask import Full
from jaxllm.state.attend import attend, global_tokens
from jaxllm.state.one_token import attend_token, obstacle
from jaxllm.state.step import Step, sequence_lengths

__all__ = ["Attention"]

_BY_HEAD = ("batch", "length", "heads", "head_dim")


class Attention(nn.Module):
    """MHA, GQA and MQA: out = softmax(scale q kT + mask) v, with q, k, v linear in x.

    As the spec says, queries and keys are normed, scores capped, a learned sink joins the softmax,
    and the heads' outputs are gated.
    """

    op: spec_ops.Attention
    policy: Policy

    def _norm(self, x: Array, name: str, leaves: Leaves) -> Array:
        """Queries or keys as the spec norms them."""
        assert self.op.qk_norm is not None
        return qk_norm(x, leaves[name] if self.op.qk_norm.scale else None, self.op.qk_norm)

    def _adapter(self, name: str, x: Array, leaves: Leaves) -> Array:
        """What a layer adds to a projection that it shares."""
        low = leaves.product(f"{name}_adapter_a", x, "BTD,DR->BTR")
        return leaves.product(f"{name}_adapter_b", low, "BTR,RNH->BTNH")

    def _global_rows(self, x: Array, out: Array, *, step: Step, leaves: Leaves) -> Array:
        """`out` with the rows of global queries replaced: these see all, by projections apart."""
        special = global_tokens(self.op.mask, step)
        if special is None:
            return out
        q, k, v = (leaves.product(f"{n}_global", x, "BTD,DNH->BTNH") for n in "qkv")
        whole = dataclasses.replace(self.op, mask=Full(), global_projections=False)
        found, _ = attend(None, (q, k, v), step=step, op=whole, policy=self.policy)
        return jnp.where(special[:, :, None, None], found, out)

    def _attend(
        self, state: Any, qkv: tuple[Array, Array, Array], *, step: Step, leaves: Leaves
    ) -> tuple[Array, Any]:
        """(what each query found, the new state) of queries, keys and values before their rope."""
        op, policy = self.op, self.policy
        q, k, v = qkv
        if op.rope is not None:
            lengths = sequence_lengths(step) if op.rope.follows_length else None
            q, k = (apply_rope(y, step.positions, op.rope, lengths=lengths) for y in (q, k))
        if op.qk_norm is not None and op.qk_norm.after_rope:
            q, k = self._norm(q, "q_norm", leaves), self._norm(k, "k_norm", leaves)
        if op.temperature is not None:
            q = q * query_temperature(step.positions, op.temperature).astype(q.dtype)
        by_kv_head = ("batch", "length", "kv_heads", "head_dim")
        q = constrain(q, _BY_HEAD, policy.rules)
        k, v = constrain(k, by_kv_head, policy.rules), constrain(v, by_kv_head, policy.rules)
        sinks = leaves["sinks"] if op.sinks else None
        if op.length_projection is not None:
            k = project_length(k, leaves["k_length"], step.lengths)
            v = project_length(v, leaves["v_length"], step.lengths)
        return attend(state, (q, k, v), step=step, op=op, sinks=sinks, policy=policy)

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], *, step: Step, state: Any, aux: LayerAux
    ) -> tuple[Float[Array, "B T _"], Any]:
        """(x, the op's state) -> (update of x, new state)."""
        op, policy = self.op, self.policy
        leaves = leaves_of(self, x.shape[-1], step, aux)
        q, k, v = leaves.project("qkv", x, "BTD,DNH->BTNH")
        if op.adapter_rank is not None:
            q, k, v = (
                y + self._adapter(name, x, leaves) for name, y in zip("qkv", (q, k, v), strict=True)
            )
        q, k, v = keep(q), keep(k), keep(v)
        if op.qk_norm is not None and not op.qk_norm.after_rope:
            q, k = self._norm(q, "q_norm", leaves), self._norm(k, "k_norm", leaves)
        if obstacle(state, q, step=step, op=op, policy=policy) is None:
            out, state = attend_token(state, (q, k, v), step=step, op=op)
        else:
            out, state = self._attend(state, (q, k, v), step=step, leaves=leaves)
        if op.global_projections:
            out = self._global_rows(x, out, step=step, leaves=leaves)
        out = keep(constrain(out, _BY_HEAD, policy.rules), "attention")
        if op.gate:
            gate = leaves.product("out_gate", x, "BTD,DNH->BTNH")
            out = out * jax.nn.sigmoid(gate)
        return keep(leaves.product("o", out, "BTNH,NHD->BTD")), state
