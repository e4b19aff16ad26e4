"""Tiles of the kernels for a call, by the width of its heads; NOTES.md has the measurements."""

from __future__ import annotations

from pallas_kernels.flash_attention.mosaic_gpu import Tiles
from pallas_kernels.flash_attention.mosaic_gpu_backward import BackwardTiles
from pallas_kernels.flash_attention.problem import Spec

__all__ = ["backward_tiles", "forward_tiles"]

_SHORT = 1024  # queries of a row


def forward_tiles(q: tuple[int, ...], v: tuple[int, ...], spec: Spec) -> Tiles:
    """Tiles of the forward for q's and v's shapes."""
    width = max(q[-1], v[-1])
    if width > 192:
        return Tiles(block_kv=64, share=q[-1] == v[-1])
    if width > 128:
        return Tiles(block_kv=64)
    if width <= 64 and q[1] <= _SHORT:
        return Tiles(persistent=False)
    if width <= 64:
        return Tiles(stages=4)
    return Tiles()


def backward_tiles(q: tuple[int, ...], v: tuple[int, ...], spec: Spec) -> BackwardTiles:
    """Tiles of the backward for q's and v's shapes."""
    width = max(q[-1], v[-1])
    if width > 192:
        return BackwardTiles(split=True, dq_stages=2, dq_value_stages=1, share=True)
    if width > 128:
        return BackwardTiles(split=True, dq_stages=2, dq_value_stages=2, share=True)
    return BackwardTiles()
