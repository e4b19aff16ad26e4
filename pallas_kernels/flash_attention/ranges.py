"""Which blocks of the other side a tile visits, and which of them need no mask.

A tile of rows (queries in the forward and for dq, keys for dk and dv) visits blocks low .. high - 1
of columns; of these, full_low .. full_high - 1 are seen whole by every row of the tile. At least
one block is always visited, so that a tile without any visible pair needs no branch of its own.
What positions and lengths decide is arithmetic inside of the kernel; segments, which are data, come
as a table that `table` computes outside.
"""

from __future__ import annotations

import dataclasses
import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.flash_attention.problem import Extras, Spec

__all__ = ["BOTH", "HIGH", "LOW", "Walk", "runs"]

# Which ends of a row's columns a block may hold: what its mask has to test.
LOW, HIGH, BOTH = "low", "high", "both"
_LENGTHS = {"query_lengths", "key_lengths"}


def _floor(x, by: int):
    return lax.div(x, jnp.int32(by))


def _ceil(x, by: int):
    return lax.div(x + jnp.int32(by - 1), jnp.int32(by))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Walk:
    """Tiles over blocks.

    Attributes:
      batch, queries, keys: B, T, S.
      tile: rows of a tile; block: columns of a block.
      names: of the extras that are there.
      transposed: rows are keys and columns are queries.
    """

    spec: Spec
    batch: int
    queries: int
    keys: int
    tile: int
    block: int
    names: tuple[str, ...]
    transposed: bool = False

    @property
    def rows(self) -> int:
        return self.keys if self.transposed else self.queries

    @property
    def columns(self) -> int:
        return self.queries if self.transposed else self.keys

    @property
    def tiles(self) -> int:
        return -(-self.rows // self.tile)

    @property
    def blocks(self) -> int:
        return -(-self.columns // self.block)

    @property
    def segmented(self) -> bool:
        return "query_segments" in self.names

    @property
    def packed(self) -> bool:
        """Whether segments are runs, so that a row's columns are one range."""
        return self.segmented and self.spec.packed

    @property
    def limited(self) -> bool:
        """Whether columns end before the last block does."""
        return self.columns % self.block != 0 or bool(_LENGTHS & set(self.names))

    @property
    def masked(self) -> bool:
        """Whether any block may need a mask."""
        return self.spec.banded or self.segmented or self.limited

    @property
    def apart(self) -> bool:
        """Whether no block holds both ends of the band of a tile's rows."""
        spec = self.spec
        if self.segmented or self.limited:
            return False
        if spec.left is None or spec.right is None:
            return True
        return spec.left + spec.right + 2 - self.tile >= self.block - 1

    @property
    def last_is_high(self) -> bool:
        """Whether the last block of every tile holds no low end."""
        spec = self.spec
        if not self.apart or spec.offset is None or spec.right is None or self.transposed:
            return False
        return self.queries + spec.offset + spec.right <= self.keys

    @property
    def leading(self) -> bool:
        """Whether blocks before the first full one may need a mask."""
        if self.segmented:
            return True
        return (self.spec.right if self.transposed else self.spec.left) is not None

    @property
    def trailing(self) -> bool:
        """Whether blocks after the last full one may need a mask."""
        if self.segmented or self.columns % self.block or _LENGTHS & set(self.names):
            return True
        return (self.spec.left if self.transposed else self.spec.right) is not None

    @property
    def heavy_last(self) -> bool:
        """Whether later tiles visit more blocks."""
        return self.spec.right is not None and not self.transposed

    @property
    def uneven(self) -> bool:
        """Whether how many blocks tiles visit follows no order."""
        return False

    @property
    def own(self) -> bool:
        """Whether each consumer has a list of its own of the blocks that come for a tile."""
        return False

    def of_consumer(self) -> Walk:
        """The walk of the consumer that asks, over what it uses of the blocks that come."""
        return self

    def entry(self, place, index, refs):
        """The position, which `block_at` and `pattern` take, of one between a tile's `bounds`."""
        del place, refs
        return index

    def facts(self, batch, refs):
        """(offset, query length, key length) of a sequence; ints where they are static."""
        info = refs.get("info")
        offset = info[batch, 0] if self.spec.offset is None else self.spec.offset
        queries = info[batch, 1] if "query_lengths" in self.names else self.queries
        keys = info[batch, 2] if "key_lengths" in self.names else self.keys
        return offset, queries, keys

    def ends(self, rows, facts):
        """(first, last) column that each row sees, segments aside; None without a bound."""
        offset, queries, keys = facts
        spec = self.spec
        if self.transposed:
            shift, before, after, limit = -offset, spec.right, spec.left, queries
        else:
            shift, before, after, limit = offset, spec.left, spec.right, keys
        low = None if before is None else rows + (shift - before)
        high = None if after is None else rows + (shift + after)
        if self.limited:
            high = limit - 1 if high is None else jnp.minimum(high, limit - 1)
        return low, high

    def seen(self, rows, columns, facts):
        """Which pairs of a tile see each other, segments aside: bool, or None for all."""
        low, high = self.ends(rows, facts)
        tests = [] if low is None else [columns >= low]
        tests += [] if high is None else [columns <= high]
        return functools.reduce(operator.and_, tests) if tests else None

    def block_at(self, place, position, refs):
        """The block that stands at a place between a tile's `bounds`."""
        del place, refs
        return position

    def pattern(self, place, position, rows, ends, refs):
        """Words of a block's mask beside its `ends`, or None; see `keeper`."""
        del place, position, rows, ends, refs

    def bounds(self, place, refs):
        """(low, full_low, full_high, high) of a tile, int32 scalars.

        Args:
          place: sequence, tile, query head.
        """
        batch, tile, _ = place
        if "table" in refs:
            return tuple(refs["table"][batch, tile * 4 + i] for i in range(4))
        return self._band(tile, self.facts(batch, refs))

    def parts(self, bounds):
        """(first block, end, which ends to test or None) of the loops over a tile's `bounds`."""
        low, full_low, full_high, high = bounds
        if not self.masked:
            return [(low, high, None)]
        first, last = (LOW, HIGH) if self.apart else (BOTH, BOTH)
        parts = [(low, full_low, first), (full_low, full_high, None), (full_high, high, last)]
        if not self.leading:
            return [(low, full_high, None), parts[2]]
        return parts if self.trailing else [parts[0], (full_low, high, None)]

    def _band(self, tile, facts):
        """`bounds` without segments: plain arithmetic, of scalars or of arrays."""
        offset, queries, keys = facts
        spec = self.spec
        # Row r sees columns r + shift - before .. r + shift + after.
        if self.transposed:
            rows, columns, shift = keys, queries, -offset
            before, after = spec.right, spec.left
        else:
            rows, columns, shift = queries, keys, offset
            before, after = spec.left, spec.right
        first = tile * self.tile
        last = jnp.minimum(first + self.tile, rows) - 1
        columns = jnp.int32(columns) if isinstance(columns, int) else columns
        low = full_low = jnp.zeros_like(first)
        high, full_high = _ceil(columns, self.block), _floor(columns, self.block)
        if after is not None:
            high = jnp.minimum(high, _ceil(jnp.maximum(last + (shift + after + 1), 0), self.block))
            whole = jnp.maximum(first + (shift + after + 1), 0)
            full_high = jnp.minimum(full_high, _floor(whole, self.block))
        if before is not None:
            low = _floor(jnp.maximum(first + (shift - before), 0), self.block)
            full_low = _ceil(jnp.maximum(last + (shift - before), 0), self.block)
        low = jnp.clip(low, 0, self.blocks - 1)
        high = jnp.maximum(high, low + 1)
        full_low = jnp.clip(full_low, low, high)
        full_high = jnp.clip(full_high, full_low, high)
        return low, full_low, full_high, high

    def _bands(self, info):
        """`_band` of every tile of a sequence, from its row of `info`."""
        facts = (
            self.spec.offset if self.spec.offset is not None else info[0],
            info[1] if "query_lengths" in self.names else self.queries,
            info[2] if "key_lengths" in self.names else self.keys,
        )
        return self._band(jnp.arange(self.tiles, dtype=jnp.int32), facts)

    @property
    def most(self) -> int:
        """Blocks that a tile visits at most."""
        if self.spec.left is None or self.spec.right is None:
            return self.blocks
        seen = self.tile + self.spec.left + self.spec.right
        return min(self.blocks, (seen + self.block - 2) // self.block + 1)

    def every(self, extras: Extras) -> jax.Array:
        """`bounds` of every tile, segments or not: int32 [B, tiles * 4]."""
        table = self.table(extras)
        if table is not None:
            return table
        info = self.info(extras)
        if info is None:
            info = jnp.zeros((self.batch, 4), jnp.int32)
        return jax.vmap(lambda one: jnp.stack(self._bands(one), axis=1).reshape(-1))(info)

    def visits(self) -> np.ndarray:
        """How many blocks each tile visits, as far as the spec alone says: int32 [1, tiles]."""
        spec, block = self.spec, self.block
        shift = self.keys - self.queries if spec.offset is None else spec.offset
        before, after = spec.left, spec.right
        if self.transposed:
            shift, before, after = -shift, after, before
        first = np.arange(self.tiles) * self.tile
        last = np.minimum(first + self.tile, self.rows) - 1
        low, high = np.zeros_like(first), np.full_like(first, self.blocks)
        if before is not None:
            low = np.clip((first + shift - before) // block, 0, self.blocks - 1)
        if after is not None:
            high = np.minimum(high, -(-np.maximum(last + shift + after + 1, 0) // block))
        return np.maximum(high - low, 1)[None]

    def info(self, extras: Extras) -> jax.Array | None:
        """What `facts` reads: int32 [B, 4]."""
        if not ({"offset"} | _LENGTHS) & set(self.names):
            return None
        fill = lambda x: jnp.zeros((self.batch,), jnp.int32) if x is None else x  # noqa: E731
        parts = (extras.offset, extras.query_lengths, extras.key_lengths, None)
        return jnp.stack([fill(x) for x in parts], axis=1)

    def table(self, extras: Extras) -> jax.Array | None:
        """`bounds` of every tile under segments: int32 [B, tiles * 4].

        Blocks are compared by the range of their segment ids: exact for packed sequences, whose
        ids do not fall, and safe for any.
        """
        if not self.segmented:
            return None
        if self.packed:
            return self._packed_table(extras)
        info = self.info(extras)
        of_rows, of_columns = extras.query_segments, extras.key_segments
        if self.transposed:
            of_rows, of_columns = of_columns, of_rows
        r_low, r_high = _extremes(of_rows, self.tile)
        c_low, c_high = _extremes(of_columns, self.block)
        meet = (r_low[:, :, None] <= c_high[:, None]) & (c_low[:, None] <= r_high[:, :, None])
        same = r_low == r_high
        same = same[:, :, None] & (c_low == c_high)[:, None] & (r_low[:, :, None] == c_low[:, None])

        def one(meet, same, info):
            """One sequence's tiles."""
            low, full_low, full_high, high = self._bands(info)
            block = jnp.arange(self.blocks, dtype=jnp.int32)[None, :]
            meet = meet & (block >= low[:, None]) & (block < high[:, None])
            full = same & (block >= full_low[:, None]) & (block < full_high[:, None])
            first = jnp.argmax(meet, axis=1).astype(jnp.int32)
            end = self.blocks - jnp.argmax(meet[:, ::-1], axis=1).astype(jnp.int32)
            some = jnp.any(meet, axis=1)
            low = jnp.where(some, first, low)
            high = jnp.where(some, end, low + 1)
            start = jnp.argmax(full, axis=1).astype(jnp.int32)
            run = jnp.cumsum(jnp.where(block >= start[:, None], ~full, False), axis=1)
            length = jnp.sum((run == 0) & full, axis=1).astype(jnp.int32)
            full_low = jnp.where(jnp.any(full, axis=1), start, low)
            full_low = jnp.clip(full_low, low, high)
            full_high = jnp.clip(full_low + length, full_low, high)
            return jnp.stack([low, full_low, full_high, high], axis=1).reshape(-1)

        if info is None:
            info = jnp.zeros((self.batch, 4), jnp.int32)
        return jax.vmap(one)(meet, same, info)

    def _packed_table(self, extras: Extras) -> jax.Array:
        """`table` where segments are runs, whose ends rise with the rows."""
        whose = runs(extras.query_segments)
        firsts = jnp.arange(self.tiles, dtype=jnp.int32) * self.tile
        lasts = jnp.minimum(firsts + self.tile, self.rows) - 1
        info = self.info(extras)
        if info is None:
            info = jnp.zeros((self.batch, 4), jnp.int32)

        def one(whose, info):
            low, full_low, full_high, high = self._bands(info)
            (start, last_start), (end, last_end) = ((x[firsts], x[lasts]) for x in whose)
            low = jnp.maximum(low, _floor(start, self.block))
            high = jnp.maximum(jnp.minimum(high, _ceil(last_end + 1, self.block)), low + 1)
            full_low = jnp.maximum(full_low, _ceil(last_start, self.block))
            full_high = jnp.minimum(full_high, _floor(end + 1, self.block))
            full_low = jnp.clip(full_low, low, high)
            full_high = jnp.clip(full_high, full_low, high)
            return jnp.stack([low, full_low, full_high, high], axis=1).reshape(-1)

        return jax.vmap(one)(whose, info)


def runs(ids: jax.Array) -> jax.Array:
    """First and last place of each token's run of equal ids: [B, L] -> int32 [B, 2, L]."""
    length = ids.shape[1]
    at = jnp.arange(length, dtype=jnp.int32)[None]
    changes = ids[:, 1:] != ids[:, :-1]
    edge = jnp.ones((ids.shape[0], 1), bool)
    starts = jnp.where(jnp.concatenate([edge, changes], axis=1), at, 0)
    ends = jnp.where(jnp.concatenate([changes, edge], axis=1), length - 1 - at, 0)
    both = _highest_so_far(jnp.stack([starts, ends[:, ::-1]], axis=1))
    return jnp.stack([both[:, 0], length - 1 - both[:, 1, ::-1]], axis=1)


def _highest_so_far(x: jax.Array) -> jax.Array:
    """Running maximum along the last dim, of numbers from 0 on.

    In two levels of 64 places, each a plain reduction: a scan is a dozen kernels on a GPU.
    """
    size = 64
    length = x.shape[-1]
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -length % size)])
    x = x.reshape(*x.shape[:-1], -1, size)
    before = jnp.tril(jnp.ones((size, size), bool))
    inner = jnp.max(jnp.where(before, x[..., None, :], 0), axis=-1)
    number = x.shape[-2]
    before = jnp.tril(jnp.ones((number, number), bool), -1)
    outer = jnp.max(jnp.where(before, jnp.max(x, axis=-1)[..., None, :], 0), axis=-1)
    return jnp.maximum(inner, outer[..., None]).reshape(*x.shape[:-2], -1)[..., :length]


def _extremes(ids: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """Least and greatest id of each block of a [B, L] array: two [B, blocks]."""
    batch, length = ids.shape
    pad = -length % size
    ids = jnp.pad(ids, ((0, 0), (0, pad)), mode="edge").reshape(batch, -1, size)
    return jnp.min(ids, axis=2), jnp.max(ids, axis=2)
