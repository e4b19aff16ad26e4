"""Rows of a part of the token stream: windows at random places, or packed documents.

The rows of a step are a function of (seed, step) alone: not of the number of hosts or devices, and
not of what came before. A run resumes anywhere without the state of a loader.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from jaxllm.data.batch import Batch
from jaxllm.data.packing import Packing
from jaxllm.data.shards import Shards
from jaxllm.errors import UnsupportedError

__all__ = ["Packed", "Rows", "Windows", "import_grain"]


def import_grain() -> Any:
    """The grain package, imported when a run needs it.

    Raises:
      UnsupportedError: it is not installed.
    """
    try:
        import grain
    except ImportError as error:
        raise UnsupportedError(
            f"training data needs the package grain, which cannot be imported ({error}); "
            "install it: pip install grain"
        ) from None
    return grain


@dataclasses.dataclass(frozen=True)
class Windows:
    """Rows of `length` tokens of the stream; documents follow each other in them.

    Attributes:
      shards: the stream.
      part: first token and the place after the last.
      length: T of a row.
    """

    shards: Shards
    part: tuple[int, int]
    length: int

    @property
    def count(self) -> int:
        """Windows side by side that have a token after them."""
        return max(0, (self.part[1] - self.part[0] - 1) // self.length)

    def drawn(self, step: int, *, rows: int, seed: int, part: slice) -> Batch:
        """Windows at random places."""
        random = np.random.Generator(np.random.Philox(key=[seed, step]))
        places = random.integers(0, self.part[1] - self.part[0] - self.length, rows)
        return self._at(places[part])

    def consecutive(self, begin: int, stop: int) -> Batch:
        """Windows side by side."""
        return self._at(np.arange(begin, stop) * self.length)

    def _at(self, places: np.ndarray) -> Batch:
        inside = places[:, None] + np.arange(self.length + 1)
        rows = self.shards.gather(self.part[0] + inside)
        return Batch(
            np.ascontiguousarray(rows[:, :-1]),
            np.ascontiguousarray(rows[:, 1:]),
            np.ones((len(places), self.length), np.float32),
        )


@dataclasses.dataclass(frozen=True)
class Packed:
    """Rows of whole documents, in an order that is shuffled anew for each epoch.

    Segments are numbered from 1 in each row, 0 is padding; positions begin at 0 in each. A
    document's last token predicts nothing.

    Attributes:
      shards: the stream.
      packing: which piece stands where.
      length: T of a row.
    """

    shards: Shards
    packing: Packing
    length: int

    @property
    def count(self) -> int:
        """Rows of an epoch."""
        return self.packing.count

    def drawn(self, step: int, *, rows: int, seed: int, part: slice) -> Batch:
        """The next rows of the shuffled epochs."""
        # Row numbers of all epochs, one after the other; grain's shuffle is a function of an index.
        order = import_grain().MapDataset.range(self.count).seed(seed).shuffle().repeat()
        return self._rows(np.array([order[step * rows + i] for i in range(*part.indices(rows))]))

    def consecutive(self, begin: int, stop: int) -> Batch:
        """Rows in the order of the packing."""
        return self._rows(np.arange(begin, stop))

    def _rows(self, numbers: np.ndarray) -> Batch:
        """Fill rows: all their pieces at once, token by token from the stream."""
        shape, packing = (len(numbers), self.length), self.packing
        first = packing.rows[numbers]
        counts = packing.rows[numbers + 1] - first
        row = np.repeat(np.arange(len(numbers)), counts)
        segment = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
        pieces = first[row] + segment
        lengths = packing.lengths[pieces].astype(np.int64)
        ends = np.cumsum(lengths)
        before = ends - lengths  # tokens of all pieces before
        whole = np.bincount(row, lengths, len(numbers)).astype(np.int64)
        in_row = before - (np.cumsum(whole) - whole)[row]
        position = np.arange(int(lengths.sum())) - np.repeat(before, lengths)
        target = np.repeat(row * self.length + in_row, lengths) + position
        source = np.repeat(packing.starts[pieces], lengths) + position
        has_next = np.ones(len(position), bool)
        has_next[ends[packing.closes[pieces]] - 1] = False

        def filled(values: np.ndarray, dtype: Any) -> np.ndarray:
            out = np.zeros(shape, dtype)
            out.reshape(-1)[target] = values
            return out

        following = np.where(has_next, source + 1, source)
        return Batch(
            filled(self.shards.gather(source), np.int32),
            filled(self.shards.gather(following) * has_next, np.int32),
            filled(has_next, np.float32),
            filled(np.repeat(segment + 1, lengths), np.int32),
            filled(position, np.int32),
        )


# Both have `count`, `drawn` (the rows of a training step) and `consecutive` (rows of a validation).
Rows = Windows | Packed
