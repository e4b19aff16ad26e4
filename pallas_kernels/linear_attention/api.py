"""`linear_attention`: checks, the choice of an implementation."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.choice import Choice, choose
from pallas_kernels.errors import ShapeError
from pallas_kernels.linear_attention.kernels import KERNELS, kernel, obstacle, unfit
from pallas_kernels.linear_attention.reference import reference
from pallas_kernels.ssd.chunks import numbers
from pallas_kernels.ssd.segments import check_segments

__all__ = ["IMPLEMENTATIONS", "Choice", "explain", "linear_attention", "unfit"]


# name -> (run(q, k, v, log_decay, beta, initial, number) -> (out, final matrices),
#          obstacle(v, k, delta=, channels=))
IMPLEMENTATIONS: dict[str, tuple[Callable[..., Any], Callable[..., str | None]]] = {
    **{
        name: (functools.partial(kernel, name), functools.partial(obstacle, name))
        for name in KERNELS
    },
    "reference": (reference, lambda *_, **__: None),
}


def _check(q, k, v, gates, initial, segment_ids) -> None:
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
    log_decay, beta = gates
    channels = (*v.shape[:3], k.shape[3])
    if log_decay is not None and log_decay.shape not in (v.shape[:3], channels):
        raise ShapeError(
            f"linear_attention: log_decay must be {v.shape[:3]} or {channels}, "
            f"not {log_decay.shape}"
        )
    if beta is not None and beta.shape != v.shape[:3]:
        raise ShapeError(f"linear_attention: beta must be {v.shape[:3]}, not {beta.shape}")
    state = (v.shape[0], v.shape[2], k.shape[3], v.shape[3])
    if initial is not None and initial.shape != state:
        raise ShapeError(f"linear_attention: initial must be {state}, not {initial.shape}")
    if segment_ids is not None:
        check_segments("linear_attention", segment_ids, v.shape[:2])


def explain(
    v, k, *, delta: bool = False, channels: bool = False, implementation: str = "auto"
) -> Choice:
    """Which implementation `linear_attention` takes for a call, and why.

    Args:
      v, k: arrays or `jax.ShapeDtypeStruct`.
      delta: whether by the delta rule.
      channels: whether decays are a channel.

    Raises:
      UnsupportedError: as `linear_attention`.
    """
    return choose(
        "linear_attention",
        implementation,
        IMPLEMENTATIONS,
        lambda name: IMPLEMENTATIONS[name][1](v, k, delta=delta, channels=channels),
        "'auto' or 'reference'",
    )


def linear_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    log_decay: jax.Array | None = None,
    beta: jax.Array | None = None,
    initial: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    implementation: str = "auto",
) -> tuple[jax.Array, jax.Array]:
    """S <- diag(exp(log_decay)) S + k u^T; out = S^T q, token by token, with its gradient.

    u = v, or by the delta rule beta (v - (diag(exp(log_decay)) S)^T k). The matrices are kept in
    float32. Sources: arXiv 2006.16236 (linear transformer), 2307.08621 (RetNet), 2401.04658
    (Lightning Attention), 2312.06635 (GLA), 2412.06464 (gated DeltaNet), 2510.26692 (KDA).

    Args:
      q, k: [B, T, K, M] of v's dtype; head n reads key head n // (N / K).
      v: [B, T, N, H].
      log_decay: [B, T, N] a head or [B, T, N, M] a channel, 0 or less; None for no decay.
      beta: [B, T, N], how much of what a key reads is replaced; None without the delta rule.
      initial: [B, N, M, H], the matrices before; zeros by default.
      segment_ids: as of `pallas_kernels.ssd.ssd`.
      implementation: `auto`, or a name of `IMPLEMENTATIONS`.

    Returns:
      (out [B, T, N, H] in v's dtype, the last matrices [B, N, M, H] in float32).

    Raises:
      ShapeError: arguments that do not fit. UnsupportedError: a named implementation that cannot
        serve the call, with the reason.
    """
    _check(q, k, v, (log_decay, beta), initial, segment_ids)
    kind = {"delta": beta is not None, "channels": log_decay is not None and log_decay.ndim == 4}
    choice = explain(v, k, **kind, implementation=implementation)
    number = None if segment_ids is None else numbers(segment_ids)
    return IMPLEMENTATIONS[choice.name][0](q, k, v, log_decay, beta, initial, number)
