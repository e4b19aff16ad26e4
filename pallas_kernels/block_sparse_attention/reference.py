"""Attention under a block map in plain jnp: the oracle, and what runs where no kernel does."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.block_sparse_attention.blocks import SIDE, BlockMap
from pallas_kernels.flash_attention.problem import Extras, Spec
from pallas_kernels.flash_attention.reference import dense

__all__ = ["reference", "visible"]


def visible(blocks: BlockMap, extras: Extras) -> jax.Array:
    """Who sees whom, bool [B or 1, M, T, S]."""
    seen = jnp.asarray(blocks.patterns)[jnp.asarray(blocks.classes)].transpose(0, 1, 3, 2, 4)
    maps, rows, _, columns, _ = seen.shape
    seen = seen.reshape(1, maps, rows * SIDE, columns * SIDE)[:, :, : blocks.queries, : blocks.keys]
    if extras.key_lengths is not None:
        there = jnp.arange(blocks.keys, dtype=jnp.int32)[None] < extras.key_lengths[:, None]
        seen = seen & there[:, None, None]
    return seen


def reference(
    q: jax.Array, k: jax.Array, v: jax.Array, extras: Extras, *, spec: Spec, blocks: BlockMap
) -> tuple[jax.Array, jax.Array]:
    """(out [B, T, N, Hv], lse float32 [B, N, T]); see `flash_attention.reference`."""
    seen = visible(blocks, extras)
    seen = jnp.broadcast_to(seen, (q.shape[0], *seen.shape[1:]))
    return dense(q, k, v, seen, scale=spec.scale, softcap=spec.softcap, sinks=extras.sinks)
