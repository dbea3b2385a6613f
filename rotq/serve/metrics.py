"""What Prometheus reads at ``/metrics``."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from rotq.serve.engine.engine import Engine
from rotq.serve.engine.generation import Generation
from rotq.serve.engine.observer import Observer, State

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)

_GAUGES = {
    "running": "Sequences that run.",
    "waiting": "Sequences that wait.",
    "tokens": "Tokens of running sequences in the cache.",
    "pages": "Pages with something in them.",
    "pages_total": "Pages.",
    "cache_bytes": "Bytes of pages and whole tokens with something in them.",
    "cache_bytes_total": "Bytes allocated for the cache.",
    "bits_per_element": "Cache bits per key or value element of running sequences, all in.",
}
_COUNTERS = {
    "generated": "Tokens generated.",
    "prompted": "Prompt tokens computed.",
    "reused": "Prompt tokens found in the cache.",
}


class Metrics(Observer):
    """Counters of one server.

    Args:
        on_error: Told when a forward pass fails.
    """

    def __init__(self, on_error: Callable[[Exception], None]) -> None:
        self.registry = CollectorRegistry()
        self._on_error = on_error
        self._first = Histogram(
            "rotq_time_to_first_token_seconds",
            "From a request's arrival to its first token.",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._next = Histogram(
            "rotq_inter_token_seconds",
            "Between two tokens of a sequence.",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._whole = Histogram(
            "rotq_request_seconds",
            "From a sequence's arrival to its end.",
            ["outcome"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._responses = Counter(
            "rotq_http_responses",
            "Answers by route and status.",
            ["route", "status"],
            registry=self.registry,
        )
        self._failures = Counter(
            "rotq_failed_passes", "Forward passes that failed.", registry=self.registry
        )

    def watch(self, engine: Engine) -> None:
        """Read an engine's state whenever somebody asks for the metrics."""
        self.registry.register(_EngineCollector(engine.state))

    def first_token(self, seconds: float) -> None:
        self._first.observe(seconds)

    def next_token(self, seconds: float) -> None:
        self._next.observe(seconds)

    def retired(self, sequence: Generation, outcome: str, seconds: float) -> None:
        self._whole.labels(outcome).observe(seconds)

    def failed(self, error: Exception) -> None:
        """Count it, and pass it to ``on_error``."""
        self._failures.inc()
        self._on_error(error)

    def responded(self, route: str, status: int) -> None:
        """Count a response of a route."""
        self._responses.labels(route, str(status)).inc()

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)


class _EngineCollector(Collector):
    def __init__(self, state: Callable[[], State]) -> None:
        self._state = state

    def collect(self) -> Iterator[Metric]:
        state = self._state()
        for name, text in _GAUGES.items():
            yield GaugeMetricFamily(f"rotq_{name}", text, value=getattr(state, name))
        for name, text in _COUNTERS.items():
            yield CounterMetricFamily(f"rotq_{name}_tokens", text, value=getattr(state, name))
