"""`linear_attention`: checks, the choice of an implementation.

With a decay a head it is the dual state space scan by other names: values are its inputs, keys its
b, queries its c, and every step is 1. Its kernels are those of `pallas_kernels.ssd`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.choice import Choice, choose
from pallas_kernels.errors import ShapeError
from pallas_kernels.linear_attention.reference import reference
from pallas_kernels.ssd import hopper, tpu
from pallas_kernels.ssd.chunks import numbers
from pallas_kernels.ssd.segments import check_segments
from pallas_kernels.target import target

__all__ = ["IMPLEMENTATIONS", "Choice", "explain", "linear_attention", "unfit"]


def _always(*_) -> None:
    return None


def _by(walk):
    return lambda q, k, v, log_decay, *rest: walk(v, None, log_decay, k, q, *rest)


# name -> (run(q, k, v, log_decay, initial, number) -> (out, final matrices), obstacle(v, k))
IMPLEMENTATIONS = {
    "mosaic_gpu": (_by(hopper.walk), hopper.obstacle),
    "mosaic_tpu": (_by(tpu.walk), tpu.obstacle),
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
      dtype: name of the dtype of q, k and v.
      heads: N and K.
      widths: of values and of keys.
      platform: see `pallas_kernels.target`; by default what is traced for.
    """
    kind = {"dtype": dtype, "heads": heads, "widths": widths}
    return _UNFIT[implementation](**kind, platform=platform or target())


def _check(q, k, v, log_decay, initial, segment_ids) -> None:
    if v.ndim != 4 or k.ndim != 4 or q.shape != k.shape or k.shape[:2] != v.shape[:2]:
        raise ShapeError(
            f"linear_attention takes q and k [B, T, K, M] and v [B, T, N, H], not {q.shape}, "
            f"{k.shape} and {v.shape}"
        )
    if k.shape[2] == 0 or v.shape[2] % k.shape[2]:
        raise ShapeError(
            f"linear_attention: {v.shape[2]} heads are no multiple of {k.shape[2]} key heads"
        )
    if not q.dtype == k.dtype == v.dtype or not jnp.issubdtype(v.dtype, jnp.floating):
        raise ShapeError(
            f"linear_attention: q, k and v must share one floating dtype, not {q.dtype}, "
            f"{k.dtype}, {v.dtype}"
        )
    if log_decay is not None and log_decay.shape != v.shape[:3]:
        raise ShapeError(
            f"linear_attention: log_decay must be {v.shape[:3]}, not {log_decay.shape}"
        )
    state = (v.shape[0], v.shape[2], k.shape[3], v.shape[3])
    if initial is not None and initial.shape != state:
        raise ShapeError(f"linear_attention: initial must be {state}, not {initial.shape}")
    if segment_ids is not None:
        check_segments("linear_attention", segment_ids, v.shape[:2])


def explain(v, k, *, implementation: str = "auto") -> Choice:
    """Which implementation `linear_attention` takes for a call, and why.

    Args:
      v, k: arrays or `jax.ShapeDtypeStruct`.

    Raises:
      UnsupportedError: as `linear_attention`.
    """
    return choose(
        "linear_attention",
        implementation,
        IMPLEMENTATIONS,
        lambda name: IMPLEMENTATIONS[name][1](v, k),
        "'auto' or 'reference'",
    )


def linear_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    log_decay: jax.Array | None = None,
    initial: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    implementation: str = "auto",
) -> tuple[jax.Array, jax.Array]:
    """S <- exp(log_decay) S + k v^T; out = S^T q, token by token, with its gradient.

    The matrices are kept in float32. Sources: arXiv 2006.16236 (linear transformer), 2307.08621
    (RetNet), 2401.04658 (Lightning Attention).

    Args:
      q, k: [B, T, K, M] of v's dtype; head n reads key head n // (N / K).
      v: [B, T, N, H].
      log_decay: [B, T, N], 0 or less; None for no decay.
      initial: [B, N, M, H], the matrices before; zeros by default.
      segment_ids: as of `pallas_kernels.ssd.ssd`.
      implementation: `auto`, or a name of `IMPLEMENTATIONS`.

    Returns:
      (out [B, T, N, H] in v's dtype, the last matrices [B, N, M, H] in float32).

    Raises:
      ShapeError: arguments that do not fit. UnsupportedError: a named implementation that cannot
        serve the call, with the reason.
    """
    _check(q, k, v, log_decay, initial, segment_ids)
    choice = explain(v, k, implementation=implementation)
    number = None if segment_ids is None else numbers(segment_ids)
    if log_decay is None:
        log_decay = jnp.zeros(v.shape[:3], jnp.float32)
    return IMPLEMENTATIONS[choice.name][0](q, k, v, log_decay, initial, number)
