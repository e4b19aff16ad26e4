"""Which implementation of each op a trace takes: noted for people, kept for whoever asks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

from jaxllm.core.logging import note_once

__all__ = ["taken", "took"]

_asked: ContextVar[dict[str, set[str]] | None] = ContextVar("asked", default=None)


def took(op: str, name: str, why: str | None = None) -> None:
    """Say what an op is traced with; of a free choice with the reason, which people see once."""
    if why is not None:
        note_once(f"{op}: {name} ({why})")
    heard = _asked.get()
    if heard is not None:
        heard.setdefault(op, set()).add(name)


@contextlib.contextmanager
def taken() -> Iterator[dict[str, set[str]]]:
    """Op -> names of the implementations that traces inside of the scope take."""
    heard: dict[str, set[str]] = {}
    token = _asked.set(heard)
    try:
        yield heard
    finally:
        _asked.reset(token)
