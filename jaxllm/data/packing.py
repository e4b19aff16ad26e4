"""Packing: whole documents into rows of one length, first-fit, computed once and kept."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import numpy as np

from jaxllm.core.logging import log
from jaxllm.data.kept import keep
from jaxllm.data.shards import Shards

__all__ = ["Packing", "cut_documents", "first_fit", "pack", "packed"]

# Rows that documents may still go to. A power of two: they are the leaves of a tree.
OPEN_ROWS = 1024


@dataclasses.dataclass(frozen=True, eq=False)
class Packing:
    """Which piece of the token stream stands in which row.

    Attributes:
      starts: [pieces] int64, where a piece begins in the stream; in the order of rows.
      lengths: [pieces] int32, its tokens.
      closes: [pieces] bool, whether its document ends with it.
      rows: [rows + 1] int64, the first piece of each row; the last is the number of pieces.
    """

    starts: np.ndarray
    lengths: np.ndarray
    closes: np.ndarray
    rows: np.ndarray

    @property
    def count(self) -> int:
        """Rows."""
        return len(self.rows) - 1


def cut_documents(begins: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(starts, lengths, closes) of pieces of at most `length` tokens, in the order of documents.

    A last token that would stand alone is left out: nothing follows it, and the piece before it
    already predicts it. So each token of a document but the first is predicted exactly once.
    """
    begins = np.asarray(begins, np.int64)
    sizes = np.diff(begins)
    counts = np.maximum(sizes - 1, 0) + length - 1
    counts //= length
    document = np.repeat(np.arange(len(sizes)), counts)
    before = np.cumsum(counts) - counts
    part = np.arange(len(document)) - before[document]
    starts = begins[document] + part * length
    lengths = np.minimum(begins[document + 1] - starts, length).astype(np.int32)
    return starts, lengths, starts + lengths == begins[document + 1]


def first_fit(sizes: np.ndarray, length: int, open_rows: int = OPEN_ROWS) -> np.ndarray:
    """The row of each piece: the first of the open rows that has room, else a new one.

    When `open_rows` are open, a new row takes the place of the one that was opened first.

    Args:
      sizes: [pieces] in [1, length].
      length: of a row.
      open_rows: a power of two.
    """
    room = [0] * (2 * open_rows)  # of a leaf; a node has the larger one of its two
    row_of = [0] * open_rows
    out = np.empty(len(sizes), np.int64)
    opened = 0
    for index, size in enumerate(sizes.tolist()):
        if room[1] >= size:
            node = 1
            while node < open_rows:
                node *= 2
                if room[node] < size:
                    node += 1
            left = room[node] - size
        else:
            node = open_rows + opened % open_rows
            row_of[node - open_rows] = opened
            opened += 1
            left = length - size
        out[index] = row_of[node - open_rows]
        room[node] = left
        node >>= 1
        while node:
            most = max(room[2 * node], room[2 * node + 1])
            if room[node] == most:
                break
            room[node] = most
            node >>= 1
    return out


def pack(begins: np.ndarray, length: int) -> Packing:
    """Documents in rows of `length`: `begins` says where each begins, and where the last ends."""
    starts, lengths, closes = cut_documents(begins, length)
    row = np.empty(len(starts), np.int64)
    # A piece that fills a row needs no search.
    full = lengths == length
    row[~full] = first_fit(lengths[~full], length)
    used = int(row[~full].max(initial=-1)) + 1
    row[full] = used + np.arange(int(full.sum()))
    order = np.argsort(row, kind="stable")
    count = used + int(full.sum())
    rows = np.searchsorted(row[order], np.arange(count + 1))
    return Packing(starts[order], lengths[order], closes[order], rows.astype(np.int64))


def packed(shards: Shards, part: tuple[int, int], length: int) -> Packing:
    """The packing of a part of the stream, kept beside the shards.

    Args:
      shards: the stream.
      part: first token and the place after the last; documents are cut there.
      length: of a row.
    """
    begin, stop = part
    folder = shards.folder.with_name(f"{shards.folder.name}-packed-{length}-{begin}-{stop}")

    def fill(target: Path) -> dict[str, Any]:
        begun = time.perf_counter()
        inner = shards.begins[(shards.begins > begin) & (shards.begins < stop)]
        found = pack(np.concatenate([[begin], inner.astype(np.int64), [stop]]), length)
        for field in dataclasses.fields(Packing):
            np.save(target / f"{field.name}.npy", getattr(found, field.name))
        seconds, share = time.perf_counter() - begun, _share(found, length)
        log.info(
            "data: %s documents packed into %s rows of %d, %.1f %% full, %.1f s",
            f"{len(inner) + 1:,}",
            f"{found.count:,}",
            length,
            100 * share,
            seconds,
        )
        return {"rows": found.count}

    keep(folder, fill)
    names = [f.name for f in dataclasses.fields(Packing)]
    return Packing(*(np.load(folder / f"{name}.npy", mmap_mode="r") for name in names))


def _share(packing: Packing, length: int) -> float:
    return float(packing.lengths.sum()) / max(1, packing.count * length)
