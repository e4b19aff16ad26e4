"""The end of a run in numbers: what its table shows and `summary.json` holds."""

from __future__ import annotations

from typing import Any

import jax

from jaxllm.core.config import to_dict
from jaxllm.train.config import RunConfig

__all__ = ["peak_bytes", "summarise"]


def peak_bytes(devices: Any) -> int | None:
    """Most bytes that were in use at once on one of this process's devices, or None."""
    found = [d.memory_stats() for d in devices if d.process_index == jax.process_index()]
    peaks = [stats["peak_bytes_in_use"] for stats in found if stats]
    return max(peaks) if peaks else None


def summarise(
    config: RunConfig, rows: list[dict[str, Any]], meter: dict[str, Any], **known: Any
) -> dict[str, Any]:
    """The summary of a run.

    Args:
      config: the run.
      rows: of `metrics.jsonl`, those of earlier processes included.
      meter: `Meter.summary()` of this process's part.
      known: `folder`, `step`, `skipped`, `devices` and `predicted_bytes` of the step program.

    Returns:
      JSON-ready numbers. `tokens_per_s`, `mfu`, `goodput` and all seconds are of this process's
      part of the run; losses, `step` and `tokens` of the whole.
    """
    devices = known["devices"]
    last: dict[str, Any] = next((r for r in reversed(rows) if "loss" in r), {})
    checked = [r for r in rows if r.get("val_loss") is not None]
    best: dict[str, Any] = min(checked, key=lambda r: r["val_loss"], default={})
    newest: dict[str, Any] = checked[-1] if checked else {}
    return {
        "folder": str(known["folder"]),
        "step": known["step"],
        "steps": config.steps,
        "finished": known["step"] >= config.steps,
        "tokens": known["step"] * config.batch * config.length,
        "loss": last.get("loss"),
        "best_val_loss": best.get("val_loss"),
        "best_val_step": best.get("step"),
        "val_loss": newest.get("val_loss"),
        "val_step": newest.get("step"),
        "skipped": known["skipped"],
        **to_dict(meter),
        "device": devices[0].device_kind,
        "devices": len(devices),
        "peak_bytes": peak_bytes(devices),
        "predicted_bytes": known["predicted_bytes"],
    }
