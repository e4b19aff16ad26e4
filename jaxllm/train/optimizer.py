"""Optimizers and schedules from optax; strict promotion is off inside, as optax needs."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import jax
import optax

from jaxllm.core.tree import flatten, map_leaves, segments_of
from jaxllm.errors import ConfigError
from jaxllm.spec.model import ModelSpec
from jaxllm.spec.param import ParamDef
from jaxllm.spec.table import FUSED, model_table
from jaxllm.train.config import Optimizer

__all__ = ["make_optimizer", "make_schedule", "map_moments", "optimizer_text"]

_RMS = 0.2
"""Root mean square of a Muon update before the learning rate, that of AdamW in practice: one
learning rate serves both (arXiv 2502.16982)."""


def make_schedule(config: Optimizer, steps: int) -> optax.Schedule:
    """Learning rate by step, counted from 0.

    With w = max(warmup_steps, 1): step i < w has (i + 1) / w of the peak, and from the peak at step
    w - 1 the named schedule goes on so that step `steps - 1`, the last one, has its last value. A
    warm-up of `steps` and more is cut off by the end of the run.
    """
    peak, low = config.learning_rate, config.learning_rate * config.final
    lead = max(config.warmup_steps - 1, 0)
    rest = max(steps - 1 - lead, 1)
    decay = max(int(rest * config.decay_fraction), 1)
    after = {
        "constant": lambda: optax.constant_schedule(peak),
        "linear": lambda: optax.linear_schedule(peak, low, rest),
        "cosine": lambda: optax.cosine_decay_schedule(peak, rest, config.final),
        "wsd": lambda: optax.join_schedules(
            [optax.constant_schedule(peak), optax.linear_schedule(peak, low, decay)],
            [rest - decay],
        ),
    }[config.schedule]()
    if not lead:
        return after
    warm = optax.linear_schedule(peak / config.warmup_steps, peak, lead)
    return optax.join_schedules([warm, after], [lead])


def _decays(params: Any) -> Any:
    """True for matrices and tables: leaves of two dims and more besides a layers axis."""

    def decays(path: Any, x: Any) -> bool:
        names = [str(getattr(p, "key", p)) for p in path]
        stacked = names[0] == "layers" and ":" in names[1]
        vector = names[-1] in ("scale", "q_norm", "k_norm") or names[-1].endswith("bias")
        return not vector and x.ndim - stacked >= 2

    return jax.tree_util.tree_map_with_path(decays, params)


def _matrix(path: str, definition: ParamDef) -> Any:
    """How Muon sees a leaf: its inputs against its outputs, layers apart; None where AdamW acts.

    The head is left to AdamW, as its authors do: rows of words are no map between equal spaces.
    """
    from optax.contrib import MuonDimensionNumbers

    if not definition.inputs or not path.startswith("layers."):
        return None
    lead = int(definition.axes[0] == "layers")
    dims = tuple(range(len(definition.shape)))
    return MuonDimensionNumbers(
        dims[lead : lead + definition.inputs], dims[lead + definition.inputs :]
    )


def _muon(
    config: Optimizer, schedule: optax.Schedule, spec: ModelSpec
) -> optax.GradientTransformation:
    """Muon on the matrices of the layers, AdamW on everything else; a fused leaf is one matrix."""
    from optax.contrib import muon

    def matrices(params: Any) -> Any:
        names = {path.split(".")[-1] for path, _ in flatten(params)}
        table = model_table(spec, segments_of(params["layers"]), not names.isdisjoint(FUSED))
        table = dict(flatten(table))
        return map_leaves(lambda path, _: _matrix(path, table[path]), params)

    def labels(params: Any) -> Any:
        return jax.tree.map(
            lambda m: "adamw" if m is None else "muon",
            matrices(params),
            is_leaf=lambda m: m is None or isinstance(m, tuple),
        )

    return optax.partition(
        {
            "muon": muon(
                schedule,
                beta=config.momentum,
                eps=config.eps,
                weight_decay=config.weight_decay,
                muon_weight_dimension_numbers=matrices,
                consistent_rms=_RMS,
            ),
            "adamw": _adamw(config, schedule),
        },
        labels,
    )


def _adamw(config: Optimizer, schedule: optax.Schedule) -> optax.GradientTransformation:
    return optax.adamw(
        schedule,
        config.b1,
        config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=_decays,
    )


def _adafactor(config: Optimizer, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Adafactor with the decay scaled by the learning rate, as in the others.

    `optax.adafactor(weight_decay_rate=0.1)` takes a tenth off the parameters at every step,
    whatever the learning rate is.
    """
    return optax.chain(
        optax.adafactor(None),
        optax.scale(-1.0),
        optax.add_decayed_weights(config.weight_decay, _decays),
        optax.scale_by_learning_rate(schedule),
    )


