"""Asking a run to stop, by SIGTERM or by Ctrl-C: it ends its step, saves and sums up."""

from __future__ import annotations

import signal
import threading
from typing import Any

from jaxllm.core.logging import log

__all__ = ["Stop"]


class Stop:
    """Listens while the context lasts.

    In another thread than the main one Python hands out no signals: nothing is listened to there.
    A second Ctrl-C interrupts at once, as Python does by itself.

    Attributes:
      asked: whether the run is to stop.
      interrupted: whether by Ctrl-C: the caller's own program is to stop as well.
    """

    def __init__(self) -> None:
        self.asked = False
        self.interrupted = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            self._before[signal.SIGTERM] = signal.signal(signal.SIGTERM, self._terminate)
            # Somebody else's own handling of Ctrl-C, or its being ignored, stays.
            if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
                self._before[signal.SIGINT] = signal.signal(signal.SIGINT, self._interrupt)
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _terminate(self, *_: Any) -> None:
        self.asked = True

    def _interrupt(self, *_: Any) -> None:
        self.asked = self.interrupted = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        log.warning("interrupted: saving after this step; Ctrl-C again stops at once")
