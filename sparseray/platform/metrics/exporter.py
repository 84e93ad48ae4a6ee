"""Recording and exporting metrics: one registry and one exporter for each process of a run.

What can be recorded stands in metrics_registry.py. A slot that goes takes its series along, because
nobody else exports them. Nothing here stops a step: a failure is told once, and training goes on.
"""

import bisect
import itertools
import threading
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from wsgiref.simple_server import WSGIServer

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
    start_http_server,
)

from sparseray.log import get_logger
from sparseray.platform.metrics.discovery import write_targets
from sparseray.platform.metrics.registry import PREFIX, REGISTRY, Metric, Source

log = get_logger(__name__)

__all__ = ["PREFIX", "REGISTRY", "Metric", "Metrics", "write_targets"]


class _Histogram(Histogram):
    """A histogram that takes a value several times at the price of one."""

    def observe_times(self, value: float, times: int = 1) -> None:
        """Observe.

        Args:
            value: in the metric's unit.
            times: how often.
        """
        self._sum.inc(value * times)
        self._buckets[bisect.bisect_left(self._upper_bounds, value)].inc(times)


class Metrics:
    """Records into a registry of its own, by the names of `REGISTRY`.

    Args:
        constant: labels that every series of this process carries, such as the slot.
        declare: whose counters and histograms stand at zero from the start, where their labels are known.
    """

    def __init__(self, constant: dict[str, str], declare: Source | None = None) -> None:
        disable_created_metrics()
        self.registry = CollectorRegistry()
        self._constant = constant
        self._made: dict[str, Counter | Gauge | _Histogram] = {}
        self._actions: dict[tuple[str | tuple[str, str], ...], Callable[..., None]] = {}
        self._refused: set[str] = set()
        self._served: tuple[WSGIServer, threading.Thread] | None = None
        ProcessCollector(namespace=PREFIX.rstrip("_"), registry=self.registry)
        for name, metric in REGISTRY.items():
            if (
                metric.source == declare
                and metric.kind != "gauge"
                and set(metric.values) == set(metric.labels)
            ):
                for values in itertools.product(*(metric.values[label] for label in metric.labels)):
                    self._action(name, dict(zip(metric.labels, values)))

    def record(self, name: str, value: float, times: int = 1, /, **labels: str) -> None:
        """Add to a counter, set a gauge, or observe into a histogram.

        A name or label that the registry does not know is a defect; it is told once and costs no step.

        Args:
            name: in the registry.
            value: in the metric's unit.
            times: that a histogram has the value.
            labels: of the metric.
        """
        try:
            action = self._actions.get((name, *labels.items())) or self._action(name, labels)
            if times == 1:
                action(value)
            else:
                action(value, times)
        except Exception as error:
            if name not in self._refused:
                self._refused.add(name)
                log.warning("metric %s is not recorded: %s: %s", name, type(error).__name__, error)

    def forget(self, name: str, **labels: str) -> None:
        """Drop one series, of a thing that is gone."""
        if self._actions.pop((name, *labels.items()), None) is not None:
            self._made[name].remove_by_labels(self._constant | labels)

    def _action(self, name: str, labels: dict[str, str]) -> Callable[..., None]:
        """Return what records into one series, and keep it for the next time."""
        metric = REGISTRY[name]
        made = self._made.get(name) or self._make(name, metric)
        if set(labels) != set(metric.labels):
            raise ValueError(f"labels {sorted(labels)} were given, {sorted(metric.labels)} are registered")
        child = made.labels(**self._constant, **labels) if self._constant or labels else made
        if isinstance(child, Counter):
            action: Callable[..., None] = child.inc
        else:
            action = child.set if isinstance(child, Gauge) else child.observe_times
        self._actions[(name, *labels.items())] = action
        return action

    def _make(self, name: str, metric: Metric) -> Counter | Gauge | _Histogram:
        labels = (*self._constant, *metric.labels)
        full = PREFIX + name
        made: Counter | Gauge | _Histogram
        if metric.kind == "counter":
            made = Counter(full, metric.help, labels, registry=self.registry)
        elif metric.kind == "gauge":
            made = Gauge(full, metric.help, labels, registry=self.registry)
        else:
            made = _Histogram(full, metric.help, labels, registry=self.registry, buckets=metric.buckets)
        self._made[name] = made
        return made

    def exposition(self) -> bytes:
        """Return all series in Prometheus' text format."""
        return generate_latest(self.registry)

    def serve(self, host: str) -> str:
        """Serve `/metrics` on a free port and return its address; a failure is told once and costs no step."""
        try:
            server, thread = start_http_server(0, addr=host, registry=self.registry)
        except OSError as error:
            log.warning("no metrics from this process: cannot listen on %s (%s)", host, error)
            return ""
        self._served = server, thread
        return f"{host}:{server.server_port}"

    def close(self) -> None:
        """End what `serve` began."""
        if self._served is not None:
            server, thread = self._served
            server.shutdown()
            server.server_close()
            thread.join()
            self._served = None


def versions() -> dict[str, str]:
    """Versions that a watcher may want to see beside the figures."""
    found = {}
    for package in ("sparseray", "torch", "ray"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    return found
