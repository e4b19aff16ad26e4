"""The compressive memory of Infini-attention: what closed segments said, token by token."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxllm.ops.chunks import over_chunks, over_tokens

__all__ = ["read_memory"]

_CHUNK = 64  # tokens whose states the backward pass computes again


def _feature(x: Float[Array, "*dims"]) -> Float[Array, "*dims"]:
    """elu(x) + 1, in float32."""
    return jax.nn.elu(x.astype(jnp.float32)) + 1.0


def _read(features: Float[Array, "B K *dims H"], memory: Array) -> Array:
    """s M / s z, or 0 from an empty memory; the last column of the memory is z."""
    found = jnp.einsum("bk...h,bkhv->bk...v", features, memory)
    weight = found[..., -1:]
    some = weight > 0
    share = found[..., :-1] / jnp.where(some, weight, jnp.ones_like(weight))
    return jnp.where(some, share, jnp.zeros_like(share))


def _token(memory: Array, token: Any, *, delta: bool) -> tuple[Array, Array]:
    """(memory [B, K, 2, H, H + 1] of closed segments and the open one, what a token read)."""
    q, k, v, begins, reset, real = token
    wide = lambda flag: jax.lax.expand_dims(flag, range(1, memory.ndim - 1))  # noqa: E731
    memory = jnp.where(reset[:, None, None, None, None], jnp.zeros_like(memory), memory)
    closed, opened = memory[:, :, 0], memory[:, :, 1]
    closed, opened = (
        jnp.where(wide(begins), closed + opened, closed),
        jnp.where(wide(begins), jnp.zeros_like(opened), opened),
    )
    found = _read(q, closed)
    new = v - _read(k, closed) if delta else v
    rows = jnp.concatenate([new, jnp.ones_like(new[..., :1])], axis=-1)
    added = k[..., :, None] * rows[..., None, :]
    opened = opened + jnp.where(wide(real), added, jnp.zeros_like(added))
    return jnp.stack([closed, opened], axis=2), found


def read_memory(
    qkv: tuple[Float[Array, "B T N H"], Float[Array, "B T K H"], Float[Array, "B T K H"]],
    initial: Float[Array, "B K 2 H V"] | None,
    flags: tuple[Bool[Array, "B T"], Bool[Array, "B T"], Bool[Array, "B T"]],
    *,
    delta: bool,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B K 2 H V"]]:
    """(what queries find in the memory of closed segments, the memory after the last token).

    Args:
      qkv: queries, keys and values, not rotated.
      initial: the memory before the first token; None for an empty one.
      flags: which real tokens begin a segment, which begin a sequence, which are real.
      delta: whether what the memory says of a key is subtracted from its value.
    """
    q, k, v = qkv
    batch, length, heads, dim = k.shape
    q = _feature(q).reshape(batch, length, heads, -1, dim)
    if initial is None:
        initial = jnp.zeros((batch, heads, 2, dim, dim + 1), jnp.float32)
    tokens = (q, _feature(k), v.astype(jnp.float32), *flags)
    step = functools.partial(_token, delta=delta)

    def body(memory: Array, chunk: Any) -> tuple[Array, Array]:
        found, memory = over_tokens(step, memory, chunk)
        return memory, found

    run = (lambda: over_chunks(body, initial, tokens, _CHUNK)) if length > _CHUNK else None
    found, final = run() if run is not None else over_tokens(step, initial, tokens)
    return found.reshape(batch, length, -1, dim), final
