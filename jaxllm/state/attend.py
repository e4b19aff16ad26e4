"""Attention through the state: the one place that dispatches on how keys are remembered."""

from __future__ import annotations

import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxllm.core.policy import Policy
from jaxllm.core.sharding import island, shards
from jaxllm.errors import UnsupportedError
from jaxllm.ops.attention import Scores, attention
from jaxllm.ops.mask import Visibility
from jaxllm.spec.mask import Global, Mask, draws, parts, reach
from jaxllm.spec.ops import Attention, LatentAttention
from jaxllm.state.dense import DenseKV, write
from jaxllm.state.paged import PagedKV, attend_pages
from jaxllm.state.step import Step
from jaxllm.typing import AnyArray

__all__ = ["attend", "global_tokens", "over_state", "spread"]


def attend(
    state: Any,
    qkv: tuple[Float[Array, "B T N H"], Float[Array, "B S K H"], Float[Array, "B S K H"]],
    *,
    step: Step,
    op: Attention,
    sinks: Float[AnyArray, "N"] | None = None,
    policy: Policy,
) -> tuple[Float[Array, "B T N H"], Any]:
    """Remember the new keys and values, and attend over all that is remembered.

    Args:
      state: None (training) or the op's `DenseKV` or `PagedKV`.
      qkv: queries, keys and values of the new tokens, rotated; S is T, or the rows of a length
        projection.
      step: where the tokens stand.
      op: scale, soft-cap and mask.
      sinks: a logit a head that joins the softmax.
      policy: implementation of softmax attention, and how arrays lie on a mesh.

    Returns:
      (what each query found, the new state).
    """
    q, k, v = qkv
    if isinstance(state, PagedKV):
        scores = Scores(scale=op.query_scale, softcap=op.softcap, sinks=sinks)
        return attend_pages(state, qkv, step=step, mask=op.mask, scores=scores, policy=policy)
    see, cached = over_state(state, step, op)
    if state is not None and not isinstance(state, DenseKV):
        raise UnsupportedError(f"attention cannot read a {type(state).__name__}; use a dense state")
    if state is not None:
        state = DenseKV(
            write(state.k, k, step.positions, aligned=step.aligned),
            write(state.v, v, step.positions, aligned=step.aligned),
        )
    if cached and state is not None:
        k, v = state.k, state.v
    keys, values = k.astype(q.dtype), v.astype(q.dtype)
    heads = jnp.arange(op.heads, dtype=jnp.int32) if draws(op.mask) else None
    scores = Scores(scale=op.query_scale, softcap=op.softcap, sinks=sinks, heads=heads)
    return spread(q, keys, values, see, scores=scores, policy=policy), state


def spread(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Hv"],
    see: Visibility,
    *,
    scores: Scores,
    policy: Policy,
) -> Float[Array, "B T N Hv"]:
    """Attention with rows and heads spread over the mesh: no device needs another's."""
    parts = shards("heads", policy.rules)
    if q.shape[2] % parts == 0 and k.shape[2] % parts:
        # Fewer key heads than devices: each gets a copy of those that its queries read.
        copies = next(c for c in range(2, parts + 1) if k.shape[2] * c % parts == 0)
        copies = copies if q.shape[2] % (k.shape[2] * copies) == 0 else q.shape[2] // k.shape[2]
        k, v = jnp.repeat(k, copies, axis=2), jnp.repeat(v, copies, axis=2)
    rows = lambda x: ("batch", *[None] * (x.ndim - 1))  # noqa: E731
    queries, keys = ("batch", None, "heads", None), ("batch", None, "kv_heads", None)
    axes = (
        queries,
        keys,
        keys,
        jax.tree.map(rows, see),
        jax.tree.map(lambda _: ("heads",), scores),
    )

    def one(q: Array, k: Array, v: Array, see: Visibility, scores: Scores) -> Array:
        return attention(q, k, v, see, scores=scores, implementation=policy.attention)

    shape = (*q.shape[:3], v.shape[-1])
    return island(one, (q, k, v, see, scores), axes, out=(shape, queries), rules=policy.rules)


def over_state(state: Any, step: Step, op: Attention | LatentAttention) -> tuple[Visibility, bool]:
    """(who sees whom, whether keys are those of the state) once the new ones are in it.

    Raises:
      UnsupportedError: the mask is of whole rows, and a state or a packed row holds parts.
    """
    _check_rows(op, step, state)
    if state is None or step.fresh:
        return _among_new(step, op), False
    return _over_cache(jax.tree.leaves(state)[0].shape[:2], step, op.mask), True


def _sees_ahead(mask: Mask) -> bool:
    return reach(mask)[1] != 0


def _rows(op: Attention | LatentAttention) -> int | None:
    """Rows that a length projection makes of a sequence's keys."""
    projection = op.length_projection if isinstance(op, Attention) else None
    return None if projection is None else projection.rows


def _check_rows(op: Attention | LatentAttention, step: Step, state: Any) -> None:
    """A state forgets marks and does not know where a row ends; nor do packed documents."""
    special = [part for part in parts(op.mask) if isinstance(part, Global)]
    projected = _rows(op) is not None
    ends = draws(op.mask) or any(part.last for part in special) or projected
    what = "a length projection" if projected else str(op.mask)
    if state is not None and (ends or any(part.marked for part in special)):
        raise UnsupportedError(f"attention with {what} sees whole rows: give no state")
    if step.segment_ids is not None and ends:
        raise UnsupportedError(f"attention with {what} sees whole rows: do not pack documents")


def _among_new(step: Step, op: Attention | LatentAttention) -> Visibility:
    """The new tokens among themselves; padding is at the end, so a causal mask hides it."""
    rows = _rows(op)
    if rows is not None:
        rows = jnp.zeros((step.positions.shape[0], rows), jnp.int32)
        return Visibility(step.positions, rows, mask=op.mask)
    return Visibility(
        step.positions,
        step.positions,
        step.segment_ids,
        step.segment_ids,
        step.lengths if _sees_ahead(op.mask) else None,
        mask=op.mask,
        aligned=step.fresh,
        runs=step.fresh or step.segment_ids is not None,
        marks=step.marks,
        heads=op.heads,
    )


def _over_cache(shape: tuple[int, int], step: Step, mask: Mask) -> Visibility:
    """The new tokens over all slots; slots past the sequence are never before a query."""
    slots = jnp.arange(shape[1], dtype=step.positions.dtype)
    lengths = None
    if _sees_ahead(mask):
        new = step.positions.shape[1] if step.lengths is None else step.lengths
        lengths = (step.positions[:, 0] + new).astype(slots.dtype)
    return Visibility(
        step.positions,
        jnp.broadcast_to(slots, shape),
        key_lengths=lengths,
        mask=mask,
        slots=True,
    )


def global_tokens(mask: Mask, step: Step) -> Bool[Array, "B T"] | None:
    """Tokens that a mask's `Global` parts make global, or None where it is none of them."""
    places, found = jnp.asarray(step.positions), []
    for part in parts(mask):
        if isinstance(part, Global) and part.marked and step.marks is not None:
            found.append(jnp.asarray(step.marks))
        elif isinstance(part, Global) and not part.marked:
            end = places.shape[1] - part.last
            found.append((places < part.first) | (places >= end))
    return functools.reduce(operator.or_, found) if found else None
