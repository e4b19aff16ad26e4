"""Tiles of the kernels for a call: those measured on a device (tiles.json), else by what fits."""

from __future__ import annotations

import functools
import importlib.resources
import json
from typing import Any

from pallas_kernels.flash_attention.mosaic_gpu import Tiles
from pallas_kernels.flash_attention.mosaic_gpu_backward import BackwardTiles
from pallas_kernels.flash_attention.problem import Spec
from pallas_kernels.target import device_name

__all__ = ["TWO_KERNELS", "backward_tiles", "forward_tiles", "measured"]

TWO_KERNELS = 1024
"""Keys up to which two backward kernels are faster than one pass: H200, heads of 128, NOTES.md."""


@functools.cache
def _table() -> dict[str, Any]:
    text = importlib.resources.files(__package__).joinpath("tiles.json").read_text()
    return json.loads(text)


def measured(kind: str, *, device: str, width: int, queries: int, packed: bool) -> dict | None:
    """Fields of the tiles of the first entry that fits a call, or None.

    Args:
      kind: `forward` or `backward`.
      device: the device's name.
      width: the greater of H and Hv.
      queries: T.
      packed: whether rows are packed with documents.
    """
    for entry in _table()[kind]:
        if (
            entry["device"] in device
            and width <= entry["width"]
            and queries <= entry.get("queries", queries)
            and packed >= entry.get("packed", False)
        ):
            return entry["tiles"]
    return None


def _found(kind: str, q: tuple[int, ...], v: tuple[int, ...], spec: Spec) -> dict | None:
    facts = {"width": max(q[-1], v[-1]), "queries": q[1], "packed": spec.packed}
    return measured(kind, device=device_name(), **facts)


def forward_tiles(q: tuple[int, ...], v: tuple[int, ...], spec: Spec) -> Tiles:
    """Tiles of the forward for q's and v's shapes."""
    found = _found("forward", q, v, spec)
    if found is not None:
        return Tiles(**found)
    width = max(q[-1], v[-1])
    if width > 192:
        return Tiles(block_kv=64, share=q[-1] == v[-1])
    if width > 128:
        return Tiles(block_kv=64)
    if width <= 64:
        return Tiles(stages=4, ahead=True)
    return Tiles(joined=True, by_data=spec.packed)


def backward_tiles(q: tuple[int, ...], v: tuple[int, ...], spec: Spec) -> BackwardTiles:
    """Tiles of the backward for q's and v's shapes; in one pass neither with `spec.deterministic`
    nor for packed rows, whose tiles two kernels deal out by the documents."""
    found = _found("backward", q, v, spec)
    if found is not None and not (spec.deterministic and found.get("one_pass")):
        return BackwardTiles(**found)
    width = max(q[-1], v[-1])
    two = spec.packed or spec.deterministic or v[1] <= TWO_KERNELS
    if q[-1] == width == 128 and not two:
        return BackwardTiles(one_pass=True, stages=3)
    if width > 192:
        wide = {"dq_stages": 2, "dq_value_stages": 1, "share": True, "opaque": True}
        return BackwardTiles(split=True, keys_ahead=True, **wide)
    if width > 128:
        wide = {"dq_stages": 2, "dq_value_stages": 2, "share": True, "opaque": True}
        return BackwardTiles(split=True, keys_ahead=True, **wide)
    if width > 64:
        return BackwardTiles(dq_value_stages=2, delta=True, by_data=spec.packed)
    return BackwardTiles(stages=4, running=True, keys_ahead=True, delta=True)
