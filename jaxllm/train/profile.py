"""A trace of some steps by `jax.profiler`, for TensorBoard, XProf or Perfetto."""

from __future__ import annotations

from pathlib import Path

from jaxllm.core.config import require
from jaxllm.core.logging import log

__all__ = ["Profile", "communication", "exposed", "parse_profile"]

_COLLECTIVE = ("nccl", "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "permute")


def parse_profile(text: str) -> tuple[int, int]:
    """First and last step of a trace from a text such as `10:13`; (0, 0) of an empty one."""
    if not text:
        return 0, 0
    first, _, last = text.partition(":")
    whole = first.isdecimal() and last.isdecimal()
    require(
        whole and 1 <= int(first) <= int(last),
        f"profile {text!r}: write FIRST:LAST, steps counted from 1, for example 10:13",
    )
    return int(first), int(last)


class Profile:
    """Starts and stops the trace of a run.

    Args:
      text: `FIRST:LAST`, or empty for no trace.
      folder: where it goes.
    """

    def __init__(self, text: str, folder: Path):
        self.first, self.last = parse_profile(text)
        self._folder = folder
        self._running = False

    def start(self) -> None:
        """Begin to trace."""
        import jax

        self._folder.mkdir(parents=True, exist_ok=True)
        jax.profiler.start_trace(str(self._folder))
        self._running = True

    def stop(self) -> None:
        """End the trace, if one runs."""
        import jax

        if self._running:
            self._running = False
            jax.profiler.stop_trace()
            log.info("profile of steps %d to %d: %s", self.first, self.last, self._folder)


def exposed(
    hidden: list[tuple[float, float]], covers: list[tuple[float, float]]
) -> tuple[float, float]:
    """Length of the union of intervals (begin, end), and of what no interval of `covers` covers."""

    def union(intervals: list[tuple[float, float]]) -> list[tuple[float, float]]:
        merged: list[tuple[float, float]] = []
        for begin, end in sorted(intervals):
            if merged and begin <= merged[-1][1]:
                merged[-1] = merged[-1][0], max(end, merged[-1][1])
            else:
                merged.append((begin, end))
        return merged

    def length(intervals: list[tuple[float, float]]) -> float:
        return float(sum(end - begin for begin, end in union(intervals)))

    return length(hidden), length([*hidden, *covers]) - length(covers)


def communication(folder: Path) -> dict[str, float] | None:
    """What collectives cost in a trace: milliseconds of the first device, of all its traced steps.

    Args:
      folder: where `jax.profiler` wrote.

    Returns:
      `busy_ms`: any kernel runs; `collective_ms`: a collective runs; `exposed_ms`: a collective
      runs and nothing else does; and the sum of each kernel of collectives by its name. None if the
      trace has no device with streams of kernels (a CPU).
    """
    from jax.profiler import ProfileData

    files = sorted(folder.glob("**/*.xplane.pb"))
    require(bool(files), f"no trace in {folder}")
    data = ProfileData.from_file(str(files[-1]))
    planes = sorted((p for p in data.planes if p.name.startswith("/device:")), key=lambda p: p.name)
    for plane in planes:
        kinds: tuple[list, list] = ([], [])
        sums: dict[str, float] = {}
        for line in plane.lines:
            if not line.name.startswith("Stream"):
                continue
            for event in line.events:
                collective = any(word in event.name.lower() for word in _COLLECTIVE)
                span = event.start_ns / 1e6, (event.start_ns + event.duration_ns) / 1e6
                kinds[collective].append(span)
                if collective:
                    name = event.name.partition("(")[0]
                    sums[name] = sums.get(name, 0.0) + event.duration_ns / 1e6
        if any(kinds):
            work, collectives = kinds
            total, alone = exposed(collectives, work)
            busy = exposed([*work, *collectives], [])[0]
            return {"busy_ms": busy, "collective_ms": total, "exposed_ms": alone} | sums
    return None
