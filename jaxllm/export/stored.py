"""A bundle whose executables are kept: in the user's own store, or brought along and trusted.

The portable programs of a bundle are compiled at their first use, and the executables stored by
fingerprint as any other program's. Executables inside a bundle are code of whoever made it: they
are loaded only on request, after their hash matched, and only for exactly this stack.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

import jax

from jaxllm.aot.program import Executable, Program
from jaxllm.aot.store import Store, atomic_write, load_bytes
from jaxllm.core.logging import log, note_once
from jaxllm.errors import CapacityError, WeightsError
from jaxllm.export.runtime import Bundle, BundleError

__all__ = ["StoredBundle"]

_SETTLED_S = 2.0
"""A file that was changed less long ago is not remembered: a clock's tick could hide one more."""


class StoredBundle(Bundle):
    """A `Bundle` that compiles as little as it can.

    Args:
      path: directory or .tar.
      store: where executables are kept, or None.
      trust: take executables out of the bundle too.
    """

    def __init__(self, path: str | Path, store: Store | None, *, trust: bool = False):
        self.store, self.trust = store, trust
        self.build_ms = 0.0
        self._notes = self._notes_of(path)
        self._seen = self._remembered()
        before = len(self._seen)
        super().__init__(path)
        if self._notes is not None and len(self._seen) > before:
            with contextlib.suppress(OSError, CapacityError):
                atomic_write(self._notes, [json.dumps(self._seen).encode()])

    def _notes_of(self, path: str | Path) -> Path | None:
        """Where the user's own store remembers which files of a bundle were sound."""
        if self.store is None or Path(path) in self.store.folder.parents:
            return None
        name = hashlib.sha256(os.path.realpath(path).encode()).hexdigest()[:32]
        return self.store.folder / f"checked-{name}.json"

    def _remembered(self) -> dict[str, str]:
        """What a file of weights was like when it was last hashed -> its hash."""
        try:
            return {} if self._notes is None else dict(json.loads(self._notes.read_bytes()))
        except (OSError, ValueError, TypeError):
            return {}

    def _check(self, name: str, wanted: str) -> None:
        """As of `Bundle`; weights, which are no code, are hashed again only once they changed.

        What changes a file's contents changes the time that its inode keeps, which no call sets.
        """
        weights = name.endswith(".safetensors") and name in self.files
        if self._notes is None or not weights:
            return super()._check(name, wanted)
        file, offset, size = self.files[name]
        found = os.stat(file)
        like = [found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]
        mark = json.dumps([name, offset, size, *like])
        if self._seen.get(mark) == wanted:
            return None
        super()._check(name, wanted)
        if time.time() - found.st_ctime > _SETTLED_S:
            self._seen[mark] = wanted
        return None

    def build(self, entry: dict[str, Any], *args: Any) -> Executable:
        """The executable of a program: from the store, from the bundle, or compiled and stored.

        Raises:
          WeightsError: jax cannot read the program.
        """
        del args  # shapes stand in the program itself, so that a fingerprint needs no run
        start = time.perf_counter()
        try:
            made = self._kept(entry)
        except BundleError as error:
            raise WeightsError(str(error)) from None
        self.build_ms += 1e3 * (time.perf_counter() - start)
        return made

    def _kept(self, entry: dict[str, Any]) -> Executable:
        program = self.program(entry)
        key = program.fingerprint()
        name = f"native/{Store(Path()).path(program.name, key).name}"
        if self.trust and name not in self.manifest["files"]:
            made = self.manifest.get("native") or {}
            stack = ", ".join(f"{n} {made[n]}" for n in ("device_kind", "jax") if n in made)
            note_once(
                f"{self.path}: brings no executable of {program.name} for this stack"
                + (f" (they are for {stack})" if stack else "")
            )
        elif self.trust:
            content = bytes(self.read(name))
            found = load_bytes(content, key, program.devices(), where=f"{self.path}: {name}")
            if found is not None:
                log.info("program %s: from the bundle", program.name)
                return Executable(
                    name=program.name,
                    compiled=found[0],
                    report=found[1],
                    stored=True,
                    seconds=0.0,
                    fingerprint=key,
                )
        return program.load(self.store)

    def compile_all(self) -> None:
        """Compile and store every program for this machine."""
        for entry in self.way["programs"].values():
            self.program(entry).load(self.store)

    def program(self, entry: dict[str, Any]) -> Program:
        """A portable program as one of ours, which knows its own shapes."""
        portable = self.exported(entry)
        places = portable.in_shardings_jax(self.mesh) if self.way["devices"] > 1 else ()
        lie = [*places] or [None] * len(portable.in_avals)
        flat = [
            jax.ShapeDtypeStruct(kind.shape, kind.dtype, sharding=place)
            for kind, place in zip(portable.in_avals, lie, strict=True)
        ]
        return Program(
            name=f"bundle-{self.way['folder']}-{entry['name']}",
            build=lambda: portable.call,
            args=jax.tree.unflatten(portable.in_tree, flat)[0],
            depends={"portable": self.manifest["files"][entry["file"]]},
            donate=tuple(entry["donate"]),
            mesh=self.mesh if self.way["devices"] > 1 else None,
            options=tuple(sorted(self.way["compiler_options"].items())),
        )
