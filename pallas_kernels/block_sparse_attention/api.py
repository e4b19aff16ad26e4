"""`block_sparse_attention`: checks, the choice of an implementation, and its derivative."""

from __future__ import annotations

import dataclasses
import functools

import jax

from pallas_kernels.block_sparse_attention import mosaic_gpu, mosaic_tpu
from pallas_kernels.block_sparse_attention.blocks import BlockMap
from pallas_kernels.block_sparse_attention.reference import reference
from pallas_kernels.choice import Choice, choose
from pallas_kernels.errors import ShapeError
from pallas_kernels.flash_attention import hopper, tpu
from pallas_kernels.flash_attention.differentiable import Plan, clean, run
from pallas_kernels.flash_attention.mosaic_gpu import Tiles
from pallas_kernels.flash_attention.mosaic_gpu_backward import BackwardTiles
from pallas_kernels.flash_attention.mosaic_tpu import TpuTiles
from pallas_kernels.flash_attention.problem import Extras, Spec, pose
from pallas_kernels.flash_attention.tiles import backward_tiles, forward_tiles
from pallas_kernels.target import interpreting, processors
from pallas_kernels.warpgroups import CONSUMERS

__all__ = ["IMPLEMENTATIONS", "block_sparse_attention", "explain"]

_TPU_TILES = TpuTiles(tile=256, block=256)
_WIDEST = 128  # of heads whose tiles have room to be cut for a map
_SHORT_STEP = 1.15  # what a key costs in steps of 64, over that in steps of 128


def forward_cut(blocks: BlockMap, q: tuple[int, ...], v: tuple[int, ...], spec: Spec) -> Tiles:
    """Tiles of the forward: a list for each consumer, in steps of 64 keys, where these visit so
    much less that short steps pay; else tiles that overlap where heads are wide."""
    tiles, width = forward_tiles(q, v, spec), max(q[-1], v[-1])
    if width > _WIDEST:
        return tiles
    own = Tiles(block_kv=64, stages=8 if width <= 64 else 4, own=True)
    tile, block = CONSUMERS * tiles.block_q, tiles.block_kv
    partial, every = blocks.lists(tile, block).counts.sum(axis=(0, 1))
    ends = blocks.halves(64, gap=own.stages // 2).ends.sum(axis=(0, 1, 2))
    masked = ends[2] - ends[1] + ends[0]
    together = block * (every + mosaic_gpu.MASKED * partial)
    apart = 64 / CONSUMERS * _SHORT_STEP * (ends[2] + mosaic_gpu.MASKED * masked)
    if apart < together:
        return own
    return dataclasses.replace(tiles, joined=not (tiles.ahead or tiles.share))


def backward_cut(q: tuple[int, ...], v: tuple[int, ...], spec: Spec) -> BackwardTiles:
    """Tiles of the backward: two kernels, for over maps the one pass has not run on a device; a
    list for each consumer up to heads of 128, where scores ahead would have no room."""
    tiles = backward_tiles(q, v, dataclasses.replace(spec, deterministic=True))
    return tiles if tiles.split else dataclasses.replace(tiles, keys_ahead=False)


def _on_hopper(q, k, v, extras: Extras, *, spec: Spec, blocks: BlockMap):
    options = {"blocks": blocks, "processors": processors(), "interpret": interpreting()}
    plan = Plan(
        spec=spec,
        kernels=(mosaic_gpu.forward, mosaic_gpu.backward),
        tiles=(forward_cut(blocks, q.shape, v.shape, spec), backward_cut(q.shape, v.shape, spec)),
        options=tuple(options.items()),
    )
    return run(*clean(q, k, v, extras), extras, plan)


def _on_tpu(q, k, v, extras: Extras, *, spec: Spec, blocks: BlockMap):
    plan = Plan(
        spec=spec,
        kernels=(mosaic_tpu.forward, mosaic_tpu.backward),
        tiles=(_TPU_TILES, _TPU_TILES),
        options=(("blocks", blocks), ("interpret", interpreting())),
    )
    return run(*clean(q, k, v, extras), extras, plan)


# name -> (run(q, k, v, extras, spec=..., blocks=...) -> (out, lse), obstacle as flash attention's)
IMPLEMENTATIONS = {
    "mosaic_gpu": (_on_hopper, hopper.obstacle),
    "mosaic_tpu": (_on_tpu, tpu.obstacle),
    "reference": (reference, lambda *_: None),
}


def explain(q, k, v, implementation: str = "auto") -> Choice:
    """Which implementation serves a call, and why; arrays may be abstract.

    Raises:
      UnsupportedError: the named one cannot.
    """
    return choose(
        "block_sparse_attention",
        implementation,
        IMPLEMENTATIONS,
        lambda name: IMPLEMENTATIONS[name][1](q, k, v, Extras(), Spec(scale=1.0)),
        "'auto' or 'reference'",
    )


def block_sparse_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    blocks: BlockMap,
    *,
    softcap: float | None = None,
    scale: float | None = None,
    sinks: jax.Array | None = None,
    key_lengths: jax.Array | None = None,
    return_lse: bool = False,
    implementation: str = "auto",
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """softmax(cap(scale q kT) + mask) v where the mask is a block map, with its gradient.

    Args:
      q: [B, T, N, H].
      k: [B, S, K, H], N a multiple of K.
      v: [B, S, K, Hv].
      blocks: which pairs see each other, for T queries and S keys; a row that sees nothing gives
        zeros.
      softcap: above 0; scores become softcap * tanh(scores / softcap).
      scale: above 0; default 1 / sqrt(H).
      sinks: [N], a logit a head that joins the softmax's sum and gives nothing.
      key_lengths: integers [B]; keys from there on are not seen and may be NaN.
      return_lse: also return the log of each row's softmax sum.
      implementation: `auto`, or a name of `IMPLEMENTATIONS`.

    Returns:
      out [B, T, N, Hv] in v's dtype; with `return_lse` also lse [B, N, T], float32.

    Raises:
      ShapeError: arguments that do not fit. UnsupportedError: a named implementation that cannot
        serve the call, with the reason.
    """
    names = ("window", "segment_ids", "query_lengths")
    spec, extras = pose(
        q,
        k,
        v,
        causal=False,
        packed=False,
        softcap=softcap,
        scale=scale,
        sinks=sinks,
        key_lengths=key_lengths,
        query_offset=0,
        **dict.fromkeys(names),
    )
    if (blocks.queries, blocks.keys) != (q.shape[1], k.shape[1]):
        raise ShapeError(
            f"block_sparse_attention: the map is of {blocks.queries} queries and {blocks.keys} "
            f"keys, q and k have {q.shape[1]} and {k.shape[1]}"
        )
    if blocks.classes.shape[0] not in (1, q.shape[2]):
        raise ShapeError(
            f"block_sparse_attention: {blocks.classes.shape[0]} maps for {q.shape[2]} query heads; "
            "give one, or one for each"
        )
    chosen = explain(q, k, v, implementation).name
    call = functools.partial(IMPLEMENTATIONS[chosen][0], spec=spec, blocks=blocks)
    out, lse = call(q, k, v, extras)
    return (out, lse) if return_lse else out
