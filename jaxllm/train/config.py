"""RunConfig: everything that a training run depends on, as one frozen value."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

from jaxllm.core.config import require
from jaxllm.core.mesh import parse_mesh
from jaxllm.core.precision import DtypeName
from jaxllm.ops.loss import LossOptions
from jaxllm.spec.model import ModelSpec

__all__ = ["LossScale", "Optimizer", "RunConfig", "SpikeRule"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer:
    """AdamW (or a kin) with warm-up and a schedule.

    Attributes:
      kind: `adamw`; `lion` (try a tenth to a third of AdamW's learning rate and as many times the
        decay); `adafactor` (its update is relative to the size of a leaf and it has no b1, b2 or
        eps; try 1e-2); `muon` (the matrices of the layers, each orthogonalised alone with a root
        mean square of 0.2, so that AdamW's learning rate fits; the rest takes AdamW); `custom`.
      learning_rate: at the peak.
      schedule: after warm-up: `cosine` to `final`, `linear` to `final`, `wsd` (constant, then
        linear to `final` over the last `decay_fraction`), or `constant`.
      warmup_steps: steps from 0 to the peak, which the last of them has.
      final: learning rate of the last step, as a share of the peak.
      decay_fraction: of the steps after warm-up, for `wsd`.
      weight_decay: on matrices and tables, not on vectors; times the learning rate.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the root of the second moment, and to a matrix's norm in Muon.
      momentum: of Muon's matrices.
      clip: largest global norm of the gradient; 0 is no bound.
      build: of `custom`: a function (this config, schedule) -> optax.GradientTransformation. It
        makes updates with their sign and learning rate, as optax's own aliases do.
    """

    kind: Literal["adamw", "lion", "adafactor", "muon", "custom"] = "adamw"
    learning_rate: float = 1e-3
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    warmup_steps: int = 100
    final: float = 0.1
    decay_fraction: float = 0.2
    weight_decay: float = 0.1
    b1: float = 0.9
    b2: float = 0.99
    eps: float = 1e-8
    momentum: float = 0.95
    clip: float = 1.0
    build: Callable[..., Any] | None = None

    def __post_init__(self) -> None:
        require(self.learning_rate > 0, f"learning_rate is positive, found {self.learning_rate}")
        require(self.warmup_steps >= 0, f"warmup_steps is ≥ 0, found {self.warmup_steps}")
        require(0 <= self.final <= 1, f"final is in [0, 1], found {self.final}")
        require(
            0 < self.decay_fraction <= 1,
            f"decay_fraction is in (0, 1], found {self.decay_fraction}",
        )
        require(self.weight_decay >= 0, f"weight_decay is ≥ 0, found {self.weight_decay}")
        require(0 <= self.b1 < 1 and 0 <= self.b2 < 1, "b1 and b2 are in [0, 1)")
        require(self.eps > 0, f"eps is positive, found {self.eps}")
        require(0 <= self.momentum < 1, f"momentum is in [0, 1), found {self.momentum}")
        require(self.clip >= 0, f"clip is ≥ 0, found {self.clip}")
        require(
            (self.kind == "custom") == (self.build is not None),
            "an optimizer of kind 'custom', and no other, has a build function; "
            f"found kind {self.kind!r} and build {self.build}",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpikeRule:
    """When a step is left out because its loss or gradient norm leaps.

    It is if either exceeds mean + threshold x deviation of the steps taken so far, weighted
    exponentially; the deviation counts as at least `floor` of the mean.

    Attributes:
      threshold: standard deviations.
      decay: weight of the past at every step.
      warmup: steps of which the statistics are made before any is left out.
      patience: steps left out in a row after which the next one is taken and the statistics begin
        anew, so that a level that really changed cannot stall the run.
      floor: least deviation, as a share of the mean.
    """

    threshold: float = 6.0
    decay: float = 0.99
    warmup: int = 100
    patience: int = 5
    floor: float = 0.01

    def __post_init__(self) -> None:
        require(self.threshold > 0, f"spike: threshold is positive, found {self.threshold}")
        require(0 < self.decay < 1, f"spike: decay is in (0, 1), found {self.decay}")
        require(self.warmup >= 2, f"spike: warmup is at least 2, found {self.warmup}")
        require(self.patience >= 1, f"spike: patience is at least 1, found {self.patience}")
        require(self.floor > 0, f"spike: floor is positive, found {self.floor}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossScale:
    """Dynamic loss scaling, for float16 alone: gradients below 2^-24 would be lost.

    Attributes:
      initial: the first scale.
      growth_interval: finite steps in a row after which the scale doubles.
      backoff: factor after a non-finite step.
      least: the scale never falls below.
    """

    initial: float = 2.0**15
    growth_interval: int = 1000
    backoff: float = 0.5
    least: float = 1.0

    def __post_init__(self) -> None:
        require(self.initial >= self.least > 0, "loss scale: initial ≥ least > 0")
        require(self.growth_interval >= 1, "loss scale: growth_interval is at least 1")
        require(0 < self.backoff < 1, f"loss scale: backoff is in (0, 1), found {self.backoff}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A training run.

    Attributes:
      spec: the model.
      data: text file or folder; `--data` overrides it.
      tokens: `characters` of the text, or `bytes`.
      out: run directory.
      steps: optimizer steps.
      batch: rows of a step.
      accumulate: parts that a step's rows are taken in, one after the other.
      length: tokens of a row.
      optimizer: how parameters move.
      loss: smoothing, z-loss, chunk size.
      loss_scale: how the loss is scaled when `dtype` is float16.
      dtype: of activations and matmul inputs; parameters and their update are float32.
      dropout: rate on embeddings and residual updates.
      remat: what the backward pass recomputes.
      seed: of parameters, rows and dropout.
      validation_fraction: share of the text at its end that is never trained on.
      eval_every: steps between validations; also after the last step.
      eval_batches: batches of a validation.
      checkpoint_every: steps between checkpoints; also after the last step.
      keep: newest checkpoints that stay.
      keep_best: checkpoints of lowest validation loss that stay; above 0, an evaluation that is the
        best so far is saved.
      keep_every: checkpoints at multiples of this step stay for ever; 0 for none.
      export: whether `model` below the run directory has the last or the best parameters.
      spike: which steps are left out because their loss leaps; None takes all that are finite.
      mesh: devices by axis, for example `data=2,fsdp=4`; empty for one device. `data` copies the
        state, `fsdp` shards it (ZeRO-3), `tensor` splits heads, ffn and vocabulary.
      patience: consecutive non-finite steps after which the run stops.
    """

    spec: ModelSpec
    data: str | None = None
    tokens: Literal["characters", "bytes"] = "characters"
    out: str = "runs/run"
    steps: int = 1000
    batch: int = 12
    accumulate: int = 1
    length: int = 64
    optimizer: Optimizer = Optimizer()
    loss: LossOptions = LossOptions()
    loss_scale: LossScale = LossScale()
    dtype: DtypeName = "float32"
    dropout: float = 0.0
    remat: Literal["none", "full"] = "none"
    seed: int = 0
    validation_fraction: float = 0.1
    eval_every: int = 250
    eval_batches: int = 50
    checkpoint_every: int = 250
    keep: int = 2
    keep_best: int = 0
    keep_every: int = 0
    export: Literal["last", "best"] = "last"
    spike: SpikeRule | None = None
    mesh: str = ""
    patience: int = 20

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "accumulate", "length", "eval_every", "eval_batches"):
            value = getattr(self, name)
            require(value >= 1, f"{name} is at least 1, found {value}")
        require(self.checkpoint_every >= 1, "checkpoint_every is at least 1")
        require(self.keep >= 1, f"keep is at least 1, found {self.keep}")
        require(self.keep_best >= 0 and self.keep_every >= 0, "keep_best and keep_every are ≥ 0")
        require(
            self.export == "last" or self.keep_best >= 1,
            "export 'best' needs the best checkpoint: give keep_best of at least 1",
        )
        require(0 <= self.seed < 2**32, f"seed is in [0, 2^32), found {self.seed}")
        require(
            self.batch % self.accumulate == 0,
            f"batch {self.batch} is no multiple of accumulate {self.accumulate}",
        )
        require(
            self.length <= self.spec.context,
            f"length {self.length} exceeds the model's context of {self.spec.context}",
        )
        sizes = parse_mesh(self.mesh)
        shards = sizes.get("data", 1) * sizes.get("fsdp", 1)
        rows = self.batch // self.accumulate
        require(
            rows % shards == 0,
            f"{rows} rows at a time are no multiple of data x fsdp = {shards} in {self.mesh!r}",
        )
        known = {"data", "fsdp", "tensor"}
        require(
            set(sizes) <= known, f"mesh {self.mesh!r}: training takes {', '.join(sorted(known))}"
        )
        require(
            0 < self.validation_fraction < 1,
            f"validation_fraction is in (0, 1), found {self.validation_fraction}",
        )
