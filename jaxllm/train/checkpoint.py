"""Checkpoints by Orbax: asynchronous, atomic, checked when read; which of them stay.

A checkpoint `checkpoints/STEP` holds the whole TrainState (parameters, optimizer, step, random
key), and as JSON the step that the rows go on from, the resolved config, shapes, a checksum and the
validation loss.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jaxllm.aot.fingerprint import digest
from jaxllm.core.config import to_dict
from jaxllm.core.logging import log
from jaxllm.errors import CapacityError, ConfigError, WeightsError
from jaxllm.train.config import RunConfig
from jaxllm.train.resume import check_config, check_leaves, leaves_of

__all__ = ["Checkpoints", "best_checkpoint", "validation_losses"]

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def validation_losses(folder: Path) -> dict[int, float]:
    """Step -> validation loss of the checkpoints below a folder that were evaluated.

    Raises:
      WeightsError: the file of a checkpoint's metrics is damaged.
    """
    out = {}
    for step in _steps(folder):
        path = folder / str(step) / "metrics" / "metrics"
        if not path.is_file():
            continue
        try:
            loss = json.loads(path.read_text()).get("val_loss")
            if loss is not None:
                out[step] = float(loss)
        except (ValueError, AttributeError, TypeError):
            raise WeightsError(
                f"checkpoint {step}: {path} is damaged; delete {folder / str(step)}, and the run "
                "goes on without that checkpoint"
            ) from None
    return {step: loss for step, loss in out.items() if math.isfinite(loss)}


def best_checkpoint(run: Path) -> int | None:
    """The step of lowest validation loss among the checkpoints of a run directory, or None."""
    found = validation_losses(run / "checkpoints")
    return min(found, key=lambda step: (found[step], step)) if found else None


def _steps(folder: Path) -> list[int]:
    """Steps whose checkpoint was written to its end: others have Orbax's longer names."""
    if not folder.is_dir():
        return []
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdecimal() and p.is_dir())


@dataclasses.dataclass(frozen=True)
class _KeepBest:
    """The n checkpoints of lowest validation loss (Orbax's BestN fills up with others)."""

    n: int

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        del context
        losses = {c.step: (c.metrics or {}).get("val_loss") for c in checkpoints}
        known = [s for s, loss in losses.items() if loss is not None and math.isfinite(loss)]
        best = set(sorted(known, key=lambda s: (losses[s], s))[: self.n])
        return [c.step in best for c in checkpoints]


def _policy(config: RunConfig) -> Any:
    from orbax.checkpoint import checkpoint_managers as managers

    policies: list[Any] = [managers.LatestN(config.keep)]
    if config.keep_every:
        policies.append(managers.EveryNSteps(config.keep_every))
    if config.keep_best:
        policies.append(_KeepBest(config.keep_best))
    return managers.AnyPreservationPolicy(policies)


def _short(error: BaseException) -> str:
    """The first line of an error; paths in its middle are cut, the reason stands at its end."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return line if len(line) <= 240 else f"{line[:100]} … {line[-130:]}"


def _is_full(error: BaseException) -> bool:
    """Whether a failed write says that there is no room (tensorstore says it in words only)."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in _FULL:
            return True
        if any(os.strerror(code) in str(seen) for code in _FULL):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


