"""cuDNN's fused attention through `jax.nn.dot_product_attention`: what its public face can say."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.flash_attention.problem import Extras, Spec
from pallas_kernels.target import target

__all__ = ["attention", "obstacle"]


def obstacle(q, k, v, extras: Extras, spec: Spec) -> str | None:
    """Why cuDNN cannot serve a call, or None."""
    if target() != "gpu":
        return f"it needs a CUDA device, this is {target()}"
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it takes bfloat16 and float16, not {q.dtype}"
    if q.shape[-1] % 8 or q.shape[-1] > 256 or v.shape[-1] != q.shape[-1]:
        widths = f"{q.shape[-1]} and {v.shape[-1]}"
        return f"it takes equal head widths, multiples of 8 up to 256, not {widths}"
    if spec.softcap is not None:
        return "it has no soft-cap"
    if spec.bias is not None:
        return "it has no bias by function"
    if spec.deterministic:
        return "nothing tells it in which order to add up gradients"
    names = set(extras.names) - {"query_lengths", "key_lengths"}
    if names:
        return f"it has no {', '.join(sorted(names))}"
    if spec.banded and (spec.offset != 0 or spec.right != 0):
        return "its causal mask and window start at the first key"
    return None


def attention(q, k, v, extras: Extras, *, spec: Spec) -> tuple[jax.Array, None]:
    """As `reference`, without the log-sum."""
    window = None if spec.left is None else (spec.left, 0)
    with jax.numpy_dtype_promotion("standard"):
        out = jax.nn.dot_product_attention(
            q,
            k,
            v,
            scale=spec.scale,
            is_causal=spec.right == 0,
            query_seq_lengths=extras.query_lengths,
            key_value_seq_lengths=extras.key_lengths,
            local_window_size=window,
            implementation="cudnn",
        )
    if extras.query_lengths is not None:
        rows = jnp.arange(q.shape[1])[None, :] < extras.query_lengths[:, None]
        out = jnp.where(rows[:, :, None, None], out, jnp.zeros((), out.dtype))
    return out, None
