"""Block-sparse attention of `pallas_kernels` in our words: a declared mask as a map of blocks."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxllm.ops.mask import Visibility
from jaxllm.spec.mask import And, Blocks, Chunk, Full, Global, Mask, Or, Prefix, Row, allowed, draws
from jaxllm.spec.mask import parts as parts_of

__all__ = ["block_map", "mapped", "sparse"]


def mapped(see: Visibility, heads: int) -> bool:
    """Whether a mask is known before the step, for rows from position 0 on.

    Args:
      see: who sees whom.
      heads: query heads that are here.
    """
    if not see.aligned or see.query_segments is not None:
        return False
    if draws(see.mask) and see.heads != heads:  # a shard does not know which are its own
        return False
    marked = [part for part in parts_of(see.mask) if isinstance(part, (Global, Prefix))]
    return see.marks is None or not any(part.marked for part in marked)


def _even(mask: Mask) -> int:
    """A size of blocks of positions on which the mask is the same; 0 for any."""
    match mask:
        case Full():
            return 0
        case Blocks() | Chunk():
            return mask.size
        case And() | Or():
            return math.gcd(_even(mask.first), _even(mask.second))
    return 1


@functools.lru_cache(maxsize=32)
def block_map(mask: Mask, length: int, heads: int) -> Any:
    """The map of a mask over rows of `length` positions; the same object for the same arguments.

    Args:
      mask: the declared mask.
      length: T = S.
      heads: N, for masks that each head draws for itself.

    Returns:
      A `pallas_kernels.block_sparse_attention.BlockMap`.
    """
    from pallas_kernels.block_sparse_attention import BlockMap

    head = np.arange(heads, dtype=np.int32)[:, None, None] if draws(mask) else None
    row = Row(length=length, head=head, heads=heads)

    def visible(queries: np.ndarray, keys: np.ndarray) -> np.ndarray:
        seen = np.asarray(allowed(mask, queries, keys, row))
        shape = (*seen.shape[:-2], queries.shape[0], keys.shape[1])
        return np.broadcast_to(seen, shape).reshape(-1, *shape[-2:])

    size = _even(mask)
    if size and size % 64:
        return BlockMap.of(visible, length, length)
    size = size or 64
    places = np.arange(0, length, size, dtype=np.int32)
    return BlockMap.even(visible(places[:, None], places[None]), size, length, length)


def sparse(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K Hv"],
    see: Visibility,
    *,
    scores: Any,
    implementation: str,
) -> Float[Array, "B T N Hv"]:
    """Attention by a kernel that walks over lists of blocks; see `mapped`.

    Args:
      q, k, v: see `jaxllm.ops.attention.reference`.
      see: who sees whom.
      scores: scale, soft-cap and sinks.
      implementation: a name of `pallas_kernels.block_sparse_attention.IMPLEMENTATIONS`.
    """
    from pallas_kernels.block_sparse_attention import block_sparse_attention

    lengths = see.key_lengths
    out = block_sparse_attention(
        q,
        k,
        v,
        block_map(see.mask, q.shape[1], q.shape[2]),
        softcap=scores.softcap,
        scale=scores.scale,
        sinks=None if scores.sinks is None else jnp.asarray(scores.sinks),
        key_lengths=None if lengths is None else jnp.asarray(lengths),
        implementation=implementation,
    )
    assert isinstance(out, jax.Array)
    return out
