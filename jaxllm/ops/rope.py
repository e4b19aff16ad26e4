"""Rotary position embedding. Positions stay integers, angles float32."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int

from jaxllm.errors import ShapeError
from jaxllm.spec.ops import Temperature
from jaxllm.spec.rope import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    NtkScaling,
    Rope,
    YarnScaling,
)
from jaxllm.typing import AnyArray

__all__ = ["apply_rope", "frequencies", "frequencies_at", "query_temperature", "rope_turns"]


def frequencies(rope: Rope, head_dim: int) -> Float32[np.ndarray, "pairs"]:
    """Angles per position of the H * fraction / 2 rotated pairs.

    theta^(-2i / H'), then scaled as the spec says; where that depends on the length of a sequence,
    those of sequences within the original context.
    """
    dims = int(head_dim * rope.fraction)
    freqs = _powers(rope.theta, dims)
    match rope.scaling:
        case None | DynamicScaling():
            pass
        case LinearScaling(factor=factor):
            freqs = freqs / factor
        case NtkScaling(factor=factor):
            freqs = freqs * factor ** -_ntk_exponents(dims)
        case YarnScaling() as s:
            divide = _yarn_ramp(s, theta=rope.theta, dims=dims)
            freqs = divide * freqs / s.factor + (1 - divide) * freqs
        case LongRopeScaling(short_factor=divisors):
            freqs = freqs / np.asarray(divisors, np.float64)
        case Llama3Scaling() as s:
            wavelengths = 2 * math.pi / freqs
            ramp = (s.original_context / wavelengths - s.low_freq_factor) / (
                s.high_freq_factor - s.low_freq_factor
            )
            keep = np.clip(ramp, 0.0, 1.0)
            freqs = keep * freqs + (1 - keep) * freqs / s.factor
    return freqs.astype(np.float32)


def _powers(theta: float, dims: int) -> np.ndarray:
    return theta ** (-np.arange(0, dims, 2, dtype=np.float64) / dims)


def _ntk_exponents(dims: int) -> np.ndarray:
    """theta^(-2i / d) with theta' = theta s^(d / (d - 2)) is s^(-2i / (d - 2)) times as large."""
    return np.arange(0, dims, 2, dtype=np.float64) / (dims - 2)


def _yarn_ramp(scaling: YarnScaling, *, theta: float, dims: int) -> np.ndarray:
    """How much of each pair is interpolated, 0 to 1."""

    def pair_that_turns(times: float) -> float:
        turns = scaling.original_context / (2 * math.pi * times)
        return dims * math.log(turns) / (2 * math.log(theta))

    first, last = pair_that_turns(scaling.beta_fast), pair_that_turns(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    # The upper bound counts dims and not pairs, in the authors' code as in all that followed it.
    first, last = max(first, 0), min(last, dims - 1)
    if first == last:
        last += 0.001
    return np.clip((np.arange(dims // 2) - first) / (last - first), 0.0, 1.0)


def frequencies_at(
    rope: Rope, head_dim: int, lengths: Int[AnyArray, "B t"]
) -> Float32[Array, "B t pairs"]:
    """`frequencies` for sequences of these lengths in tokens, which may be traced."""
    table = frequencies(rope, head_dim)
    pairs = len(table)
    match rope.scaling:
        case DynamicScaling() as s:
            # Exactly the table up to the original context: its logarithm is that of 1.
            over = jnp.maximum(lengths - s.original_context, 0).astype(jnp.float32)
            growth = jnp.log1p(over * np.float32(s.factor / s.original_context))
            exponents = _ntk_exponents(2 * pairs).astype(np.float32)
            return jnp.exp(-growth[..., None] * exponents[None, None]) * table[None, None]
        case LongRopeScaling() as s:
            long = _powers(rope.theta, 2 * pairs) / np.asarray(s.long_factor, np.float64)
            longer = (lengths > s.original_context)[..., None]
            both = (jnp.asarray(x, jnp.float32)[None, None] for x in (long, table))
            return jnp.where(longer, *both)
    return jnp.broadcast_to(table[None, None], (*lengths.shape, pairs))


def _waves(
    width: int, positions: Int[AnyArray, "B T"], rope: Rope, lengths: Int[AnyArray, "B t"] | None
) -> tuple[Float32[Array, "B T pairs"], Float32[Array, "B T pairs"]]:
    """Cosines and sines of heads of a width, times the rope's magnitude."""
    if rope.follows_length:
        if lengths is None:
            raise ShapeError(f"a rope with {rope.scaling} needs the lengths of the sequences")
        freqs = frequencies_at(rope, width, lengths)
    else:
        freqs = frequencies(rope, width)[None, None]
    angles = positions[..., None].astype(jnp.float32) * freqs
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    if rope.magnitude != 1:
        cos, sin = cos * rope.magnitude, sin * rope.magnitude
    return cos, sin


def rope_turns(
    width: int,
    positions: Int[AnyArray, "B T"],
    rope: Rope,
    *,
    lengths: Int[AnyArray, "B t"] | None = None,
) -> Float32[Array, "B T 2 H"]:
    """What rotates whole heads by halves: y = x turns[0] + (x with its halves swapped) turns[1].

    Args:
      width: H, of which all dims are rotated, pairs half a head apart.
      positions, rope, lengths: see `apply_rope`.

    Raises:
      ShapeError: as `apply_rope`.
    """
    cos, sin = _waves(width, positions, rope, lengths)
    return jnp.stack(
        [jnp.concatenate([cos, cos], axis=-1), jnp.concatenate([-sin, sin], axis=-1)], axis=-2
    )


def apply_rope(
    x: Float[Array, "B T N H"],
    positions: Int[AnyArray, "B T"],
    rope: Rope,
    *,
    lengths: Int[AnyArray, "B t"] | None = None,
) -> Float[Array, "B T N H"]:
    """Rotate x by its positions; dims beyond the rotated fraction stay.

    Pair (a, b) becomes m (a cos - b sin, b cos + a sin), m the rope's magnitude.
    Source: arXiv 2104.09864.

    Args:
      x: queries or keys.
      positions: of the tokens.
      rope: base, fraction, layout and scaling.
      lengths: of the sequence that each token belongs to, in tokens (t is T, or 1 for all of a
        row); needed where the rope follows the length.

    Raises:
      ShapeError: the rope follows the length and there are no lengths.
    """
    cos, sin = (y[:, :, None, :] for y in _waves(x.shape[-1], positions, rope, lengths))
    dims = 2 * cos.shape[-1]
    rotated, rest = x[..., :dims].astype(jnp.float32), x[..., dims:]
    if rope.layout == "half":
        a, b = jnp.split(rotated, 2, axis=-1)
        out = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    else:
        a, b = rotated[..., 0::2], rotated[..., 1::2]
        out = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(rotated.shape)
    out = out.astype(x.dtype)
    return jnp.concatenate([out, rest], axis=-1) if dims < x.shape[-1] else out


def query_temperature(
    positions: Int[AnyArray, "B T"], temperature: Temperature
) -> Float32[Array, "B T 1 1"]:
    """1 + scale ln(1 + floor((position + 1) / period)), the factor on queries."""
    steps = jnp.floor((positions.astype(jnp.float32) + 1.0) / temperature.period)
    return (jnp.log1p(steps) * temperature.scale + 1.0)[..., None, None]
