"""Mixture of experts on arrays: tokens to experts, through them, and back by weight.

A *pair* is a token and one of its A experts, numbered token * A + choice. A *plan* lays the pairs
of a device out in rows sorted by group: experts, or the devices that hold them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxllm.ops.routing import Routing
from jaxllm.typing import Slot

__all__ = ["Dispatch", "Plan", "mix", "mix_over", "mix_own", "plan"]

Run = Callable[[Array, Array, Array], Array]
"""(rows [R, D], group of each row [R], rows of each group [E]) -> what the experts make of them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dispatch:
    """What is to be done with pairs; static.

    Attributes:
      count: experts that `Routing.experts` numbers; a number past them is no expert.
      slots: rows of each expert, beyond which a device's later pairs are dropped; None: as many as
        there are.
      weigh_inputs: weights multiply what goes in.
    """

    count: int
    slots: int | None = None
    weigh_inputs: bool = False


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plan:
    """Where pairs stand among rows sorted by group.

    Attributes:
      source: [R], the pair of each row; the number of pairs where there is none.
      owner: [R], the group of each row.
      sizes: [groups], rows of each group.
      place: [pairs], the row of each pair.
      kept: [pairs], whether it has one.
    """

    source: Slot
    owner: Slot
    sizes: Slot
    place: Slot
    kept: Slot


def plan(groups: Int[Array, "pairs"], count: int, slots: int | None = None) -> Plan:
    """Rows for pairs of these groups, first come first served; pairs past the last group have none.

    Args:
      groups: of each pair; `count` and more is no group.
      count: number of groups.
      slots: rows of each group, used or not; by default a group has as many as it has pairs.
    """
    pairs = groups.shape[0]
    order = jnp.argsort(groups, stable=True).astype(jnp.int32)
    sizes = jnp.zeros(count, jnp.int32).at[groups].add(1, mode="drop")
    place = jnp.zeros(pairs, jnp.int32).at[order].set(jnp.arange(pairs, dtype=jnp.int32))
    inside = jnp.minimum(groups, count - 1)
    if slots is None:
        return Plan(order, inside[order], sizes, place, groups < count)
    starts = jnp.cumsum(sizes) - sizes
    slot = jnp.arange(slots, dtype=jnp.int32)[None]
    rows = jnp.where(slot < sizes[:, None], starts[:, None] + slot, pairs)
    source = order.at[rows.reshape(-1)].get(mode="fill", fill_value=pairs)
    rank = place - starts[inside]
    kept = (groups < count) & (rank < slots)
    owner = jnp.repeat(jnp.arange(count, dtype=jnp.int32), slots)
    place = inside * slots + jnp.minimum(rank, slots - 1)
    return Plan(source, owner, jnp.full(count, slots, jnp.int32), place, kept)


