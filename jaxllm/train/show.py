"""What a run says: a live line and a bar on a terminal, else plain lines; a table at its end."""

from __future__ import annotations

import sys
import time
from typing import Any

__all__ = ["Show", "facts", "line"]

_QUIET_SECONDS = 1.0
"""Plain lines of steps are this far apart, unless `log_every` says otherwise."""


def line(row: dict[str, Any], steps: int) -> str:
    """One step in words: what is None or absent in its row is left out."""
    parts = [f"step {row['step']}/{steps}"]

    def say(name: str, form: str) -> None:
        if row.get(name) is not None:
            parts.append(form.format(row[name]))

    say("loss", "loss {:.4f}")
    say("grad_norm", "grad norm {:.3f}")
    say("lr", "lr {:.2e}")
    say("load_entropy", "load entropy {:.3f}")
    say("max_violation", "max violation {:.2f}")
    say("dropped", "dropped {:,.0f}")
    say("tokens_per_s", "{:,.0f} tokens/s")
    say("step_ms", "{:,.1f} ms")
    if row.get("mfu") is not None:
        parts.append(f"MFU {_percent(row['mfu'])}")
    say("val_loss", "val {:.4f}")
    return "  ".join(parts)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _span(seconds: float) -> str:
    """Seconds as people say them."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def facts(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """(name, value) of the final table; what is not known is left out."""
    s = summary
    found = [
        ("steps", f"{s['step']:,} of {s['steps']:,}"),
        ("tokens", f"{s['tokens']:,}"),
        ("wall clock", _span(s["seconds"])),
    ]

    def add(name: str, value: Any, text: Any) -> None:
        if value is not None:
            found.append((name, text(value)))

    at = lambda which: lambda v: f"{v:.4f} at step {s[which]:,}"  # noqa: E731
    add("best validation loss", s["best_val_loss"], at("best_val_step"))
    add("last validation loss", s["val_loss"], at("val_step"))
    add("tokens/s", s["tokens_per_s"], "{:,.0f}".format)
    add("MFU", s["mfu"], lambda v: f"{_percent(v)} of {s['devices']} x {s['device']}")
    startup = {k.replace("_", " "): v for k, v in s["startup"].items() if v >= 0.05}
    parts = ", ".join(f"{k} {_span(v)}" for k, v in startup.items())
    add("start-up", s["startup_seconds"], lambda v: f"{_span(v)} ({parts})")
    lost = "".join(f", {k} {_span(v)}" for k, v in s["apart"].items() if v >= 0.05)
    found.append(("goodput", _percent(s["goodput"]) + (f" (apart{lost[1:]})" if lost else "")))
    if s["skipped"]:
        found.append(("steps skipped", f"{s['skipped']:,} (not finite)"))
    predicted = _size(s["predicted_bytes"])
    peak = s["peak_bytes"]
    found.append(
        ("device memory", (f"peak {_size(peak)}, " if peak else "") + f"step predicted {predicted}")
    )
    found.append(("run directory", s["folder"]))
    return found


class Show:
    """The terminal's view of a run; a context manager around its steps.

    Args:
      steps: of the run.
      log_every: steps between plain lines; 0 is one a second at most.
      quiet: say nothing at all.
    """

    def __init__(self, steps: int, *, log_every: int = 0, quiet: bool = False):
        self.steps = steps
        self.log_every = log_every
        self.quiet = quiet
        self._terminal = not quiet and sys.stdout.isatty()
        self._said: float | None = None
        self._first = 0
        self._begun = time.perf_counter()
        self._live: Any = None

    def __enter__(self) -> Show:
        if self._terminal:
            self._live = _Live(self.steps)
        return self

    def __exit__(self, *_: Any) -> None:
        if self._live is not None:
            self._live.close()
            self._live = None

    def step(self, row: dict[str, Any]) -> None:
        """Say how a step went, or let it pass."""
        if self.quiet:
            return
        text = line(row, self.steps)
        if self._live is not None:
            self._live.update(row["step"], text)
        if self._due(row):
            self.note(text + ("" if self._live is not None else self._left(row["step"])))

    def _due(self, row: dict[str, Any]) -> bool:
        """Whether a step gets a line that stays; the live one shows the others."""
        now, step = time.perf_counter(), row["step"]
        edge = self._said is None or step == self.steps or "val_loss" in row
        if self.log_every:
            due = edge or step % self.log_every == 0
        else:
            due = edge or (self._live is None and now - (self._said or 0.0) >= _QUIET_SECONDS)
        if self._said is None:
            self._first, self._begun = step, now
        if due:
            self._said = now
        return due

    def _left(self, step: int) -> str:
        """How long it will still take, from the pace since the first step."""
        done, left = step - self._first, self.steps - step
        if not done or not left:
            return ""
        return f"  {_span((time.perf_counter() - self._begun) / done * left)} left"

    def note(self, text: str) -> None:
        """A line that stays, above the live one."""
        if self.quiet:
            return
        if self._live is not None:
            self._live.print(text)
        else:
            print(text, flush=True)

    def table(self, summary: dict[str, Any]) -> None:
        """The end of the run."""
        if self.quiet:
            return
        rows = facts(summary)
        if self._terminal:
            from rich.console import Console
            from rich.table import Table

            table = Table(show_header=False)
            for name, value in rows:
                table.add_row(name, value)
            Console(markup=False, highlight=False).print(table)
            return
        width = max(len(name) for name, _ in rows)
        print("\n".join(f"{name:<{width}}  {value}" for name, value in rows), flush=True)


class _Live:
    """A line of metrics over a bar, redrawn a few times a second."""

    def __init__(self, steps: int):
        from rich.console import Console, Group
        from rich.live import Live
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
        from rich.text import Text

        self._text = Text("")
        self._bar = Progress(BarColumn(None), MofNCompleteColumn(), TimeRemainingColumn())
        self._task = self._bar.add_task("", total=steps)
        self._started = False
        console = Console(markup=False, highlight=False)
        self._console = console
        self._live = Live(
            Group(self._text, self._bar), console=console, refresh_per_second=4, transient=True
        )
        self._live.start()

    def update(self, step: int, text: str) -> None:
        """Show a step."""
        self._text.plain = text
        if not self._started:
            # A resumed run's pace counts from where it went on.
            self._bar.reset(self._task, completed=step)
            self._started = True
        self._bar.update(self._task, completed=step)

    def print(self, text: str) -> None:
        """A line above."""
        self._console.print(text, soft_wrap=True)

    def close(self) -> None:
        """Take the line away."""
        self._live.stop()
