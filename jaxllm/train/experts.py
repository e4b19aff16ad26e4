"""Experts in training: how evenly they are used, and the bias that evens it out."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from jaxllm.core.tree import flatten, unflatten, unstacked_paths
from jaxllm.ops.routing import balance_step, load_entropy, max_violation

__all__ = ["move_biases", "router_metrics"]

_BIAS, _LOAD, _DROPPED = ".balance_bias", ".load", ".dropped"


def router_metrics(stats: dict[str, Any]) -> dict[str, Any]:
    """Numbers of a step from the statistics of all layers; none for a model without experts.

    Args:
      stats: path -> how many tokens chose each expert (`layers.3.moe.load`), or how many choices
        found no place (`layers.3.moe.dropped`).

    Returns:
      `load_entropy`, in nats, the mean over layers; `max_violation`, the greatest; `dropped`, the
      sum.
    """
    loads = [load for path, load in stats.items() if path.endswith(_LOAD)]
    if not loads:
        return {}
    dropped = [count for path, count in stats.items() if path.endswith(_DROPPED)]
    return {
        "load_entropy": jnp.mean(jnp.stack([load_entropy(load) for load in loads])),
        "max_violation": jnp.max(jnp.stack([max_violation(load) for load in loads])),
        "dropped": jnp.sum(jnp.stack(dropped)),
    }


def move_biases(new: Any, old: Any, stats: dict[str, Any], rate: float) -> Any:
    """Parameters whose balance biases are a step on from the old ones, whatever optimizers did.

    Args:
      new: parameters after the optimizer's update.
      old: parameters that the statistics are of.
      stats: as for `router_metrics`, of all parts of the step together.
      rate: by how much a bias moves.
    """
    before, after = dict(flatten(old)), dict(flatten(new))
    biases = [path for path in before if path.endswith(_BIAS)]
    for path in biases:
        layers = [p.removesuffix(_BIAS) + _LOAD for p in unstacked_paths(path)]
        loads = [stats[name] for name in layers]
        load = loads[0] if before[path].ndim == 1 else jnp.stack(loads)
        after[path] = balance_step(before[path], load, rate)
    return unflatten(after) if biases else new
