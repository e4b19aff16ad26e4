"""Sequences in chunks of tokens, and products of decays within one: for recurrences as matmuls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

__all__ = [
    "Decays",
    "decay_sums",
    "decays_between",
    "in_chunks",
    "out_of_chunks",
    "over_chunks",
    "over_tokens",
    "same_sequence",
]

_GRID = 1024.0
_FLOOR = -104.0  # exp of it is 0 in float32

Decays = tuple[Float[Array, "..."], Float[Array, "..."]]
"""Sums of logarithms of decays, in two parts to be added after a difference was taken."""


def in_chunks(x: Array, size: int) -> Array:
    """[B, T, ...] -> [T / C, B, C, ...], zeros after the last token."""
    pad = -x.shape[1] % size
    x = jnp.pad(x, ((0, 0), (0, pad), *[(0, 0)] * (x.ndim - 2)))
    return jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)


def out_of_chunks(y: Array, length: int) -> Array:
    """[T / C, B, C, ...] -> [B, T, ...]: the inverse of `in_chunks`."""
    y = jnp.moveaxis(y, 0, 1)
    return y.reshape(y.shape[0], -1, *y.shape[3:])[:, :length]


def over_tokens(
    step: Callable[[Array, Any], tuple[Array, Array]], initial: Array, tokens: Any
) -> tuple[Array, Array]:
    """([B, T, ...] of what `step` gives for each token, the last state): a loop without chunks."""
    by_time = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), tokens)
    if jax.tree.leaves(by_time)[0].shape[0] == 1:
        final, y = step(initial, jax.tree.map(lambda x: x[0], by_time))
        return y[:, None], final
    final, y = jax.lax.scan(step, initial, by_time)
    return jnp.moveaxis(y, 0, 1), final


def over_chunks(
    body: Callable[[Array, Any], tuple[Array, Array]], initial: Array, tokens: Any, size: int
) -> tuple[Array, Array]:
    """As `over_tokens`, `size` tokens a time; the backward pass computes a chunk again."""
    length = jax.tree.leaves(tokens)[0].shape[1]
    chunks = jax.tree.map(lambda x: in_chunks(x, size), tokens)
    final, y = jax.lax.scan(jax.checkpoint(body), initial, chunks)
    return out_of_chunks(y, length), final


def decay_sums(log_decay: Float[Array, "B C N"], same: Bool[Array, "b C C"]) -> Decays:
    """Sums of logarithms of decays from the first token of a sequence in the chunk to each.

    A decay after strong ones is a small difference of large sums. One part of the sums is on a
    grid, where they and their differences are exact (up to 2^14), the other part is small. The sums
    are a product of matrices, so that exactly no gradient passes from a sequence to another.

    Args:
      log_decay: of every token.
      same: of `same_sequence`.
    """
    kept = jnp.maximum(log_decay, _FLOOR)
    coarse = jax.lax.stop_gradient(jnp.round(kept * _GRID) / _GRID)
    mask, exact = same.astype(kept.dtype), jax.lax.Precision.HIGHEST
    coarse, fine = (jnp.matmul(mask, part, precision=exact) for part in (coarse, kept - coarse))
    return coarse, fine


def decays_between(last: Decays, first: Decays) -> Float[Array, "..."]:
    """Product of the decays after `first` up to `last`; only where `last` is no earlier."""
    difference = (last[0] - first[0]) + (last[1] - first[1])
    return jnp.exp(jnp.minimum(difference, 0.0))


def same_sequence(starts: Bool[Array, "B C"] | None, size: int) -> Bool[Array, "b C C"]:
    """[B (or 1), C, C]: whether a token (dim 1) comes after another (dim 2) of its own sequence."""
    order = jnp.tril(jnp.ones((size, size), bool))[None]
    if starts is None:
        return order
    number = jnp.cumsum(starts, axis=1)
    return order & (number[:, :, None] == number[:, None, :])
