"""RunConfig: everything that a training run depends on, as one frozen value."""

from __future__ import annotations

import dataclasses
from typing import Literal

from jaxllm.core.config import require
from jaxllm.core.precision import DtypeName
from jaxllm.ops.loss import LossOptions
from jaxllm.spec.model import ModelSpec
from jaxllm.train.mesh import check_mesh

__all__ = ["LossScale", "Optimizer", "RunConfig"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer:
    """AdamW (or a kin) with warm-up and a schedule.

    Attributes:
      kind: `adamw`, `lion` or `adafactor`, from optax.
      learning_rate: at the peak.
      schedule: after warm-up: `cosine` to `final`, `linear` to `final`, `wsd` (constant, then
        linear to `final` over the last `decay_fraction`), or `constant`.
      warmup_steps: linear from 0.
      final: last learning rate, as a share of the peak.
      decay_fraction: of all steps, for `wsd`.
      weight_decay: on matrices and tables, not on vectors.
      b1: decay of the first moment.
      b2: decay of the second moment.
      clip: largest global norm of the gradient; 0 is no bound.
    """

    kind: Literal["adamw", "lion", "adafactor"] = "adamw"
    learning_rate: float = 1e-3
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    warmup_steps: int = 100
    final: float = 0.1
    decay_fraction: float = 0.2
    weight_decay: float = 0.1
    b1: float = 0.9
    b2: float = 0.99
    clip: float = 1.0

    def __post_init__(self) -> None:
        require(self.learning_rate > 0, f"learning_rate is positive, found {self.learning_rate}")
        require(self.warmup_steps >= 0, f"warmup_steps is ≥ 0, found {self.warmup_steps}")
        require(0 <= self.final <= 1, f"final is in [0, 1], found {self.final}")
        require(0 <= self.b1 < 1 and 0 <= self.b2 < 1, "b1 and b2 are in [0, 1)")
        require(self.clip >= 0, f"clip is ≥ 0, found {self.clip}")


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
      keep: checkpoints that stay.
      mesh: devices by axis, for example `data=2,fsdp=4`; empty for one device. `data` copies the
        state, `fsdp` shards what `sharding` names, `tensor` splits heads, ffn and vocabulary.
      sharding: what `fsdp` shards: nothing (`replicated`), optimizer state (`zero1`), gradients
        too (`zero2`), parameters too (`zero3`); `hybrid` is `zero3` with gradients and optimizer
        state sharded over `data` as well.
      sequence_parallel: between the ops of a layer, split tokens over `tensor`.
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
    mesh: str = ""
    sharding: Literal["replicated", "zero1", "zero2", "zero3", "hybrid"] = "zero3"
    sequence_parallel: bool = True
    patience: int = 20

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "accumulate", "length", "eval_every", "eval_batches"):
            value = getattr(self, name)
            require(value >= 1, f"{name} is at least 1, found {value}")
        require(self.checkpoint_every >= 1, "checkpoint_every is at least 1")
        require(self.keep >= 1, f"keep is at least 1, found {self.keep}")
        require(0 <= self.seed < 2**32, f"seed is in [0, 2^32), found {self.seed}")
        require(
            self.batch % self.accumulate == 0,
            f"batch {self.batch} is no multiple of accumulate {self.accumulate}",
        )
        require(
            self.length <= self.spec.context,
            f"length {self.length} exceeds the model's context of {self.spec.context}",
        )
        check_mesh(self)
        require(
            0 < self.validation_fraction < 1,
            f"validation_fraction is in (0, 1), found {self.validation_fraction}",
        )
