"""Tiles of the kernels for a call; NOTES.md has the measurements."""

from __future__ import annotations

from pallas_kernels.grouped_matmul.mosaic_gpu import Tiles

__all__ = ["group_tiles_for", "row_tiles_for"]


def row_tiles_for(rows: int, groups: int) -> Tiles:
    """Tiles of a product of so many rows in so many groups, by the rows of an even group."""
    if rows < 64 * groups:  # the matrices' bytes bind: small parts of them keep all programs busy
        return Tiles(rows=64, columns=128, depth=128, stages=4, split="columns")
    if rows <= 128 * groups:
        return Tiles(rows=64, columns=256, stages=4, split="columns")
    return Tiles()


def group_tiles_for(outputs: int) -> Tiles:
    """Tiles of the gradient of matrices [I, O] of so many outputs."""
    if outputs % 256:
        return Tiles(rows=256, columns=128)
    return Tiles()
