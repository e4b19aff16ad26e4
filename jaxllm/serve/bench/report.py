"""From the records of a benchmark to numbers, a table and a plot.

TTFT: from asking to the first piece. ITL: between two pieces. TPOT: from the first piece to the
last, a token. E2E: from asking to the end. Goodput: answers a second that keep every promise.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxllm.core.config import require
from jaxllm.serve.bench.load import Load, Record

__all__ = ["Slo", "Times", "draw", "summary", "table", "times_of"]

PERCENTILES = (50, 90, 99)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slo:
    """What an answer promises, in milliseconds; None promises nothing."""

    ttft_ms: float | None = None
    tpot_ms: float | None = None
    e2e_ms: float | None = None

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            require(value is None or value > 0, f"{name} is positive, found {value}")

    @property
    def given(self) -> dict[str, float]:
        """The promises by the name of their time."""
        return {k: v for k, v in dataclasses.asdict(self).items() if v is not None}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Times:
    """Times of answers in milliseconds; one entry an answer, but `itl_ms` one a gap."""

    ttft_ms: np.ndarray
    tpot_ms: np.ndarray
    e2e_ms: np.ndarray
    itl_ms: np.ndarray


def times_of(records: Sequence[Record]) -> Times:
    """Times of the answers that came; NaN where an answer is too short to have one."""
    good = [r for r in records if r.error is None]
    first = [r.stamps[0] if r.stamps else np.nan for r in good]
    tpot = [
        (r.stamps[-1] - r.stamps[0]) / (r.output_tokens - 1)
        if r.output_tokens > 1 and len(r.stamps) > 1
        else np.nan
        for r in good
    ]
    gaps = [np.diff(r.stamps) for r in good]
    ms = lambda x: 1e3 * np.asarray(x, np.float64)  # noqa: E731
    return Times(
        ttft_ms=ms(first) - ms([r.sent for r in good]),
        tpot_ms=ms(tpot),
        e2e_ms=ms([r.ended - r.sent for r in good]),
        itl_ms=ms(np.concatenate(gaps) if gaps else []),
    )


def _spread(values: np.ndarray) -> Mapping[str, float | None]:
    """Mean and percentiles of what is finite."""
    values = values[np.isfinite(values)]
    if not len(values):
        return {"mean": None} | {f"p{p}": None for p in PERCENTILES}
    found = np.percentile(values, PERCENTILES)
    mean = {"mean": float(values.mean())}
    return mean | {f"p{p}": float(x) for p, x in zip(PERCENTILES, found, strict=True)}


def summary(load: Load, records: Sequence[Record], seconds: float, slo: Slo) -> dict[str, Any]:
    """One load's numbers, plain JSON."""
    times = times_of(records)
    good = [r for r in records if r.error is None]
    fed, drawn = (sum(getattr(r, n) for r in good) for n in ("input_tokens", "output_tokens"))
    out: dict[str, Any] = {
        "load": load.name,
        **dataclasses.asdict(load),
        "requests": len(records),
        "failed": len(records) - len(good),
        "errors": sorted({r.error for r in records if r.error is not None})[:5],
        "seconds": seconds,
        "input_tokens": fed,
        "output_tokens": drawn,
        "cached_tokens": sum(r.cached_tokens for r in good),
        "requests_per_s": len(good) / seconds,
        "output_tokens_per_s": drawn / seconds,
        "total_tokens_per_s": (fed + drawn) / seconds,
    }
    for field in dataclasses.fields(Times):
        out[field.name] = _spread(getattr(times, field.name))
    if slo.given:
        # A time that an answer is too short to have is no broken promise.
        kept = [~(getattr(times, name) > most) for name, most in slo.given.items()]
        out["goodput_per_s"] = float(np.logical_and.reduce(kept).sum()) / seconds
    return out


def table(runs: Sequence[dict[str, Any]]) -> str:
    """A line a load; times are p50 / p99 in milliseconds."""
    goodput = any("goodput_per_s" in run for run in runs)
    head = ["load", "failed", "requests/s", "output tok/s", "total tok/s"]
    head += ["TTFT ms", "TPOT ms", "ITL ms", "E2E ms"] + ["goodput/s"] * goodput

    def pair(times: Mapping[str, float | None]) -> str:
        both = (times["p50"], times["p99"])
        return " / ".join("–" if x is None else f"{x:.1f}" for x in both)

    rows = [head]
    for run in runs:
        row = [run["load"], f"{run['failed']}/{run['requests']}", f"{run['requests_per_s']:.2f}"]
        row += [f"{run[name]:.1f}" for name in ("output_tokens_per_s", "total_tokens_per_s")]
        row += [pair(run[name]) for name in ("ttft_ms", "tpot_ms", "itl_ms", "e2e_ms")]
        rows.append(row + [f"{run.get('goodput_per_s', 0):.2f}"] * goodput)
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = ["  ".join(cell.rjust(w) for cell, w in zip(r, widths, strict=True)) for r in rows]
    return "\n".join(lines)


def draw(path: Path, runs: Sequence[dict[str, Any]], times: Sequence[Times]) -> None:
    """Shares of TTFT and ITL below a time, a curve a load; with several loads their throughput."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    several = len(runs) > 1
    figure = Figure(figsize=(12 if several else 8, 4), dpi=120, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots(1, 3 if several else 2)
    for panel, name in zip(axes, ("ttft_ms", "itl_ms"), strict=False):
        for run, one in zip(runs, times, strict=True):
            values = np.sort(getattr(one, name))
            values = values[np.isfinite(values)]
            share = np.arange(1, len(values) + 1) / max(1, len(values))
            panel.step(values, share, where="post", label=run["load"])
        panel.set(xlabel=f"{name[:-3].upper()}, ms", ylabel="share of all", ylim=(0, 1.02))
        if any(np.nanmax(getattr(one, name), initial=0) > 0 for one in times):
            panel.set_xscale("log")
        panel.grid(alpha=0.3)
    axes[0].legend(title="load")
    if several:
        last = axes[2]
        last.plot([run["load"] for run in runs], [run["output_tokens_per_s"] for run in runs], "o-")
        last.set(xlabel="load", ylabel="output tokens/s")
        last.set_ylim(bottom=0)
        last.grid(alpha=0.3)
    with path.open("wb") as file:
        canvas.print_png(file)
