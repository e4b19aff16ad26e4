"""Checkpoints by Orbax: asynchronous, atomic, the last few kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jaxllm.errors import WeightsError

__all__ = ["Checkpoints"]


class Checkpoints:
    """The checkpoints of a run, by step."""

    def __init__(self, folder: Path, keep: int):
        import orbax.checkpoint as ocp

        self._ocp = ocp
        self._manager = ocp.CheckpointManager(
            folder.absolute(),
            options=ocp.CheckpointManagerOptions(max_to_keep=keep, create=True),
        )

    def latest(self) -> int | None:
        """The last step that was saved whole, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any) -> None:
        """Begin to save; the device arrays are copied before this returns."""
        self._manager.save(step, args=self._ocp.args.StandardSave(state))

    def restore(self, step: int, like: Any) -> Any:
        """The state of a step, shaped and placed like `like`.

        Raises:
          WeightsError: the checkpoint is damaged or of another model.
        """
        try:
            return self._manager.restore(step, args=self._ocp.args.StandardRestore(like))
        except (ValueError, OSError, KeyError, TypeError) as error:
            reason = str(error).strip().splitlines()[0][:200]
            raise WeightsError(
                f"checkpoint {step} below {self._manager.directory} cannot be read: {reason}"
            ) from error

    def close(self) -> None:
        """Wait until all is written."""
        self._manager.wait_until_finished()
        self._manager.close()
