"""The experts' part of a mixture: on one device, or on each of a mesh for its own tokens."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from jaxllm.core.policy import Policy
from jaxllm.core.sharding import partition_spec, with_axes
from jaxllm.nn.remat import keep
from jaxllm.ops import linear
from jaxllm.ops.activation import mlp_hidden
from jaxllm.ops.moe import Dispatch, mix, mix_over, mix_own
from jaxllm.ops.routing import Routing
from jaxllm.spec.op_table import op_table
from jaxllm.spec.ops import MoE

__all__ = ["Experts"]


@dataclasses.dataclass(frozen=True)
class _Axes:
    """Mesh axes that split tokens, experts, and each expert's ffn."""

    tokens: tuple[str, ...] = ()
    experts: tuple[str, ...] = ()
    ffn: tuple[str, ...] = ()


def _names(spec: Any) -> tuple[str, ...]:
    """All mesh axes of some dims of a PartitionSpec."""
    parts = [(part,) if isinstance(part, str) else tuple(part or ()) for part in spec]
    return tuple(name for part in parts for name in part)


@dataclasses.dataclass(frozen=True)
class Experts:
    """How the experts of an op run under a policy."""

    op: MoE
    policy: Policy

    def __call__(
        self, x: Float[Array, "B T D"], routing: Routing, weights: dict[str, Any]
    ) -> tuple[Float[Array, "B T D"], Float[Array, ""]]:
        """(sums over each token's experts by weight, number of pairs that were dropped).

        Args:
          x: tokens.
          routing: of each; an expert past the last is none.
          weights: leaves of the experts by name.
        """
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty or mesh.size == 1:
            return self._local(x, routing, weights, _Axes())
        dtype = self.policy.compute_dtype
        weights = {name: linear.expanded(w, dtype) for name, w in weights.items()}
        tokens, lie, axes = self._places(x, weights, dict(mesh.shape))
        run = jax.shard_map(
            functools.partial(self._local, axes=axes),
            mesh=mesh,
            in_specs=(tokens, Routing(tokens, tokens, None), lie),
            out_specs=(tokens, PartitionSpec()),
            check_vma=False,
        )
        return run(x, routing, weights)

    def _places(
        self, x: Array, weights: dict[str, Array], sizes: dict[str, int]
    ) -> tuple[PartitionSpec, dict[str, PartitionSpec], _Axes]:
        """Where tokens and experts lie. The width is whole: what FSDP splits is gathered here."""
        rules = with_axes(self.policy.rules, width=None)
        table = op_table(self.op, x.shape[-1])

        def place(name: str, w: Array) -> PartitionSpec:
            axes = table[name].axes if name in table else ("experts", *[None] * (w.ndim - 1))
            return partition_spec(axes, rules, sizes, w.shape)

        tokens = partition_spec(("batch", "length", None), rules, sizes, x.shape)
        lie = {name: place(name, w) for name, w in weights.items()}
        experts, *rest = lie["down"]
        return tokens, lie, _Axes(_names(tokens), _names((experts,)), _names(rest))

    def _job(self, tokens: int) -> Dispatch:
        """For so many tokens of one device."""
        op, factor, slots = self.op, self.policy.expert_capacity, None
        if factor is not None:
            slots = max(1, math.ceil(factor * tokens * op.active / op.experts))
        return Dispatch(count=op.experts, slots=slots, weigh_inputs=op.router.weigh_inputs)

    def _local(
        self, x: Float[Array, "B T D"], routing: Routing, weights: dict[str, Any], axes: _Axes
    ) -> tuple[Float[Array, "B T D"], Float[Array, ""]]:
        """One device's tokens; sums over the axes that split experts."""
        flat = x.reshape(-1, x.shape[-1])
        routing = jax.tree.map(lambda a: a.reshape(flat.shape[0], -1), routing)
        job = self._job(flat.shape[0])
        run = functools.partial(self._run, weights, axes.ffn)
        if not axes.experts:
            y, dropped = mix(flat, routing, run, job)
        else:
            over = mix_over if axes.experts[0] in axes.tokens else mix_own
            y, dropped = over(flat, routing, run, job, axes.experts[0])
        y = jax.lax.psum(y, axes.ffn) if axes.ffn else y
        dropped = jax.lax.psum(dropped, axes.tokens) if axes.tokens else dropped
        return y.reshape(x.shape).astype(x.dtype), dropped

    def _run(
        self,
        weights: dict[str, Any],
        ffn: tuple[str, ...],
        rows: Array,
        owner: Array,
        sizes: Array,
    ) -> Array:
        """Rows sorted by expert through their experts."""
        mlp, equal = self.op.mlp, self.policy.expert_capacity is not None

        def product(name: str, x: Array) -> Array:
            how = {"dtype": self.policy.compute_dtype, "implementation": self.policy.experts}
            return linear.grouped(x, weights[name], sizes, equal=equal, **how)

        def project(name: str) -> Array:
            y, bias = keep(product(name, rows)), weights.get(f"{name}_bias")
            return y if bias is None else y + bias[owner].astype(y.dtype)

        if "gate_up" in weights:
            gate, up = jnp.split(project("gate_up"), 2, axis=-1)
        else:
            gate, up = project("gate") if mlp.gated else None, project("up")
        y, bias = product("down", mlp_hidden(mlp, up, gate)), weights.get("down_bias")
        if bias is None:
            return y
        own = bias[owner].astype(y.dtype)
        for axis in ffn:  # the parts of y are added up: one of them brings the bias
            own = jnp.where(jax.lax.axis_index(axis) == 0, own, jnp.zeros_like(own))
        return y + own
