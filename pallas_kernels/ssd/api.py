"""`ssd`: checks, the choice of an implementation."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.choice import Choice, choose
from pallas_kernels.errors import ShapeError
from pallas_kernels.ssd import hopper, tpu
from pallas_kernels.ssd.chunks import numbers
from pallas_kernels.ssd.reference import reference
from pallas_kernels.ssd.segments import check_segments
from pallas_kernels.target import target

__all__ = ["IMPLEMENTATIONS", "Choice", "explain", "ssd", "unfit"]


def _always(*_) -> None:
    return None


# name -> (run(x, dt, a, b, c, initial, number) -> (y, final state), obstacle(x, b))
IMPLEMENTATIONS = {
    "mosaic_gpu": (hopper.scan, hopper.obstacle),
    "mosaic_tpu": (tpu.scan, tpu.obstacle),
    "reference": (reference, _always),
}

_UNFIT = {"mosaic_gpu": hopper.unfit, "mosaic_tpu": tpu.unfit}


def unfit(
    implementation: str,
    *,
    dtype: str,
    heads: tuple[int, int],
    widths: tuple[int, int],
    platform: str | None = None,
) -> str | None:
    """Why a kernel cannot serve a kind of call, or None: what can be said without its arrays.

    Args:
      implementation: the name of a kernel of this package.
      dtype: name of the dtype of x, b and c.
      heads: N and K.
      widths: H and M.
      platform: see `pallas_kernels.target`; by default what is traced for.
    """
    kind = {"dtype": dtype, "heads": heads, "widths": widths}
    return _UNFIT[implementation](**kind, platform=platform or target())


def _check(x, dt, a, b, c, initial, segment_ids) -> None:
    if x.ndim != 4 or b.ndim != 4 or b.shape != c.shape or b.shape[:2] != x.shape[:2]:
        raise ShapeError(
            f"ssd takes x [B, T, N, H] and b and c [B, T, K, M], not {x.shape}, {b.shape} and "
            f"{c.shape}"
        )
    if b.shape[2] == 0 or x.shape[2] % b.shape[2]:
        raise ShapeError(f"ssd: {x.shape[2]} heads are no multiple of {b.shape[2]} groups")
    if dt.shape != x.shape[:3] or a.shape != x.shape[2:3]:
        raise ShapeError(
            f"ssd takes dt {x.shape[:3]} and a {x.shape[2:3]}, not {dt.shape} and {a.shape}"
        )
    if not x.dtype == b.dtype == c.dtype or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ShapeError(
            f"ssd: x, b and c must share one floating dtype, not {x.dtype}, {b.dtype}, {c.dtype}"
        )
    state = (x.shape[0], *x.shape[2:], b.shape[3])
    if initial is not None and initial.shape != state:
        raise ShapeError(f"ssd: the initial state must be {state}, not {initial.shape}")
    if segment_ids is not None:
        check_segments("ssd", segment_ids, x.shape[:2])


def explain(x, b, *, implementation: str = "auto") -> Choice:
    """Which implementation `ssd` takes for a call, and why.

    Args:
      x, b: arrays or `jax.ShapeDtypeStruct`.

    Raises:
      UnsupportedError: as `ssd`.
    """
    return choose(
        "ssd",
        implementation,
        IMPLEMENTATIONS,
        lambda name: IMPLEMENTATIONS[name][1](x, b),
        "'auto' or 'reference'",
    )


def ssd(
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
    """S <- exp(dt a) S + dt x b^T; y = S c, token by token, with its gradient.

    The state is kept in float32. Source: arXiv 2405.21060 (Mamba-2).

    Args:
      x: [B, T, N, H].
      dt: [B, T, N] float32, step sizes, 0 or more; a token of 0 leaves the state as it was.
      a: [N] float32, negative.
      b: [B, T, K, M] of x's dtype, into the state; head n reads group n // (N / K).
      c: [B, T, K, M] of x's dtype, out of it.
      initial: [B, N, H, M], the state before; zeros by default.
      segment_ids: integers [B, T] that never go back. A token whose id is not that of the one
        before (of the first: not 0) forgets all before it, be it NaN. As data on a device they are
        not checked: wherever they change, a sequence begins.
      implementation: `auto`, or a name of `IMPLEMENTATIONS`.

    Returns:
      (y [B, T, N, H] in x's dtype, the last state [B, N, H, M] in float32).

    Raises:
      ShapeError: arguments that do not fit. UnsupportedError: a named implementation that cannot
        serve the call, with the reason.
    """
    _check(x, dt, a, b, c, initial, segment_ids)
    choice = explain(x, b, implementation=implementation)
    number = None if segment_ids is None else numbers(segment_ids)
    return IMPLEMENTATIONS[choice.name][0](x, dt, a, b, c, initial, number)
