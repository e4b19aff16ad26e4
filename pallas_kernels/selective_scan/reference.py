"""The selective scan in plain jnp, token by token: what the kernel is compared with."""

from __future__ import annotations

import jax
import jax.numpy as jnp

__all__ = ["reference"]


def reference(x, dt, a, b, c, initial, number) -> tuple[jax.Array, jax.Array]:
    """(y [B, T, I] in x's dtype, the last state [B, I, M]), in float32 at least.

    Args:
      x, dt, a, b, c, initial: as of `selective_scan`.
      number: int32 [B, T], how many sequences began up to each token; None where none did.
    """
    wide = x.dtype if jnp.finfo(x.dtype).bits >= 32 else jnp.float32

    begins = None
    if number is not None:
        begins = number != jnp.pad(number[:, :-1], ((0, 0), (1, 0)))

    def step(h, token):
        *token, begin = token
        x, dt, b, c = (z.astype(wide) for z in token)
        if begin is not None:
            h = jnp.where(begin[:, None, None], jnp.zeros_like(h), h)
        decay = jnp.exp(dt[..., None] * a.astype(wide)[None])
        h = decay * h + (dt * x)[..., None] * b[:, None]
        return h, jnp.sum(h * c[:, None], axis=-1)

    by_time = jax.tree.map(lambda z: jnp.moveaxis(z, 1, 0), (x, dt, b, c, begins))
    final, y = jax.lax.scan(step, initial.astype(wide), by_time)
    return jnp.moveaxis(y, 0, 1).astype(x.dtype), final
