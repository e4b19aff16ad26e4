"""A clock that the test turns."""


class Clock:
    """Stands in for the module `time`."""

    def __init__(self, now: float = 0.0):
        self.now = now

    def perf_counter(self) -> float:
        """Seconds."""
        return self.now
