"""Mixture of experts as a module: route, send tokens to their experts, sum by weight."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float

from jaxllm.core.policy import Policy
from jaxllm.core.sharding import partition_spec, with_axes
from jaxllm.errors import UnsupportedError
from jaxllm.nn.aux import LayerAux
from jaxllm.nn.leaf import Leaves
from jaxllm.nn.remat import keep
from jaxllm.ops import linear
from jaxllm.ops.activation import mlp_hidden
from jaxllm.ops.moe import Dispatch, mix, mix_own, mix_over
from jaxllm.ops.routing import Routing, load_balance, loads, route, router_z
from jaxllm.spec import ops as spec_ops
from jaxllm.spec.op_table import op_table
from jaxllm.state.step import Step, real_tokens

__all__ = ["MoE"]

_TOKENS = ("batch", "length", None)


class MoE(nn.Module):
    """y = sum of weight_e expert_e(x) over the A experts that the router chooses.

    Without a capacity no token is dropped. With one (`Policy.expert_capacity`) an expert takes at
    most factor x A x tokens / E of a device's tokens, the first ones; padding takes none.
    """

    op: spec_ops.MoE
    policy: Policy

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], *, step: Step, state: Any, aux: LayerAux
    ) -> tuple[Float[Array, "B T D"], Any]:
        """x -> (update of x, the state as it was)."""
        op, table = self.op, op_table(self.op, x.shape[-1])
        leaves = Leaves(
            self, table, policy=self.policy, aux=aux, adapter_ids=step.adapter_ids
        )
        logits = leaves.product("router", x, "BTD,DE->BTE", dtype=jnp.float32)
        bias = leaves["balance_bias"] if op.router.balance_bias else None
        routing, real = route(logits, op, bias), real_tokens(step)
        weights = {
            name: leaves[name]
            for name in leaves.names
            if name not in ("router", "router_bias", "balance_bias")
        }
        if step.adapter_ids is not None and any(map(linear.is_adapted, weights.values())):
            raise UnsupportedError(
                "experts take one adapter for all rows; leave adapter_ids out, or adapters off "
                f"{self.name}'s experts"
            )
        update, dropped = self._spread(x, routing, real, weights)
        _report(self.name or "moe", logits, routing, real, aux)
        aux.stats[f"{self.name}.dropped"] = dropped
        return keep(update), state

    def _job(self, x: Float[Array, "B T D"]) -> Dispatch:
        """For tokens x of one device."""
        op, factor, slots = self.op, self.policy.expert_capacity, None
        if factor is not None:
            pairs = x.shape[0] * x.shape[1] * op.active
            slots = max(1, math.ceil(factor * pairs / op.experts))
        return Dispatch(
            count=op.experts, slots=slots, weigh_inputs=op.router.weigh_inputs
        )

    def _spread(
        self,
        x: Float[Array, "B T D"],
        routing: Routing,
        real: Bool[Array, "B T"] | None,
        weights: dict[str, Any],
    ) -> tuple[Float[Array, "B T D"], Float[Array, ""]]:
        """The experts' part, on each device of a mesh for its own tokens and experts."""
        experts = routing.experts
        if real is not None and self.policy.expert_capacity is not None:
            experts = jnp.where(real[..., None], experts, self.op.experts)
        routing = Routing(experts, routing.weights, None)
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty or mesh.size == 1:
            return self._local(x, routing, weights, _Axes())
        place = functools.partial(
            partition_spec, rules=self.policy.rules, mesh_shape=dict(mesh.shape)
        )
        table = op_table(self.op, x.shape[-1])
        dense = {n: linear.expanded(w, self.policy.compute_dtype) for n, w in weights.items()}
        # The width is whole inside: what FSDP keeps apart is gathered here.
        whole = with_axes(self.policy.rules, width=None)
        axes = {n: table[n].axes if n in table else ("experts", *[None] * (w.ndim - 1)) for n, w in dense.items()}
        lie = {n: place(axes[n], whole, shape=w.shape) for n, w in dense.items()}
        tokens = place(_TOKENS, shape=x.shape)
        found = _Axes(
            tokens=_names(tokens),
            expert=_names(lie["down"])[:1] if lie["down"][0] else (),
            tensor=_names(lie["down"][1:]),
        )
        run = jax.shard_map(
            functools.partial(self._local, axes=found),
            mesh=mesh,
            in_specs=(tokens, Routing(tokens, tokens, None), lie),
            out_specs=(tokens, PartitionSpec()),
            check_vma=False,
        )
        return run(x, routing, dense)

    def _local(
        self,
        x: Float[Array, "B T D"],
        routing: Routing,
        weights: dict[str, Any],
        axes: _Axes,
    ) -> tuple[Float[Array, "B T D"], Float[Array, ""]]:
        """One device's tokens through the experts; sums over the axes that split experts."""
        job = self._job(x)
        flat = x.reshape(-1, x.shape[-1])
        routing = jax.tree.map(lambda a: a.reshape(flat.shape[0], -1), routing)
        run = functools.partial(self._run, weights, job, axes)
        if not axes.expert:
            y, dropped = mix(flat, routing, run, job)
        elif axes.expert[0] in axes.tokens:
            y, dropped = mix_over(flat, routing, run, job, axes.expert[0])
        else:
            y, dropped = mix_own(flat, routing, run, job, axes.expert[0])
        y = jax.lax.psum(y, axes.tensor) if axes.tensor else y
        dropped = jax.lax.psum(dropped, axes.tokens) if axes.tokens else dropped
        return y.reshape(x.shape).astype(x.dtype), dropped

    def _run(
        self, weights: dict[str, Any], job: Dispatch, axes: _Axes, rows: Array, owner: Array, sizes: Array
    ) -> Array:
        """Rows sorted by expert through their experts."""
        product = functools.partial(
            linear.grouped,
            group_sizes=sizes,
            dtype=self.policy.compute_dtype,
            equal=job.slots is not None,
        )

        def project(name: str, x: Array) -> Array:
            y = keep(product(x, weights[name]))
            bias = weights.get(f"{name}_bias")
            return y if bias is None else y + bias[owner].astype(y.dtype)

        if "gate_up" in weights:
            gate, up = jnp.split(project("gate_up", rows), 2, axis=-1)
        else:
            gate = project("gate", rows) if self.op.mlp.gated else None
            up = project("up", rows)
        hidden = mlp_hidden(self.op.mlp, up, gate)
        y = product(hidden, weights["down"])
        bias = weights.get("down_bias")
        if bias is None:
            return y
        # Devices that split F add up their parts of y: one of them brings the bias.
        first = functools.reduce(
            lambda found, axis: found & (jax.lax.axis_index(axis) == 0), axes.tensor, True
        )
        return y + jnp.where(first, bias[owner], 0).astype(y.dtype)


@dataclasses.dataclass(frozen=True)
class _Axes:
    """Mesh axes that split tokens, experts, and each expert's ffn."""

    tokens: tuple[str, ...] = ()
    expert: tuple[str, ...] = ()
    tensor: tuple[str, ...] = ()


def _names(spec: Any) -> tuple[str, ...]:
    """All mesh axes of a PartitionSpec."""
    parts = [(p,) if isinstance(p, str) else tuple(p or ()) for p in spec]
    return tuple(name for part in parts for name in part)


def _report(
    name: str, logits: Array, routing: Routing, real: Array | None, aux: LayerAux
) -> None:
    """Losses, and how often each expert was chosen."""
    aux.lose("load_balance", load_balance(routing, real))
    aux.lose("sequence_balance", load_balance(routing, real, by_row=True))
    aux.lose("router_z", router_z(logits, real))
    count = logits.shape[-1]
    aux.stats[f"{name}.load"] = jnp.sum(loads(routing.experts, count, real), axis=0)
