"""One new token of each sequence: rope, write and attention as one kernel."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxllm.core.choices import took
from jaxllm.core.policy import Policy
from jaxllm.ops.flash import band
from jaxllm.ops.flat import query_blocks
from jaxllm.ops.rope import rope_turns
from jaxllm.spec.ops import Attention
from jaxllm.state.dense import DenseKV
from jaxllm.state.paged import PagedKV, pages_of
from jaxllm.state.step import Step, sequence_lengths
from pallas_kernels.target import target

__all__ = ["attend_token", "obstacle"]


def _of_op(op: Attention) -> str | None:
    """What an attention does that the kernel does not, or None."""
    rope = op.rope
    if rope is not None and (rope.layout != "half" or rope.fraction != 1):
        return "it rotates whole heads by halves"
    if op.qk_norm is not None and op.qk_norm.after_rope:
        return "it rotates last"
    if op.temperature is not None or op.sinks:
        return "it knows no temperatures and no sinks"
    if op.length_projection is not None or op.global_projections:
        return "it knows one projection of keys and values"
    sides = band(op.mask)
    return None if sides is not None and sides[1] == 0 else "it takes causal masks and windows"


def _of_step(state: Any, q: Array, step: Step) -> str | None:
    """What a step has that the kernel does not, or None."""
    if isinstance(state, PagedKV):
        if step.flat is None or step.flat.longest > 1:
            return "it takes one token a sequence"
        return None if state.scales is None else "it takes no pages of 8 bits"
    if not isinstance(state, DenseKV) or q.shape[1] != 1 or step.fresh:
        return "it takes one token a sequence after those of a dense state or of pages"
    if step.segment_ids is not None or step.lengths is not None or step.marks is not None:
        return "it takes whole sequences"
    return None


def obstacle(
    state: Any, q: Float[Array, "B T N H"], *, step: Step, op: Attention, policy: Policy
) -> str | None:
    """Why a step's attention is not one kernel, or None.

    Args:
      state: the op's.
      q: its queries.
      step: where the tokens stand.
      op: the attention.
      policy: how it runs; its `attention` is `auto` or `mosaic_gpu` where it is.
    """
    if (reason := _of_step(state, q, step)) is not None:
        return reason
    platform = target()
    if policy.attention not in ("auto", "mosaic_gpu"):
        return "another implementation is named"
    if platform == "interpreter" and policy.attention == "auto":
        return "the interpreter runs kernels by name only"
    if not jax.sharding.get_abstract_mesh().empty:
        return "it runs on one device"
    if platform not in ("gpu", "interpreter"):
        return f"it needs a CUDA device, this is {platform}"
    if (reason := _of_op(op)) is not None:
        return reason
    if state.k.dtype != q.dtype:
        return "it takes a cache of the queries' dtype"
    from pallas_kernels.decode_attention import unfit  # Pallas takes a third of a second to import

    facts: dict[str, Any] = {"width": q.shape[3], "group": op.heads // op.kv_heads}
    facts |= {"page" if isinstance(state, PagedKV) else "slots": state.k.shape[1]}
    return unfit("mosaic_gpu", dtype=str(q.dtype), **facts)


def attend_token(
    state: DenseKV | PagedKV,
    qkv: tuple[Float[Array, "B T N H"], Float[Array, "B T K H"], Float[Array, "B T K H"]],
    *,
    step: Step,
    op: Attention,
) -> tuple[Float[Array, "B T N H"], DenseKV | PagedKV]:
    """Rotate, remember and attend, as `apply_rope` and `attend` do it, in one kernel.

    Args:
      state: keys and values so far.
      qkv: of the new tokens, not rotated: [B, 1] of a dense state, [1, B] of pages.
      step: where the tokens stand.
      op: the attention; `obstacle` said None.

    Returns:
      (what each query found, the new state).
    """
    from pallas_kernels.decode_attention import Problem, decode_attention

    sides = band(op.mask)
    assert sides is not None
    problem = Problem(heads=op.heads, scale=op.query_scale, window=sides[0], softcap=op.softcap)
    lead, rows = qkv[0].shape[:2], qkv[0].shape[0] * qkv[0].shape[1]
    flat = lambda x: jnp.reshape(x, (rows, *x.shape[2:]))  # noqa: E731
    turns, pages, positions = None, None, flat(step.positions)
    if op.rope is not None:
        lengths = sequence_lengths(step) if op.rope.follows_length else None
        turns = flat(rope_turns(op.head_dim, step.positions, op.rope, lengths=lengths))
    if isinstance(state, PagedKV):
        table, owners = pages_of(step, op.mask)
        pages = (jnp.asarray(table.pages), jnp.asarray(table.firsts))
        positions = query_blocks(owners, rows).starts
    took("attention", "decode_attention")
    out, k, v = decode_attention(
        flat(jnp.concatenate(qkv, axis=2)),
        jnp.asarray(state.k),
        jnp.asarray(state.v),
        positions,
        problem=problem,
        turns=turns,
        pages=pages,
        implementation="mosaic_gpu",
    )
    return out.reshape(*lead, *out.shape[1:]), dataclasses.replace(state, k=k, v=v)
