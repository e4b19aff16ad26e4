"""The training loop: programs compiled before the first step, rows, checkpoints, validation."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxllm.aot import counter
from jaxllm.aot.program import abstract_like
from jaxllm.aot.store import Store
from jaxllm.core.logging import log
from jaxllm.core.mesh import make_mesh, parse_mesh
from jaxllm.data.batch import Batch
from jaxllm.data.loader import Data, DataOptions, open_data
from jaxllm.errors import CapacityError, ConfigError
from jaxllm.spec.cost import num_params
from jaxllm.train import hosts
from jaxllm.train.checkpoint import Checkpoints
from jaxllm.train.config import RunConfig
from jaxllm.train.devices import peak_flops, step_flops
from jaxllm.train.export import export_model
from jaxllm.train.meter import Meter
from jaxllm.train.plot import draw_losses
from jaxllm.train.profile import Profile
from jaxllm.train.programs import make_programs
from jaxllm.train.record import Record
from jaxllm.train.samples import Sampler
from jaxllm.train.show import Show
from jaxllm.train.stop import Stop
from jaxllm.train.summary import summarise
from jaxllm.train.trackers import Trackers, import_wandb

__all__ = ["Result", "open_run", "train"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """How a run ended.

    Attributes:
      folder: the run directory.
      step: last step taken.
      loss: of the last step.
      val_loss: of the last validation, or None.
      seconds: wall clock of this process's part.
      summary: what stands in `summary.json`.
    """

    folder: Path
    step: int
    loss: float | None
    val_loss: float | None
    seconds: float
    summary: dict[str, Any]


def open_run(config: RunConfig) -> Data:
    """The data of a run, tokenised once.

    Raises:
      ConfigError: none is named, or it is missing, broken or too little.
    """
    if config.data is None:
        raise ConfigError("there is no data: give --data PATH (text, JSON lines, Parquet, tokens)")
    return open_data(
        DataOptions(
            path=config.data,
            tokenizer=config.tokenizer,
            text_field=config.text_field,
            end_token=config.end_token,
            rows=config.rows,
            length=config.length,
            validation_fraction=config.validation_fraction,
            vocabulary=config.spec.vocab,
        )
    )


def train(config: RunConfig, *, quiet: bool = False, begun: float | None = None) -> Result:
    """Train, from the last checkpoint of the run directory if it has one.

    Args:
      config: the run.
      quiet: no lines on the terminal.
      begun: `time.perf_counter()` from which start-up counts; now by default.

    Raises:
      ConfigError: contradictions, missing data; CapacityError: the loss stays non-finite;
      UnsupportedError: a tracker is not installed; KeyboardInterrupt: after Ctrl-C, all being
      saved.
    """
    counter.start()
    meter = Meter(time.perf_counter() if begun is None else begun)
    if begun is not None:
        meter.started("imports")
    if config.wandb:
        import_wandb()
    hosts.start()
    hosts.check_same(config)
    quiet = quiet or not hosts.is_main()
    with hosts.together("opening the data or the run directory"):
        data = open_run(config)
        meter.started("data")
        record = Record(Path(config.out), config)
    hosts.check_shared(record.folder)
    checkpoints = Checkpoints(record.folder / "checkpoints", config)
    with contextlib.closing(record), contextlib.closing(checkpoints):
        run = _Run(config, data, record, checkpoints, meter)
        return run.run(Show(config.steps, log_every=config.log_every, quiet=quiet))


class _Run:
    """One process's part of a run."""

    def __init__(
        self,
        config: RunConfig,
        data: Data,
        record: Record,
        checkpoints: Checkpoints,
        meter: Meter,
    ):
        self.config = config
        self.data = data
        self.record = record
        self.checkpoints = checkpoints
        self.meter = meter
        self.profile = Profile(config.profile, record.folder / "profile")
        self.sampler: Sampler | None = None
        self.loss: float | None = None
        self.val_loss: float | None = None
        self.skipped = 0
        self.needed: dict[int, float] = {}
        """FLOPs of the steps that are under way."""

    def run(self, show: Show) -> Result:
        """All remaining steps, a validation and a checkpoint at the end, the model as files."""
        self.show = show
        state, start = self._prepare()
        self.trackers = Trackers(self.config, self.record.folder, start)
        self.meter.started("trackers")
        try:
            with show, Stop() as self.stop, contextlib.closing(self._batches(start)) as batches:
                state, step = self._steps(state, start, batches)
            with self.meter.apart("checkpoints"):
                self.checkpoints.wait()
            if step >= self.config.steps:
                best = self.checkpoints.best() if self.config.export == "best" else None
                state = state if best is None else self._restore(best, state)
                export_model(self.config, state.params, self.record.folder / "model")
                if self.data.tokenizer is not None and hosts.is_main():
                    self.data.tokenizer.save(self.record.folder / "model")
            summary = self._finish(step)
        finally:
            self.profile.stop()
            self.trackers.close()
        if self.stop.interrupted:
            raise KeyboardInterrupt
        return Result(
            folder=self.record.folder,
            step=step,
            loss=self.loss,
            val_loss=self.val_loss,
            seconds=summary["seconds"],
            summary=summary,
        )

    def _prepare(self) -> tuple[Any, int]:
        """Everything before the first step; the state and the step that it is of."""
        config, meter = self.config, self.meter
        sizes = parse_mesh(config.mesh)
        mesh = make_mesh(sizes) if sizes else None
        self.devices = list(mesh.devices.flat) if mesh is not None else jax.devices()[:1]
        peak = peak_flops(self.devices[0].device_kind, config.dtype)
        meter.peak = None if peak is None else peak * len(self.devices)
        self.programs = make_programs(config, Store.default(), mesh)
        meter.started("programs")
        report = self.programs.step.report
        log.info("model: %s parameters; step: %s", f"{num_params(config.spec):,}", report)
        state = self.programs.init(np.uint32(config.seed))
        start = self.checkpoints.latest() or 0
        if start:
            state = self._restore(start, state)
            log.info("resumed from step %d", start)
        self.record.begin(start)
        meter.started("state")
        if config.sample_every:
            self.sampler = Sampler(
                config, self.data.tokenizer, store=Store.default(), mesh=mesh, params=state.params
            )
            meter.started("samples")
        self.validation = [
            hosts.place_whole(batch, program=self.programs.evaluate)
            for batch in self.data.validation_batches(rows=config.batch, count=config.eval_batches)
        ]
        self.agree = hosts.Agreement()
        meter.started("data")
        return state, start

    def _batches(self, start: int) -> Generator[Batch, None, None]:
        """This process's rows of the steps after `start`, made ahead."""
        rows = self.config.batch
        part = hosts.own_rows(rows, program=self.programs.step)
        return self.data.stream(start, rows=rows, seed=self.config.seed, part=part)

    def _restore(self, step: int, state: Any) -> Any:
        """The state of a checkpoint; that of the argument makes room for it."""
        like = jax.tree.map(abstract_like, state)
        jax.tree.map(lambda x: x.delete(), state)
        return self.checkpoints.restore(step, like, self.programs.checksum)

    def _save(self, step: int, state: Any, val_loss: float | None) -> None:
        total = int(self.programs.checksum(state))
        self.checkpoints.save(step, state, checksum=total, val_loss=val_loss)

    def _steps(
        self, state: Any, start: int, batches: Generator[Batch, None, None]
    ) -> tuple[Any, int]:
        """Steps start+1..steps; metrics are read one step late, so the device never waits."""
        config, pending, step = self.config, None, start
        for step in range(start + 1, config.steps + 1):
            if step == self.profile.first:
                if pending is not None:
                    self._write(*pending)
                    pending = None
                with self.meter.apart("profile"):
                    self.profile.start()
            own = next(batches)
            self.needed[step] = step_flops(config.spec, own, rows=config.batch)
            batch = hosts.place(own, config.batch, program=self.programs.step)
            state, metrics = self.programs.step(state, batch)
            if pending is not None:
                self._write(*pending)
            pending = (step, metrics)
            end = self.agree(self.stop.asked) or step == config.steps
            evaluates = step % config.eval_every == 0 or step == config.steps
            self.checkpoints.check()
            samples = self.sampler is not None and step % config.sample_every == 0
            saves = end or self.checkpoints.due(step)
            if evaluates or saves or samples or step == self.profile.last:
                self._write(*pending, params=state.params if evaluates else None)
                pending = None
            if step == self.profile.last:
                with self.meter.apart("profile"):
                    self.profile.stop()
            if samples:
                self._sample(step, state.params)
            val_loss = self.val_loss if evaluates else None
            if saves or self.checkpoints.due(step, val_loss):
                with self.meter.apart("checkpoints"):
                    self._save(step, state, val_loss)
            if end:
                break
        return state, step

    def _write(self, step: int, metrics: Any, params: Any = None) -> None:
        """The row of a step, with a validation when parameters are given."""
        config, metrics = self.config, jax.device_get(metrics)
        row: dict[str, Any] = {
            "step": step,
            "loss": float(metrics.loss),
            "grad_norm": float(metrics.grad_norm),
            "lr": float(metrics.learning_rate),
        }
        row |= {name: float(value) for name, value in metrics.router.items()}
        tokens = config.batch * config.length
        flops = self.needed.pop(step)
        row |= self.meter.step(tokens, flops, skipped=int(metrics.bad_steps) > 0)
        row["skipped"] = self.skipped = int(metrics.skipped)
        if config.dtype == "float16":
            row["loss_scale"] = float(metrics.loss_scale)
        if self.config.spike is not None:
            row["spikes"] = int(metrics.spikes)
        if params is not None:
            with self.meter.apart("validation"):
                found = [self.programs.evaluate(params, batch) for batch in self.validation]
                nll, weight = np.asarray(jax.device_get(found), np.float64).sum(0)
            row["val_loss"] = self.val_loss = float(nll / weight)
        self.loss = row["loss"]
        self.record.add(row)
        self.trackers.add(row)
        self.show.step(row)
        if int(metrics.bad_steps) >= config.patience:
            raise CapacityError(
                f"the loss or gradient was not finite for {config.patience} steps in a row "
                f"(up to step {step}); lower the learning rate or check the data. Checkpoints "
                f"below {self.record.folder} are intact"
            )

    def _sample(self, step: int, params: Any) -> None:
        """A text by the parameters of a step."""
        assert self.sampler is not None
        with self.meter.apart("samples"):
            sample = self.sampler.draw(params)
            self.record.samples.add({"step": step, **sample})
            self.show.note(f"sample at step {step}: {sample['prompt']}{sample['text']}")

    def _finish(self, step: int) -> dict[str, Any]:
        """`summary.json`, `loss.png` and the table."""
        with self.meter.apart("checkpoints"):
            self.checkpoints.close()
        rows, folder = self.record.metrics.rows(), self.record.folder
        if not hosts.is_main():
            return self.meter.summary()
        summary = summarise(
            self.config,
            rows,
            self.meter.summary(),
            folder=folder,
            step=step,
            skipped=self.skipped,
            devices=self.devices,
            predicted_bytes=self.programs.step.report.peak_bytes,
        )
        self.record.finish(summary)
        draw_losses(rows, folder / "loss.png")
        self.show.table(summary)
        return summary
