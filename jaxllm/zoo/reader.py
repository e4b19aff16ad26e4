"""The one interface of every weight file, and the checks that all formats share.

A reader is opened once, has checked the whole header by then, and keeps no file, memory map or
array alive: `read` opens the file anew, and what it returns owns the memory map that it needs.
"""

import difflib
import math
import mmap
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISREG
from typing import Any, Protocol, runtime_checkable

import numpy as np

from jaxllm.errors import WeightsError

max_header_bytes = 100_000_000  # of a JSON or key/value header; the largest seen in use are 20 MB
_max_elements = 2**58  # numpy counts bytes in 63 bits, and its widest element here has 16
_mapping_step = mmap.ALLOCATIONGRANULARITY


@dataclass(frozen=True)
class TensorInfo:
    """What a file's header says of one tensor: row-major shape, stored type, stored bytes."""

    shape: tuple[int, ...]
    dtype: str
    nbytes: int


@runtime_checkable
class Reader(Protocol):
    """An opened checkpoint: names, shapes and metadata are known, tensors are read one by one."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor by name, in the order of the file."""
        ...

    @property
    def metadata(self) -> Mapping[str, Any]:
        """The file's own key/value pairs as Python values."""
        ...

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that hold the tensors."""
        ...

    def read(self, name: str) -> np.ndarray:
        """One tensor, read-only and memory-mapped where the format allows it."""
        ...


@dataclass(frozen=True)
class Stamp:
    """A file as it was when its header was checked; `map_array` refuses a file that changed."""

    path: Path
    size: int
    mtime_ns: int


@dataclass(frozen=True)
class Place:
    """Where a tensor's bytes lie: file and absolute byte offset."""

    file: Stamp
    offset: int


def stamp(path: Path) -> Stamp:
    """Size and time of a regular file.

    Raises:
        WeightsError: the path is missing, unreadable or not a file.
    """
    try:
        status = path.stat()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise WeightsError(f"{path}: cannot be read: {_reason(error)}.") from error
    if not S_ISREG(status.st_mode):
        raise WeightsError(f"{path}: is not a regular file; give the weight file.")
    return Stamp(path, status.st_size, status.st_mtime_ns)


def map_file(file: Stamp, offset: int = 0, nbytes: int | None = None) -> tuple[mmap.mmap, int]:
    """Read-only memory map of `nbytes` > 0 from `offset`, and where `offset` lies within it.

    Raises:
        WeightsError: the file is gone, unreadable, or not the one that was checked.
    """
    start = offset % _mapping_step
    length = (file.size - offset if nbytes is None else nbytes) + start
    try:
        with open(file.path, "rb") as handle:
            status = os.fstat(handle.fileno())
            if (status.st_size, status.st_mtime_ns) != (file.size, file.mtime_ns):
                raise WeightsError(
                    f"{file.path}: was changed after it was opened ({file.size} bytes then, "
                    f"{status.st_size} now); open it again."
                )
            access = mmap.ACCESS_READ
            return mmap.mmap(handle.fileno(), length, access=access, offset=offset - start), start
    except OSError as error:
        raise WeightsError(f"{file.path}: cannot be read: {_reason(error)}.") from error


def map_array(place: Place, dtype: Any, shape: tuple[int, ...]) -> np.ndarray:
    """The tensor at `place` as a read-only array that owns its memory map."""
    dtype = np.dtype(dtype)
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes == 0:
        empty = np.empty(shape, dtype)
        empty.flags.writeable = False
        return empty
    mapped, start = map_file(place.file, place.offset, nbytes)
    return np.ndarray(shape, dtype, buffer=mapped, offset=start)


def num_elements(shape: Iterable[int]) -> int | None:
    """Product of the dimensions, or None where no array of that shape can exist.

    numpy bounds the product of the dimensions other than 0, so `(2**62, 0)` is None too.
    """
    bound = math.prod(dim for dim in shape if dim)
    if bound > _max_elements:
        return None
    return math.prod(shape)


def lookup[T](known: Mapping[str, T], name: str, path: Path) -> T:
    """`known[name]`, or a WeightsError that names the nearest tensors."""
    try:
        return known[name]
    except KeyError:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        hint = f"nearest: {', '.join(map(shown, near))}" if near else f"it holds {len(known)}"
        raise WeightsError(f"{path}: has no tensor {shown(name)}; {hint}.") from None


def shown(value: object, limit: int = 72) -> str:
    """`repr` on one line, cut to `limit` characters: file contents never flood a message."""
    text = repr(value[: limit + 1] if isinstance(value, str | bytes) else value)
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def lfs_hint(start: bytes) -> str:
    """A sentence for the commonest wrong file: a Git LFS pointer in place of the weights."""
    if start.startswith(b"version https://git-lfs"):
        return " This is a Git LFS pointer: fetch the file itself with `git lfs pull`."
    return ""


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
