"""The kernels as implementations: what they serve, and the scan by them with its gradient."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_batching import sequential_vmap

from pallas_kernels.selective_scan import mosaic_gpu, mosaic_tpu
from pallas_kernels.target import interpreting, not_hopper, target

__all__ = ["KERNELS", "kernel", "obstacle", "run", "unfit"]

KERNELS = ("mosaic_gpu", "mosaic_tpu")
_DTYPES = ("bfloat16", "float16")
_STATES = (8, 16, 32)
_BACK = mosaic_gpu.Tiles(tokens=16, unroll=4)  # the states of a piece lie in shared memory


def unfit(
    implementation: str = "mosaic_gpu",
    *,
    dtype: str,
    channels: int,
    state: int,
    platform: str | None = None,
) -> str | None:
    """Why a kernel cannot serve a kind of call, or None: what can be said without its arrays.

    Args:
      implementation: the name of a kernel of this package.
      dtype: name of x's dtype.
      channels: I.
      state: M.
      platform: see `pallas_kernels.target`; by default what is traced for.
    """
    platform = platform or target()
    gpu = implementation == "mosaic_gpu"
    if gpu and platform not in ("gpu", "interpreter"):
        return f"it needs a CUDA device, this is {platform}"
    if not gpu and platform != "tpu":
        return f"it needs a TPU, this is {platform}"
    if dtype not in _DTYPES:
        return f"it takes bfloat16 and float16, not {dtype}"
    unit = mosaic_gpu.Tiles().channels if gpu else mosaic_tpu.CHANNELS
    if channels % unit:
        return f"it takes a multiple of {unit} channels, not {channels}"
    if state not in _STATES:
        return f"it takes {', '.join(map(str, _STATES))} states a channel, not {state}"
    return not_hopper(platform) if gpu else None


def obstacle(implementation: str, x, a) -> str | None:
    """Why a kernel cannot serve a call, or None."""
    if 0 in x.shape:
        return "it takes no empty arrays"
    return unfit(implementation, dtype=str(x.dtype), channels=x.shape[2], state=a.shape[1])


def kernel(implementation: str, x, dt, a, b, c, initial, number) -> Any:
    """As `reference`, by a kernel."""
    keep = None
    if number is not None:
        same = number == jnp.pad(number[:, :-1], ((0, 0), (1, 0)))
        keep = same.astype(jnp.float32)
    dt, a, b, c, initial = (z.astype(jnp.float32) for z in (dt, a, b, c, initial))
    return run(x, dt, a, b, c, initial, keep, implementation, interpreting())


@functools.partial(jax.custom_vjp, nondiff_argnums=(7, 8))
def run(x, dt, a, b, c, initial, keep, implementation: str, interpret: bool) -> Any:
    """(y, the last states); differentiable by all but `keep`. A vmapped axis becomes a loop.

    Args:
      x: [B, T, I], narrow; all others are float32.
      dt, a, b, c, initial: as of `selective_scan`.
      keep: [B, T], 0 where a sequence begins; None where none does.
    """
    return _forward(x, dt, a, b, c, initial, keep, implementation, interpret)[0]


def _padded(unit: int, *arrays):
    """Tokens whose step is 0 leave the state as it is."""
    short = -arrays[0].shape[1] % unit
    return tuple(
        None if z is None else jnp.pad(z, ((0, 0), (0, short), *[(0, 0)] * (z.ndim - 2)))
        for z in arrays
    )


def _forward(x, dt, a, b, c, initial, keep, implementation: str, interpret: bool):
    @sequential_vmap
    def call(x, dt, a, b, c, initial, keep):
        if implementation == "mosaic_tpu":
            return mosaic_tpu.forward(x, dt, a, b, c, initial, keep, interpret=interpret)
        length = x.shape[1]
        x, dt, b, c = _padded(mosaic_gpu.Tiles().tokens, x, dt, b, c)
        keep = _ones(keep, x)
        y, final = mosaic_gpu.forward(x, dt, a, b, c, initial, keep, interpret=interpret)
        return y[:, :length], final

    kept = (x, dt, a, b, c, initial, keep)
    return call(*kept), kept


def _ones(keep, x):
    """`keep` of padded tokens, which begin nothing."""
    if keep is None:
        return None
    short = x.shape[1] - keep.shape[1]
    return jnp.pad(keep, ((0, 0), (0, short)), constant_values=1)


def _backward(implementation: str, interpret: bool, residuals, gradients):
    @sequential_vmap
    def call(x, dt, a, b, c, initial, keep, dy, dfinal):
        pull = dy.astype(x.dtype), dfinal.astype(jnp.float32)
        if implementation == "mosaic_tpu":
            inputs = (x, dt, a, b, c, initial, keep)
            return mosaic_tpu.backward(inputs, pull, interpret=interpret)
        length, how = x.shape[1], {"tiles": _BACK, "interpret": interpret}
        x, dt, b, c, dy = _padded(_BACK.tokens, x, dt, b, c, pull[0])
        keep = _ones(keep, x)
        states, _ = mosaic_gpu.forward(x, dt, a, b, c, initial, keep, keep_states=True, **how)
        inputs = (x, dt, a, b, c, keep)
        found = mosaic_gpu.backward(inputs, states, (dy, pull[1]), **how)
        dx, ddt, db, dc, da, dinitial = found
        db, dc = (jnp.sum(z, axis=1)[:, :length] for z in (db, dc))
        return dx[:, :length], ddt[:, :length], jnp.sum(da, axis=0), db, dc, dinitial

    keep = residuals[-1]
    none = None if keep is None else np.zeros(keep.shape, keep.dtype)
    return *call(*residuals, *gradients), none


run.defvjp(_forward, _backward)
