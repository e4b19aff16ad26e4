"""Product-key memory as a module: query, find the best keys, read their values."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from jaxllm.core.policy import Policy
from jaxllm.nn.aux import LayerAux
from jaxllm.nn.leaf import Leaves, checked, leaves_of
from jaxllm.nn.remat import keep
from jaxllm.ops import linear
from jaxllm.ops.memory import best_pairs
from jaxllm.ops.norm import rms_norm
from jaxllm.spec import ops as spec_ops
from jaxllm.spec.op_table import values_table
from jaxllm.state.step import Step

__all__ = ["Memory"]


class Memory(nn.Module):
    """y = sum over heads and their best keys of softmax(q k) value; scores in float32.

    With a width of values of its own the update is W_down y, or W_down (y * silu(W_gate x)).
    """

    op: spec_ops.Memory
    policy: Policy

    def _values(self, leaves: Leaves, width: int) -> Any:
        """The table of values, of this op alone or in common."""
        if self.op.share is None:
            return leaves["values"]
        found = None
        if self.has_variable("shared", "values"):
            found = self.get_variable("shared", "values")
        shape = values_table(self.op, width).shape
        return checked(found, shape, f"shared.{self.op.share}.values")

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], *, step: Step, state: Any, aux: LayerAux
    ) -> tuple[Float[Array, "B T D"], Any]:
        """x -> (update of x, the state as it was)."""
        op, width = self.op, x.shape[-1]
        leaves = leaves_of(self, width, step, aux)
        q = keep(leaves.product("q", x, "BTD,DNH->BTNH"))
        q = q.reshape(*q.shape[:-1], 2, op.key_dim // 2)
        if op.query_norm:
            q = rms_norm(q, leaves["q_norm"], eps=op.eps)
        keys = jnp.asarray(leaves["keys"]).astype(jnp.float32)
        scores = jnp.einsum("btnph,npkh->btnpk", q.astype(jnp.float32), keys)
        found, rows = best_pairs(scores, op.active)
        weights = jax.nn.softmax(found, axis=-1).astype(x.dtype)
        flat = rows.reshape(rows.shape[0], -1)
        read = linear.take(self._values(leaves, width), flat, dtype=self.policy.compute_dtype)
        read = read.reshape(*rows.shape, read.shape[-1])
        y = keep(jnp.einsum("btna,btnav->btv", weights, read))
        if op.value_dim is None:
            return y, state
        if op.gated:
            y = y * jax.nn.silu(keep(leaves.product("gate", x, "BTD,DF->BTF")))
        return keep(leaves.product("down", y, "BTF,FD->BTD")), state
