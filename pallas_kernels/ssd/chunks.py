"""What the kernels read beside the arrays of a call: sums of decays, chunk by chunk."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels.warpgroups import LOG2E

__all__ = ["Chunks", "chunks", "numbers", "padded"]

_FLOOR = -150.0  # 2^-150 is 0 in float32


def padded(x: jax.Array, dim: int, unit: int) -> jax.Array:
    """Zeros after the end of a dim, up to a multiple of `unit`."""
    short = -x.shape[dim] % unit
    if not short:
        return x
    return jnp.pad(x, [(0, short if i == dim else 0) for i in range(x.ndim)])


def numbers(segment_ids: jax.Array) -> jax.Array:
    """int32 [B, T]: how many sequences began up to each token, whatever their ids are."""
    ids = segment_ids.astype(jnp.int32)
    before = jnp.pad(ids[:, :-1], ((0, 0), (1, 0)))
    return jnp.cumsum((ids != before).astype(jnp.int32), axis=1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Chunks:
    """Of a call's tokens in chunks of Q, T rounded up to C of them.

    Attributes:
      stats: float32 [B, H, 4, C Q]: sums of log2 of the decays since the chunk began; the same less
        log2 of the step size; what is left at the chunk's end of what a token gave; step sizes. So
        2^(first of i - second of j) is what i reads of j, its step size included.
      held: float32 [B, H, C], what is left of the state at the chunk's end.
      number: int32 [B, C Q], sequences that began in the chunk up to a token; None where none did.
    """

    stats: jax.Array
    held: jax.Array
    number: jax.Array | None


def chunks(
    steps: jax.Array | None, log_decay: jax.Array, number: jax.Array | None, size: int
) -> Chunks:
    """Sums in chunks of `size`.

    Args:
      steps: float32 [B, T, H], what a token's input is multiplied by; None for 1.
      log_decay: float32 [B, T, H], 0 or less.
      number: of `numbers`, or None.
    """
    length = log_decay.shape[1]

    def cut(x):
        x = padded(x.astype(jnp.float32), 1, size).transpose(0, 2, 1)
        return x.reshape(*x.shape[:2], -1, size)

    # Below what float32 knows a decay is 0 anyway: sums stay small, and their differences exact.
    sums = jnp.cumsum(jnp.maximum(cut(log_decay) * LOG2E, _FLOOR), axis=3)
    if steps is None:
        steps = jnp.ones((1, length, 1), jnp.float32)
    steps = jnp.broadcast_to(cut(steps), sums.shape)
    last = jnp.exp2(sums[..., -1:] - sums)
    held = jnp.exp2(sums[..., -1])
    inside = None
    if number is not None:
        short = -number.shape[1] % size
        number = jnp.pad(number, ((0, 0), (0, short)), mode="edge")
        inside = number.reshape(number.shape[0], -1, size)
        before = jnp.pad(inside[:, :-1, -1:], ((0, 0), (1, 0), (0, 0)))
        inside = inside - before
        same = inside == inside[..., -1:]
        last = jnp.where(same[:, None], last, jnp.zeros_like(last))
        held = jnp.where(inside[:, None, :, -1] == 0, held, jnp.zeros_like(held))
        inside = inside.reshape(number.shape)
    stats = jnp.stack([sums, sums - jnp.log2(steps), last, steps], axis=2)
    return Chunks(stats.reshape(*stats.shape[:3], -1), held, inside)
