"""Fitting a step into memory: remat policies tried ahead of time, the fastest that fits wins."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import jax

from jaxllm.aot.program import Executable
from jaxllm.core.logging import log
from jaxllm.core.policy import Remat
from jaxllm.errors import CapacityError
from jaxllm.train.config import RunConfig

__all__ = ["fit_remat", "memory_limit", "remat_order"]


def remat_order(config: RunConfig, platform: str) -> tuple[Remat, ...]:
    """Remat policies from the fastest to the one that needs the least memory.

    A scan writes all that a layer keeps into stacks; on an accelerator that costs more than to
    compute the elementwise parts again, so `none` is not tried there (docs/benchmarks.md).
    """
    order: tuple[Remat, ...] = ("none", "save_dots", "save_attention", "full")
    return order[1:] if config.layout == "scan" and platform != "cpu" else order


def memory_limit(device: Any) -> int | None:
    """Bytes that programs may take on a device; None where nobody says."""
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return int(stats["bytes_limit"])
    if device.platform == "cpu":  # all devices of the process share the host's memory
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return total // jax.local_device_count()
    return None


def fit_remat(
    config: RunConfig, load: Callable[[RunConfig], Executable], device: Any
) -> tuple[RunConfig, Executable]:
    """The config with the first remat policy whose step fits, and the compiled step.

    Args:
      config: a run with remat `auto`.
      load: compiles (or loads) the step of a config.
      device: whose memory counts; `config.memory_gib` takes its place if it is set.

    Raises:
      CapacityError: none fits; says what each would need.
    """
    limit = int(config.memory_gib * 2**30) or memory_limit(device)
    needs = []
    for remat in remat_order(config, device.platform):
        fitted = dataclasses.replace(config, remat=remat)
        step = load(fitted)
        need = step.report.peak_bytes
        needs.append(f"{remat} {need / 2**30:.2f}")
        if limit is None or need <= limit:
            room = "unknown" if limit is None else f"{limit / 2**30:.2f} GiB"
            log.info("remat: %s takes %.2f GiB, limit %s", remat, need / 2**30, room)
            return fitted, step
    raise CapacityError(
        f"a step of {config.batch} x {config.length} tokens fits with no remat policy into "
        f"{(limit or 0) / 2**30:.2f} GiB; GiB needed: {', '.join(needs)}. Raise `accumulate`, "
        "lower `batch`, or shard over more devices"
    )
