"""Block-sparse attention on TPU: the flash kernels, whose grid's last axis walks over lists.

The lists are prefetched as scalars, so that a step's block and its pattern are on their way before
the step begins. A pattern is a block of int8 that is read where the list names it.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.block_sparse_attention.blocks import BlockMap, Lists
from pallas_kernels.block_sparse_attention.walk import MapWalk
from pallas_kernels.flash_attention.mosaic_tpu import (
    Kernel,
    Layout,
    TpuTiles,
    launch,
    launch_backward,
)
from pallas_kernels.flash_attention.problem import Extras, Spec

__all__ = ["backward", "forward"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ListWalk(MapWalk):
    """Tiles over lists; the table of a tile is (blocks with a pattern, blocks, entries)."""

    lists: Lists

    @property
    def most(self) -> int:
        """Blocks that a tile visits at most."""
        return self.lists.entries.shape[2]

    def every(self, extras: Extras) -> jax.Array:
        """The table of every tile: int32 [M, tiles * (2 + W)]."""
        del extras
        table = np.concatenate([self.lists.counts, self.lists.entries], axis=2)
        return jnp.asarray(table.reshape(len(table), -1))

    def start(self, place, table) -> tuple:
        """Where the table of a tile begins; place is (sequence, query head, tile, step)."""
        return (place[1] if table.shape[0] > 1 else 0), place[2] * (2 + self.most)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ListKernel(Kernel):
    """A kernel whose tiles walk over lists."""

    walk: ListWalk

    def steps(self, refs, place, body):
        """body(mask or None) if the tile visits a block in this step."""
        batch, step = place[0], place[3]
        walk, bounds = self.walk, refs["bounds"]
        of, start = walk.start(place, bounds)
        partial, every = bounds[of, start], bounds[of, start + 1]
        full, shape = step < every - partial, (walk.tile, walk.block)

        def there():
            entry = bounds[of, start + 2 + jnp.minimum(step, every - 1)]
            columns = lax.broadcasted_iota(jnp.int32, shape, 1) + (entry & 0xFFFF) * walk.block
            return columns < walk.facts(batch, refs)[2]

        @pl.when(full)
        def _():
            body(there() if walk.limited else None)

        @pl.when((step < every) & ~full)
        def _():
            seen = refs["pattern"][0].astype(jnp.int32) != 0
            body(seen & there() if walk.limited else seen)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ListLayout(Layout):
    """Where a program finds its parts, by the lists."""

    walk: ListWalk

    def _entry(self, place, bounds):
        of, start = self.walk.start(place, bounds)
        last = bounds[of, start + 1] - 1
        return bounds[of, start + 2 + jnp.minimum(place[3], last)]

    def block_at(self, place, bounds):
        """The block of a step; past the end, the last."""
        return self._entry(place, bounds) & 0xFFFF

    def kernel(self, names):
        """The kernel over arrays of these names."""
        return ListKernel(walk=self.walk, group=self.group, names=names)

    def more(self) -> dict:
        """The patterns."""
        words = self.walk.lists.words.view(np.uint32)
        bits = (words[:, :, None] >> np.arange(32, dtype=np.uint32)[:, None]) & 1
        bits = bits.reshape(len(words), -1, self.walk.tile).transpose(0, 2, 1)

        def where(*ids_and_refs):
            ids, bounds = ids_and_refs[:-2], ids_and_refs[-2]
            if self.by_keys:
                batch, kv_head, tile, member, step = ids
                place = (batch, kv_head * self.group + member, tile, step)
            else:
                place = ids
            return self._entry(place, bounds) >> 16, 0, 0

        spec = pl.BlockSpec((1, self.walk.tile, self.walk.block), where)
        return {"pattern": (jnp.asarray(bits.astype(np.int8)), spec)}


def _layout(q, k, extras: Extras, spec: Spec, blocks: BlockMap, cut: tuple) -> ListLayout:
    walk = ListWalk(
        spec=spec,
        batch=q.shape[0],
        queries=q.shape[1],
        keys=k.shape[1],
        tile=cut[0],
        block=cut[1],
        transposed=cut[2],
        names=extras.names,
        lists=blocks.lists(*cut),
    )
    return ListLayout(walk=walk, group=q.shape[2] // k.shape[2], by_keys=cut[2])


def forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    extras: Extras,
    *,
    spec: Spec,
    tiles: TpuTiles,
    blocks: BlockMap,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Runs the forward: out [B, T, N, Hv] and lse [B, N, T]."""
    cut = (*tiles.fitted(q.shape[1], k.shape[1]), False)
    return launch(_layout(q, k, extras, spec, blocks, cut), (q, k, v), extras, interpret=interpret)


def backward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    extras: Extras,
    results: tuple[jax.Array, jax.Array],
    gradients: tuple[jax.Array, jax.Array],
    *,
    spec: Spec,
    tiles: TpuTiles,
    blocks: BlockMap,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Gradients by q, k, v, and d loss / d (score of a row's sink) as [B, N, T]."""
    of_queries, of_keys = tiles.fitted(q.shape[1], k.shape[1])
    make = functools.partial(_layout, q, k, extras, spec, blocks)
    layouts = (make((of_queries, of_keys, False)), make((of_keys, of_queries, True)))
    return launch_backward(layouts, (q, k, v), extras, (results, gradients), interpret=interpret)