class Checkpoints:
    """The checkpoints of a run, by step."""

    def __init__(self, folder: Path, config: RunConfig):
        import orbax.checkpoint as ocp

        self._ocp = ocp
        self._config = config
        self._folder = folder.absolute()
        losses = validation_losses(self._folder)
        self._lowest = min(losses.values(), default=math.inf)
        self._pending: int | None = None
        self._broken: int | None = None
        # Orbax logs the traceback of every error that it raises as well.
        self._absl = logging.getLogger("absl")
        self._level = self._absl.level
        self._absl.setLevel(logging.CRITICAL)
        self._manager = ocp.CheckpointManager(
            self._folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=_policy(config),
                best_fn=lambda metrics: metrics.get("val_loss", math.inf),
                best_mode="min",
                create=True,
                cleanup_tmp_directories=True,
            ),
        )

    def latest(self) -> int | None:
        """The last step that was saved whole, or None."""
        return self._manager.latest_step()

    def best(self) -> int | None:
        """The step of lowest validation loss, or None."""
        self.wait()
        return best_checkpoint(self._folder.parent)

    def due(self, step: int, val_loss: float | None = None) -> bool:
        """Whether a step is saved; `val_loss` is that of its parameters, if they were evaluated."""
        config = self._config
        if step % config.checkpoint_every == 0 or step == config.steps:
            return True
        if config.keep_every and step % config.keep_every == 0:
            return True
        return bool(config.keep_best and val_loss is not None and val_loss < self._lowest)

    def save(self, step: int, state: Any, *, checksum: int, val_loss: float | None = None) -> None:
        """Begin to save; the device arrays are copied before this returns.

        Args:
          step: taken so far; the rows go on from there.
          state: the TrainState.
          checksum: of the state.
          val_loss: of its parameters, if they were evaluated.

        Raises:
          CapacityError: no space is left, for this checkpoint or the one before.
        """
        self.wait()
        args = self._ocp.args
        meta: dict[str, Any] = {
            "step": step,
            "loader": {"step": step},
            "checksum": checksum,
            "config": to_dict(self._config),
            "leaves": leaves_of(state),
        }
        meta["sha256"] = digest(meta)
        items = args.Composite(state=args.StandardSave(state), meta=args.JsonSave(meta))
        metrics = {} if val_loss is None else {"val_loss": val_loss}
        try:
            self._manager.save(step, args=items, metrics=metrics, force=True)
        except Exception as error:
            raise self._failed(step, error) from error
        self._pending = step
        if val_loss is not None and math.isfinite(val_loss):
            self._lowest = min(self._lowest, val_loss)

    def check(self) -> None:
        """Raise what a save in the background failed of, as soon as it did; costs microseconds."""
        if self._pending is not None and not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Until all is written.

        Raises:
          CapacityError: no space is left; WeightsError: another error of the write.
        """
        step, self._pending = self._pending, None
        if step is None:
            return
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._failed(step, error) from error
        log.info("checkpoint %d is complete", step)

    def _failed(self, step: int, error: Exception) -> Exception:
        """The error of a write, which says what is left."""
        self._broken = step
        whole = [s for s in _steps(self._folder) if s != step]
        intact = (
            f"checkpoint {whole[-1]} is intact, and the same command goes on from it"
            if whole
            else "there is no checkpoint before it"
        )
        reason = f"checkpoint {step} below {self._folder} was not written: {_short(error)}"
        if _is_full(error):
            return CapacityError(f"no space is left. {reason}. Free some space; {intact}")
        return WeightsError(f"{reason}. {intact[0].upper()}{intact[1:]}")

    def restore(self, step: int, like: Any, checksum: Callable[[Any], Any]) -> Any:
        """The state of a step, shaped and placed like `like`.

        Args:
          step: of the checkpoint.
          like: abstract state with shardings.
          checksum: the compiled `checksum`.

        Raises:
          WeightsError: the checkpoint is damaged or of another model; ConfigError: of another
            optimizer.
        """
        try:
            return self._read(step, like, checksum, notes=True)
        except _Damaged as error:
            older = self._older(step, like, checksum)
            folder = self._folder / str(step)
            advice = (
                f"checkpoint {older} is whole: delete {folder}, and the same command goes on from "
                f"step {older}"
                if older is not None
                else "no older one is whole: give another --out to begin anew"
            )
            raise WeightsError(
                f"checkpoint {step} in {folder} is damaged: {error}; {advice}"
            ) from error.__cause__

    def _older(self, step: int, like: Any, checksum: Callable[[Any], Any]) -> int | None:
        """The last step before one whose checkpoint can be read."""
        for older in reversed([s for s in _steps(self._folder) if s < step]):
            with contextlib.suppress(_Damaged, ConfigError, WeightsError):
                self._read(older, like, checksum)
                return older
        return None

    def _read(
        self, step: int, like: Any, checksum: Callable[[Any], Any], *, notes: bool = False
    ) -> Any:
        args = self._ocp.args
        meta = self._item(step, "meta", args.JsonRestore())
        written = meta.pop("sha256", None) if isinstance(meta, dict) else None
        if written is None or written != digest(meta):
            raise _Damaged("its meta item is not what was written")
        check_config(self._folder / str(step), meta["config"], to_dict(self._config), notes)
        check_leaves(self._folder / str(step), meta["leaves"], leaves_of(like))
        state = self._item(step, "state", args.StandardRestore(like))
        if int(checksum(state)) != meta["checksum"]:
            raise _Damaged("its arrays are not those that were written")
        return state

    def _item(self, step: int, name: str, item: Any) -> Any:
        try:
            return self._manager.restore(step, args=self._ocp.args.Composite(**{name: item}))[name]
        except Exception as error:  # Orbax raises whatever its parsers do
            raise _Damaged(f"its {name} cannot be read: {_short(error)}") from error

    def close(self) -> None:
        """Wait until all is written; the errors are those of `wait`."""
        try:
            self.wait()
        finally:
            with contextlib.suppress(Exception):  # `wait` has raised it
                self._manager.close()
            self._absl.setLevel(self._level)
            if self._broken is not None:  # it takes up the space that there is not
                for rest in self._folder.glob(f"{self._broken}.orbax-checkpoint-tmp*"):
                    shutil.rmtree(rest, ignore_errors=True)


class _Damaged(Exception):
    """A checkpoint cannot be read; the message says why."""
