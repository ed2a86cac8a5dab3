"""What a server has done and is doing, in the text format of Prometheus.

Requests are counted here, in plain numbers, which costs a request about a microsecond. They become Prometheus' metrics
only when somebody asks for ``/metrics``.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

from torchsurgeon.serve.outcome import Outcome
from torchsurgeon.serve.registry import ModelRegistry
from torchsurgeon.serve.statistics import MOST_CUTS

LATENCY_BOUNDS_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
BATCH_BOUNDS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)


@dataclass
class _Counts:
    """What is counted of one model, and of everything that is about none."""

    requests: dict[int, int] = field(default_factory=dict)
    errors: dict[str, int] = field(default_factory=dict)
    cuts: dict[str, int] = field(default_factory=dict)
    below: list[int] = field(default_factory=lambda: [0] * (len(LATENCY_BOUNDS_S) + 1))
    sum_s: float = 0.0
    received_bytes: int = 0
    sent_bytes: int = 0


class Metrics(Collector):
    """Counts what becomes of requests.

    Args:
        registry: the served models.
        connections: returns how many connections are open.
    """

    def __init__(self, registry: ModelRegistry, connections: Callable[[], int]) -> None:
        self._registry, self._connections = registry, connections
        self._counts: dict[str, _Counts] = {}
        self._prometheus = CollectorRegistry(auto_describe=False)
        self._prometheus.register(self)

    def __call__(self, outcome: Outcome) -> None:
        """Count a request; called by the event loop's thread."""
        model = outcome.model
        counts = self._counts.get(model)
        if counts is None:
            # Names that no model has are not labels.
            model = model if model in self._registry.names() else ""
            counts = self._counts.setdefault(model, _Counts())
        counts.requests[outcome.status] = counts.requests.get(outcome.status, 0) + 1
        if outcome.error:
            counts.errors[outcome.error] = counts.errors.get(outcome.error, 0) + 1
        if outcome.cut:
            cut = outcome.cut if outcome.cut in counts.cuts or len(counts.cuts) < MOST_CUTS else "other"
            counts.cuts[cut] = counts.cuts.get(cut, 0) + 1
        counts.below[bisect_left(LATENCY_BOUNDS_S, outcome.duration_s)] += 1
        counts.sum_s += outcome.duration_s
        counts.received_bytes += outcome.received_bytes
        counts.sent_bytes += outcome.sent_bytes

    def text(self) -> tuple[bytes, str]:
        """Return all metrics in Prometheus' text format, and its media type."""
        return generate_latest(self._prometheus), CONTENT_TYPE_LATEST

    def collect(self) -> Iterator[Metric]:
        """Return all metrics; called by prometheus-client."""
        yield from self._of_requests()
        yield from self._of_models()
        yield GaugeMetricFamily("torchsurgeon_connections", "Open connections.", value=self._connections())

    def _of_requests(self) -> Iterator[Metric]:
        requests = CounterMetricFamily(
            "torchsurgeon_requests", "Requests by HTTP status; 499 where the client left.", labels=["model", "status"]
        )
        errors = CounterMetricFamily(
            "torchsurgeon_errors", "Requests that failed or were refused, by kind.", labels=["model", "kind"]
        )
        cuts = CounterMetricFamily(
            "torchsurgeon_cut_requests", "Inferences by the tensors that were sent.", labels=["model", "cut"]
        )
        latency = HistogramMetricFamily(
            "torchsurgeon_request_seconds", "Seconds from a request's head to its answer.", labels=["model"]
        )
        received = CounterMetricFamily("torchsurgeon_received_bytes", "Bytes of requests' bodies.", labels=["model"])
        sent = CounterMetricFamily("torchsurgeon_sent_bytes", "Bytes of answers' bodies.", labels=["model"])
        for model, counts in list(self._counts.items()):
            for status, count in list(counts.requests.items()):
                requests.add_metric([model, str(status)], count)
            for kind, count in list(counts.errors.items()):
                errors.add_metric([model, kind], count)
            for cut, count in list(counts.cuts.items()):
                cuts.add_metric([model, cut], count)
            latency.add_metric([model], _buckets(LATENCY_BOUNDS_S, counts.below), counts.sum_s)
            received.add_metric([model], counts.received_bytes)
            sent.add_metric([model], counts.sent_bytes)
        yield from (requests, errors, cuts, latency, received, sent)

    def _of_models(self) -> Iterator[Metric]:
        ready = GaugeMetricFamily("torchsurgeon_model_ready", "Whether a model is loaded.", labels=["model"])
        waiting = GaugeMetricFamily("torchsurgeon_queue", "Requests that wait for a thread.", labels=["model"])
        by_priority = GaugeMetricFamily(
            "torchsurgeon_queue_by_priority", "The same, by the requests' priority.", labels=["model", "priority"]
        )
        clients = GaugeMetricFamily(
            "torchsurgeon_queue_clients", "Clients that have requests waiting for a thread.", labels=["model"]
        )
        slowdown = GaugeMetricFamily(
            "torchsurgeon_slowdown", "Seconds of an inference now, divided by those without load (K).", labels=["model"]
        )
        tails = GaugeMetricFamily("torchsurgeon_tails", "Tails that are kept.", labels=["model"])
        batches = HistogramMetricFamily("torchsurgeon_batch_requests", "Requests that ran together.", labels=["model"])
        for name, served in self._registry.loaded().items():
            ready.add_metric([name], served is not None)
            if served is None:
                continue
            intake = served.intake
            waiting.add_metric([name], intake.worker.waiting)
            who, of_each = intake.worker.who_waits()
            clients.add_metric([name], who)
            for priority, count in of_each.items():
                by_priority.add_metric([name, priority], count)
            slowdown.add_metric([name], intake.slowdown)
            tails.add_metric([name], len(served.tails))
            below = [0] * (len(BATCH_BOUNDS) + 1)
            sizes = list(served.statistics.by_requests.items())
            for size, count in sizes:
                below[bisect_left(BATCH_BOUNDS, size)] += count
            batches.add_metric([name], _buckets(BATCH_BOUNDS, below), sum(size * count for size, count in sizes))
        yield from (ready, waiting, by_priority, clients, slowdown, tails, batches)


def _buckets(bounds: tuple[float, ...], counts: list[int]) -> list[tuple[str, float]]:
    """Return a histogram's counts at or below each bound, as prometheus-client takes them."""
    found, total = [], 0
    for bound, count in zip((*map(str, bounds), "+Inf"), counts, strict=True):
        total += count
        found.append((bound, float(total)))
    return found
