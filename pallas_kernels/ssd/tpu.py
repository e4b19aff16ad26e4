"""The Mosaic TPU kernels as an implementation: what they serve, and their plan for a call."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.ssd.derivative import Plan, run
from pallas_kernels.ssd.mosaic_tpu import SIZE, backward, forward
from pallas_kernels.target import target

__all__ = ["obstacle", "scan", "unfit", "walk"]

_ROOM = 8 << 20  # bytes of scratch memory for the states of a group's heads


def unfit(*, dtype: str, heads: tuple[int, int], widths: tuple[int, int], platform: str):
    """Why these kernels cannot serve a kind of call, or None; see `unfit` of the package."""
    if platform != "tpu":
        return f"it needs a TPU, this is {platform}"
    if dtype != "bfloat16":
        return f"it takes bfloat16, not {dtype}"
    if any(width not in (64, 128) for width in widths):
        return f"it takes heads and states 64 or 128 wide, not {widths}"
    if heads[0] // heads[1] * widths[0] * widths[1] * 4 > _ROOM:
        return f"the states of {heads[0] // heads[1]} heads do not fit into its memory"
    return None


def obstacle(x, b) -> str | None:
    """Why these kernels cannot serve a call, or None."""
    if 0 in (*x.shape, *b.shape):
        return "it takes no empty arrays"
    heads, widths = (x.shape[2], b.shape[2]), (x.shape[3], b.shape[3])
    return unfit(dtype=str(x.dtype), heads=heads, widths=widths, platform=target())


def scan(x, dt, a, b, c, initial, number, *, interpret: bool = False):
    """As `reference`."""
    dt = dt.astype(jnp.float32)
    log_decay = dt * a.astype(jnp.float32)[None, None]
    initial = None if initial is None else initial.swapaxes(2, 3)
    y, final = walk(x, dt, log_decay, b, c, initial, number, interpret=interpret)
    return y, final.swapaxes(2, 3)


def walk(
    x, steps, log_decay, b, c, initial, number, *, interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
    """As `derivative.run` by these kernels."""
    kind = (("interpret", interpret),)
    plan = Plan(SIZE, forward, backward, (kind, kind))
    initial = None if initial is None else initial.astype(jnp.float32)
    return run(x, steps, log_decay.astype(jnp.float32), b, c, initial, number, plan)
