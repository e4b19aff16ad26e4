"""Notes for people: to stderr through the standard logger, each text at most once."""

from __future__ import annotations

import logging
import sys

__all__ = ["log", "note_once", "show_notes"]

log = logging.getLogger("jaxllm")
_seen: set[str] = set()


def note_once(message: str) -> None:
    """Log a note at INFO the first time it comes up in this process."""
    if message not in _seen:
        _seen.add(message)
        log.info(message)


class _Stderr(logging.Handler):
    """Writes to whatever stderr is at the moment of the note."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr, flush=True)


def show_notes(level: int = logging.INFO) -> None:
    """Send the house's notes to stderr; the command line does this."""
    if not log.handlers:
        log.addHandler(_Stderr())
        log.propagate = False
    log.setLevel(level)
