"""State space ops and the short convolution as modules: project, convolve, scan, project back."""

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
from jaxllm.ops.gated_norm import gated_norm
from jaxllm.ops.linear import align
from jaxllm.ops.norm import rms_norm
from jaxllm.ops.ssm import Dual, Selective, dual_scan, selective_scan
from jaxllm.spec import state_space as spec
from jaxllm.state import recur
from jaxllm.state.step import Step, real_tokens

__all__ = ["Convolution", "SelectiveScan", "StateSpaceDual"]


def _convolve(leaves: Leaves, name: str, x: Array, tail: Any, step: Step) -> tuple[Array, Any]:
    """x through the convolution of a name, with its bias where the op has one."""
    bias = f"{name}_bias"
    return recur.convolve(
        tail, x, leaves[name], leaves[bias] if leaves.has(bias) else None, step=step
    )


def _steps(raw: Array, leaves: Leaves, step: Step, limits: tuple[float, float | None]) -> Array:
    """Step sizes softplus(raw + offset) in float32, within limits; 0 at padding."""
    offset = leaves["dt_offset"].astype(jnp.float32)
    dt = jnp.clip(jax.nn.softplus(raw.astype(jnp.float32) + align(offset, raw)), *limits)
    real = real_tokens(step)
    return dt if real is None else jnp.where(real[..., None], dt, jnp.zeros_like(dt))


class SelectiveScan(nn.Module):
    """out = W (silu(z) (c . h + d x)), h decaying by what each token says; see the spec."""

    op: spec.SelectiveScan
    policy: Policy

    def _normed(self, x: Array, name: str, leaves: Leaves) -> Array:
        eps = self.op.inner_eps
        return x if eps is None else rms_norm(x, leaves[f"{name}_norm"], eps=eps)

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], *, step: Step, state: Any, aux: LayerAux
    ) -> tuple[Float[Array, "B T D"], Any]:
        """(x, the op's state) -> (update of x, new state)."""
        op, rules, held = self.op, self.policy.rules, state or {}
        leaves, names = leaves_of(self, x.shape[-1], step, aux), ("batch", "length", "ffn")
        x, z = (keep(leaves.product(n, x, "BTD,DI->BTI")) for n in ("x", "z"))
        x, z = constrain(x, names, rules), constrain(z, names, rules)
        x, tail = _convolve(leaves, "conv", x, held.get("conv"), step)
        x = activation(op.activation, x)
        low = self._normed(leaves.product("step", x, "BTI,IR->BTR"), "step", leaves)
        b, c = (self._normed(leaves.product(n, x, "BTI,IM->BTM"), n, leaves) for n in ("b", "c"))
        dt = _steps(keep(leaves.product("dt", low, "BTR,RI->BTI")), leaves, step, (0.0, None))
        a = -jnp.exp(leaves["a_log"].astype(jnp.float32))

        def run(tokens: Any, initial: Any, starts: Any) -> Any:
            x, dt, b, c = tokens
            inputs = Selective(x, dt, b, c, a, leaves["d"])
            how = {"implementation": self.policy.scan, "rules": rules}
            return selective_scan(inputs, initial, starts=starts, **how)

        y, scan = recur.recurrence(held.get("scan"), (x, dt, b, c), run, step=step)
        y = constrain(y * jax.nn.silu(z), names, rules)
        out = keep(leaves.product("o", y, "BTI,ID->BTD"))
        if state is None:
            return out, None
        return out, {"conv": tail, "scan": scan}


class StateSpaceDual(nn.Module):
    """out = W norm(S c + d x, z), one decay a head and a matrix state S; see the spec."""

    op: spec.StateSpaceDual
    policy: Policy

    def _project(self, x: Array, leaves: Leaves) -> list[Array]:
        """z, x, b, c and the raw step sizes, scaled."""
        rules = self.policy.rules
        parts = []
        for name, scale in zip(("z", "x", "b", "c", "dt"), self.op.scales, strict=True):
            dims = {"z": "NH", "x": "NH", "b": "KM", "c": "KM", "dt": "N"}[name]
            y = keep(leaves.product(name, x, f"BTD,D{dims}->BT{dims}"))
            axis = "kv_heads" if name in "bc" else "heads"
            y = constrain(y, ("batch", "length", axis, "head_dim")[: y.ndim], rules)
            parts.append(y if scale == 1.0 else y * scale)
        return parts

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], *, step: Step, state: Any, aux: LayerAux
    ) -> tuple[Float[Array, "B T D"], Any]:
        """(x, the op's state) -> (update of x, new state)."""
        op, held = self.op, state or {}
        leaves = leaves_of(self, x.shape[-1], step, aux)
        z, *convolved, raw = self._project(x, leaves)
        new: dict[str, Any] = {}
        for i, name in enumerate(("x", "b", "c")):
            y, new[name] = _convolve(leaves, f"conv_{name}", convolved[i], held.get(name), step)
            convolved[i] = activation(op.activation, y)
        dt = _steps(raw, leaves, step, (op.dt_min, op.dt_max))
        a = -jnp.exp(leaves["a_log"].astype(jnp.float32))
        x, b, c = convolved
        how = {"implementation": self.policy.scan, "rules": self.policy.rules}

        def run(tokens: Any, initial: Any, starts: Any) -> Any:
            x, dt, b, c = tokens
            return dual_scan(Dual(x, dt, b, c, a, None), initial, starts=starts, **how)

        y, scan = recur.recurrence(held.get("scan"), (x, dt, b, c), run, step=step)
        scale = None if op.norm is None else leaves["norm"]
        y = gated_norm(y, z, scale, op.norm, skip=(x, leaves["d"]), **how)
        y = constrain(y, ("batch", "length", "heads", "head_dim"), self.policy.rules)
        out = keep(leaves.product("o", y, "BTNH,NHD->BTD"))
        if state is None:
            return out, None
        return out, {**new, "scan": scan}


class Convolution(nn.Module):
    """out = W (c conv(b x)) with b, c and x linear in the input."""

    op: spec.Convolution
    policy: Policy

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], *, step: Step, state: Any, aux: LayerAux
    ) -> tuple[Float[Array, "B T D"], Any]:
        """(x, the op's state) -> (update of x, new state)."""
        leaves = leaves_of(self, x.shape[-1], step, aux)
        b, c, x = (keep(leaves.product(n, x, "BTD,DI->BTI")) for n in ("b", "c", "x"))
        tail = None if state is None else state["conv"]
        y, tail = _convolve(leaves, "conv", b * x, tail, step)
        y = constrain(c * y, ("batch", "length", "ffn"), self.policy.rules)
        out = keep(leaves.product("o", y, "BTI,ID->BTD"))
        return out, None if state is None else {"conv": tail}
