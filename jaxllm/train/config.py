"""RunConfig: everything that a training run depends on, as one frozen value."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

from jaxllm.core.config import require
from jaxllm.core.mesh import parse_mesh
from jaxllm.core.policy import AttentionKind, ExpertsKind, Remat, ScanKind
from jaxllm.core.precision import DtypeName
from jaxllm.data.tokens import check_tokenizer
from jaxllm.ops.loss import LossOptions
from jaxllm.spec.model import ModelSpec
from jaxllm.train.mesh import check_mesh
from jaxllm.train.profile import parse_profile

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
      data: text file, JSON lines, Parquet, token array, a folder of such files, or `data:NAME`
        that was pulled; `--data` overrides it.
      tokenizer: `characters` of the data, `bytes`, `bpe:VOCAB` (trained on the training part), a
        model's path or name, or `none` for token arrays.
      text_field: of JSON lines and Parquet, that holds the text.
      end_token: id that ends the documents of token arrays.
      rows: `windows` at random places of the token stream, or whole documents `packed`.
      out: run directory.
      steps: optimizer steps.
      batch: rows of a step.
      accumulate: parts that a step's rows are taken in, one after the other.
      length: tokens of a row.
      optimizer: how parameters move.
      loss: smoothing, z-loss, chunk size.
      loss_scale: how the loss is scaled when `dtype` is float16.
      dtype: of activations and matmul inputs.
      param_dtype: of parameters, gradients and moments; updates are computed in float32. In
        bfloat16 a small update is rounded away: for memory, or to compare speed.
      layout: of the layers: `scan` compiles in a time that does not grow with depth, `unrolled`
        runs faster.
      fused: train query/key/value and gate/up as one matrix each: fewer and larger products. The
        exported model has them apart.
      logit_dtype: of logits in the loss; its statistics are float32 anyhow.
      attention: implementation of softmax attention, as in `Policy`.
      scan: implementation of recurrences, as in `Policy`.
      experts: implementation of the products of experts, as in `Policy`.
      balance_rate: by how much a step moves the balance bias of each expert, towards equal loads;
        for models that have them.
      expert_capacity: tokens of an expert on a device, as a multiple of its even share; those past
        it go without the expert. 0 drops none.
      dropout: rate on embeddings and residual updates.
      remat: what the backward pass recomputes; `auto` compiles policies from the fastest on and
        takes the first that fits into a device's memory.
      memory_gib: that `auto` may fill on a device; 0 for what the device has.
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
        state, `fsdp` shards what `sharding` names, `tensor` splits heads, ffn and vocabulary.
      sharding: what `fsdp` shards: nothing (`replicated`), optimizer state (`zero1`), gradients
        too (`zero2`), parameters too (`zero3`); `hybrid` is `zero3` with gradients and optimizer
        state sharded over `data` as well.
      sequence_parallel: between the ops of a layer, split tokens over `tensor`.
      patience: consecutive non-finite steps after which the run stops.
      log_every: steps between lines on the terminal; 0: each step that takes over a second, else
        about one line a second. The first and the last step, and validations, always.
      tensorboard: write scalars into `tensorboard/` of the run directory.
      wandb: project of Weights & Biases to report to (the package is installed apart); empty: none.
      sample_every: steps between samples of text; 0 is never.
      sample_prompt: what a sample begins with.
      sample_tokens: at most this many new tokens a sample.
      profile: steps of which `jax.profiler` takes a trace into `profile/`, as `FIRST:LAST`, both
        included; empty: none.
    """

    spec: ModelSpec
    data: str | None = None
    tokenizer: str = "characters"
    text_field: str = "text"
    end_token: int | None = None
    rows: Literal["windows", "packed"] = "windows"
    out: str = "runs/run"
    steps: int = 1000
    batch: int = 12
    accumulate: int = 1
    length: int = 64
    optimizer: Optimizer = Optimizer()
    loss: LossOptions = LossOptions()
    loss_scale: LossScale = LossScale()
    dtype: DtypeName = "float32"
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    logit_dtype: Literal["float32", "bfloat16"] = "float32"
    attention: AttentionKind = "auto"
    scan: ScanKind = "auto"
    experts: ExpertsKind = "auto"
    layout: Literal["scan", "unrolled"] = "scan"
    fused: bool = False
    balance_rate: float = 1e-3
    expert_capacity: float = 0.0
    dropout: float = 0.0
    remat: Remat | Literal["auto"] = "none"
    memory_gib: float = 0.0
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
    sharding: Literal["replicated", "zero1", "zero2", "zero3", "hybrid"] = "zero3"
    sequence_parallel: bool = True
    patience: int = 20
    log_every: int = 0
    tensorboard: bool = True
    wandb: str = ""
    sample_every: int = 0
    sample_prompt: str = "\n"
    sample_tokens: int = 100
    profile: str = ""

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "accumulate", "length", "eval_every", "eval_batches"):
            value = getattr(self, name)
            require(value >= 1, f"{name} is at least 1, found {value}")
        require(self.checkpoint_every >= 1, "checkpoint_every is at least 1")
        require(
            not (self.fused and parse_mesh(self.mesh).get("tensor", 1) > 1),
            "fused projections cannot be split over a tensor axis; set fused=False",
        )
        for name in ("balance_rate", "expert_capacity", "memory_gib"):
            require(getattr(self, name) >= 0, f"{name} is ≥ 0, found {getattr(self, name)}")
        require(
            self.spec.decodes and self.spec.head.logits,
            "the loss is on the next token: an encoder would see it, and a body has no logits",
        )
        check_tokenizer(self.tokenizer, self.spec.vocab)
        require(
            self.end_token is None or 0 <= self.end_token < self.spec.vocab,
            f"end_token is in [0, {self.spec.vocab}), found {self.end_token}",
        )
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
        check_mesh(self)
        self._check_seeing()
        require(
            0 < self.validation_fraction < 1,
            f"validation_fraction is in (0, 1), found {self.validation_fraction}",
        )

    def _check_seeing(self) -> None:
        require(self.log_every >= 0, f"log_every is ≥ 0, found {self.log_every}")
        require(self.sample_every >= 0, f"sample_every is ≥ 0, found {self.sample_every}")
        require(self.sample_tokens >= 1, f"sample_tokens is at least 1, found {self.sample_tokens}")
        require(
            not self.sample_every or bool(self.sample_prompt),
            "sample_prompt is empty; give at least one character",
        )
        first = parse_profile(self.profile)[0]
        require(
            first <= self.steps, f"profile {self.profile!r}: the run has only {self.steps} steps"
        )
