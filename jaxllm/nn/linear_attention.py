"""Linear attention as a module: project, convolve, map, run the recurrence, norm, gate."""

from __future__ import annotations

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
from jaxllm.ops.activation import activation
from jaxllm.ops.features import FEATURES, favor, l2_normalize, projection
from jaxllm.ops.linear import align
from jaxllm.ops.linear_attention import Gates, add_ones, divide, linear_attention
from jaxllm.ops.norm import qk_norm
from jaxllm.ops.rope import apply_rope
from jaxllm.spec import linear_attention as spec
from jaxllm.spec.ops import QKNorm
from jaxllm.state.recur import carry, convolve, in_rows, initial, resets, sequence_starts
from jaxllm.state.step import Step, real_tokens, sequence_lengths

__all__ = ["LinearAttention"]

_GATES = {"silu": jax.nn.silu, "sigmoid": jax.nn.sigmoid}
_PARTS = {"query": "BTD,DKM->BTKM", "key": "BTD,DKM->BTKM", "value": "BTD,DNH->BTNH"}


class LinearAttention(nn.Module):
    """Keys write into a matrix a head, queries read it; see the spec for the kinds it gives."""

    op: spec.LinearAttention
    policy: Policy

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], *, step: Step, state: Any, aux: LayerAux
    ) -> tuple[Float[Array, "B T D"], Any]:
        """(x, the op's state) -> (update of x, new state)."""
        op = self.op
        leaves = leaves_of(self, x.shape[-1], step, aux)
        held = state or {}
        (q, k, v), new = self._inputs(x, leaves, held, step)
        v = v if op.normalizer is None else add_ones(v)
        tokens = (q, k, v, self._log_decay(x, leaves), self._beta(x, leaves))
        memory = {name: held[name] for name in ("matrix", "peak") if name in held}
        out, memory = in_rows(memory or None, tokens, self._recurrence, step=step)
        new |= memory
        out = out if op.normalizer is None else divide(out, op.normalizer)
        out = keep(constrain(out, ("batch", "length", "heads", "head_dim"), self.policy.rules))
        out = self._outputs(out, x, leaves)
        y = keep(leaves.product("out", out, "BTNH,NHD->BTD"))
        return y, None if state is None else new

    def _inputs(
        self, x: Array, leaves: Leaves, held: dict[str, Any], step: Step
    ) -> tuple[list[Array], dict[str, Any]]:
        """Queries, keys and values before the feature map, and the tails of their convolutions."""
        op, found, tails = self.op, [], {}
        for name, equation in _PARTS.items():
            y = keep(leaves.product(name, x, equation))
            heads = "heads" if name == "value" else "kv_heads"
            y = constrain(y, ("batch", "length", heads, "head_dim"), self.policy.rules)
            if op.conv is not None:
                tail = held.get(name)
                y, tails[name] = convolve(tail, y, leaves[f"conv_{name}"], step=step)
            found.append(y if op.activation is None else activation(op.activation, y))
        q, k, v = found
        if op.rope is not None:
            lengths = sequence_lengths(step) if op.rope.follows_length else None
            q, k = (apply_rope(y, step.positions, op.rope, lengths=lengths) for y in (q, k))
        if op.l2_eps is not None:
            q, k = l2_normalize(q, op.l2_eps), l2_normalize(k, op.l2_eps)
        return [q, k, v], tails

    def _recurrence(self, tokens: Any, held: Any, step: Step) -> tuple[Array, dict[str, Any]]:
        """(what queries read [B, T, N, H], what is remembered after the tokens)."""
        op, held, new = self.op, held or {}, {}
        q, k, v, log_decay, beta = tokens
        if op.feature == "favor":
            q, k, log_decay, new["peak"] = self._favor(q, k, log_decay, held.get("peak"), step)
        else:
            q, k = (FEATURES[op.feature](y) for y in (q, k))
            q = q * op.query_scale
        gates = Gates(log_decay, beta, resets(step), real_tokens(step))
        before = initial(held.get("matrix"), step)
        how = {"implementation": self.policy.scan, "rules": self.policy.rules}
        out, matrix = linear_attention((q, k, v), gates=gates, state=before, **how)
        return out, new | {"matrix": carry(held.get("matrix"), matrix)}

    def _projected(self, name: str, x: Array, leaves: Leaves, outputs: str) -> Array:
        """x times a matrix or the two whose product it is; outputs such as `NH`."""
        if not leaves.has(f"{name}_a"):
            return keep(leaves.product(name, x, f"BTD,D{outputs}->BT{outputs}"))
        low = leaves.product(f"{name}_a", x, "BTD,DR->BTR")
        return keep(leaves.product(f"{name}_b", low, f"BTR,R{outputs}->BT{outputs}"))

    def _log_decay(self, x: Array, leaves: Leaves) -> Array | None:
        """Log decays [B, T, N] or [B, T, N, M] in float32."""
        decay = self.op.decay
        if decay is None:
            return None
        if not isinstance(decay, spec.GatedDecay):
            rate = -jnp.abs(jax.lax.stop_gradient(leaves["rate"].astype(jnp.float32)))
            return jnp.broadcast_to(rate[None, None], (*x.shape[:2], self.op.heads))
        outputs = "N" if decay.over == "head" else "NM"
        raw = self._projected("decay", x, leaves, outputs).astype(jnp.float32)
        raw = raw + align(leaves["dt_bias"].astype(jnp.float32), raw)
        if decay.form == "sigmoid":
            return jax.nn.log_sigmoid(raw) / decay.temperature
        speed = jnp.exp(leaves["a_log"].astype(jnp.float32))
        return -speed.reshape(1, 1, -1, *[1] * (raw.ndim - 3)) * jax.nn.softplus(raw)

    def _beta(self, x: Array, leaves: Leaves) -> Array | None:
        if not self.op.delta:
            return None
        raw = leaves.product("beta", x, "BTD,DN->BTN").astype(jnp.float32)
        return self.op.beta_max * jax.nn.sigmoid(raw)

    def _favor(
        self, q: Array, k: Array, log_decay: Array | None, peak: Any, step: Step
    ) -> tuple[Array, Array, Array, Any]:
        """Random features, with the shrinking of their scale among the decays."""
        op = self.op
        assert op.features is not None
        weights = projection(op.features, op.key_dim, op.seed)
        root = op.query_scale**0.5
        found = favor(
            q * root,
            k * root,
            weights,
            before=initial(peak, step),
            starts=sequence_starts(step),
            real=real_tokens(step),
        )
        shrink = jnp.repeat(found.log_decay, op.heads // op.key_heads, axis=2)
        log_decay = shrink if log_decay is None else log_decay + shrink
        return found.q, found.k, log_decay, carry(peak, found.peak)

    def _outputs(self, out: Array, x: Array, leaves: Leaves) -> Array:
        """What the heads read, normed and gated, in the compute dtype."""
        op = self.op
        wide = out.astype(jnp.float32)
        if op.out_norm is not None:
            norm = QKNorm(over=op.out_norm.over, eps=op.out_norm.eps)
            wide = qk_norm(wide, leaves["out_norm"], norm)
        if op.gate is not None:
            gate = self._projected("out_gate", x, leaves, "NH").astype(jnp.float32)
            wide = wide * _GATES[op.gate](gate)
        return wide.astype(self.policy.compute_dtype)
