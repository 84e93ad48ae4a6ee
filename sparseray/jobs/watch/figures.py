"""The metrics of all live runs and servers as a few lines of text: what `top` shows below a job's slots.

It reads the same exporters that Prometheus scrapes, found by the same file; rates are over the time between two looks.
"""

import json
import time
import urllib.request
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from sparseray.platform.metrics.discovery import merged_targets
from sparseray.platform.metrics.registry import PREFIX

ANSWER_S = 1.0
Key = tuple[str, str, frozenset[tuple[str, str]]]


class Readings:
    """Two looks at the exporters of one run.

    Args:
        run: its name.
        now, before: value by (process, metric without prefix, labels).
        seconds: between the two; 0 at the first look, when there are no rates yet.
        silent: processes that did not answer.
    """

    def __init__(
        self, run: str, now: dict[Key, float], before: dict[Key, float], seconds: float, silent: int
    ) -> None:
        self.run, self.seconds, self.silent = run, seconds, silent
        self._now, self._before = now, before
        self.processes = len({process for process, _, _ in now})

    def values(self, name: str, **labels: str) -> list[float]:
        """Present values of a metric's series that have these labels."""
        wanted = set(labels.items())
        return [value for (_, found, of), value in self._now.items() if found == name and wanted <= of]

    def kinds(self, name: str, label: str) -> list[str]:
        """Values of a label that a metric's series have, sorted."""
        return sorted({dict(of)[label] for _, found, of in self._now if found == name})

    def rate(self, name: str, **labels: str) -> float | None:
        """Growth per second of a counter, summed over its series; None where nothing grew or nothing is known."""
        wanted, grown = set(labels.items()), 0.0
        for key, value in self._now.items():
            if key[1] == name and wanted <= key[2]:
                # A process that has started anew counts from zero again.
                grown += max(0.0, value - self._before.get(key, value))
        return grown / self.seconds if self.seconds and grown else None

    def share(self, name: str, **labels: str) -> float | None:
        """Part of a counter that the series with these labels have: since the last look, else of all time."""
        part, whole = self.rate(name, **labels) or 0.0, self.rate(name)
        if whole is None:
            part, whole = sum(self.values(name, **labels)), sum(self.values(name))
        return part / whole if whole else None

    def mean(self, name: str) -> float | None:
        """Mean of what a histogram observed since the last look; over all time at the first."""
        count, total = self.rate(f"{name}_count"), self.rate(f"{name}_sum")
        if count is None or total is None:
            count, total = sum(self.values(f"{name}_count")), sum(self.values(f"{name}_sum"))
        return total / count if count else None


class Figures:
    """Looks at all live runs, again and again."""

    def __init__(self) -> None:
        self._before: dict[str, dict[Key, float]] = {}
        self._at = 0.0

    def look(self) -> list[Readings]:
        """Scrape every exporter once; those that do not answer within a second are counted."""
        try:
            entries = json.loads(merged_targets().read_text())
        except (OSError, ValueError):
            return []
        with ThreadPoolExecutor(16) as pool:
            scraped = list(pool.map(_scrape, entries))
        started, at = self._at, time.monotonic()
        found: dict[str, dict[Key, float]] = {}
        silent: dict[str, int] = {}
        for entry, samples in zip(entries, scraped):
            run = entry["labels"]["run"]
            found.setdefault(run, {}).update(samples or {})
            silent[run] = silent.get(run, 0) + (samples is None)
        readings = [
            Readings(
                run, now, before := self._before.get(run, {}), at - started if before else 0.0, silent[run]
            )
            for run, now in sorted(found.items())
        ]
        self._before, self._at = found, at
        return readings


def _scrape(entry: dict[str, Any]) -> dict[Key, float] | None:
    try:
        with urllib.request.urlopen(f"http://{entry['targets'][0]}/metrics", timeout=ANSWER_S) as answer:
            text = answer.read().decode()
        return {
            (
                entry["labels"]["process"],
                sample.name.removeprefix(PREFIX),
                frozenset(sample.labels.items()),
            ): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }
    except (OSError, ValueError):
        return None


# -- lines ---------------------------------------------------------------------------------------------


def lines(readings: Readings) -> list[str]:
    """What there is to say of one run, a line for each part of the system that it has."""
    parts = (
        _training,
        _experts,
        _attention,
        _memory,
        _checkpoint,
        _requests,
        _latency,
        _autoscale,
        _processes,
    )
    found = [(part.__name__.removeprefix("_"), part(readings)) for part in parts]
    return [f"{name:<11}{', '.join(texts)}" for name, texts in found if texts]


def _texts(pairs: Iterable[tuple[str, float | None]]) -> list[str]:
    return [text.format(value) for text, value in pairs if value is not None]


def _of(values: list[float], reduce: Callable[[list[float]], float]) -> float | None:
    return reduce(values) if values else None


def _average(values: list[float]) -> float:
    return sum(values) / len(values)


