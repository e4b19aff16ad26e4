"""Rotary position embedding. Positions stay integers, angles float32."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int

from jaxllm.spec.rope import LinearScaling, Llama3Scaling, Rope
from jaxllm.typing import AnyArray

__all__ = ["apply_rope", "frequencies"]


def frequencies(rope: Rope, head_dim: int) -> Float32[np.ndarray, "pairs"]:
    """Angles per position of the H * fraction / 2 rotated pairs.

    theta^(-2i / H'), then scaled as the spec says.
    """
    dims = int(head_dim * rope.fraction)
    freqs = rope.theta ** (-np.arange(0, dims, 2, dtype=np.float64) / dims)
    match rope.scaling:
        case None:
            pass
        case LinearScaling(factor=factor):
            freqs = freqs / factor
        case Llama3Scaling() as s:
            wavelengths = 2 * math.pi / freqs
            ramp = (s.original_context / wavelengths - s.low_freq_factor) / (
                s.high_freq_factor - s.low_freq_factor
            )
            keep = np.clip(ramp, 0.0, 1.0)
            freqs = keep * freqs + (1 - keep) * freqs / s.factor
    return freqs.astype(np.float32)


def apply_rope(
    x: Float[Array, "B T N H"], positions: Int[AnyArray, "B T"], rope: Rope
) -> Float[Array, "B T N H"]:
    """Rotate x by its positions; dims beyond the rotated fraction stay.

    Pair (a, b) becomes (a cos - b sin, b cos + a sin). Source: arXiv 2104.09864.
    """
    freqs = frequencies(rope, x.shape[-1])
    angles = positions[..., None].astype(jnp.float32) * freqs[None, None]
    cos, sin = (f(angles)[:, :, None, :] for f in (jnp.cos, jnp.sin))
    dims = 2 * len(freqs)
    rotated, rest = x[..., :dims].astype(jnp.float32), x[..., dims:]
    if rope.layout == "half":
        a, b = jnp.split(rotated, 2, axis=-1)
        out = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    else:
        a, b = rotated[..., 0::2], rotated[..., 1::2]
        out = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(rotated.shape)
    out = out.astype(x.dtype)
    return jnp.concatenate([out, rest], axis=-1) if dims < x.shape[-1] else out
