"""`selective_scan`: checks, the choice of an implementation."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.choice import Choice, choose
from pallas_kernels.errors import ShapeError
from pallas_kernels.selective_scan.kernels import KERNELS, kernel, obstacle, unfit
from pallas_kernels.selective_scan.reference import reference
from pallas_kernels.ssd.chunks import numbers
from pallas_kernels.ssd.segments import check_segments

__all__ = ["IMPLEMENTATIONS", "Choice", "explain", "selective_scan", "unfit"]


# name -> (run(x, dt, a, b, c, initial, number) -> (y, final state), obstacle(x, a))
IMPLEMENTATIONS: dict[str, tuple[Callable[..., Any], Callable[..., str | None]]] = {
    **{
        name: (functools.partial(kernel, name), functools.partial(obstacle, name))
        for name in KERNELS
    },
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
    segment_ids: jax.Array | None = None,
    implementation: str = "auto",
) -> tuple[jax.Array, jax.Array]:
    """h <- exp(dt a) h + dt x b; y = h . c, channel by channel, token by token, with its gradient.

    The states are kept in float32. Source: arXiv 2312.00752 (Mamba).

    Args:
      x: [B, T, I].
      dt: [B, T, I], step sizes, 0 or more; a token of 0 leaves the state as it was.
      a: [I, M], negative.
      b, c: [B, T, M], into and out of the states.
      initial: [B, I, M], the states before; zeros by default.
      segment_ids: as of `pallas_kernels.ssd.ssd`.
      implementation: `auto`, or a name of `IMPLEMENTATIONS`.

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
    if segment_ids is not None:
        check_segments("selective_scan", segment_ids, (x.shape[0], x.shape[1]))
    choice = explain(x, a, implementation=implementation)
    number = None if segment_ids is None else numbers(segment_ids)
    return IMPLEMENTATIONS[choice.name][0](x, dt, a, b, c, initial, number)
