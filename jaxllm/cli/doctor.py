"""`jaxllm doctor`: what this machine offers, what would be chosen on it and why."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from jaxllm.cli.options import Doctor
from jaxllm.core import runtime
from jaxllm.errors import CapacityError

__all__ = ["run"]

_PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "numpy",
    "tokenizers",
    "safetensors",
    "gguf",
    "huggingface_hub",
    "tyro",
    "rich",
    "jinja2",
)


def run(options: Doctor) -> int:
    """Run the subcommand; exit code 1 when something needed is missing."""
    problems: list[str] = []
    facts = {
        "python": sys.version.split()[0],
        "packages": _packages(problems),
        "devices": _devices(problems),
        "choices": _choices(),
        "caches": _caches(problems),
        "problems": problems,
    }
    print(json.dumps(facts) if options.json else _text(facts))
    return 1 if problems else 0


def _packages(problems: list[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            problems.append(f"package {name} is missing; run scripts/setup")
    return found


def _devices(problems: list[str]) -> list[dict[str, Any]]:
    try:
        import jax

        devices = jax.devices()
    except Exception as error:  # a backend that fails to start says so in many ways
        problems.append(f"no device: {str(error).splitlines()[0]}")
        return []
    out = []
    for device in devices:
        stats = device.memory_stats() or {}
        limit, used = stats.get("bytes_limit"), stats.get("bytes_in_use")
        free = None if limit is None or used is None else limit - used
        if free is None and device.platform == "cpu":
            free = _host_free_bytes()
        out.append({"device": str(device), "kind": device.device_kind, "free_bytes": free})
    return out


def _host_free_bytes() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(x.split()[1]) * 1024 for x in lines if x.startswith("MemAvailable")), None)


_ATTENTION: dict[str, dict[str, Any]] = {
    "attention": {},
    "attention, packed rows or a window": {"form": "band"},
    "attention, soft-cap or sinks": {"softcap": True},
    "attention, other masks": {"form": "dense"},
}


def _choices() -> dict[str, str]:
    try:
        import jax

        from jaxllm.infer.open import run_policy
        from jaxllm.ops import grouped, paged, quantized
        from jaxllm.ops.attention import Call, choose
        from jaxllm.spec.mask import Causal

        policy = run_policy()
        platform, dtype = jax.default_backend(), policy.compute_dtype
        call = Call(platform=platform, dtype=dtype, head_dim=64)
        out = {}
        for name, changes in _ATTENTION.items():
            choice = choose("auto", dataclasses.replace(call, **changes))
            out[name] = f"{choice.name} ({choice.why})"
        sizes = {"dtype": dtype, "widths": (64, 64), "page_size": 64, "mask": Causal()}
        out["attention over pages"] = _ours(paged.obstacle(**sizes))
        out["attention over pages of 8 bits"] = _ours(paged.obstacle(**sizes, codes=True))
        experts = grouped.choose("auto", platform=platform, dtype=dtype, sides=(2048, 1024))
        out["experts"] = f"{experts.name} ({experts.why})"
        out["packed weights, decoding"] = _ours(quantized.unfit(dtype, "int4", (4096, 4096, 64)))
        out["matmul"] = f"XLA's own in {dtype}"
        fused = ", fused projections" if policy.fused else ""
        out["weights"] = f"{policy.param_dtype}, {policy.layout} layers{fused}"
        return out
    except ImportError as error:
        return {"attention": f"unknown: {error}"}


def _ours(obstacle: str | None) -> str:
    return "our kernel" if obstacle is None else f"XLA's own (our kernel: {obstacle})"


def _caches(problems: list[str]) -> dict[str, Any]:
    try:
        folders = {
            "models": runtime.models_dir(),
            "weights": runtime.weights_dir(),
            "programs": runtime.programs_dir(),
        }
    except CapacityError as error:
        problems.append(str(error))
        return {}
    free = shutil.disk_usage(folders["models"]).free
    return {name: str(path) for name, path in folders.items()} | {"free_bytes": free}


def _gib(number: int | None) -> str:
    return "unknown" if number is None else f"{number / 2**30:.1f} GiB"


def _text(facts: dict[str, Any]) -> str:
    lines = [f"python {facts['python']}"]
    lines += [f"{name} {version}" for name, version in facts["packages"].items()]
    lines += [
        f"device {d['device']}: {d['kind']}, {_gib(d['free_bytes'])} free" for d in facts["devices"]
    ]
    lines += [f"{name}: {choice}" for name, choice in facts["choices"].items()]
    caches = dict(facts["caches"])
    free = caches.pop("free_bytes", None)
    lines += [f"cache {name}: {path}" for name, path in caches.items()]
    lines.append(f"free on the cache's disk: {_gib(free)}")
    lines += [f"problem: {p}" for p in facts["problems"]] or ["all that is needed is here"]
    return "\n".join(lines)
