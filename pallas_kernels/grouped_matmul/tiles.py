"""Tiles of the kernels for a call; NOTES.md has the measurements."""

from __future__ import annotations

from pallas_kernels.grouped_matmul.mosaic_gpu import Tiles

__all__ = ["group_tiles_for", "row_tiles_for"]


def row_tiles_for(rows: int, groups: int, columns: int) -> Tiles:
    """Tiles of a product of so many rows and groups, of so many columns."""
    if rows < 64 * groups:
        return Tiles(rows=64, columns=128, split="columns", stages=8)
    return Tiles()


def group_tiles_for(inputs: int, outputs: int) -> Tiles:
    """Tiles of the gradient of matrices of these sides."""
    return Tiles()
