"""Folders that are made once and kept: whole or not there, and checked before they are used.

A folder is filled under another name and renamed when all of it is on the disk. Its manifest.json
records size, SHA-256 and time of every file. A folder that does not agree with its manifest is
made again, with a warning.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jaxllm.core.logging import log
from jaxllm.errors import CapacityError

__all__ = ["keep", "kept"]

_MANIFEST = "manifest.json"
_FORMAT = "jaxllm-kept-1"

Facts = dict[str, Any]


def kept(folder: Path) -> Facts | None:
    """What the maker of a kept folder noted, or None if it is not there or damaged.

    Sizes are compared always, contents where a file is not as old as its record says.
    """
    if not folder.exists():
        return None
    try:
        manifest = json.loads((folder / _MANIFEST).read_text())
        if manifest["format"] != _FORMAT:
            raise ValueError("it is of another version")
        for name, record in manifest["files"].items():
            _check(folder / name, record)
        return dict(manifest["facts"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("data: %s is damaged (%s) and made again", folder, error)
        return None


def keep(folder: Path, fill: Callable[[Path], Facts]) -> Facts:
    """The facts of a kept folder, made by `fill` if it is not (soundly) there.

    Args:
      folder: where it shall lie; its parent exists.
      fill: writes files into the folder that it is given, and returns facts as JSON values.

    Raises:
      CapacityError: no space is left; nothing stays behind.
    """
    facts = kept(folder)
    if facts is not None:
        return facts
    # One process makes it, the others wait for it. A kill frees the lock.
    with _locked(folder):
        facts = kept(folder)
        if facts is not None:
            return facts
        for rest in folder.parent.glob(f".{folder.name}.*.part"):  # of killed processes
            shutil.rmtree(rest, ignore_errors=True)
        part = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.", suffix=".part"))
        try:
            facts = fill(part)
            _seal(part, facts)
            if folder.exists():  # damaged
                shutil.rmtree(folder)
            os.rename(part, folder)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise CapacityError(
                f"no space left for {folder}; free some or set JAXLLM_CACHE to another folder"
            ) from None
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return facts


def _check(path: Path, record: Facts) -> None:
    """Raise ValueError unless a file is what its record says."""
    status = path.stat()
    if status.st_size != record["bytes"]:
        raise ValueError(f"{path.name} has {status.st_size} bytes, not {record['bytes']}")
    if status.st_mtime_ns != record["mtime_ns"] and _sha256(path) != record["sha256"]:
        raise ValueError(f"the contents of {path.name} have changed")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _seal(part: Path, facts: Facts) -> None:
    """Records of all files, and everything on the disk."""
    files = {}
    for path in sorted(part.iterdir()):
        _sync(path)
        status = path.stat()
        files[path.name] = {
            "bytes": status.st_size,
            "mtime_ns": status.st_mtime_ns,
            "sha256": _sha256(path),
        }
    manifest = {"format": _FORMAT, "facts": facts, "files": files}
    (part / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    _sync(part / _MANIFEST)
    _sync(part)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    with open(folder.parent / f".{folder.name}.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