def _training(r: Readings) -> list[str]:
    flops, peak = r.rate("train_flops_total"), _of(r.values("train_peak_flops"), max)
    name = "train_phase_seconds_total"
    spent = {phase: r.rate(name, phase=phase) or 0.0 for phase in r.kinds(name, "phase")}
    whole = sum(spent.values())
    return [
        *_texts(
            (
                ("gradient norm {:.3g}", _of(r.values("train_grad_norm"), max)),
                ("learning rate {:.2e}", _of(r.values("train_learning_rate"), max)),
                ("validation {:.4f}", _of([v for v in r.values("eval_loss") if v], max)),
                ("FLOPs {:.0%} of the peak", flops / peak if flops and peak else None),
            )
        ),
        *(f"{phase} {seconds / whole:.0%}" for phase, seconds in spent.items() if seconds),
    ]


def _experts(r: Readings) -> list[str]:
    return _texts(
        (
            ("load at most {:.2f} over the mean", _of(r.values("moe_load_max_violation"), max)),
            ("entropy at least {:.3f}", _of(r.values("moe_load_entropy_ratio"), min)),
            ("{:.0f} dead", _of(r.values("moe_dead_experts"), sum)),
            ("biases over {:.3f}", _of(r.values("moe_router_bias_range"), max)),
            ("{:,.0f} rows/s", r.rate("expert_rows_total")),
        )
    )


def _attention(r: Readings) -> list[str]:
    name = "nsa_branch_gate_mean"
    gates = [(branch, r.values(name, branch=branch)) for branch in r.kinds(name, "branch")]
    return _texts(
        (
            *((f"gate {branch} {{:.2f}}", _of(values, _average)) for branch, values in gates),
            ("selected {:.0%} of the blocks", _of(r.values("nsa_selected_block_ratio"), _average)),
            ("{:.0f} tokens back", _of(r.values("nsa_selected_distance_tokens"), _average)),
        )
    )


def _memory(r: Readings) -> list[str]:
    fetch = r.mean("dse_fetch_seconds")
    return _texts(
        (
            ("gate {:.2f}", _of(r.values("dse_gate_mean"), _average)),
            ("{:,.0f} rows/s", r.rate("dse_rows_total")),
            ("{:.0%} of them distinct", _of([v for v in r.values("dse_unique_row_ratio") if v], _average)),
            ("{:.0%} from the own slot", r.share("dse_lookups_total", tier="local")),
            ("a fetch {:.1f} ms", fetch * 1e3 if fetch else None),
            ("tables {:.1f} MB", _of([v / 1e6 for v in r.values("dse_table_bytes")], sum)),
        )
    )


def _checkpoint(r: Readings) -> list[str]:
    at = _of([v for v in r.values("checkpoint_last_success_timestamp_seconds") if v], max)
    size = _of([v for v in r.values("checkpoint_bytes") if v], max)
    return _texts(
        (
            ("{:.0f} s old", time.time() - at if at else None),
            ("{:.1f} MB", size / 1e6 if size else None),
        )
    )


def _requests(r: Readings) -> list[str]:
    if not r.values("requests_open"):
        return []
    return _texts(
        (
            ("{:.0f} open", _of(r.values("requests_open"), sum)),
            ("{:.0f} in the batch", _of(r.values("requests_running"), sum)),
            ("{:.0f} waiting", _of(r.values("requests_waiting"), sum)),
            ("cache {:.0%}", _of(r.values("cache_usage_ratio"), max)),
            ("{:.1f} tokens/s", r.rate("generation_tokens_total") or 0.0),
            ("{:.0f} failed", _of(r.values("requests_failed_total"), sum)),
            ("{:.0f} retried", _of(r.values("request_retries_total"), sum)),
        )
    )


def _latency(r: Readings) -> list[str]:
    names = {
        "first token": "time_to_first_token_seconds",
        "next token": "inter_token_latency_seconds",
        "request": "request_latency_seconds",
        "queue": "request_queue_seconds",
    }
    found = {label: r.mean(name) for label, name in names.items()}
    return [f"{label} {value * 1e3:.1f} ms" for label, value in found.items() if value is not None]


def _autoscale(r: Readings) -> list[str]:
    name = "autoscale_wanted_slots"
    wanted = [(role, r.values(name, role=role)) for role in r.kinds(name, "role")]
    busy = [(role, r.values("autoscale_busy_ratio", role=role)) for role, _ in wanted]
    return (
        [
            *_texts((f"{role} {{:.0f}} wanted", _of(values, max)) for role, values in wanted),
            *_texts((f"{role} {{:.0%}} busy", _of(values, max)) for role, values in busy),
            *_texts((("{:.0f} changes", _of(r.values("autoscale_changes_total"), sum)),)),
        ]
        if wanted
        else []
    )


def _processes(r: Readings) -> list[str]:
    found = _texts(
        (
            (f"{r.processes} answer, {{:.0f}} MB", sum(r.values("process_resident_memory_bytes")) / 1e6),
            ("{:.1f} cores busy", r.rate("process_cpu_seconds_total")),
        )
    )
    return [*found, f"{r.silent} silent"] if r.silent else found
