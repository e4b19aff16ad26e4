"""The selective scan (Mamba-1): a loop over tokens, and an associative scan chunk by chunk."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxllm.ops.chunks import over_chunks, over_tokens
from jaxllm.ops.linear import align
from jaxllm.typing import Slot

__all__ = ["Selective", "selective_chunked", "selective_loop"]

CHUNK = 32
"""Tokens whose states are in memory at once: C x I x M floats a row."""

Result = tuple[Float[Array, "B T I"], Float[Array, "B I M"]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Selective:
    """What a selective scan reads; a and d are parameters.

    Attributes:
      x: [B, T, I] inputs.
      dt: [B, T, I] float32, step sizes, 0 or more.
      b: [B, T, M], into the state.
      c: [B, T, M], out of it.
      a: [I, M] float32, negative.
      d: [I], what passes by the state.
    """

    x: Slot
    dt: Slot
    b: Slot
    c: Slot
    a: Slot
    d: Slot


def _decay_and_input(x: Array, dt: Array, b: Array, a: Array) -> tuple[Array, Array]:
    """exp(dt a) and dt b x [..., I, M] of tokens x, dt [..., I], b [..., M]."""
    decay = jnp.exp(dt[..., None] * align(a, dt[..., None]))
    entering = (dt * x.astype(jnp.float32))[..., None] * b.astype(jnp.float32)[..., None, :]
    return decay, entering


def _out(c: Array, states: Array) -> Array:
    return jnp.sum(states * c.astype(jnp.float32)[..., None, :], axis=-1)


def selective_loop(
    inputs: Selective, initial: Float[Array, "B I M"], starts: Bool[Array, "B T"] | None
) -> Result:
    """A token at a time: h <- exp(dt a) h + dt b x; (c . h, the last h)."""

    def step(h: Array, token: Any) -> tuple[Array, Array]:
        x, dt, b, c, start = token
        if start is not None:
            h = jnp.where(start[:, None, None], jnp.zeros_like(h), h)
        decay, entering = _decay_and_input(x, dt, b, inputs.a)
        h = decay * h + entering
        return h, _out(c, h)

    tokens = (inputs.x, inputs.dt, inputs.b, inputs.c, starts)
    return over_tokens(step, initial, tokens)


def selective_chunked(
    inputs: Selective, initial: Float[Array, "B I M"], starts: Bool[Array, "B T"] | None
) -> Result:
    """Chunk by chunk, an associative scan in each; the backward pass computes a chunk again."""
    size = min(CHUNK, inputs.x.shape[1])

    def combine(left: Any, right: Any) -> Any:
        return left[0] * right[0], right[0] * left[1] + right[1]

    def body(h: Array, chunk: Any) -> tuple[Array, Array]:
        x, dt, b, c, begins = chunk
        decay, entering = _decay_and_input(x, dt, b, inputs.a)
        before = h[:, None]
        if begins is not None:
            decay = jnp.where(begins[..., None, None], jnp.zeros_like(decay), decay)
            here = jnp.cumsum(begins, axis=1)[..., None, None] == 0
            before = jnp.where(here, before, jnp.zeros_like(before))  # 0 x NaN is NaN
        kept, sums = jax.lax.associative_scan(combine, (decay, entering), axis=1)
        states = kept * before + sums
        return states[:, -1], _out(c, states)

    tokens = (inputs.x, inputs.dt, inputs.b, inputs.c, starts)
    return over_chunks(body, initial, tokens, size)
