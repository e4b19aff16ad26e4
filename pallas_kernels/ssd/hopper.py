"""The Mosaic GPU kernels as an implementation: what they serve, and their plan for a call."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.ssd.derivative import Plan, run
from pallas_kernels.ssd.mosaic_gpu import SIZE, forward
from pallas_kernels.ssd.mosaic_gpu_backward import backward
from pallas_kernels.target import interpreting, not_hopper, target
from pallas_kernels.warpgroups import CONSUMERS

__all__ = ["obstacle", "scan", "unfit", "walk"]

_WIDTH, _STATES = 64, (64, 128)


def unfit(*, dtype: str, heads: tuple[int, int], widths: tuple[int, int], platform: str):
    """Why these kernels cannot serve a kind of call, or None; see `unfit` of the package."""
    if platform not in ("gpu", "interpreter"):
        return f"it needs a CUDA device, this is {platform}"
    if dtype not in ("bfloat16", "float16"):
        return f"it takes bfloat16 and float16, not {dtype}"
    width, state = widths
    if width % _WIDTH:
        return f"it takes heads whose width is a multiple of {_WIDTH}, not {width}"
    if state not in _STATES:
        return f"it takes states of {' or '.join(map(str, _STATES))}, not {state}"
    shared = heads[0] * (width // _WIDTH) // heads[1]
    if shared % CONSUMERS:
        return f"it takes heads two by two: {heads[0]} heads of {heads[1]} groups do not pair"
    return not_hopper(platform)


def obstacle(x, b) -> str | None:
    """Why these kernels cannot serve a call, or None."""
    if 0 in (*x.shape, *b.shape):
        return "it takes no empty arrays"
    heads, widths = (x.shape[2], b.shape[2]), (x.shape[3], b.shape[3])
    return unfit(dtype=str(x.dtype), heads=heads, widths=widths, platform=target())


def _walked(count: int, programs: int) -> int:
    """Heads of a program of the backward pass: a divisor of `count`, as many as leave four programs
    a processor."""
    divisors = [n for n in range(1, count + 1) if count % n == 0]
    fit = [n for n in divisors if programs * (count // n) >= 4 * 132]
    return max(fit, default=1)


def scan(x, dt, a, b, c, initial, number) -> tuple[jax.Array, jax.Array]:
    """As `reference`."""
    dt = dt.astype(jnp.float32)
    log_decay = dt * a.astype(jnp.float32)[None, None]
    initial = None if initial is None else initial.swapaxes(2, 3)
    y, final = walk(x, dt, log_decay, b, c, initial, number)
    return y, final.swapaxes(2, 3)


def walk(x, steps, log_decay, b, c, initial, number) -> tuple[jax.Array, jax.Array]:
    """As `derivative.run` with any width of heads that `unfit` lets through."""
    batch, length, heads, width = x.shape
    slices, state = width // _WIDTH, b.shape[3]
    log_decay = log_decay.astype(jnp.float32)
    if slices > 1:  # columns of a state are heads of their own
        x = x.reshape(batch, length, heads * slices, _WIDTH)
        log_decay = jnp.repeat(log_decay, slices, axis=2)
        steps = None if steps is None else jnp.repeat(steps, slices, axis=2)
    if initial is not None:
        initial = initial.astype(jnp.float32)
        initial = initial.reshape(batch, heads, state, slices, _WIDTH).swapaxes(2, 3)
        initial = initial.reshape(batch, -1, state, _WIDTH)
    kind = (("interpret", interpreting()),)
    walked = _walked(x.shape[2] // b.shape[2], batch * b.shape[2] * -(-length // SIZE))
    plan = Plan(SIZE, forward, backward, (kind, (("heads", walked), *kind)))
    found: Any = run(x, steps, log_decay, b, c, initial, number, plan)
    y, final = found
    final = final.reshape(batch, heads, slices, state, _WIDTH).swapaxes(2, 3)
    return y.reshape(batch, length, heads, width), final.reshape(batch, heads, state, width)
