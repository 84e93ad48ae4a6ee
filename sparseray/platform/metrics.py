"""The registry of metrics: name, kind, unit, labels, help and buckets of everything that is recorded.

Exporters, dashboards, alert rules and the docs table are made from `REGISTRY`. Each slot has an
exporter of its own, so a slot that goes takes its series along.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
    start_http_server,
)

from sparseray.log import get_logger

log = get_logger(__name__)

PREFIX = "sparseray_"
STEP_BUCKETS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0, 300.0)
LATENCY_BUCKETS = (
    0.0005,
    0.001,
    0.002,
    0.005,
    0.01,
    0.02,
    0.05,
    0.1,
    0.2,
    0.5,
    1.0,
    2.0,
    5.0,
    10.0,
    20.0,
    80.0,
)


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One metric as code, exporters and dashboards know it."""

    kind: Literal["counter", "gauge", "histogram"]
    unit: str
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


REGISTRY: dict[str, Metric] = {
    "train_step": Metric(kind="gauge", unit="", help="Last committed optimizer step"),
    "train_loss": Metric(kind="gauge", unit="nats", help="Cross-entropy of the last step, nats per token"),
    "train_aux_loss": Metric(kind="gauge", unit="", help="Balance loss of the last step"),
    "train_grad_norm": Metric(kind="gauge", unit="", help="Global gradient norm before clipping"),
    "train_learning_rate": Metric(kind="gauge", unit="", help="Learning rate of the last step"),
    "train_tokens_total": Metric(kind="counter", unit="tokens", help="Tokens trained on"),
    "train_step_seconds": Metric(
        kind="histogram", unit="seconds", help="Wall time from one commit to the next", buckets=STEP_BUCKETS
    ),
    "train_phase_seconds_total": Metric(
        kind="counter", unit="seconds", help="Time of the slowest worker's shards by phase", labels=("phase",)
    ),
    "eval_loss": Metric(kind="gauge", unit="nats", help="Validation cross-entropy, nats per token"),
    "eval_bits_per_byte": Metric(kind="gauge", unit="", help="Validation loss in bits per byte of text"),
    "moe_load_max_violation": Metric(
        kind="gauge", unit="", help="Largest expert load over the mean, minus one", labels=("layer",)
    ),
    "moe_dead_experts": Metric(
        kind="gauge", unit="", help="Experts without a token in the last step", labels=("layer",)
    ),
    "dse_update_rows_total": Metric(kind="counter", unit="rows", help="Memory rows updated by this slot"),
    "elastic_generation": Metric(kind="gauge", unit="", help="Generation of the plan in force"),
    "elastic_slots": Metric(kind="gauge", unit="", help="Slots by role", labels=("role",)),
    "elastic_replicas": Metric(
        kind="gauge", unit="", help="Holders that a piece of state should have and has", labels=("state",)
    ),
    "elastic_events_total": Metric(
        kind="counter", unit="", help="Losses, recoveries, resizes", labels=("kind",)
    ),
    "elastic_recovery_seconds": Metric(
        kind="histogram",
        unit="seconds",
        help="From a loss to the next committed step, by phase",
        labels=("phase",),
        buckets=STEP_BUCKETS,
    ),
    "elastic_resize_pause_seconds": Metric(
        kind="histogram", unit="seconds", help="Time that training waited for a resize", buckets=STEP_BUCKETS
    ),
    "elastic_moved_bytes_total": Metric(
        kind="counter", unit="bytes", help="State that moved between slots because the plan changed"
    ),
    "elastic_goodput_ratio": Metric(kind="gauge", unit="", help="Productive time over all time"),
    "elastic_time_seconds_total": Metric(
        kind="counter", unit="seconds", help="Where the run's time went", labels=("state",)
    ),
    "checkpoint_save_seconds": Metric(
        kind="histogram",
        unit="seconds",
        help="Time that training waited for a checkpoint",
        buckets=STEP_BUCKETS,
    ),
    "checkpoint_bytes": Metric(kind="gauge", unit="bytes", help="Size of the newest checkpoint"),
    "requests_running": Metric(
        kind="gauge", unit="", help="Requests that are open, in the batch or waiting for a place in it"
    ),
    "prompt_tokens_total": Metric(kind="counter", unit="tokens", help="Prompt tokens of accepted requests"),
    "generation_tokens_total": Metric(kind="counter", unit="tokens", help="Tokens generated"),
    "requests_finished_total": Metric(
        kind="counter", unit="", help="Requests by the reason they ended for", labels=("finished_reason",)
    ),
    "time_to_first_token_seconds": Metric(
        kind="histogram",
        unit="seconds",
        help="From a request's arrival to its first token",
        buckets=LATENCY_BUCKETS,
    ),
    "inter_token_latency_seconds": Metric(
        kind="histogram", unit="seconds", help="Between two tokens of one request", buckets=LATENCY_BUCKETS
    ),
    "request_latency_seconds": Metric(
        kind="histogram", unit="seconds", help="From a request's arrival to its end", buckets=LATENCY_BUCKETS
    ),
}


class Metrics:
    """Records into a registry of its own, by the names of `REGISTRY`.

    Args:
        constant: labels that every series of this process carries, such as run and slot.
    """

    def __init__(self, constant: dict[str, str]) -> None:
        disable_created_metrics()
        self.registry = CollectorRegistry()
        self._constant = constant
        self._made: dict[str, Counter | Gauge | Histogram] = {}

    def record(self, name: str, value: float, **labels: str) -> None:
        """Add to a counter, set a gauge, or observe into a histogram.

        Raises:
            KeyError: the registry has no such metric.
        """
        metric = REGISTRY[name]
        made = self._made.get(name) or self._make(name, metric)
        child = made.labels(*(self._constant | labels).values()) if self._constant or labels else made
        if isinstance(child, Counter):
            child.inc(value)
        elif isinstance(child, Gauge):
            child.set(value)
        else:
            child.observe(value)

    def _make(self, name: str, metric: Metric) -> Counter | Gauge | Histogram:
        labels = (*self._constant, *metric.labels)
        full = PREFIX + name
        made: Counter | Gauge | Histogram
        if metric.kind == "counter":
            made = Counter(full, metric.help, labels, registry=self.registry)
        elif metric.kind == "gauge":
            made = Gauge(full, metric.help, labels, registry=self.registry)
        else:
            made = Histogram(full, metric.help, labels, registry=self.registry, buckets=metric.buckets)
        self._made[name] = made
        return made

    def exposition(self) -> bytes:
        """Return all series in Prometheus' text format."""
        return generate_latest(self.registry)

    def serve(self, host: str) -> str:
        """Serve `/metrics` on a free port and return its address; a failure is told once and costs no step."""
        try:
            server, _ = start_http_server(0, addr=host, registry=self.registry)
        except OSError as error:
            log.warning("no metrics from this process: cannot listen on %s (%s)", host, error)
            return ""
        return f"{host}:{server.server_port}"


def write_targets(path: Path, targets: dict[str, str], run: str) -> None:
    """Write a file for Prometheus' file-based service discovery, atomically.

    Args:
        path: file to write.
        targets: name of a process to its address.
        run: label of all of them.
    """
    content = [
        {"targets": [address], "labels": {"job": "sparseray", "run": run, "process": name}}
        for name, address in sorted(targets.items())
        if address
    ]
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1))
    os.replace(temporary, path)