def _custom(config: Optimizer, schedule: optax.Schedule) -> optax.GradientTransformation:
    build = config.build
    assert build is not None  # the config checks it
    made = build(config, schedule)
    if not (callable(getattr(made, "init", None)) and callable(getattr(made, "update", None))):
        raise ConfigError(
            f"optimizer.build returns {type(made).__name__}; it takes (config, schedule) and "
            "returns an optax.GradientTransformation"
        )
    return made


def make_optimizer(config: Optimizer, steps: int, spec: ModelSpec) -> optax.GradientTransformation:
    """The gradient transformation of a config, global-norm clipping first.

    Args:
      config: what it is.
      steps: of the whole run, for the schedule.
      spec: the model, which says what of a leaf is input and what output.

    Raises:
      ConfigError: `build` of a custom optimizer returns something else.
    """
    schedule = make_schedule(config, steps)
    kinds: dict[str, Callable[[], optax.GradientTransformation]] = {
        "adamw": lambda: _adamw(config, schedule),
        "lion": lambda: optax.lion(
            schedule, config.b1, config.b2, weight_decay=config.weight_decay, mask=_decays
        ),
        "adafactor": lambda: _adafactor(config, schedule),
        "muon": lambda: _muon(config, schedule, spec),
        "custom": lambda: _custom(config, schedule),
    }
    parts = [optax.clip_by_global_norm(config.clip)] if config.clip else []
    return optax.chain(*parts, kinds[config.kind]())


def optimizer_text(optimizer: optax.GradientTransformation, params: Any) -> str:
    """SHA-256 of what an optimizer computes, for the fingerprint of a program that holds it.

    Python code of the user's own has no version: the lowered text says exactly what it does, with
    every constant it closes over, and costs a trace of the update alone.

    Args:
      optimizer: any.
      params: abstract parameters.
    """

    def both(grads: Any, params: Any) -> Any:
        with jax.numpy_dtype_promotion("standard"):
            state = optimizer.init(params)
            return optimizer.update(grads, state, params)

    text = jax.jit(both).lower(params, params).as_text()
    return hashlib.sha256(text.encode()).hexdigest()


def map_moments(
    function: Callable[..., Any],
    opt_state: Any,
    params: Any,
    *rest: Any,
    others: Callable[..., Any],
) -> Any:
    """The optimizer's state with `function(moment, param, *rest)` where a leaf belongs to a param.

    It belongs to the parameter whose path its own ends with; `optax.tree.map_params` takes no
    optimizer that looks at the parameters' paths.

    Args:
      function: of a moment, its parameter, and the leaves of `rest` at that parameter.
      opt_state: of any optimizer.
      params: parameters, or their shapes.
      rest: trees like `params`.
      others: of every other leaf, for example a count.
    """
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    columns = [jax.tree.leaves(tree) for tree in (params, *rest)]
    known = {path: row for path, *row in zip(paths, *columns, strict=True)}

    def leaf(path: tuple[Any, ...], x: Any) -> Any:
        for start in range(len(path)):
            if path[start:] in known:
                return function(x, *known[path[start:]])
        return others(x)

    return jax.tree_util.tree_map_with_path(leaf, opt_state)
