"""Counts traces and compilations of this process by `jax.monitoring` events, nothing of our own."""

from __future__ import annotations

import collections

__all__ = ["compilations", "compile_seconds", "start", "traces"]

_TRACE = "/jax/core/compile/jaxpr_trace_duration"
_COMPILE = "/jax/core/compile/backend_compile_duration"
_counts: collections.Counter[str] = collections.Counter()
_seconds: dict[str, float] = {}
_started: list[bool] = []


def start() -> None:
    """Begin to count; call it before the first jax function runs. Later calls do nothing."""
    if _started:
        return
    import jax.monitoring

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        _counts[event] += 1
        _seconds[event] = _seconds.get(event, 0.0) + duration_secs

    jax.monitoring.register_event_duration_secs_listener(listen)
    _started.append(True)


def compilations() -> int:
    """Backend compilations since `start`."""
    return _counts[_COMPILE]


def traces() -> int:
    """Functions traced to jaxprs since `start`."""
    return _counts[_TRACE]


def compile_seconds() -> float:
    """Seconds spent in backend compilations since `start`."""
    return _seconds.get(_COMPILE, 0.0)
