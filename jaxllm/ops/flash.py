"""Flash attention of `pallas_kernels` in our words: a mask as a band, segments and lengths."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxllm.ops.mask import Visibility
from jaxllm.ops.sparse import mapped, sparse
from jaxllm.spec.mask import And, Causal, Full, Global, Mask, Or, Prefix, Window

__all__ = ["Form", "band", "flash", "form", "obstacle"]

Form = Literal["plain", "band", "blocks", "dense"]
"""How a kernel may be told who sees whom: whole rows, causal or not, or one query over the filled
slots (`plain`); a band of positions with segments, lengths and an offset (`band`); a map of blocks
that is known before the step (`blocks`); or pair by pair alone (`dense`)."""

Sides = tuple[int | None, int | None]


def _narrower(first: int | None, second: int | None) -> int | None:
    sides = [side for side in (first, second) if side is not None]
    return min(sides, default=None)


def band(mask: Mask, *, marked: bool = False) -> Sides | None:
    """(left, right) of a mask that is exactly the keys from left before to right after a query.

    Args:
      mask: the declared mask.
      marked: whether the step marks tokens; a part on marks is empty where there are none.

    Returns:
      Each side a count or None for all; None where the mask is no band.
    """
    match mask:
        case Causal():
            return None, 0
        case Full():
            return None, None
        case Window():
            return mask.left, mask.right
        case And():
            first, second = band(mask.first, marked=marked), band(mask.second, marked=marked)
            if first is None or second is None:
                return None
            return _narrower(first[0], second[0]), _narrower(first[1], second[1])
        case Or(first=one, second=Global() | Prefix() as other) if other.marked and not marked:
            return band(one, marked=marked)
    return None


def form(see: Visibility, length: int, heads: int) -> Form:
    """The cheapest form that says exactly what a visibility says.

    Args:
      see: who sees whom.
      length: T.
      heads: query heads that are here.
    """
    sides = band(see.mask, marked=see.marks is not None)
    if sides is None:
        return "blocks" if mapped(see, heads) else "dense"
    bare = see.query_segments is None and see.key_lengths is None
    if sides == (None, None):
        return "plain" if bare else "band"
    if bare and sides == (None, 0) and (see.aligned or (see.slots and length == 1)):
        return "plain"
    return "band" if see.aligned or see.runs or see.slots else "dense"


def obstacle(implementation: str, *, dtype: str, widths: tuple[int, int], platform: str):
    """Why a kernel cannot serve a kind of call, or None; see `unfit` of the kernels' package."""
    from pallas_kernels.flash_attention import unfit  # Pallas takes a third of a second to import

    return unfit(implementation, dtype=dtype, widths=widths, platform=platform)


def flash(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Hv"],
    see: Visibility,
    *,
    scores: Any,
    implementation: str,
    deterministic: bool = False,
) -> Float[Array, "B T N Hv"]:
    """Attention by a kernel; `see` must not be of the form `dense`.

    Args:
      q, k, v: see `jaxllm.ops.attention.reference`.
      see: who sees whom.
      scores: scale, soft-cap and sinks.
      implementation: a name of `pallas_kernels.flash_attention.IMPLEMENTATIONS`.
      deterministic: gradients of the same bits in every run; over maps of blocks, and of packed
        rows, they always are.
    """
    from pallas_kernels.flash_attention import flash_attention

    sides = band(see.mask, marked=see.marks is not None)
    if sides is None:
        return sparse(q, k, v, see, scores=scores, implementation=implementation)
    lengths = see.key_lengths
    offset: Any = 0
    if see.slots:  # rows follow what is remembered; slots past them may hold anything
        offset = jnp.asarray(see.query_positions)[:, 0].astype(jnp.int32)
        ends = jnp.asarray(see.query_positions)[:, -1].astype(jnp.int32) + 1
        if lengths is None:
            lengths = jnp.minimum(ends, k.shape[1])
    segments, packed = None, False
    if see.query_segments is not None and see.key_segments is not None:
        packed = see.runs
        segments = jnp.asarray(see.query_segments)
        segments = segments if packed else (segments, jnp.asarray(see.key_segments))
    out = flash_attention(
        q,
        k,
        v,
        causal=False,
        window=sides,
        segment_ids=segments,
        packed=packed,
        softcap=scores.softcap,
        scale=scores.scale,
        sinks=None if scores.sinks is None else jnp.asarray(scores.sinks),
        key_lengths=lengths,
        query_offset=offset,
        deterministic=deterministic,
        implementation=implementation,
    )
    assert isinstance(out, jax.Array)
    return out
