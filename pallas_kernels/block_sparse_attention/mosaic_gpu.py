# Types of jax's Mosaic GPU objects are not public.
# pyright: reportPrivateImportUsage=false, reportAbstractUsage=false, reportIndexIssue=false, reportAttributeAccessIssue=false, reportCallIssue=false
"""Block-sparse attention on Hopper: the flash kernels, whose tiles walk over lists of blocks.

Full blocks of a list need no mask. The others name a pattern: a word of 32 bits for each row and 32
columns, which is read while the block's scores are multiplied. The two consumers of a tile share
one list, or each has one of its own in it.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.block_sparse_attention.blocks import BlockMap, Halves
from pallas_kernels.block_sparse_attention.walk import MapWalk
from pallas_kernels.flash_attention.mosaic_gpu import Tiles
from pallas_kernels.flash_attention.mosaic_gpu import launch as launch_forward
from pallas_kernels.flash_attention.mosaic_gpu_backward import BackwardTiles, Walks
from pallas_kernels.flash_attention.mosaic_gpu_backward import launch as launch_backward
from pallas_kernels.flash_attention.problem import Extras, Spec
from pallas_kernels.flash_attention.ranges import BOTH, HIGH
from pallas_kernels.once import lowered_once
from pallas_kernels.warpgroups import CONSUMERS, ROW

__all__ = ["MASKED", "ListWalk", "SharedWalk", "backward", "forward"]

MASKED = 0.3  # what a pattern adds to a block's cost: 619 instructions a step instead of 469
_ALONE = 0.7  # what a step of one consumer takes while the other waits, over that of both


@dataclasses.dataclass(frozen=True, kw_only=True)
class ListWalk(MapWalk):
    """Tiles over lists of blocks; a place between `bounds` is one in the list.

    Attributes:
      map: who sees whom.
    """

    map: BlockMap

    @property
    def per_head(self) -> bool:
        """Whether every query head has lists of its own."""
        return self.map.classes.shape[0] > 1

    def visits(self) -> np.ndarray:
        """What each tile costs, in blocks: float64 [1 or N, tiles]."""
        counts = self.map.lists(self.tile, self.block, self.transposed).counts
        return counts[..., 1] + MASKED * counts[..., 0]

    def _at(self, place) -> tuple:
        return (place[2] if self.per_head else 0, place[1])

    def bounds(self, place, refs):
        """(0, 0, end of the full blocks, end)."""
        at = self._at(place)
        partial, every = refs["counts"][(*at, 0)], refs["counts"][(*at, 1)]
        return jnp.int32(0), jnp.int32(0), every - partial, every

    def parts(self, bounds):
        """The full blocks, which only lengths may hide, and those with a pattern."""
        low, _, full_high, high = bounds
        return [(low, full_high, HIGH if self.limited else None), (full_high, high, BOTH)]

    def block_at(self, place, position, refs):
        """The block at a place of the list."""
        return refs["entries"][(*self._at(place), position)] & 0xFFFF

    def pattern(self, place, position, rows, ends, refs):
        """Words of a block's pattern for some rows of the tile."""
        if ends != BOTH:
            return None
        number = refs["entries"][(*self._at(place), position)] >> 16
        first = rows[0] - place[1] * self.tile
        words = refs["words"]
        return [
            plgpu.load(words.at[number, i, pl.ds(first, rows[1])], layout=ROW, optimized=False)
            for i in range(self.block // 32)
        ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SharedWalk(ListWalk):
    """Tiles over the blocks that two consumers share, each with a list of its own; see `Halves`.

    Attributes:
      gap: of `BlockMap.halves`.
    """

    gap: int = 1 << 16

    @property
    def own(self) -> bool:
        return True

    @property
    def halves(self) -> Halves:
        """The lists."""
        return self.map.halves(self.block, self.transposed, self.gap)

    def visits(self) -> np.ndarray:
        """As for `ListWalk`; one consumer alone is faster than two beside each other."""
        masked, whole, end = np.moveaxis(self.halves.ends, -1, 0)
        own = end + MASKED * (end - whole + masked)
        return np.maximum(own.mean(axis=-1), _ALONE * own.max(axis=-1))

    def bounds(self, place, refs):
        """(0, 0, 0, end) of all that come."""
        zero = jnp.int32(0)
        return zero, zero, zero, refs["counts"][self._at(place)]

    def block_at(self, place, position, refs):
        """The block at a place of the shared list."""
        return refs["blocks"][(*self._at(place), position)]

    def of_consumer(self) -> OwnWalk:
        return OwnWalk(**{f.name: getattr(self, f.name) for f in dataclasses.fields(self)})


@dataclasses.dataclass(frozen=True, kw_only=True)
class OwnWalk(SharedWalk):
    """The walk of a consumer; its positions are entries of its own list."""

    def _own(self, place) -> tuple:
        return (*self._at(place), lax.axis_index("wg"))

    def bounds(self, place, refs):
        """(0, end of what is masked, end of what is whole, end)."""
        ends = (refs["ends"][(*self._own(place), i)] for i in range(3))
        return jnp.int32(0), *ends

    def parts(self, bounds):
        """What is masked, the whole blocks, which only lengths may hide, and what is masked."""
        low, full_low, full_high, high = bounds
        whole = (full_low, full_high, HIGH if self.limited else None)
        return [(low, full_low, BOTH), whole, (full_high, high, BOTH)]

    def entry(self, place, index, refs):
        """The entry at an index of the list."""
        return refs["own"][(*self._own(place), index)]

    def arrival(self, entry):
        """Which of the tile's shared blocks an entry is."""
        return entry & 0xFFFF

    def block_at(self, place, position, refs):
        """The block of an entry."""
        return super().block_at(place, self.arrival(position), refs)

    def pattern(self, place, position, rows, ends, refs):
        """Words of an entry's pattern."""
        del place, rows
        if ends != BOTH:
            return None
        number, words = position >> 16, refs["words"]
        return [
            plgpu.load(words.at[number, i], layout=ROW, optimized=False)
            for i in range(self.block // 32)
        ]


def _data(walk: Any, extras: Extras) -> dict:
    names = ("entries", "counts", "words")
    if isinstance(walk, SharedWalk):
        found, names = walk.halves, ("blocks", "counts", "own", "ends", "words")
    else:
        found = walk.map.lists(walk.tile, walk.block, walk.transposed)
    out = {name: jnp.asarray(getattr(found, name)) for name in names}
    info = walk.info(extras)
    return out if info is None else out | {"info": info}


def _walk(q, k, extras: Extras, *, kind: type[ListWalk] = ListWalk, **facts) -> ListWalk:
    sizes = {"batch": q.shape[0], "queries": q.shape[1], "keys": k.shape[1]}
    return kind(names=extras.names, **sizes, **facts)


@lowered_once("spec", "tiles", "blocks", "processors", "interpret")
def forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    extras: Extras,
    *,
    spec: Spec,
    tiles: Tiles,
    blocks: BlockMap,
    processors: int = 132,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Runs the forward: out [B, T, N, Hv] and lse [B, N, T]."""
    cut: dict = {"tile": CONSUMERS * tiles.block_q, "block": tiles.block_kv}
    if tiles.own:
        cut |= {"kind": SharedWalk, "gap": tiles.stages // 2}
    walk = _walk(q, k, extras, spec=spec, map=blocks, **cut)
    data = _data(walk, extras)
    if extras.sinks is not None:
        data["sinks"] = extras.sinks
    options = {"tiles": tiles, "processors": processors, "interpret": interpret}
    return launch_forward(walk, (q, k, v), data, **options)


@lowered_once("spec", "tiles", "blocks", "processors", "interpret")
def backward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    extras: Extras,
    results: tuple[jax.Array, jax.Array],
    gradients: tuple[jax.Array, jax.Array],
    *,
    spec: Spec,
    tiles: BackwardTiles,
    blocks: BlockMap,
    processors: int = 132,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Gradients by q, k, v, and d loss / d (score of a row's sink) as [B, N, T]."""
    kind = ListWalk if tiles.split else SharedWalk
    make = functools.partial(_walk, q, k, extras, spec=spec, map=blocks, kind=kind)
    walks = Walks.of(make, tiles)
    data = (_data(walks.by_queries, extras), _data(walks.by_keys, extras))
    options = {"tiles": tiles, "processors": processors, "interpret": interpret}
    return launch_backward(walks, (q, k, v), data, (results, gradients), **options)
