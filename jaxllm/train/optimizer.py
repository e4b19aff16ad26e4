"""Optimizers and schedules from optax; strict promotion is off inside, as optax needs."""

from __future__ import annotations

from typing import Any

import jax
import optax

from jaxllm.train.config import Optimizer

__all__ = ["make_optimizer", "make_schedule"]


def make_schedule(config: Optimizer, steps: int) -> optax.Schedule:
    """Learning rate by step: linear warm-up, then the named schedule to the last step."""
    peak, low = config.learning_rate, config.learning_rate * config.final
    rest = max(steps - config.warmup_steps, 1)
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
    if not config.warmup_steps:
        return after
    warm = optax.linear_schedule(peak / config.warmup_steps, peak, config.warmup_steps - 1 or 1)
    return optax.join_schedules([warm, after], [config.warmup_steps])


def _decays(params: Any) -> Any:
    """True for matrices and tables: leaves of two dims and more besides a layers axis."""

    def decays(path: Any, x: jax.Array) -> bool:
        names = [str(getattr(p, "key", p)) for p in path]
        stacked = names[0] == "layers" and ":" in names[1]
        vector = names[-1] == "scale" or names[-1].endswith("bias")
        return not vector and x.ndim - stacked >= 2

    return jax.tree_util.tree_map_with_path(decays, params)


def make_optimizer(config: Optimizer, steps: int) -> optax.GradientTransformation:
    """The gradient transformation of a config, global-norm clipping first."""
    schedule = make_schedule(config, steps)
    kinds = {
        "adamw": lambda: optax.adamw(
            schedule, config.b1, config.b2, weight_decay=config.weight_decay, mask=_decays
        ),
        "lion": lambda: optax.lion(
            schedule, config.b1, config.b2, weight_decay=config.weight_decay, mask=_decays
        ),
        "adafactor": lambda: optax.adafactor(
            schedule, weight_decay_rate=config.weight_decay or None, weight_decay_mask=_decays
        ),
    }
    parts = [optax.clip_by_global_norm(config.clip)] if config.clip else []
    return optax.chain(*parts, kinds[config.kind]())
