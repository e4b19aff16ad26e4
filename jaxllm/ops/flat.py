"""Flat batches: the new tokens of many sequences one after another in a single row [1, T].

Products of matrices need no more than that. Ops that follow a sequence take its tokens as rows
[R, C], or as blocks of a few queries, each of one sequence, and put what they find back.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32

from jaxllm.typing import AnyArray, Slot

__all__ = ["Flat", "QueryBlocks", "from_rows", "query_blocks", "to_rows"]

BLOCK = 32
"""Queries of one sequence that read its keys together."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Flat:
    """Whose the tokens of a flat batch are; rows in use come first.

    Attributes:
      counts: [R] int32, new tokens of each row; 0 where it is not used.
      starts: [R] int32, tokens remembered before.
      slots: [R] int32, each row's place in arrays that are held by sequence; past their end where
        the row is not used.
      longest: static, no row has more new tokens. With 1, T is R and token t is that of row t.
    """

    counts: Slot
    starts: Slot
    slots: Slot
    longest: int = dataclasses.field(metadata={"static": True})

    @property
    def firsts(self) -> Int32[Array, "R"]:
        """Where in the flat batch each row's tokens begin."""
        return jnp.cumsum(self.counts) - self.counts

    def owners(self, length: int) -> Int32[Array, "T"]:
        """The row of each of `length` tokens; R for padding."""
        if self.longest == 1:
            rows = jnp.arange(length, dtype=jnp.int32)
            return jnp.where(self.counts > 0, rows, length)
        return _place(jnp.cumsum(self.counts), length)

    def positions(self, length: int) -> Int32[Array, "T"]:
        """The place of each of `length` tokens in its sequence; of padding anything."""
        if self.longest == 1:
            return jnp.asarray(self.starts)
        row = jnp.minimum(self.owners(length), self.counts.shape[0] - 1)
        return jnp.take(self.starts - self.firsts, row) + jnp.arange(length, dtype=jnp.int32)


def _place(ends: Int32[Array, "R"], length: int) -> Int32[Array, "T"]:
    """How many of the ends each of the places 0..length-1 is at or past."""
    places = jnp.arange(length, dtype=jnp.int32)
    return jnp.sum(places[:, None] >= ends[None], axis=1, dtype=jnp.int32)


def _keep(x: Array, where: Bool[Array, "*lead"]) -> Array:
    """x with zeros (of NaN too) where it is not wanted."""
    where = jax.lax.expand_dims(where, range(where.ndim, x.ndim))
    return jnp.where(where, x, jnp.zeros_like(x))


def to_rows(x: AnyArray, flat: Flat) -> Array:
    """[1, T, ...] -> [R, C, ...] with C the longest; zeros past a row's tokens."""
    x = jnp.asarray(x)[0]
    if flat.longest == 1:
        return _keep(x[:, None], flat.counts[:, None] > 0)
    offsets = jnp.arange(flat.longest, dtype=jnp.int32)[None]
    found = jnp.take(x, flat.firsts[:, None] + offsets, axis=0, mode="clip")
    return _keep(found, offsets < flat.counts[:, None])


def from_rows(y: AnyArray, flat: Flat, length: int) -> Array:
    """[R, C, ...] -> [1, T, ...]: the inverse of `to_rows`; padding holds anything."""
    y = jnp.asarray(y)
    if flat.longest == 1:
        return y[:, 0][None]
    owner = jnp.minimum(flat.owners(length), y.shape[0] - 1)
    offset = jnp.arange(length, dtype=jnp.int32) - jnp.take(flat.firsts, owner)
    offset = jnp.clip(offset, 0, y.shape[1] - 1)
    return y[owner, offset][None]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QueryBlocks:
    """The tokens of a flat batch in blocks of up to Q, each of one row.

    Attributes:
      row: [M] int32, the row of each block, clipped.
      token: [M, Q] int32, the flat place of each query, clipped.
      real: [M, Q] booleans.
      positions: [M, Q] int32, the place of each query in its sequence.
      block: [T] int32, the block of each token.
      place: [T] int32, and its place there.
      begins: [M] int32, the flat place of each block's first query. Blocks that are not used take
        the padding, so that every token is in one.
      starts: [M] int32, that query's place in its sequence; before 0 for padding, which sees none.
      counts: [M] int32, tokens of each block.
    """

    row: Slot
    token: Slot
    real: Slot
    positions: Slot
    block: Slot
    place: Slot
    begins: Slot
    starts: Slot
    counts: Slot


def _single(flat: Flat) -> QueryBlocks:
    """Every row is a block of one token."""
    rows = flat.counts.shape[0]
    row = jnp.arange(rows, dtype=jnp.int32)
    used, ones = flat.counts > 0, jnp.ones_like(row)
    starts = jnp.where(used, flat.starts, -1)
    return QueryBlocks(
        # As in longer steps. XLA would make a bare list of numbers for the kernel in every layer.
        row=jnp.minimum(flat.owners(rows), rows - 1),
        token=row[:, None],
        real=used[:, None],
        positions=jnp.asarray(flat.starts)[:, None],
        block=row,
        place=jnp.zeros_like(row),
        begins=row,
        starts=starts,
        counts=ones,
    )


def query_blocks(flat: Flat, length: int) -> QueryBlocks:
    """Cut the rows of a flat batch of `length` tokens into blocks."""
    if flat.longest == 1:
        return _single(flat)
    num_rows, size = flat.counts.shape[0], min(BLOCK, flat.longest)
    num_blocks = min(length, -(-length // size) + num_rows)
    firsts, counts = flat.firsts, flat.counts
    number = (counts + (size - 1)) // size
    ends = jnp.cumsum(number)
    row = _place(ends, num_blocks)
    used, row = row < num_rows, jnp.minimum(row, num_rows - 1)
    begun = jnp.arange(num_blocks, dtype=jnp.int32) - jnp.take(ends - number, row)
    offset = begun[:, None] * size + jnp.arange(size, dtype=jnp.int32)[None]
    token = jnp.take(firsts, row)[:, None] + offset
    real = (offset < jnp.take(counts, row)[:, None]) & used[:, None]
    owner = jnp.minimum(flat.owners(length), num_rows - 1)
    within = jnp.arange(length, dtype=jnp.int32) - jnp.take(firsts, owner)
    block = jnp.take(ends - number, owner) + within // size
    first = token[:, 0]
    spare = jnp.arange(num_blocks, dtype=jnp.int32) - ends[-1]
    begins = jnp.where(used, first, jnp.sum(counts) + spare * size)
    starts = jnp.take(flat.starts, row) + offset[:, 0]
    left = jnp.where(used, jnp.take(counts, row) - offset[:, 0], length - begins)
    return QueryBlocks(
        row,
        jnp.clip(token, 0, length - 1),
        real,
        jnp.take(flat.starts, row)[:, None] + offset,
        jnp.clip(block, 0, num_blocks - 1),
        within % size,
        jnp.minimum(begins, length - 1),
        jnp.where(used, starts, -size),
        jnp.clip(left, 0, size),
    )
