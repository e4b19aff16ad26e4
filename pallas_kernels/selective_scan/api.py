"""`selective_scan`: checks, the choice of an implementation. The kernel has no gradient."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.custom_batching import sequential_vmap

from pallas_kernels.choice import Choice, choose
from pallas_kernels.errors import ShapeError
from pallas_kernels.selective_scan.mosaic_gpu import Tiles, forward
from pallas_kernels.selective_scan.reference import reference
from pallas_kernels.target import interpreting, not_hopper, target

__all__ = ["IMPLEMENTATIONS", "Choice", "explain", "selective_scan", "unfit"]

_STATES = (8, 16, 32)


def unfit(*, dtype: str, channels: int, state: int, platform: str | None = None) -> str | None:
    """Why the kernel cannot serve a kind of call, or None: what can be said without its arrays.

    Args:
      dtype: name of x's dtype.
      channels: I.
      state: M.
      platform: see `pallas_kernels.target`; by default what is traced for.
    """
    platform = platform or target()
    if platform not in ("gpu", "interpreter"):
        return f"it needs a CUDA device, this is {platform}"
    if dtype not in ("bfloat16", "float16"):
        return f"it takes bfloat16 and float16, not {dtype}"
    if channels % Tiles().channels:
        return f"it takes a multiple of {Tiles().channels} channels, not {channels}"
    if state not in _STATES:
        return f"it takes {', '.join(map(str, _STATES))} states a channel, not {state}"
    return not_hopper(platform)


def _obstacle(x, a) -> str | None:
    if 0 in x.shape:
        return "it takes no empty arrays"
    return unfit(dtype=str(x.dtype), channels=x.shape[2], state=a.shape[1])


def _kernel(x, dt, a, b, c, initial) -> tuple[jax.Array, jax.Array]:
    length, tiles = x.shape[1], Tiles()
    short = -length % tiles.tokens
    wide = (z.astype(jnp.float32) for z in (dt, b, c))
    # A step of 0 leaves the state as it is.
    x, dt, b, c = (jnp.pad(z, ((0, 0), (0, short), (0, 0))) for z in (x, *wide))
    run = sequential_vmap(functools.partial(forward, tiles=tiles, interpret=interpreting()))
    y, final = run(x, dt, a.astype(jnp.float32), b, c, initial.astype(jnp.float32))
    return y[:, :length], final


# name -> (run(x, dt, a, b, c, initial) -> (y, final state), obstacle(x, a))
IMPLEMENTATIONS = {
    "mosaic_gpu": (_kernel, _obstacle),
    "reference": (reference, lambda *_: None),
}


def explain(x, a, *, implementation: str = "auto") -> Choice:
    """Which implementation `selective_scan` takes for a call, and why.

    Args:
      x, a: arrays or `jax.ShapeDtypeStruct`.

    Raises:
      UnsupportedError: as `selective_scan`.
    """
    return choose(
        "selective_scan",
        implementation,
        IMPLEMENTATIONS,
        lambda name: IMPLEMENTATIONS[name][1](x, a),
        "'auto' or 'reference'",
    )


def selective_scan(
    x: jax.Array,
    dt: jax.Array,
    a: jax.Array,
    b: jax.Array,
    c: jax.Array,
    *,
    initial: jax.Array | None = None,
    implementation: str = "auto",
) -> tuple[jax.Array, jax.Array]:
    """h <- exp(dt a) h + dt x b; y = h . c, channel by channel, token by token.

    The states are kept in float32. Source: arXiv 2312.00752 (Mamba).

    Args:
      x: [B, T, I].
      dt: [B, T, I], step sizes, 0 or more; a token of 0 leaves the state as it was.
      a: [I, M], negative.
      b, c: [B, T, M], into and out of the states.
      initial: [B, I, M], the states before; zeros by default.
      implementation: `auto`, or a name of `IMPLEMENTATIONS`. The kernel cannot be differentiated.

    Returns:
      (y [B, T, I] in x's dtype, the last states [B, I, M] in float32).

    Raises:
      ShapeError: arguments that do not fit. UnsupportedError: a named implementation that cannot
        serve the call, with the reason.
    """
    if x.ndim != 3 or dt.shape != x.shape or a.ndim != 2 or a.shape[0] != x.shape[2]:
        raise ShapeError(
            f"selective_scan takes x and dt [B, T, I] and a [I, M], not {x.shape}, {dt.shape} and "
            f"{a.shape}"
        )
    if b.shape != (*x.shape[:2], a.shape[1]) or c.shape != b.shape:
        raise ShapeError(
            f"selective_scan takes b and c {(*x.shape[:2], a.shape[1])}, not {b.shape} and "
            f"{c.shape}"
        )
    state = (x.shape[0], *a.shape)
    if initial is None:
        initial = jnp.zeros(state, jnp.float32)
    if initial.shape != state:
        raise ShapeError(f"selective_scan: initial must be {state}, not {initial.shape}")
    choice = explain(x, a, implementation=implementation)
    return IMPLEMENTATIONS[choice.name][0](x, dt, a, b, c, initial)
