"""The dual state space scan in plain jnp, token by token: what the kernels are compared with."""

from __future__ import annotations

import jax
import jax.numpy as jnp

__all__ = ["reference"]


def reference(x, dt, a, b, c, initial, number) -> tuple[jax.Array, jax.Array]:
    """(y [B, T, N, H] in x's dtype, the last state [B, N, H, M]), in float32 at least.

    Args:
      x, dt, a, b, c: as of `ssd`.
      initial: the state before, [B, N, H, M], or None for zeros.
      number: int32 [B, T], how many sequences began up to each token; None where none did.
    """
    wide = x.dtype if jnp.finfo(x.dtype).bits >= 32 else jnp.float32
    repeats = x.shape[2] // b.shape[2]
    if initial is None:
        initial = jnp.zeros((x.shape[0], *x.shape[2:], b.shape[-1]), wide)
    begins = None
    if number is not None:
        begins = number != jnp.pad(number[:, :-1], ((0, 0), (1, 0)))

    def step(state, token):
        x, dt, b, c, begin = token
        if begin is not None:
            state = jnp.where(begin[:, None, None, None], jnp.zeros_like(state), state)
        b, c = (jnp.repeat(z.astype(wide), repeats, axis=1)[:, :, None] for z in (b, c))
        decay = jnp.exp(dt.astype(wide) * a.astype(wide)[None])[..., None, None]
        entering = (dt.astype(wide)[..., None] * x.astype(wide))[..., None] * b
        state = decay * state + entering
        return state, jnp.sum(state * c, axis=-1)

    by_time = jax.tree.map(lambda z: jnp.moveaxis(z, 1, 0), (x, dt, b, c, begins))
    final, y = jax.lax.scan(step, initial.astype(wide), by_time)
    return jnp.moveaxis(y, 0, 1).astype(x.dtype), final
