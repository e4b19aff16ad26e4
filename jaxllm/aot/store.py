"""The store: one file an executable in the user's cache, written atomically, checked when read.

An executable is code. The folder belongs to the user alone (mode 0700), and a file that is damaged
or was made for something else is ignored with one warning and built again.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import errno
import hashlib
import importlib
import json
import os
import pickle
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxllm.aot.report import Report
from jaxllm.core import runtime
from jaxllm.core.config import from_dict, to_dict
from jaxllm.core.logging import log
from jaxllm.errors import CapacityError, ConfigError

__all__ = ["Store", "atomic_write", "load_bytes"]

_MAGIC = b"jaxllm-program-1\n"
_HANDLERS = "jax.experimental.mosaic.gpu"
"""What registers the handlers of our kernels for GPUs. No process lowers or reads a program that
calls one without having it."""
_ONE_AT_A_TIME = threading.Lock()
"""Held while XLA's CPU client loads an executable: two threads at once made it crash. Its GPU
client takes several: 30 programs of a server in 2.8 s instead of 14.2 (H100, 2026-11-28)."""

_COMING: dict[Path, concurrent.futures.Future[Any]] = {}
_ASKED: set[Path] = set()
_REGISTER = threading.Lock()
"""Held where these two change: files that are loaded ahead of being asked for, and those that were
asked for in this process."""


def atomic_write(path: Path, chunks: list[bytes]) -> None:
    """Write a file whole or not at all.

    Raises:
      CapacityError: no space is left; nothing stays behind.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            for chunk in chunks:
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(name)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CapacityError(
                f"no space left for {path}; free some or set JAXLLM_CACHE to another folder"
            ) from None
        raise


@dataclasses.dataclass(frozen=True)
class Store:
    """Executables by fingerprint below one folder."""

    folder: Path

    @staticmethod
    def default() -> Store:
        """The store in the user's cache."""
        return Store(runtime.programs_dir())

    def path(self, name: str, fingerprint: str) -> Path:
        """The file of a program."""
        return self.folder / f"{name}-{fingerprint[:32]}.xla"

    def save(self, name: str, fingerprint: str, compiled: Any, report: Report) -> None:
        """Store an executable and its report; one that jax cannot serialize is only warned of."""
        from jax.errors import JaxRuntimeError
        from jax.experimental import serialize_executable

        unable = (AttributeError, TypeError, pickle.PicklingError, NotImplementedError)
        try:
            payload = pickle.dumps(serialize_executable.serialize(compiled))
        except (*unable, JaxRuntimeError) as error:
            # cuDNN's attention on several GPUs carries a local function of jax's partitioner; XLA
            # names what it cannot write.
            reason = str(error).partition("\n")[0]
            log.warning("program %s cannot be stored, it compiles at each start: %s", name, reason)
            return
        head = {
            "fingerprint": fingerprint,
            "sha256": hashlib.sha256(payload).hexdigest(),
            "report": to_dict(report),
            "kernels": _HANDLERS in sys.modules,
        }
        text = json.dumps(head).encode() + b"\n"
        atomic_write(self.path(name, fingerprint), [_MAGIC, text, payload])

    def load(self, name: str, fingerprint: str, devices: Any) -> tuple[Any, Report] | None:
        """The executable of a fingerprint and its report, or None if it is not (soundly) there."""
        path = self.path(name, fingerprint)
        with _REGISTER:
            _ASKED.add(path)
            coming = _COMING.pop(path, None)
        if coming is not None:
            known, found = coming.result()
            if found is not None and known == [device.id for device in devices]:
                return found
        return self._read(path, fingerprint, devices)

    def expect(self, name: str, fingerprint: str, devices: Any, submit: Callable[..., Any]) -> bool:
        """Begin to load an executable that will be asked for; False if it was already.

        Args:
          name, fingerprint, devices: see `load`.
          submit: runs a function in a thread and gives its future.
        """
        path = self.path(name, fingerprint)
        known = [device.id for device in devices]
        with _REGISTER:
            if path in _ASKED or path in _COMING or path.parent != self.folder:
                return False
            _COMING[path] = submit(lambda: (known, self._read(path, fingerprint, devices)))
        return True

    def forget(self, name: str, fingerprint: str) -> None:
        """Drop what was expected and not asked for."""
        with _REGISTER:
            coming = _COMING.pop(self.path(name, fingerprint), None)
        if coming is not None:
            coming.cancel()

    def _read(self, path: Path, fingerprint: str, devices: Any) -> tuple[Any, Report] | None:
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return None
        return load_bytes(content, fingerprint, devices, where=str(path))


def load_bytes(
    content: bytes, fingerprint: str, devices: Any, *, where: str
) -> tuple[Any, Report] | None:
    """The executable in a stored file's bytes, or None if they hold no such one.

    The bytes become code: the caller answers for where they come from. `where` is for the warning.
    """
    try:
        report, payload, kernels = _checked(content, fingerprint)
        from jax.experimental import serialize_executable

        if kernels and devices[0].platform == "gpu":
            importlib.import_module(_HANDLERS)

        trees = pickle.loads(payload)
        alone = _ONE_AT_A_TIME if devices[0].platform == "cpu" else contextlib.nullcontext()
        with alone:
            compiled = serialize_executable.deserialize_and_load(
                *trees, backend=devices[0].client, execution_devices=devices
            )
    except Exception as error:
        log.warning("stored program %s is ignored and built again: %s", where, error)
        return None
    return compiled, report


def _checked(content: bytes, fingerprint: str) -> tuple[Report, bytes, bool]:
    """Report and payload of a stored file, and whether it may call our kernels.

    Raises:
      ConfigError: the file is damaged or holds another program.
    """
    if not content.startswith(_MAGIC):
        raise ConfigError("it is no stored program of this version")
    text, separator, payload = content[len(_MAGIC) :].partition(b"\n")
    try:
        head = json.loads(text)
        wanted = (head["fingerprint"], head["sha256"])
    except (ValueError, KeyError, TypeError):
        raise ConfigError("its header is damaged") from None
    if not separator or wanted != (fingerprint, hashlib.sha256(payload).hexdigest()):
        raise ConfigError("its contents are damaged or belong to another program")
    return from_dict(Report, head["report"], "report"), payload, head.get("kernels", True)
