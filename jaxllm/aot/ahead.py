"""Programs of a start, loaded while the device wakes up and weights are read.

A start leaves a list of the programs that it asked for. The next one like it begins with loading
these in threads of their own; whoever asks the store for one waits for it there. A list is only a
guess: what it names must still be what is asked for, by fingerprint, and what nobody asks for is
dropped.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxllm.aot import fingerprint
from jaxllm.aot.program import Executable
from jaxllm.aot.store import Store, atomic_write
from jaxllm.core.logging import log
from jaxllm.errors import CapacityError

__all__ = ["THREADS", "loading_ahead"]

THREADS = min(16, os.cpu_count() or 2)
"""Programs that are loaded at once: XLA works outside of Python."""
_MOST = 512  # programs of a list


@contextlib.contextmanager
def loading_ahead(
    store: Store | None, depends: Any, devices: Callable[[], Sequence[Any]]
) -> Iterator[Callable[[Iterable[Executable]], None]]:
    """Load what the last start like this one asked for, from now on; gives what keeps the list.

    Args:
      store: of the programs, or None for none of this.
      depends: JSON-ready description of the start.
      devices: gives the devices that its programs run on; called in a thread.
    """
    if store is None:
        yield lambda executables: None
        return
    ahead = _Ahead(store, depends, devices)
    ahead.thread.start()
    try:
        yield ahead.keep
    finally:
        ahead.end()


class _Ahead:
    """One start."""

    def __init__(self, store: Store, depends: Any, devices: Callable[[], Sequence[Any]]):
        self._store, self._depends, self._devices = store, depends, devices
        self._ended = threading.Event()
        self._loading: list[tuple[str, str]] = []
        self.thread = threading.Thread(target=self._run, name="jaxllm-ahead", daemon=True)

    def _list(self, devices: Sequence[Any]) -> Path:
        about = {"start": self._depends, "environment": fingerprint.environment(devices)}
        about["devices"] = [device.id for device in devices]
        return self._store.folder / f"start-{fingerprint.digest(about)[:32]}.json"

    def _run(self) -> None:
        try:
            devices = self._devices()
            wanted = _read(self._list(devices))
            if not wanted:
                return
            with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
                for name, key in wanted:
                    if self._ended.is_set():
                        return
                    if self._store.expect(name, key, devices, pool.submit):
                        self._loading.append((name, key))
        except Exception as error:  # a guess that went wrong costs time, nothing else
            log.info("programs are not loaded ahead: %s", error)

    def keep(self, executables: Iterable[Executable]) -> None:
        """Write the list for the next start: what takes longest to load comes first."""
        made = sorted(executables, key=lambda e: -e.seconds)[:_MOST]
        text = json.dumps([[e.name, e.fingerprint] for e in made])
        path = self._list(self._devices())
        with contextlib.suppress(OSError, CapacityError):
            if not path.exists() or sorted(_read(path)) != sorted(
                (e.name, e.fingerprint) for e in made
            ):
                path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                atomic_write(path, [text.encode()])

    def end(self) -> None:
        """Drop what nobody asked for, and wait for what is being loaded: no thread of XLA's may
        be at work when a process ends."""
        self._ended.set()
        for _ in range(2):
            for name, key in self._loading:
                self._store.forget(name, key)
            self.thread.join()


def _read(path: Path) -> list[tuple[str, str]]:
    """(name, fingerprint) of each program of a list; none of one that is damaged."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return []
    if not isinstance(found, list) or len(found) > _MOST:
        return []
    fine = all(
        isinstance(x, list) and len(x) == 2 and all(isinstance(y, str) for y in x) for x in found
    )
    return [(name, key) for name, key in found] if fine else []
