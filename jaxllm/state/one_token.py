"""One new token of each sequence through a dense state: rope, write and attention as one kernel."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxllm.core.choices import took
from jaxllm.core.policy import Policy
from jaxllm.ops.flash import band
from jaxllm.ops.rope import rope_turns
from jaxllm.spec.ops import Attention
from jaxllm.state.dense import DenseKV
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
    if not isinstance(state, DenseKV) or q.shape[1] != 1 or step.fresh:
        return "it takes one token a sequence after those of a dense state"
    if step.segment_ids is not None or step.lengths is not None or step.marks is not None:
        return "it takes whole sequences"
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

    facts = {"dtype": str(q.dtype), "width": q.shape[3], "group": op.heads // op.kv_heads}
    return unfit("mosaic_gpu", slots=state.k.shape[1], **facts)


def attend_token(
    state: DenseKV,
    qkv: tuple[Float[Array, "B 1 N H"], Float[Array, "B 1 K H"], Float[Array, "B 1 K H"]],
    *,
    step: Step,
    op: Attention,
) -> tuple[Float[Array, "B 1 N H"], DenseKV]:
    """Rotate, remember and attend, as `apply_rope` and `attend` do it, in one kernel.

    Args:
      state: keys and values so far.
      qkv: of the new tokens, not rotated.
      step: where the tokens stand.
      op: the attention; `obstacle` said None.

    Returns:
      (what each query found, the new state).
    """
    from pallas_kernels.decode_attention import Problem, decode_attention

    sides = band(op.mask)
    assert sides is not None
    problem = Problem(heads=op.heads, scale=op.query_scale, window=sides[0], softcap=op.softcap)
    turns = None
    if op.rope is not None:
        lengths = sequence_lengths(step) if op.rope.follows_length else None
        turns = rope_turns(op.head_dim, step.positions, op.rope, lengths=lengths)[:, 0]
    took("attention", "decode_attention")
    out, k, v = decode_attention(
        jnp.concatenate(qkv, axis=2)[:, 0],
        jnp.asarray(state.k),
        jnp.asarray(state.v),
        step.positions[:, 0],
        problem=problem,
        turns=turns,
        implementation="mosaic_gpu",
    )
    return out[:, None], DenseKV(k, v)
