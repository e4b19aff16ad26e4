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
            from tensorboardX import SummaryWriter

            # A file's name has whole seconds only: two processes within one must not share it.
            self._board = SummaryWriter(
                str(folder / "tensorboard"),
                purge_step=start + 1,
                flush_secs=10,
                filename_suffix=f".{start}.{time.time_ns() % 10**9}",
            )
        if config.wandb:
            self._wandb = _begin_wandb(config, folder)

    def add(self, row: dict[str, Any]) -> None:
        """Send a row of the metrics."""
        if self._board is None and self._wandb is None:
            return
        step, values = row["step"], scalars(row)
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
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
