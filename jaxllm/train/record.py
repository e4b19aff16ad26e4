"""The run directory: resolved config, one JSON line a step, and what a resume does to them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from jaxllm.core.config import to_dict
from jaxllm.errors import ConfigError
from jaxllm.train.config import RunConfig
from jaxllm.train.hosts import is_main

__all__ = ["Record"]


class Record:
    """`config.json` and `metrics.jsonl` of a run; each step stands in the latter once.

    Process 0 writes; the others only check.
    """

    def __init__(self, folder: Path, config: RunConfig):
        self.folder = folder
        self._writes = is_main()
        self._path = folder / "metrics.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        self._check(config)
        self._file: Any = None

    def _check(self, config: RunConfig) -> None:
        """A directory goes on with the same model only.

        Raises:
          ConfigError: it holds a run of another spec.
        """
        path = self.folder / "config.json"
        text = json.dumps(to_dict(config), indent=2) + "\n"
        if path.exists():
            try:
                found = json.loads(path.read_text())
            except ValueError:
                raise ConfigError(f"{path}: is damaged; give another --out") from None
            if found.get("spec") != json.loads(text)["spec"]:
                raise ConfigError(f"{path}: holds a run of another model; give another --out")
        if self._writes:
            replace_text(path, text)

    def begin(self, step: int) -> None:
        """Open for steps after `step`: rows past it are dropped, a resume is noted."""
        if not self._writes:
            return
        rows = self._rows()
        kept = [r for r in rows if r.get("step", 0) <= step and r.get("resumed_from", 0) <= step]
        if step:
            kept.append({"resumed_from": step})
        replace_text(self._path, "".join(json.dumps(r) + "\n" for r in kept))
        self._file = self._path.open("a")

    def _rows(self) -> list[dict[str, Any]]:
        """Whole rows of the file; a line that was cut off by a kill is none."""
        if not self._path.exists():
            return []
        out = []
        for line in self._path.read_text().split("\n")[:-1]:
            try:
                out.append(json.loads(line))
            except ValueError:
                continue
        return out

    def add(self, row: dict[str, Any]) -> None:
        """Append one row, whole or not at all."""
        if self._file is not None:
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()

    def close(self) -> None:
        """No more rows."""
        if self._file is not None:
            self._file.close()


def replace_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(text)
    os.replace(part, path)
