"""A trace of some steps by `jax.profiler`, for TensorBoard, XProf or Perfetto."""

from __future__ import annotations

from pathlib import Path

from jaxllm.core.config import require
from jaxllm.core.logging import log

__all__ = ["Profile", "parse_profile"]


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
