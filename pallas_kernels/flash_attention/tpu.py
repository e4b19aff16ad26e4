"""The TPU kernels as an implementation: what they serve, and their plan for a call."""

from __future__ import annotations

import jax

from pallas_kernels.flash_attention.bias import unserved
from pallas_kernels.flash_attention.differentiable import Plan, clean, run
from pallas_kernels.flash_attention.mosaic_tpu import TpuTiles, backward, forward
from pallas_kernels.flash_attention.problem import Extras, Spec
from pallas_kernels.target import interpreting, target

__all__ = ["attention", "obstacle", "unfit"]


def unfit(*, dtype: str, widths: tuple[int, int], platform: str) -> str | None:
    """Why these kernels cannot serve a kind of call, or None; see `unfit` of the package."""
    if platform not in ("tpu", "interpreter"):
        return f"it needs a TPU, this is {platform}"
    if dtype not in ("bfloat16", "float32"):
        return f"it takes bfloat16 and float32, not {dtype}"
    if any(width % 8 or not 8 <= width <= 256 for width in widths):
        return f"it takes head widths that are multiples of 8 up to 256, not {widths}"
    return None


def obstacle(q, k, v, extras: Extras, spec: Spec) -> str | None:
    """Why these kernels cannot serve a call, or None."""
    del extras
    if 0 in (*q.shape, *k.shape):
        return "it takes no empty arrays"
    if reason := unserved(spec.bias):
        return reason
    return unfit(dtype=str(q.dtype), widths=(q.shape[-1], v.shape[-1]), platform=target())


def attention(q, k, v, extras: Extras, *, spec: Spec) -> tuple[jax.Array, jax.Array]:
    """As `reference`."""
    plan = Plan(
        spec=spec,
        kernels=(forward, backward),
        tiles=(TpuTiles(), TpuTiles()),
        options=(("interpret", interpreting()),),
    )
    return run(*clean(q, k, v, extras), extras, plan)