def _rows(x: Float[Array, "M D"], held: Plan, routing: Routing, job: Dispatch) -> Array:
    """The tokens of the rows; zeros where a row has none."""
    active = routing.experts.shape[-1]
    rows = x.at[held.source // active].get(mode="fill", fill_value=0)
    if not job.weigh_inputs:
        return rows
    weights = routing.weights.reshape(-1).at[held.source].get(mode="fill", fill_value=0)
    return rows * weights.astype(x.dtype)[:, None]


def _sum(out: Float[Array, "R D"], held: Plan, routing: Routing, job: Dispatch) -> Array:
    """Each token's sum over its pairs, by weight; float32."""
    weights = held.kept.reshape(routing.experts.shape).astype(jnp.float32)
    if not job.weigh_inputs:
        weights = weights * routing.weights
    each = out[held.place].reshape(*weights.shape, out.shape[-1]).astype(jnp.float32)
    return jnp.sum(each * weights[..., None], axis=-2)


def mix(
    x: Float[Array, "M D"], routing: Routing, run: Run, job: Dispatch
) -> tuple[Float[Array, "M D"], Float[Array, ""]]:
    """Send tokens through their experts, all of which are here.

    Args:
      x: tokens.
      routing: [M, A] experts and weights.
      run: the experts.
      job: their number, slots, and where weights act.

    Returns:
      (float32 sums, number of pairs that were dropped).
    """
    groups = routing.experts.reshape(-1)
    held = plan(groups, job.count, job.slots)
    out = run(_rows(x, held, routing, job), held.owner, held.sizes)
    return _sum(out, held, routing, job), _dropped(groups, held, job)


def _dropped(groups: Int[Array, "pairs"], held: Plan, job: Dispatch) -> Float[Array, ""]:
    return jnp.sum((groups < job.count) & ~held.kept).astype(jnp.float32)


def mix_own(
    x: Float[Array, "M D"], routing: Routing, run: Run, job: Dispatch, axis: str
) -> tuple[Float[Array, "M D"], Float[Array, ""]]:
    """`mix` where the experts lie over a mesh axis and every device has all the tokens.

    Each runs its own experts; the sums are added over the axis.
    """
    own = job.count // jax.lax.axis_size(axis)
    local = routing.experts - own * jax.lax.axis_index(axis)
    local = jnp.where((local >= 0) & (local < own), local, own)
    routing = dataclasses.replace(routing, experts=local)
    y, dropped = mix(x, routing, run, dataclasses.replace(job, count=own))
    return jax.lax.psum(y, axis), jax.lax.psum(dropped, axis)


def mix_over(
    x: Float[Array, "M D"], routing: Routing, run: Run, job: Dispatch, axis: str
) -> tuple[Float[Array, "M D"], Float[Array, ""]]:
    """`mix` where experts and tokens lie over a mesh axis: rows go to their experts and back.

    Both ways by all-to-all of equal parts. Without slots a part has room for all tokens of a
    device, whoever they choose: nothing is dropped, and the most that can come is reserved.
    """
    peers = jax.lax.axis_size(axis)
    own, groups = job.count // peers, routing.experts.reshape(-1)
    if job.slots is not None:
        held = plan(groups, job.count, job.slots)
        there = _exchange(_rows(x, held, routing, job), peers, axis)
        out = _run_slots(there, run, peers, own)
    else:
        room = x.shape[0] * min(routing.experts.shape[-1], own)
        peer = jnp.where(groups < job.count, groups // own, peers)
        held = plan(peer, peers, room)
        local = (groups % own).at[held.source].get(mode="fill", fill_value=own)
        there = _exchange(_rows(x, held, routing, job), peers, axis)
        local = _exchange(local, peers, axis)[:, None]
        ones = jnp.ones(local.shape, jnp.float32)
        there_routing = Routing(local, ones, None)
        out, _ = mix(there, there_routing, run, Dispatch(count=own))
        out = out.astype(x.dtype)
    back = _exchange(out, peers, axis)
    return _sum(back, held, routing, job), _dropped(groups, held, job)


def _exchange(rows: Array, peers: int, axis: str) -> Array:
    """Part p of the rows goes to device p; what comes stands in the order of its senders."""
    parts = rows.reshape(peers, -1, *rows.shape[1:])
    return jax.lax.all_to_all(parts, axis, 0, 0).reshape(rows.shape)


def _run_slots(rows: Float[Array, "R D"], run: Run, peers: int, own: int) -> Float[Array, "R D"]:
    """Rows [peers, own experts, slots] through the experts, as [own experts, peers, slots]."""
    width = rows.shape[-1]
    by_expert = rows.reshape(peers, own, -1, width).swapaxes(0, 1)
    each = by_expert.shape[1] * by_expert.shape[2]
    owner = jnp.repeat(jnp.arange(own, dtype=jnp.int32), each)
    out = run(by_expert.reshape(-1, width), owner, jnp.full(own, each, jnp.int32))
    return out.reshape(by_expert.shape).swapaxes(0, 1).reshape(rows.shape)
