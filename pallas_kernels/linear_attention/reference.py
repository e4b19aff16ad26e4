"""Linear attention in plain jnp, token by token: what the kernels are compared with."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

__all__ = ["reference"]


def reference(q, k, v, log_decay, beta, initial, number) -> tuple[jax.Array, jax.Array]:
    """(out [B, T, N, H] in v's dtype, the last matrices [B, N, M, H]), in float32 at least.

    Args:
      q, k, v, log_decay, beta: as of `linear_attention`; the last two may be None.
      initial: the matrices before, [B, N, M, H], or None for zeros.
      number: int32 [B, T], how many sequences began up to each token; None where none did.
    """
    wide = v.dtype if jnp.finfo(v.dtype).bits >= 32 else jnp.float32
    repeats = v.shape[2] // k.shape[2]
    if initial is None:
        initial = jnp.zeros((v.shape[0], v.shape[2], k.shape[3], v.shape[3]), wide)
    begins = None
    if number is not None:
        begins = number != jnp.pad(number[:, :-1], ((0, 0), (1, 0)))

    def step(state, token):
        q, k, v, log_decay, beta, begin = token
        v = v.astype(wide)
        if begin is not None:
            state = jnp.where(begin[:, None, None, None], jnp.zeros_like(state), state)
        q, k = (jnp.repeat(z.astype(wide), repeats, axis=1)[..., None] for z in (q, k))
        if log_decay is not None:
            decay = jnp.exp(log_decay.astype(wide))
            state = lax.expand_dims(decay, range(decay.ndim, 4)) * state
        if beta is not None:
            v = beta.astype(wide)[..., None] * (v - jnp.sum(state * k, axis=2))
        state = state + k * v[:, :, None]
        return state, jnp.sum(state * q, axis=2)

    tokens = (q, k, v, log_decay, beta, begins)
    by_time = jax.tree.map(lambda z: jnp.moveaxis(z, 1, 0), tokens)
    final, out = lax.scan(step, initial.astype(wide), by_time)
    return jnp.moveaxis(out, 0, 1).astype(v.dtype), final
