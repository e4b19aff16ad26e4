"""The dual state space recurrence (Mamba-2): a loop over tokens, and matmuls chunk by chunk."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxllm.ops.chunks import (
    decay_sums,
    decays_between,
    over_chunks,
    over_tokens,
    same_sequence,
)
from jaxllm.typing import Slot

__all__ = ["Dual", "dual_chunked", "dual_loop"]

CHUNK = 128

Result = tuple[Float[Array, "B T N H"], Float[Array, "B N H M"]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Dual:
    """What a dual state space reads; a and d are parameters.

    Attributes:
      x: [B, T, N, H] inputs.
      dt: [B, T, N] float32, step sizes, 0 or more.
      b: [B, T, K, M], into the state; head n reads group n // (N / K).
      c: [B, T, K, M], out of it.
      a: [N] float32, negative.
      d: [N], what passes by the state; None where something else adds it.
    """

    x: Slot
    dt: Slot
    b: Slot
    c: Slot
    a: Slot
    d: Slot


def _einsum(equation: str, *operands: Array) -> Array:
    """Accumulated in float32; float32 operands multiply at full precision."""
    wide = operands[0].dtype == jnp.float32
    precision = jax.lax.Precision.HIGHEST if wide else jax.lax.Precision.DEFAULT
    return jnp.einsum(equation, *operands, precision=precision, preferred_element_type=jnp.float32)


def dual_loop(
    inputs: Dual, initial: Float[Array, "B N H M"], starts: Bool[Array, "B T"] | None
) -> Result:
    """A token at a time: S <- exp(dt a) S + dt x b^T; (S c, the last S)."""
    repeats = inputs.x.shape[2] // inputs.b.shape[2]

    def step(state: Array, token: Any) -> tuple[Array, Array]:
        x, dt, b, c, start = token
        if start is not None:
            state = jnp.where(start[:, None, None, None], jnp.zeros_like(state), state)
        b, c = (jnp.repeat(z.astype(jnp.float32), repeats, axis=1) for z in (b, c))
        decay = jnp.exp(dt * inputs.a[None])[..., None, None]
        entering = (dt[..., None] * x.astype(jnp.float32))[..., None] * b[:, :, None, :]
        state = decay * state + entering
        return state, jnp.sum(state * c[:, :, None, :], axis=-1)

    tokens = (inputs.x, inputs.dt, inputs.b, inputs.c, starts)
    return over_tokens(step, initial, tokens)


def dual_chunked(
    inputs: Dual, initial: Float[Array, "B N H M"], starts: Bool[Array, "B T"] | None
) -> Result:
    """Chunk by chunk: tokens of a chunk by a masked product of matrices, those before by the state.

    The state is carried in float32; products take operands of x's dtype. The backward pass computes
    a chunk again.
    """
    groups = inputs.b.shape[2]
    size, dtype = min(CHUNK, inputs.x.shape[1]), inputs.x.dtype

    def split(x: Array, dim: int) -> Array:
        return x.reshape(*x.shape[:dim], groups, -1, *x.shape[dim + 1 :])

    def body(state: Array, chunk: Any) -> tuple[Array, Array]:
        x, dt, b, c, begins = chunk
        same = same_sequence(begins, size)
        sums = decay_sums(dt * inputs.a[None, None], same)
        to = sums[0][:, :, None], sums[1][:, :, None]
        between = decays_between(to, (sums[0][:, None], sums[1][:, None]))  # [B, i, j, N]
        between = jnp.where(same[..., None], between, jnp.zeros_like(between))
        entering = (dt[..., None] * x.astype(jnp.float32)).astype(dtype)
        seen = _einsum("BIKM,BJKM->BIJK", c, b)[..., None] * split(between, 3)
        grouped = split(entering, 2)
        y = _einsum("BIJKG,BJKGH->BIKGH", seen.astype(dtype), grouped)
        # What comes from before the chunk, as far as no sequence began in it.
        reach = decays_between(sums, (jnp.zeros_like(sums[0]), jnp.zeros_like(sums[1])))
        past = _einsum("BIKM,BKGHM->BIKGH", c, split(state, 1).astype(dtype))
        past, held = past * split(reach, 2)[..., None], state * reach[:, -1][..., None, None]
        if begins is not None:  # 0 x NaN is NaN
            here = jnp.cumsum(begins, axis=1) == 0
            past = jnp.where(here[..., None, None, None], past, jnp.zeros_like(past))
            held = jnp.where(here[:, -1:, None, None], held, jnp.zeros_like(held))
        ending = grouped * split(between[:, -1], 2)[..., None].astype(dtype)
        new = _einsum("BJKGH,BJKM->BKGHM", ending, b)
        return held + new.reshape(state.shape), (y + past).reshape(x.shape)

    tokens = (inputs.x, inputs.dt, inputs.b, inputs.c, starts)
    return over_chunks(body, initial, tokens, size)
