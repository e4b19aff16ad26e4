"""Which steps are left out because their loss or gradient leaps; runs inside the step."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxllm.train.config import SpikeRule
from jaxllm.typing import Slot

__all__ = ["SpikeStats", "judge", "no_spikes"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SpikeStats:
    """What a run remembers of its losses and gradient norms.

    Attributes:
      count: int32, steps in the statistics.
      mean: float32 [2], running mean of the loss and of the gradient norm.
      variance: float32 [2], running variance.
      row: int32, steps left out in a row.
      total: int32, steps left out in all.
    """

    count: Slot
    mean: Slot
    variance: Slot
    row: Slot
    total: Slot


def no_spikes() -> SpikeStats:
    """The statistics of no step at all."""
    zero, pair = jnp.zeros((), jnp.int32), jnp.zeros(2, jnp.float32)
    return SpikeStats(zero, pair, pair, zero, zero)


def judge(
    stats: SpikeStats,
    loss: Float[Array, ""],
    norm: Float[Array, ""],
    fine: Bool[Array, ""],
    rule: SpikeRule,
) -> tuple[Bool[Array, ""], SpikeStats]:
    """(whether the step is taken, the statistics after it).

    Args:
      stats: of the steps before.
      loss: of this step.
      norm: of its gradient, before clipping.
      fine: whether both are finite; a step that is not is none of this rule's business.
      rule: limits.
    """
    values = jnp.stack([loss, norm.astype(jnp.float32)])
    deviation = jnp.maximum(jnp.sqrt(stats.variance), rule.floor * jnp.abs(stats.mean))
    over = jnp.any(values > stats.mean + rule.threshold * deviation)
    spike = fine & over & (stats.count >= rule.warmup)
    anew = spike & (stats.row >= rule.patience)
    skip = spike & ~anew
    moved = _moved(stats, values, anew, rule)
    taken = fine & ~skip

    def pick(new: Any, old: Any) -> Any:
        return jnp.where(taken, new, old)

    row = jnp.where(fine, jnp.where(skip, stats.row + 1, 0), stats.row)
    return ~skip, SpikeStats(
        pick(moved[0], stats.count),
        pick(moved[1], stats.mean),
        pick(moved[2], stats.variance),
        row.astype(jnp.int32),
        stats.total + skip.astype(jnp.int32),
    )


def _moved(
    stats: SpikeStats, values: Float[Array, "2"], anew: Bool[Array, ""], rule: SpikeRule
) -> tuple[Any, Any, Any]:
    """(count, mean, variance) with one step more.

    The weight of the newest is 1 / count at first: the mean is exact from the first step on.
    """
    count = jnp.where(anew, 0, stats.count) + 1
    weight = jnp.maximum(1.0 - rule.decay, 1.0 / count.astype(jnp.float32))
    gap = values - stats.mean
    mean = stats.mean + weight * gap
    variance = (1.0 - weight) * (stats.variance + weight * gap * gap)
    return count.astype(jnp.int32), mean, variance
