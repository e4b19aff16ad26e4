"""Shards: a token stream on disk, memory-mapped, with the places where its documents begin."""

from __future__ import annotations

import array
import dataclasses
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from jaxllm.core.config import require
from jaxllm.text.tokenizer import Tokenizer

__all__ = ["MAX_ID", "ShardWriter", "Shards", "shard_dtype"]

# Token ids are int32 on the device.
MAX_ID = 2**31 - 1
# 256 MB of uint16 a file.
SHARD_TOKENS = 2**27
_BUFFER_TOKENS = 2**20


def shard_dtype(vocabulary: int) -> str:
    """The narrowest dtype for ids below `vocabulary`."""
    return "uint16" if vocabulary <= 2**16 else "uint32"


class ShardWriter:
    """Writes a token stream into a folder; `with` it, then take `facts`."""

    def __init__(self, folder: Path, dtype: str, shard_tokens: int = SHARD_TOKENS):
        self.total = 0
        self.split: int | None = None
        self._folder = folder
        self._dtype = np.dtype(dtype)
        self._shard_tokens = shard_tokens
        self._buffer: list[np.ndarray] = []
        self._buffered = 0
        self._begins = array.array("Q")
        self._largest = -1
        self._shards = 0
        self._room = 0
        self._file: Any = None

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self._flush()
            begins = np.append(np.frombuffer(self._begins, np.uint64), np.uint64(self.total))
            begins.astype("<u8").tofile(self._folder / "documents.bin")
        if self._file is not None:
            self._file.close()

    @property
    def documents(self) -> int:
        """Documents begun."""
        return len(self._begins)

    def begin_documents(self, places: Iterable[int] = (0,)) -> None:
        """New documents begin at places counted from here; by default one, here."""
        self._begins.extend(self.total + int(place) for place in places)

    def append(self, ids: np.ndarray) -> None:
        """Add tokens to the current document.

        Raises:
          ConfigError: an id does not fit into the dtype.
        """
        if not len(ids):
            return
        largest = int(ids.max())
        fits = int(ids.min()) >= 0 and largest <= min(np.iinfo(self._dtype).max, MAX_ID)
        require(fits, f"token ids {ids.min()} to {largest} do not fit into {self._dtype}")
        self._largest = max(self._largest, largest)
        self._buffer.append(ids.astype(self._dtype.newbyteorder("<")))
        self._buffered += len(ids)
        self.total += len(ids)
        if self._buffered >= _BUFFER_TOKENS:
            self._flush()

    def _flush(self) -> None:
        ids = np.concatenate(self._buffer) if self._buffer else np.empty(0, self._dtype)
        self._buffer, self._buffered = [], 0
        while len(ids):
            if not self._room:
                if self._file is not None:
                    self._file.close()
                self._file = (self._folder / _shard_name(self._shards)).open("wb")
                self._shards += 1
                self._room = self._shard_tokens
            ids[: self._room].tofile(self._file)
            self._room, ids = max(0, self._room - len(ids)), ids[self._room :]

    def facts(self) -> dict[str, Any]:
        """What `Shards` needs to know, as JSON values."""
        return {
            "dtype": str(self._dtype),
            "tokens": self.total,
            "shards": self._shards,
            "shard_tokens": self._shard_tokens,
            "documents": self.documents,
            "largest": self._largest,
            "split": self.split,
        }


def _shard_name(number: int) -> str:
    return f"tokens-{number:05d}.bin"


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Shards:
    """A token stream on disk.

    Attributes:
      folder: where it lies.
      tokens: how many.
      shard_tokens: of every file but the last.
      maps: one memory map a file.
      begins: [documents + 1] uint64, where each document begins; the last is `tokens`.
      largest: largest id.
      split: where the validation part begins, if the tokenizer was trained on what is before.
      tokenizer: what made the tokens, or None.
    """

    folder: Path
    tokens: int
    shard_tokens: int
    maps: tuple[np.ndarray, ...]
    begins: np.ndarray
    largest: int
    split: int | None
    tokenizer: Tokenizer | None

    @staticmethod
    def open(folder: Path, facts: dict[str, Any]) -> Shards:
        """Map a kept folder into memory."""
        dtype = np.dtype(facts["dtype"]).newbyteorder("<")
        names = [_shard_name(i) for i in range(facts["shards"])]
        stored = folder / "tokenizer.json"
        return Shards(
            folder=folder,
            tokens=facts["tokens"],
            shard_tokens=facts["shard_tokens"],
            maps=tuple(np.memmap(folder / name, dtype, "r") for name in names),
            begins=np.memmap(folder / "documents.bin", "<u8", "r"),
            largest=facts["largest"],
            split=facts["split"],
            tokenizer=Tokenizer.from_json(stored.read_text()) if stored.exists() else None,
        )

    def gather(self, places: np.ndarray) -> np.ndarray:
        """int32 tokens at places, in the shape of `places`."""
        if len(self.maps) == 1:
            return self.maps[0][places].astype(np.int32)
        shard, inside = np.divmod(places, self.shard_tokens)
        out = np.empty(places.shape, np.int32)
        for number in np.unique(shard):
            here = shard == number
            out[here] = self.maps[number][inside[here]]
        return out
