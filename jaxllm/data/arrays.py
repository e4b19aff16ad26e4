"""Token arrays on disk: `.npy` of integers, and `.bin` of uint16 as nanoGPT writes it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from jaxllm.core.config import require
from jaxllm.data.shards import MAX_ID, ShardWriter, shard_dtype
from jaxllm.data.sources import Source
from jaxllm.errors import ConfigError

__all__ = ["copy_arrays", "largest_id"]

_CHUNK = 2**22


def _map(source: Source, file: Path) -> np.ndarray:
    where = source.named(file)
    if file.suffix == ".bin":
        size = file.stat().st_size
        require(size % 2 == 0, f"{where}: has {size} bytes; a .bin is uint16, two bytes a token")
        require(size > 0, f"{where}: holds no tokens")
        return np.memmap(file, "<u2", "r")
    try:
        ids = np.load(file, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ConfigError(f"{where}: cannot be read as .npy: {error}") from None
    found = f"{where}: has dtype {ids.dtype} and shape {ids.shape}"
    fine = np.issubdtype(ids.dtype, np.integer) and ids.ndim == 1
    require(fine, f"{found}; a token array is one row of integers")
    require(len(ids) > 0, f"{where}: holds no tokens")
    return ids


def _chunks(source: Source) -> Iterator[tuple[Path, np.ndarray]]:
    for file in source.files:
        ids = _map(source, file)
        for begin in range(0, len(ids), _CHUNK):
            yield file, ids[begin : begin + _CHUNK]


def largest_id(source: Source, vocabulary: int) -> int:
    """The largest id of token arrays.

    Raises:
      ConfigError: an id is negative, too large for an int32 or outside of the vocabulary.
    """
    largest, begin, last = 0, 0, None
    for file, ids in _chunks(source):
        begin = begin if file == last else 0
        last = file
        bad = (ids < 0) | (ids > MAX_ID) | (ids >= vocabulary)
        if bad.any():
            place = int(np.argmax(bad))
            raise ConfigError(
                f"{source.named(file)}: token {begin + place} is {int(ids[place])}; "
                f"ids are from 0 to {vocabulary - 1}, below the vocabulary's size"
            )
        largest = max(largest, int(ids.max()))
        begin += len(ids)
    return largest


def copy_arrays(source: Source, folder: Path, *, largest: int, end: int | None) -> dict:
    """Write token arrays as shards; a document begins with each file and after each end token."""
    with ShardWriter(folder, shard_dtype(largest + 1)) as writer:
        last, ended = None, True
        for file, ids in _chunks(source):
            cuts = np.empty(0, np.int64) if end is None else np.flatnonzero(ids == end) + 1
            begins = np.append(0, cuts) if ended or file != last else cuts
            last, ended = file, bool(len(cuts)) and int(cuts[-1]) == len(ids)
            # The place after a chunk's last token begins a document only if more tokens follow.
            writer.begin_documents(begins[begins < len(ids)].tolist())
            writer.append(np.asarray(ids))
    return writer.facts()
