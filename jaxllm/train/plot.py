"""`loss.png`: training and validation loss of a run against its steps, from `metrics.jsonl`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["draw_losses", "smooth"]

_POINTS = 4000
"""More points than pixels say nothing and take time."""


def smooth(values: np.ndarray, span: float) -> np.ndarray:
    """Running mean with weights that fall by e every `span` values, from the first value on."""
    keep, mean, weight = float(np.exp(-1.0 / span)), 0.0, 0.0
    out = np.empty(len(values))
    for i, value in enumerate(values):
        mean, weight = keep * mean + (1 - keep) * value, keep * weight + (1 - keep)
        out[i] = mean / weight
    return out


def _curve(rows: list[dict[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values) of the rows that have a finite value."""
    pairs = [(r["step"], r[name]) for r in rows if r.get(name) is not None]
    steps, values = np.array(pairs, np.float64).reshape(-1, 2).T
    fine = np.isfinite(values)
    return steps[fine], values[fine]


def draw_losses(rows: list[dict[str, Any]], path: Path) -> bool:
    """Draw the losses of metric rows, whole or not at all; False if there is none to draw."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps, losses = _curve(rows, "loss")
    if not len(steps):
        return False
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    mean = smooth(losses, max(1.0, len(losses) / 100))
    thin = slice(None, None, max(1, len(steps) // _POINTS))
    axes.plot(steps[thin], losses[thin], color="tab:blue", alpha=0.25, linewidth=0.8)
    axes.plot(steps[thin], mean[thin], color="tab:blue", linewidth=1.5, label="training, smoothed")
    val_steps, val_losses = _curve(rows, "val_loss")
    if len(val_steps):
        best = int(np.argmin(val_losses))
        label = f"validation (best {val_losses[best]:.4f} at step {val_steps[best]:.0f})"
        axes.plot(val_steps, val_losses, "o-", color="tab:orange", markersize=3, label=label)
    axes.set(xlabel="step", ylabel="loss, nats a token")
    axes.grid(alpha=0.3)
    axes.legend()
    part = path.with_name(f".{path.name}.part")
    canvas.print_png(str(part))
    os.replace(part, path)
    return True
