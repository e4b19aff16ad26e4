"""Attention through the state: the one place that dispatches on how keys are remembered."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxllm.core.policy import Policy
from jaxllm.core.sharding import island, shards
from jaxllm.errors import UnsupportedError
from jaxllm.ops.attention import Scores, attention
from jaxllm.ops.mask import Visibility
from jaxllm.spec.mask import Mask, reach
from jaxllm.spec.ops import Attention
from jaxllm.state.dense import DenseKV, write
from jaxllm.state.step import Step
from jaxllm.typing import AnyArray

__all__ = ["attend", "over_state", "spread"]


def attend(
    state: Any,
    qkv: tuple[Float[Array, "B T N H"], Float[Array, "B T K H"], Float[Array, "B T K H"]],
    *,
    step: Step,
    op: Attention,
    sinks: Float[AnyArray, "N"] | None = None,
    policy: Policy,
) -> tuple[Float[Array, "B T N H"], Any]:
    """Remember the new keys and values, and attend over all that is remembered.

    Args:
      state: None (training) or the op's `DenseKV`.
      qkv: queries, keys and values of the new tokens, rotated.
      step: where the tokens stand.
      op: scale, soft-cap and mask.
      sinks: a logit a head that joins the softmax.
      policy: implementation of softmax attention, and how arrays lie on a mesh.

    Returns:
      (what each query found, the new state).
    """
    q, k, v = qkv
    if state is not None and not isinstance(state, DenseKV):
        raise UnsupportedError(f"attention cannot read a {type(state).__name__}; use a dense state")
    if state is not None:
        state = DenseKV(
            write(state.k, k, step.positions, aligned=step.aligned),
            write(state.v, v, step.positions, aligned=step.aligned),
        )
    see, cached = over_state(state, step, op.mask)
    if cached and state is not None:
        k, v = state.k, state.v
    keys, values = k.astype(q.dtype), v.astype(q.dtype)
    scores = Scores(scale=op.query_scale, softcap=op.softcap, sinks=sinks)
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


def over_state(state: Any, step: Step, mask: Mask) -> tuple[Visibility, bool]:
    """(who sees whom, whether keys are those of the state) once the new ones are in it."""
    if state is None or step.fresh:
        return _among_new(step, mask), False
    return _over_cache(jax.tree.leaves(state)[0].shape[:2], step, mask), True


def _sees_ahead(mask: Mask) -> bool:
    return reach(mask)[1] != 0


def _among_new(step: Step, mask: Mask) -> Visibility:
    """The new tokens among themselves; padding is at the end, so a causal mask hides it."""
    return Visibility(
        step.positions,
        step.positions,
        step.segment_ids,
        step.segment_ids,
        step.lengths if _sees_ahead(mask) else None,
        mask=mask,
        aligned=step.fresh,
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
