"""Weights in run layout on disk: one flat file, mapped into memory, so that a start copies nothing.

A folder holds `index.json` (path, dtype, shape, offset of each array) and `data.bin`, with arrays
at multiples of 4096 bytes: the CPU backend takes such a map as it is.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxllm.core.logging import log
from jaxllm.core.tree import unflatten
from jaxllm.errors import CapacityError

__all__ = ["load_arrays", "save_arrays"]

_ALIGN = 4096
_FORMAT = 1


def _dtype(name: str) -> np.dtype[Any]:
    import ml_dtypes

    return np.dtype(getattr(ml_dtypes, name, name))


def save_arrays(
    folder: Path, arrays: Iterable[tuple[str, np.ndarray]], extra: Mapping[str, Any]
) -> None:
    """Write arrays one by one into a new folder, whole or not at all.

    Args:
      folder: must not exist; its parent must.
      arrays: (dotted path, array), taken one at a time.
      extra: JSON-ready data kept in the index.

    Raises:
      CapacityError: no space is left; nothing stays behind.
    """
    part = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        index: dict[str, Any] = {}
        with open(part / "data.bin", "wb") as file:
            for path, array in arrays:
                file.seek(-(-file.tell() // _ALIGN) * _ALIGN)
                index[path] = [array.dtype.name, list(array.shape), file.tell()]
                file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
            file.flush()
            os.fsync(file.fileno())
            size = file.tell()
        head = {"format": _FORMAT, "size": size, "arrays": index, "extra": dict(extra)}
        (part / "index.json").write_text(json.dumps(head))
        shutil.rmtree(folder, ignore_errors=True)
        part.rename(folder)
    except BaseException as error:
        with contextlib.suppress(OSError):
            shutil.rmtree(part)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CapacityError(
                f"no space left for {folder}; free some or set JAXLLM_CACHE to another folder"
            ) from None
        raise


def load_arrays(folder: Path) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """(nested tree of memory-mapped arrays, extra), or None if the folder is not soundly there."""
    if not folder.is_dir():
        return None
    try:
        head = json.loads((folder / "index.json").read_text())
        if head["format"] != _FORMAT or os.path.getsize(folder / "data.bin") != head["size"]:
            raise ValueError("another format or size")
        data = np.memmap(folder / "data.bin", np.uint8, "r")
        flat = {}
        for path, (name, shape, offset) in head["arrays"].items():
            dtype = _dtype(name)
            count = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
            chunk = data[offset : offset + count]
            if chunk.size != count:
                raise ValueError(f"{path} is not all there")
            flat[path] = chunk.view(dtype).reshape(shape)
        return unflatten(flat), head["extra"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        log.warning("stored weights %s are ignored and made again: %s", folder, error)
        return None
