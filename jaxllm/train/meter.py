"""Where the time of a run goes: step times, tokens a second, MFU, start-up, goodput."""

from __future__ import annotations

import collections
import contextlib
import time
from collections.abc import Iterator
from typing import Any

from jaxllm.aot import counter

__all__ = ["Meter"]


class Meter:
    """The clock of one process's part of a run.

    A step's time goes from the moment its predecessor's metrics were read (or from the end of what
    came between: a validation, a checkpoint) to the moment its own are. Until the first step's are
    read it is start-up.

    Args:
      begun: `time.perf_counter()` at which the run began.
    """

    def __init__(self, begun: float):
        self.begun = begun
        self.peak: float | None = None
        self.startup: dict[str, float] = {}
        self.aside: collections.defaultdict[str, float] = collections.defaultdict(float)
        self._last = begun
        self._startup_seconds: float | None = None
        self._compilations = 0
        self._productive = (0.0, 0, 0.0)
        """Seconds, tokens and FLOPs of the productive steps."""

    def started(self, part: str) -> None:
        """A part of the start-up ends now."""
        now = time.perf_counter()
        self.startup[part] = self.startup.get(part, 0.0) + now - self._last
        self._last = now

    def step(self, tokens: int, flops: float | None, *, skipped: bool) -> dict[str, float | None]:
        """A step ends now.

        Args:
          tokens: of the step.
          flops: that it needed, or None if that is not known.
          skipped: whether it changed nothing, its gradient being non-finite.

        Returns:
          `tokens_per_s`, `mfu` (a share of 1, None without a peak) and `step_ms` of its row.
        """
        now = time.perf_counter()
        seconds = now - self._last
        if self._startup_seconds is None:
            self.started("first_step")
            self._startup_seconds = now - self.begun
            self._compilations = counter.compilations()
        elif skipped:
            self.aside["skipped"] += seconds
        else:
            total, count, work = self._productive
            self._productive = (total + seconds, count + tokens, work + (flops or 0.0))
        self._last = now
        return {
            "tokens_per_s": tokens / seconds,
            "mfu": self._utilisation(flops, seconds),
            "step_ms": 1e3 * seconds,
        }

    def _utilisation(self, flops: float | None, seconds: float) -> float | None:
        if self.peak is None or flops is None or seconds <= 0:
            return None
        return flops / seconds / self.peak

    @contextlib.contextmanager
    def apart(self, kind: str) -> Iterator[None]:
        """What is done inside is no part of a step: `validation`, `checkpoints`, `samples` …"""
        start = time.perf_counter()
        try:
            yield
        finally:
            now = time.perf_counter()
            if self._startup_seconds is not None:
                self.aside[kind] += now - start
            self._last = now

    def summary(self) -> dict[str, Any]:
        """Means and shares so far.

        Returns:
          `seconds` of wall clock; `startup_seconds` and its parts in `startup`; `apart`, seconds by
          kind; `goodput`, the share of the wall clock in productive steps after the first;
          `tokens_per_s` and `mfu` over these; `late_compilations` after the first step.
        """
        seconds = time.perf_counter() - self.begun
        productive, tokens, work = self._productive
        started = self._startup_seconds is not None
        return {
            "seconds": seconds,
            "startup_seconds": self._startup_seconds,
            "startup": self.startup,
            "apart": dict(self.aside),
            "goodput": productive / seconds,
            "tokens_per_s": tokens / productive if productive else None,
            "mfu": self._utilisation(work or None, productive),
            "late_compilations": counter.compilations() - self._compilations if started else 0,
        }
