"""What the house logs, and how often it traced and compiled."""

import logging
from collections.abc import Iterator

import pytest

from jaxllm.aot import counter
from jaxllm.core.logging import log


class Said(logging.Handler):
    """Keeps messages of warnings."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@pytest.fixture
def warned() -> Iterator[list[str]]:
    """Warnings logged during a test."""
    handler = Said()
    log.addHandler(handler)
    yield handler.messages
    log.removeHandler(handler)


class Counts:
    """Traces and compilations since the last look."""

    def __init__(self) -> None:
        counter.start()
        self.look()

    def look(self) -> tuple[int, int]:
        """(traces, compilations) since the last look."""
        now = (counter.traces(), counter.compilations())
        before, self._last = getattr(self, "_last", now), now
        return now[0] - before[0], now[1] - before[1]


@pytest.fixture
def counts() -> Counts:
    """Counts from jax's own monitoring events."""
    return Counts()
