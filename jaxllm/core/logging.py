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


def show_notes(level: int = logging.INFO) -> None:
    """Send the house's notes to stderr; the command line does this."""
    if not log.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(message)s"))
        log.addHandler(handler)
        log.propagate = False
    log.setLevel(level)
