"""The run directory: resolved config, one JSON line a step, and what a resume does to them."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from jaxllm.core.config import to_dict
from jaxllm.errors import ConfigError
from jaxllm.train.config import RunConfig
from jaxllm.train.hosts import is_main

__all__ = ["Lines", "Record"]


class Lines:
    """A file of JSON lines, each of a step; a resume strikes out those after its own."""

    def __init__(self, path: Path):
        self.path = path
        self._file: Any = None

    def begin(self, step: int, note: dict[str, Any] | None = None) -> None:
        """Open for steps after `step`, with a `note` first; rows past it are dropped."""
        rows = self.rows()
        kept = [r for r in rows if r.get("step", 0) <= step and r.get("resumed_from", 0) <= step]
        if note is not None:
            kept.append(note)
        replace_text(self.path, "".join(json.dumps(r) + "\n" for r in kept))
        self._file = self.path.open("a")

    def rows(self) -> list[dict[str, Any]]:
        """Whole rows of the file; a line that was cut off by a kill is none."""
        if not self.path.exists():
            return []
        out = []
        for line in self.path.read_text().split("\n")[:-1]:
            try:
                out.append(json.loads(line))
            except ValueError:
                continue
        return out

    def add(self, row: dict[str, Any]) -> None:
        """Append one row, whole or not at all; a number that is not finite becomes null.

        Nothing is written before `begin`: that is how the processes beside the main one are silent.
        """
        if self._file is None:
            return
        self._file.write(json.dumps({k: _plain(v) for k, v in row.items()}) + "\n")
        self._file.flush()

    def close(self) -> None:
        """No more rows."""
        if self._file is not None:
            self._file.close()


def _plain(value: Any) -> Any:
    """JSON has no nan and no infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Record:
    """`config.json`, `metrics.jsonl`, `samples.jsonl` and `summary.json` of a run.

    Each step stands in `metrics.jsonl` once. Process 0 writes; the others only check.
    """

    def __init__(self, folder: Path, config: RunConfig):
        self.folder = folder
        self.metrics = Lines(folder / "metrics.jsonl")
        self.samples = Lines(folder / "samples.jsonl")
        self._samples = bool(config.sample_every)
        folder.mkdir(parents=True, exist_ok=True)
        self._check(config)

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
        if is_main():
            replace_text(path, text)

    def begin(self, step: int) -> None:
        """Open for steps after `step`: rows past it are dropped, a resume is noted."""
        if not is_main():
            return
        self.metrics.begin(step, {"resumed_from": step} if step else None)
        if self._samples or self.samples.path.exists():
            self.samples.begin(step)

    def add(self, row: dict[str, Any]) -> None:
        """Append the row of a step."""
        self.metrics.add(row)

    def finish(self, summary: dict[str, Any]) -> None:
        """Write `summary.json`."""
        text = json.dumps({k: _plain(v) for k, v in summary.items()}, indent=2)
        replace_text(self.folder / "summary.json", text + "\n")

    def close(self) -> None:
        """No more rows."""
        self.metrics.close()
        self.samples.close()


def replace_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(text)
    os.replace(part, path)
