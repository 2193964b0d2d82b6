"""The service's numbers for Prometheus: the run's, asked anew at each scrape, and the latencies of requests."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
LATENCIES_S = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)

Stats = Mapping[str, Any]


class Metrics:
    """One service's.

    Args:
        stats: those of `/v1/stats`, with `wanted` and `alive` where there is a fleet; None while there are none.
    """

    def __init__(self, stats: Callable[[], Stats | None]) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_OfTheRun(stats))
        self._latency = Histogram(
            "steppe_http_request_seconds",
            "From a request's arrival to its answer's end.",
            ("method", "route", "status"),
            buckets=LATENCIES_S,
            registry=self._registry,
        )
        self._known: dict[tuple[str, str, int], Histogram] = {}

    def observe(self, method: str, route: str, status: int, seconds: float) -> None:
        """One request; `route` is the pattern of its path."""
        key = (method, route, status)
        if (latency := self._known.get(key)) is None:
            latency = self._known[key] = self._latency.labels(method, route, str(status))
        latency.observe(seconds)

    def text(self) -> bytes:
        return generate_latest(self._registry)


class _OfTheRun(Collector):
    def __init__(self, stats: Callable[[], Stats | None]) -> None:
        self._stats = stats

    def describe(self) -> list[GaugeMetricFamily]:
        return []

    def collect(self) -> Iterator[GaugeMetricFamily]:
        stats = self._stats()
        yield _gauge("up", "Whether scores can be asked for.", float(stats is not None))
        if stats is None:
            return
        yield _gauge("num_samples", "Samples of the run.", stats["num_samples"])
        yield _gauge("coverage", "Share of the samples that are scored.", stats["coverage"])
        yield _gauge("samples", "Samples by status.", stats["status"], "status")
        ages = {"0.5": stats["age_versions_p50"], "0.95": stats["age_versions_p95"]}
        yield _gauge("age_versions", "Age of the scores in checkpoints, by quantile.", ages, "quantile")
        yield _gauge("staleness_bound", "Age in checkpoints beyond which a score is stale.", stats["staleness_bound"])
        yield _gauge("store_version", "Commits of rows to the score store.", stats["store_version"])
        yield _gauge("scored_rows", "Rows ever committed.", stats["scored_rows"])
        yield _gauge("newest_model_version", "Of the newest checkpoint.", stats["newest_model_version"])
        yield _gauge("newest_step", "Optimizer steps of the newest checkpoint.", stats["newest_step"])
        yield _gauge("quarantined_rows", "Rows that could not be scored.", stats["quarantined_rows"])
        fidelity = stats["fidelity"] or {}
        yield _gauge("fidelity", "Rank correlation of stored with fresh scores, newest audit.", fidelity.get("latest"))
        yield _gauge("scored_samples_per_second", "What the scorers do now.", stats.get("samples_per_second"))
        yield _gauge("scorers_wanted", "Scorers that should be there.", stats.get("wanted"))
        yield _gauge("scorers_alive", "Scorers that are there.", stats.get("alive"))
        needed = (stats.get("autoscaler") or {}).get("needed")
        yield _gauge("scorers_needed", "Scorers that would do, by autoscaling, before limits and margins.", needed)


def _gauge(name: str, doc: str, value: Any, label: str | None = None) -> GaugeMetricFamily:
    """Without samples where there is no value."""
    family = GaugeMetricFamily(f"steppe_{name}", doc, labels=[label] if label else [])
    for key, one in value.items() if label else [(None, value)]:
        if one is not None:
            family.add_metric([key] if key else [], float(one))
    return family
