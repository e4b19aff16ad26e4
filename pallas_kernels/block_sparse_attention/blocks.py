"""Block maps: which blocks of a mask are empty, full or neither, and lists of them for a kernel."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import numpy as np

from pallas_kernels.errors import ShapeError

__all__ = ["SIDE", "BlockMap", "Halves", "Lists"]

SIDE = 64  # rows and columns of a block of the map
EMPTY, FULL = 0, 1  # classes; from 2 on, the pattern of that number
_WORD = 32


@dataclasses.dataclass(frozen=True, eq=False)
class Lists:
    """The blocks that each tile of rows visits, full ones first.

    Attributes:
      entries: int32 [M, tiles, W], number of the block + 65536 * number of its pattern.
      counts: int32 [M, tiles, 2], blocks with a pattern, and all; at least one.
      words: int32 [n, block / 32, tile], bit c of word w of a row says whether it sees column
        32 w + c. Pattern 0 sees all, 1 nothing.
    """

    entries: np.ndarray
    counts: np.ndarray
    words: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Halves:
    """Lists for two warpgroups that share the blocks of a tile and skip what only the other sees.

    In the shared list stand, from its end, which the forward visits first: blocks that both see,
    one of them through a pattern; those that both see whole; whole ones of one warpgroup, in turns;
    those of one through a pattern.

    Attributes:
      blocks: int32 [M, tiles, W], numbers of the blocks that come for a tile.
      counts: int32 [M, tiles], how many; at least one.
      own: int32 [M, tiles, 2, W'], the places in `blocks` that a warpgroup uses + 65536 * number of
        the pattern.
      ends: int32 [M, tiles, 2, 3], of what is masked, of what is whole, and of all in `own`: whole
        blocks stand in the middle.
      words: int32 [n, block / 32, 64], see `Lists`.
    """

    blocks: np.ndarray
    counts: np.ndarray
    own: np.ndarray
    ends: np.ndarray
    words: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class BlockMap:
    """A mask by blocks of 64 x 64; two maps are equal if they are one object.

    Attributes:
      classes: int32 [M, T / 64, S / 64] rounded up; M is 1, or one map for each query head.
      patterns: bool [n, 64, 64], the first two empty and full.
      queries, keys: T and S.
    """

    classes: np.ndarray
    patterns: np.ndarray
    queries: int
    keys: int

    @classmethod
    def of(
        cls, visible: Callable[[np.ndarray, np.ndarray], np.ndarray], queries: int, keys: int
    ) -> BlockMap:
        """The map of a mask.

        Args:
          visible: of rows [R, 1] and columns [1, S], int32, booleans [M, R, S].
          queries: T.
          keys: S.
        """
        columns = np.arange(keys, dtype=np.int32)[None]
        patterns = [np.zeros((SIDE, SIDE), bool), np.ones((SIDE, SIDE), bool)]
        known = {np.packbits(pattern).tobytes(): i for i, pattern in enumerate(patterns)}
        lines = []
        for first in range(0, queries, SIDE):
            rows = np.arange(first, min(first + SIDE, queries), dtype=np.int32)[:, None]
            seen = np.asarray(visible(rows, columns), bool)
            short = ((0, 0), (0, SIDE - seen.shape[1]), (0, -keys % SIDE))
            seen = np.pad(seen, short).reshape(seen.shape[0], SIDE, -1, SIDE).transpose(0, 2, 1, 3)
            number = seen.sum(axis=(2, 3))
            line = np.where(number == SIDE * SIDE, FULL, EMPTY).astype(np.int32)
            for at in np.argwhere((number > 0) & (number < SIDE * SIDE)):
                pattern = seen[tuple(at)]
                name = np.packbits(pattern).tobytes()
                if name not in known:
                    known[name] = len(patterns)
                    patterns.append(pattern)
                line[tuple(at)] = known[name]
            lines.append(line)
        return cls(np.stack(lines, axis=1), np.stack(patterns), queries, keys)

    @classmethod
    def even(cls, blocks: np.ndarray, size: int, queries: int, keys: int) -> BlockMap:
        """The map of a mask that is the same on whole blocks.

        Args:
          blocks: bool [M, T / size, S / size] rounded up.
          size: of a block, a multiple of 64.
          queries: T.
          keys: S.

        Raises:
          ShapeError: sizes that do not fit.
        """
        wanted = (-(-queries // size), -(-keys // size))
        if size % SIDE or blocks.ndim != 3 or blocks.shape[1:] != wanted:
            raise ShapeError(
                f"a block map takes blocks [M, {wanted[0]}, {wanted[1]}] of a multiple of {SIDE} "
                f"positions, found {blocks.shape} of {size}"
            )
        classes = np.repeat(np.repeat(blocks, size // SIDE, axis=1), size // SIDE, axis=2)
        classes = classes[:, : -(-queries // SIDE), : -(-keys // SIDE)].astype(np.int32)
        patterns = [np.zeros((SIDE, SIDE), bool), np.ones((SIDE, SIDE), bool)]
        if keys % SIDE:  # what is past the end is not there
            patterns.append(np.broadcast_to(np.arange(SIDE) < keys % SIDE, (SIDE, SIDE)))
            classes[:, :, -1] *= 2
        return cls(classes, np.stack(patterns), queries, keys)

    @property
    def density(self) -> float:
        """Visible pairs over all, as blocks of 64 count them."""
        return float(np.mean(self.classes != EMPTY))

    @functools.lru_cache(maxsize=32)  # noqa: B019 - maps live as long as the programs that use them
    def lists(self, tile: int, block: int, transposed: bool = False) -> Lists:
        """The lists for tiles of `tile` rows over blocks of `block` columns, multiples of 64.

        Args:
          transposed: rows are keys and columns are queries.
        """
        classes, patterns = self.classes, self.patterns
        if transposed:
            classes, patterns = classes.transpose(0, 2, 1), patterns.transpose(0, 2, 1)
        high, wide = tile // SIDE, block // SIDE
        short = ((0, 0), (0, -classes.shape[1] % high), (0, -classes.shape[2] % wide))
        classes = np.pad(classes, short, constant_values=EMPTY)
        maps, rows, columns = classes.shape
        grid = classes.reshape(maps, rows // high, high, columns // wide, wide)
        grid = grid.transpose(0, 1, 3, 2, 4).reshape(maps, rows // high, columns // wide, -1)
        full, empty = np.all(grid == FULL, axis=-1), np.all(grid == EMPTY, axis=-1)
        partial = ~full & ~empty
        kinds, number = np.unique(grid[partial], axis=0, return_inverse=True)
        which = np.zeros(grid.shape[:3], np.int64)
        which[partial] = number.reshape(-1) + 2
        kinds = np.concatenate([np.full((1, high * wide), FULL), np.zeros_like(kinds[:1]), kinds])
        if len(kinds) < 2 or not partial.any():
            kinds = np.stack([np.full(high * wide, FULL), np.full(high * wide, EMPTY)])
        drawn = patterns[kinds].reshape(-1, high, wide, SIDE, SIDE).transpose(0, 1, 3, 2, 4)
        bits = np.packbits(drawn.reshape(-1, tile, block), axis=-1, bitorder="little")
        words = bits.view("<i4").transpose(0, 2, 1)
        return Lists(*_listed(full, partial, which), np.ascontiguousarray(words))

    @functools.lru_cache(maxsize=32)  # noqa: B019 - as above
    def halves(self, block: int, transposed: bool = False, gap: int = 1 << 16) -> Halves:
        """The lists of two warpgroups of 64 rows each; see `lists`.

        Args:
          gap: a warpgroup takes one of so many blocks that come one after the other, between its
            first and its last; it looks at one that it does not see rather than skip more.
        """
        lists = self.lists(SIDE, block, transposed)
        maps, rows = lists.counts.shape[:2]
        number = self.classes.shape[1 if transposed else 2]
        kinds = np.full((maps, rows + rows % 2, -(-number * SIDE // block)), _NONE)
        for at in np.ndindex(maps, rows):
            entries = lists.entries[at][: lists.counts[at][1]]
            seen = entries[entries >> 16 != 1]  # pattern 1 sees nothing
            kinds[at][seen & 0xFFFF] = seen >> 16
        kinds = kinds.reshape(maps, -1, 2, kinds.shape[-1])
        found = {at: _halved(kinds[at], gap) for at in np.ndindex(*kinds.shape[:2])}
        counts = np.array([len(x[0]) for x in found.values()], np.int32).reshape(kinds.shape[:2])
        ends = np.array([[ends for _, ends in x[1]] for x in found.values()], np.int32)
        ends = ends.reshape(*counts.shape, 2, 3)
        shared = np.zeros((*counts.shape, int(counts.max())), np.int32)
        used = np.zeros((*counts.shape, 2, int(ends.max())), np.int32)
        for at, (blocks, own) in found.items():
            shared[at][: len(blocks)] = blocks
            for i, (entries, _) in enumerate(own):
                used[at][i, : len(entries)] = entries
        return Halves(shared, counts, used, ends, lists.words)

    def dense(self) -> np.ndarray:
        """bool [M, T, S]."""
        seen = self.patterns[self.classes].transpose(0, 1, 3, 2, 4)
        maps, rows, _, columns, _ = seen.shape
        seen = seen.reshape(maps, rows * SIDE, columns * SIDE)
        return seen[:, : self.queries, : self.keys]


def _listed(full, partial, which) -> tuple[np.ndarray, np.ndarray]:
    """(entries, counts) of `Lists`."""
    counts = np.stack([partial.sum(axis=2), (full | partial).sum(axis=2)], axis=-1)
    entries = np.zeros((*full.shape[:2], max(1, int(counts[..., 1].max(initial=1)))), np.int32)
    for at in np.ndindex(*full.shape[:2]):
        blocks = np.concatenate([np.flatnonzero(full[at]), np.flatnonzero(partial[at])])
        entries[at][: len(blocks)] = blocks + (which[at][blocks] << 16)
        if not len(blocks):  # one block that nobody sees
            entries[at][0], counts[at] = 1 << 16, (1, 1)
    return entries, counts.astype(np.int32)


_NONE = -1


def _halved(kinds: np.ndarray, gap: int) -> tuple[list[int], list[tuple[list[int], list[int]]]]:
    """(shared list, (own list, its ends) of each warpgroup) of a tile; see `Halves`.

    Args:
      kinds: [2, blocks], the number of each block's pattern, 0 for whole, -1 for none.
    """
    seen = kinds != _NONE
    both = seen.all(axis=0)
    whole = (kinds <= 0).all(axis=0)
    alone = [[np.flatnonzero(seen[i] & ~both & x) for i in range(2)] for x in (whole, ~whole)]
    order = np.flatnonzero(both & ~whole).tolist()
    middle = len(order)
    order += np.flatnonzero(both & whole).tolist() + _in_turns(*alone[0])
    last = len(order)
    order = [*order, *_in_turns(*alone[1])] or [0]
    own = [_own(kinds[i][order], (middle, last), gap) for i in range(2)]
    return order[::-1], own


def _in_turns(first: np.ndarray, second: np.ndarray) -> list[int]:
    both = min(len(first), len(second))
    turns = np.stack([first[:both], second[:both]], axis=1).reshape(-1)
    return [*turns.tolist(), *first[both:].tolist(), *second[both:].tolist()]


def _own(kinds: np.ndarray, parts: tuple[int, int], gap: int) -> tuple[list[int], list[int]]:
    """(own list, its ends) from the kinds in the order of visits; whole ones lie in `parts`."""
    places: list[int] = []
    for place in np.flatnonzero(kinds != _NONE).tolist() or [0]:
        while places and place - places[-1] > gap:
            places.append(places[-1] + gap)
        places.append(place)
    middle = sum(place < parts[0] for place in places)
    whole = middle
    while whole < len(places) and places[whole] < parts[1] and kinds[places[whole]] == 0:
        whole += 1
    count = len(places)
    entries = [
        (len(kinds) - 1 - place) + (int(kinds[place] if kinds[place] != _NONE else 1) << 16)
        for place in places
    ]
    return entries[::-1], [count - whole, count - middle, count]
