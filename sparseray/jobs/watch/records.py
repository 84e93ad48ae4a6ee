"""A run folder's own records in the shape of a Prometheus answer, for the page where no Prometheus runs.

Which record stands for which expression is told by the dashboards' queries (`Query.record`).
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sparseray.dashboards.cluster import CLUSTER
from sparseray.dashboards.serving import SERVING
from sparseray.dashboards.sparse import SPARSE
from sparseray.dashboards.training import TRAINING
from sparseray.errors import ConfigError
from sparseray.platform.config import load_yaml
from sparseray.platform.metrics.training import balance
from sparseray.platform.run.folder import RunFolder

QUERIES = {
    query.expr: query.record
    for board in (TRAINING, SPARSE, SERVING, CLUSTER)
    for panel in board.panels
    for query in panel.queries
    if query.record
}
_BALANCE = {
    "max_violation": "load_max_violation",
    "variation": "load_variation",
    "entropy_ratio": "load_entropy_ratio",
    "dead_experts": "dead_experts",
}
# One record to its series: labels and value.
Reader = Callable[[dict[str, Any]], list[tuple[tuple[tuple[str, str], ...], float]]]


class Records:
    """Reads a run folder again and again while it grows.

    Args:
        folder: of a run.

    Raises:
        ConfigError: it is not one, or holds no step yet.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = RunFolder(folder)
        if not self._folder.config.exists():
            raise ConfigError(
                f"--run {folder} is not the folder of a run: it has no config.yaml; give a run_dir"
            )
        try:
            records = self._read()
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"--run {folder} cannot be read: {error}; check its rights and its metrics.jsonl"
            ) from None
        if not records:
            raise ConfigError(f"--run {folder} holds no step yet; wait for the first line of metrics.jsonl")
        self.run = folder.resolve().name
        self._layers = load_yaml(self._folder.config).model.moe_layers

    def _read(self) -> list[dict[str, Any]]:
        records = self._folder.records()
        times = {record["step"]: record["time"] for record in records}
        if self._folder.evaluations.exists():
            lines = self._folder.evaluations.read_text().splitlines(keepends=True)
            found = [json.loads(line) for line in lines if line.endswith("\n")]
            records += [{"time": times[e["step"]], **e} for e in found if e["step"] in times]
        return records

    @property
    def span(self) -> tuple[float, float]:
        """Unix times of the first and the last record."""
        times = [record["time"] for record in self._read()]
        return min(times), max(times)

    def query(self, expr: str, start: float, end: float, step: float) -> list[dict[str, Any]] | None:
        """Answer a dashboard's expression with the last record of every step of time.

        Args:
            expr: as the dashboard has it, with its variables.
            start, end: Unix times.
            step: seconds of one point.

        Returns:
            [{"metric": labels, "values": [[time, "value"], ...]}], or None if no record stands for it.
        """
        key = QUERIES.get(expr)
        if key is None:
            return None
        read = self._reader(key)
        points: dict[tuple[tuple[str, str], ...], dict[int, tuple[float, float]]] = {}
        for record in self._read():
            if start <= record["time"] <= end:
                for labels, value in read(record):
                    points.setdefault(labels, {})[int(record["time"] / step)] = (record["time"], value)
        return [
            {
                "metric": {"run": self.run, **dict(labels)},
                "values": [[at, repr(value)] for at, value in by_time.values()],
            }
            for labels, by_time in sorted(points.items())
        ]

    def _reader(self, key: str) -> Reader:
        if key in _BALANCE:
            return lambda record: [
                ((("layer", str(layer)),), balance(counts)[_BALANCE[key]])
                for layer, counts in zip(self._layers, record.get("expert_load", []))
            ]
        if key == "per_expert":
            return lambda record: [
                ((("expert", f"{expert:03d}"), ("layer", str(layer))), count / record["seconds"])
                for layer, counts in zip(self._layers, record.get("expert_load", []))
                for expert, count in enumerate(counts)
            ]
        return lambda record: [((), float(record[key]))] if record.get(key) is not None else []
