"""What a dashboard is made of, and how its PromQL is written: only with names that the registry has.

`training.py`, `sparse.py`, `serving.py` and `cluster.py` hold the four dashboards as data; `generate.py` turns
them into Grafana's JSON, and the page of the `dashboard` command draws that JSON.
"""

from dataclasses import dataclass
from typing import Literal

from sparseray.platform.metrics.registry import EXTERNAL, PREFIX, REGISTRY

WINDOW = "$__rate_interval"


@dataclass(frozen=True, kw_only=True)
class Query:
    """One expression of a panel.

    Args:
        expr: PromQL, with Grafana's variables.
        legend: Grafana's legend format.
        record: what stands for it in a run folder without a Prometheus, as jobs/watch/records.py knows it.
    """

    expr: str
    legend: str
    record: str = ""


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One panel.

    Args:
        title: short, unique in its dashboard.
        meaning: what it shows and what to make of it, for people.
        unit: Grafana's unit id.
        queries: at least one.
        kind: curve over time, or its last value.
        stack: curves on top of each other.
        log: logarithmic axis.
        top: end of the axis, if it is known.
        when: "always", or rightly without values until something was lost ("fault"), a resize was asked for
            ("resize"), or metrics.per_expert was set ("asked").
    """

    title: str
    meaning: str
    unit: str
    queries: tuple[Query, ...]
    kind: Literal["timeseries", "stat"] = "timeseries"
    stack: bool = False
    log: bool = False
    top: float | None = None
    when: Literal["always", "fault", "resize", "asked"] = "always"


@dataclass(frozen=True, kw_only=True)
class Dashboard:
    """One dashboard: rows of panels under a heading."""

    uid: str
    title: str
    meaning: str
    rows: tuple[tuple[str, tuple[Panel, ...]], ...]

    @property
    def panels(self) -> tuple[Panel, ...]:
        """All panels in order."""
        return tuple(panel for _, panels in self.rows for panel in panels)


def series(name: str, *matchers: str, run: bool = True) -> str:
    """Select a metric of the chosen runs.

    Raises:
        KeyError: the registry has no such metric.
    """
    if name in EXTERNAL:
        full = name
    else:
        kind = REGISTRY[name.removesuffix("_bucket").removesuffix("_sum").removesuffix("_count")].kind
        assert kind == "histogram" or name in REGISTRY, name
        full = PREFIX + name
    chosen = ['run=~"$run"'] if run else []
    inner = ",".join([*chosen, *matchers])
    return f"{full}{{{inner}}}" if inner else full


def rate(name: str, *matchers: str, by: str = "run", window: str = WINDOW, run: bool = True) -> str:
    """Per second increase of a counter, summed over slots."""
    return f"sum by ({by}) (rate({series(name, *matchers, run=run)}[{window}]))"


def mean(name: str, *, by: str = "run", window: str = WINDOW, run: bool = True) -> str:
    """Mean of what a histogram observed."""
    top, bottom = (rate(f"{name}_{part}", by=by, window=window, run=run) for part in ("sum", "count"))
    return f"{top} / {bottom}"


def quantile(q: float, name: str, *, by: str = "run", window: str = WINDOW, run: bool = True) -> str:
    """Quantile of what a histogram observed."""
    return f"histogram_quantile({q:g}, {rate(f'{name}_bucket', by=f'{by}, le', window=window, run=run)})"


def quantiles(name: str, *, by: str = "run", legend: str = "{{run}}") -> tuple[Query, ...]:
    """Median, 90 % and 99 % of a histogram."""
    return tuple(
        Query(expr=quantile(q, name, by=by), legend=f"{legend} {label}")
        for q, label in ((0.5, "p50"), (0.9, "p90"), (0.99, "p99"))
    )


def one(expr: str, legend: str = "{{run}}", record: str = "") -> tuple[Query, ...]:
    """A panel's only query."""
    return (Query(expr=expr, legend=legend, record=record),)
