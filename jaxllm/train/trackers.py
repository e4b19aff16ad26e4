"""Other people's dashboards: TensorBoard files, and Weights & Biases where it is installed."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

from jaxllm.core.config import to_dict
from jaxllm.errors import UnsupportedError
from jaxllm.train.config import RunConfig

__all__ = ["Trackers", "import_wandb"]

_GROUPS = {
    "val_loss": "validation/loss",
    "tokens_per_s": "speed/tokens_per_s",
    "mfu": "speed/mfu",
    "step_ms": "speed/step_ms",
}
"""Names of a row's numbers on a dashboard; all others stand below `train/`."""


def import_wandb() -> Any:
    """The wandb package.

    Raises:
      UnsupportedError: it is not installed.
    """
    try:
        import wandb  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UnsupportedError(
            "wandb names a project of Weights & Biases, whose package `wandb` is not installed; "
            "install it or leave the option out"
        ) from None
    return wandb


def scalars(row: dict[str, Any]) -> dict[str, float]:
    """The finite numbers of a row, by their names on a dashboard."""
    return {
        _GROUPS.get(name, f"train/{name}"): float(value)
        for name, value in row.items()
        if name != "step" and isinstance(value, (int, float)) and math.isfinite(value)
    }


class _Board:
    """TensorBoard's event file of one process; a step is one event (one a number is slow)."""

    def __init__(self, folder: Path, start: int):
        from tensorboardX import FileWriter
        from tensorboardX.proto import event_pb2, summary_pb2

        events: Any = event_pb2  # its names are made at import
        self._summaries: Any = summary_pb2

        # A file's name has whole seconds only: two processes within one must not share it.
        suffix = f".{start}.{time.time_ns() % 10**9}"
        self._writer = FileWriter(
            str(folder), max_queue=1000, flush_secs=10, filename_suffix=suffix
        )
        # TensorBoard hides what earlier files have from this step on.
        begins = events.SessionLog(status=events.SessionLog.START)
        self._writer.add_event(events.Event(step=start + 1, session_log=begins))

    def add(self, values: dict[str, float], step: int) -> None:
        """Numbers of a step."""
        kind = self._summaries.Summary
        found = [kind.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._writer.add_summary(kind(value=found), step)

    def close(self) -> None:
        """Write all that is left."""
        self._writer.close()


class Trackers:
    """The trackers that a run asks for; steps after `start` are sent to each.

    Args:
      config: the run.
      folder: its directory.
      start: last step of the checkpoint that it goes on from; what was written after it by an
        earlier process is struck out.
    """

    def __init__(self, config: RunConfig, folder: Path, start: int):
        self._board: Any = None
        self._wandb: Any = None
        if config.tensorboard:
            self._board = _Board(folder / "tensorboard", start)
        if config.wandb:
            self._wandb = _begin_wandb(config, folder)

    def add(self, row: dict[str, Any]) -> None:
        """Send a row of the metrics."""
        if self._board is None and self._wandb is None:
            return
        step, values = row["step"], scalars(row)
        if self._board is not None:
            self._board.add(values, step)
        if self._wandb is not None:
            # Steps that an earlier process sent are refused there: they are the same numbers.
            self._wandb.log(values, step=step)

    def close(self) -> None:
        """Nothing more comes."""
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


def _begin_wandb(config: RunConfig, folder: Path) -> Any:
    """The run at Weights & Biases; a resumed one keeps its identity."""
    wandb = import_wandb()
    path = folder / "wandb-id"
    known = path.read_text().strip() if path.is_file() else None
    run = wandb.init(
        project=config.wandb,
        name=folder.name,
        dir=str(folder),
        id=known,
        resume="allow",
        config=to_dict(config),
    )
    path.write_text(f"{run.id}\n")
    return run
