"""Metrics in Prometheus' format: the engine's counts, and times seen by the routes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from jaxllm.serve.embedder import Embedder
from jaxllm.serve.http.answering import Answering
from jaxllm.serve.stats import Stats

__all__ = ["Metrics"]

_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
_GAUGES = {
    "waiting": "sequences that wait",
    "running": "sequences that run",
    "held_pages": "pages that sequences hold",
    "total_pages": "pages there are",
    "host_page_bytes": "bytes of pages that the prefix cache keeps on the host",
}
_COUNTERS = {
    "steps": "steps dispatched",
    "drawn_tokens": "tokens of answers",
    "fed_tokens": "tokens computed",
    "prompt_tokens": "tokens of prompts admitted",
    "hit_tokens": "of these, from the prefix cache",
    "spilled_pages": "pages copied to the host",
    "restored_pages": "pages copied back from it",
    "drafted_tokens": "guesses verified",
    "accepted_tokens": "of these, right",
    "preemptions": "sequences that gave up their pages",
    "host_seconds": "host time in planning, dispatching and handing out",
}


class _Counts:
    """The engine's own counts, read when asked."""

    def __init__(self, engine: Answering | None, embedder: Embedder | None):
        self._engine, self._embedder = engine, embedder

    def collect(self) -> Iterator[Any]:
        """Metric families."""
        stats = Stats() if self._engine is None else self._engine.stats()
        if self._engine is None and self._embedder is not None:
            stats.compilations = self._embedder.compilations
        for name, what in _GAUGES.items():
            yield GaugeMetricFamily(f"jaxllm_{name}", what, getattr(stats, name))
        for name, what in _COUNTERS.items():
            yield CounterMetricFamily(f"jaxllm_{name}", what, getattr(stats, name))
        what = "XLA compilations since ready, by jax.monitoring; must stay 0"
        yield CounterMetricFamily("jaxllm_compilations_after_ready", what, stats.compilations)


class Metrics:
    """One registry a server."""

    def __init__(self, engine: Answering | None, embedder: Embedder | None = None):
        self.registry = CollectorRegistry()
        counts = _Counts(engine, embedder)
        self.registry.register(counts)  # pyright: ignore[reportArgumentType]
        times = {"buckets": _SECONDS, "registry": self.registry}
        self.first = Histogram(
            "jaxllm_time_to_first_token_seconds", "from request to text", **times
        )
        self.gaps = Histogram("jaxllm_inter_token_seconds", "between pieces of a stream", **times)
        self.requests = Counter(
            "jaxllm_requests", "answered", ("route", "status"), registry=self.registry
        )

    def text(self) -> bytes:
        """The exposition."""
        return generate_latest(self.registry)
