"""The Mosaic GPU kernels as an implementation: what they serve, and their plan for a call."""

from __future__ import annotations

import jax

from pallas_kernels.flash_attention.bias import unserved
from pallas_kernels.flash_attention.differentiable import Plan, clean, run
from pallas_kernels.flash_attention.mosaic_gpu import forward
from pallas_kernels.flash_attention.mosaic_gpu_backward import backward
from pallas_kernels.flash_attention.problem import Extras, Spec
from pallas_kernels.flash_attention.tiles import backward_tiles, forward_tiles
from pallas_kernels.target import interpreting, not_hopper, processors, target

__all__ = ["attention", "obstacle", "unfit"]


def unfit(*, dtype: str, widths: tuple[int, int], platform: str) -> str | None:
    """Why these kernels cannot serve a kind of call, or None; see `unfit` of the package."""
    if platform not in ("gpu", "interpreter"):
        return f"it needs a CUDA device, this is {platform}"
    if dtype not in ("bfloat16", "float16"):
        return f"it takes bfloat16 and float16, not {dtype}"
    if any(width % 16 or not 16 <= width <= 256 for width in widths):
        return f"it takes head widths that are multiples of 16 up to 256, not {widths}"
    return not_hopper(platform)


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
    tiles = (forward_tiles(q.shape, v.shape, spec), backward_tiles(q.shape, v.shape, spec))
    kind = {"processors": processors(), "interpret": interpreting()}
    plan = Plan(spec=spec, kernels=(forward, backward), tiles=tiles, options=tuple(kind.items()))
    return run(*clean(q, k, v, extras), extras, plan)
