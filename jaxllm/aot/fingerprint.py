"""Fingerprints: what a stored program or weight file depends on, as one hash."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxllm.core import runtime

__all__ = ["digest", "environment", "package_hash", "settings", "signature"]

_ROOT = Path(__file__).parents[1]


@functools.cache
def package_hash(*parts: str) -> str:
    """SHA-256 of the house's own sources (folders or files below the package; all by default).

    A changed line of code is a changed program: nothing stale is ever loaded.
    """
    roots = [_ROOT / part for part in parts] or [_ROOT, _ROOT.parent / "pallas_kernels"]
    hasher = hashlib.sha256()
    for root in roots:
        for path in sorted(root.rglob("*.py")) if root.is_dir() else [root]:
            hasher.update(str(path.relative_to(_ROOT.parent)).encode())
            hasher.update(path.read_bytes())
    return hasher.hexdigest()


def _cpu_features() -> str:
    """The feature flags of this CPU: jax calls every CPU just `cpu`."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        import platform

        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


_SETTINGS = (
    "jax_allow_f16_reductions",
    "jax_compiler_enable_remat_pass",
    "jax_default_matmul_precision",
    "jax_default_prng_impl",
    "jax_disable_most_optimizations",
    "jax_enable_x64",
    "jax_error_checking_behavior_divide",
    "jax_error_checking_behavior_nan",
    "jax_error_checking_behavior_oob",
    "jax_high_dynamic_range_gumbel",
    "jax_memory_fitting_level",
    "jax_optimization_level",
    "jax_pallas_enable_debug_checks",
    "jax_ragged_dot_use_gpu_pallas_triton_lowering",
    "jax_random_seed_offset",
    "jax_softmax_custom_jvp",
    "jax_threefry_partitionable",
    "jax_use_shardy_partitioner",
)
"""Of jax's settings those that trace or compile the same code to other programs."""


def settings() -> dict[str, str]:
    """jax's settings that change a program, as they are now in this thread."""
    import jax

    values = jax.config.values
    return {name: str(values[name]) for name in _SETTINGS}


def environment(devices: Sequence[Any]) -> dict[str, Any]:
    """What of the machine and the software a program for these devices depends on.

    A program for one device runs on a host of any number of them.
    """
    import jax
    from jaxlib import version as jaxlib

    device = devices[0]
    return {
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "platform": device.platform,
        "platform_version": device.client.platform_version,
        "device_kind": device.device_kind,
        "num_devices": 1 if len(devices) == 1 else device.client.device_count(),
        "cpu_features": _cpu_features() if device.platform == "cpu" else "",
        "xla_flags": runtime.xla_flags(),
        "settings": settings(),
        "sources": package_hash(),
    }


def signature(args: Any) -> list[Any]:
    """Structure, shapes, dtypes and shardings of abstract arguments."""
    import jax

    leaves, structure = jax.tree.flatten(args)
    rows = [[list(x.shape), str(x.dtype), str(getattr(x, "sharding", None))] for x in leaves]
    return [str(structure), rows]


def digest(content: Any) -> str:
    """SHA-256 of JSON-ready content."""
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
