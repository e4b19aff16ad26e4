"""The training loop: programs compiled before the first step, rows, checkpoints, validation."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxllm.aot.program import abstract_like
from jaxllm.aot.store import Store
from jaxllm.core.config import require
from jaxllm.core.logging import log
from jaxllm.core.mesh import make_mesh, parse_mesh
from jaxllm.core.tree import unstack
from jaxllm.data.text import TextData, open_text
from jaxllm.errors import CapacityError, ConfigError
from jaxllm.spec.cost import num_params
from jaxllm.train.checkpoint import Checkpoints
from jaxllm.train.config import RunConfig
from jaxllm.train.programs import make_programs
from jaxllm.train.record import Record
from jaxllm.zoo.load import save_checkpoint

__all__ = ["Result", "train"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """How a run ended.

    Attributes:
      folder: the run directory.
      step: last step taken.
      loss: of the last step.
      val_loss: of the last validation, or None.
      seconds: wall clock of this process's part.
    """

    folder: Path
    step: int
    loss: float | None
    val_loss: float | None
    seconds: float


def _check_vocabulary(config: RunConfig, data: TextData) -> None:
    require(
        data.tokenizer.vocab_size <= config.spec.vocab,
        f"the data's tokenizer has {data.tokenizer.vocab_size} tokens, the model's vocabulary "
        f"{config.spec.vocab}; give the spec at least as many",
    )


def train(config: RunConfig, *, quiet: bool = False) -> Result:
    """Train, from the last checkpoint of the run directory if it has one.

    Args:
      config: the run.
      quiet: no lines on the terminal.

    Raises:
      ConfigError: contradictions, missing data; CapacityError: the loss stays non-finite.
    """
    if config.data is None:
        raise ConfigError("there is no data: give --data PATH (a text file or a folder of text)")
    data = open_text(
        Path(config.data),
        length=config.length,
        validation_fraction=config.validation_fraction,
        tokens=config.tokens,
    )
    _check_vocabulary(config, data)
    record = Record(Path(config.out), config)
    checkpoints = Checkpoints(record.folder / "checkpoints", config)
    with contextlib.closing(record), contextlib.closing(checkpoints):
        return _Run(config, data, record, checkpoints, quiet).run()


class _Run:
    """One process's part of a run."""

    def __init__(
        self,
        config: RunConfig,
        data: TextData,
        record: Record,
        checkpoints: Checkpoints,
        quiet: bool,
    ):
        self.config = config
        self.data = data
        self.record = record
        self.checkpoints = checkpoints
        self.quiet = quiet
        self.begun = time.perf_counter()
        self.last = self.begun
        self.stopping = False
        self.loss: float | None = None
        self.val_loss: float | None = None

    def run(self) -> Result:
        """All remaining steps, a validation and a checkpoint at the end, the model as files."""
        config = self.config
        sizes = parse_mesh(config.mesh)
        mesh = make_mesh(sizes) if sizes else None
        self.programs = make_programs(config, Store.default(), mesh)
        report = self.programs.step.report
        log.info("model: %s parameters; step: %s", f"{num_params(config.spec):,}", report)
        state = self.programs.init(np.uint32(config.seed))
        start = self.checkpoints.latest() or 0
        if start:
            state = self._restore(start, state)
            log.info("resumed from step %d", start)
        self.record.begin(start)
        self.validation = self.data.validation_batches(rows=config.batch, count=config.eval_batches)
        before = signal.signal(signal.SIGTERM, self._stop)
        try:
            state, step = self._steps(state, start)
            self.checkpoints.wait()
        finally:
            signal.signal(signal.SIGTERM, before)
        if not self.stopping:
            best = self.checkpoints.best() if config.export == "best" else None
            self._export(state if best is None else self._restore(best, state))
        return Result(
            folder=self.record.folder,
            step=step,
            loss=self.loss,
            val_loss=self.val_loss,
            seconds=time.perf_counter() - self.begun,
        )

    def _restore(self, step: int, state: Any) -> Any:
        """The state of a checkpoint; that of the argument makes room for it."""
        like = jax.tree.map(abstract_like, state)
        jax.tree.map(lambda x: x.delete(), state)
        return self.checkpoints.restore(step, like, self.programs.checksum)

    def _save(self, step: int, state: Any, val_loss: float | None) -> None:
        total = int(self.programs.checksum(state))
        self.checkpoints.save(step, state, checksum=total, val_loss=val_loss)

    def _stop(self, *_: Any) -> None:
        self.stopping = True

    def _steps(self, state: Any, start: int) -> tuple[Any, int]:
        """Steps start+1..steps; metrics are read one step late, so the device never waits."""
        config, pending, step = self.config, None, start
        for step in range(start + 1, config.steps + 1):
            batch = self.data.batch(step - 1, rows=config.batch, seed=config.seed)
            state, metrics = self.programs.step(state, batch)
            if pending is not None:
                self._write(*pending)
            pending = (step, metrics)
            end = step == config.steps or self.stopping
            evaluates = step % config.eval_every == 0 or step == config.steps
            self.checkpoints.check()
            if evaluates or end or self.checkpoints.due(step):
                self._write(*pending, params=state.params if evaluates else None)
                pending = None
            val_loss = self.val_loss if evaluates else None
            if end or self.checkpoints.due(step, val_loss):
                self._save(step, state, val_loss)
            if self.stopping:
                break
        return state, step

    def _write(self, step: int, metrics: Any, params: Any = None) -> None:
        """The row of a step, with a validation when parameters are given."""
        loss, norm = float(metrics.loss), float(metrics.grad_norm)
        now = time.perf_counter()
        seconds, self.last = now - self.last, now
        tokens = self.config.batch * self.config.length
        row: dict[str, Any] = {
            "step": step,
            "loss": loss,
            "grad_norm": norm,
            "lr": float(metrics.learning_rate),
            "tokens_per_s": tokens / seconds,
            "step_ms": 1e3 * seconds,
            "skipped": int(metrics.skipped),
        }
        if self.config.dtype == "float16":
            row["loss_scale"] = float(metrics.loss_scale)
        if self.config.spike is not None:
            row["spikes"] = int(metrics.spikes)
        if params is not None:
            losses = [float(self.programs.evaluate(params, b)) for b in self.validation]
            row["val_loss"] = self.val_loss = float(np.mean(losses))
            self.last = time.perf_counter()
        self.loss = loss
        self.record.add(row)
        if not self.quiet and ("val_loss" in row or step % 50 == 0):
            shown = f"step {step}  loss {loss:.4f}  grad norm {norm:.3f}  {seconds * 1e3:.1f} ms"
            print(shown + (f"  val {self.val_loss:.4f}" if "val_loss" in row else ""), flush=True)
        if int(metrics.bad_steps) >= self.config.patience:
            raise CapacityError(
                f"the loss or gradient was not finite for {self.config.patience} steps in a row "
                f"(up to step {step}); lower the learning rate or check the data. Checkpoints "
                f"below {self.record.folder} are intact"
            )

    def _export(self, state: Any) -> None:
        """The trained model in the Hugging Face layout, below `model`."""
        spec = self.config.spec
        host = unstack(jax.tree.map(np.asarray, state.params))

        def read(path: str) -> np.ndarray:
            node = host
            for name in path.split("."):
                node = node[name]
            return np.asarray(node)

        folder = self.record.folder / "model"
        save_checkpoint(folder, spec, read, dtype="float32")
        self.data.tokenizer.save(folder)
