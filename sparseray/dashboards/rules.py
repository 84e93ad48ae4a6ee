"""Recording and alert rules, made with the registry's names; each alert has its line in docs/runbook.md."""

from dataclasses import dataclass

import yaml

from sparseray.dashboards.panels import quantile, rate, series


@dataclass(frozen=True, kw_only=True)
class Alert:
    """One alert: fires when `value condition` has held for `hold`.

    Args:
        name: also the heading in the runbook.
        value: PromQL that has samples in health, too.
        condition: what is compared with it.
        hold: Prometheus duration.
        summary: one sentence with Prometheus' template variables.
        severity: "page" or "ticket".
    """

    name: str
    value: str
    condition: str
    hold: str
    summary: str
    severity: str = "ticket"


RECORDS: dict[str, str] = {
    "sparseray:train_tokens:rate1m": rate("train_tokens_total", window="1m", run=False),
    "sparseray:train_step_seconds:p95": quantile(0.95, "train_step_seconds", window="5m", run=False),
    "sparseray:time_to_first_token_seconds:p99": quantile(
        0.99, "time_to_first_token_seconds", window="5m", run=False
    ),
    "sparseray:inter_token_latency_seconds:p99": quantile(
        0.99, "inter_token_latency_seconds", window="5m", run=False
    ),
}


def _max(name: str, by: str = "run") -> str:
    return f"max by ({by}) ({series(name, run=False)})"


def _replicas(state: str) -> str:
    return "max by (run) (" + series("elastic_replicas", f'state="{state}"', run=False) + ")"


ALERTS = (
    Alert(
        name="LossNotFinite",
        value=_max("train_loss"),
        # Nothing but NaN differs from itself.
        condition=f"!= {_max('train_loss')}",
        hold="0s",
        summary="The training loss of {{ $labels.run }} is not a number",
        severity="page",
    ),
    Alert(
        name="StepRefused",
        value=f"max by (run) (max_over_time({series('train_nonfinite_steps_total', run=False)}[10m]))",
        condition="> 0",
        hold="0s",
        summary="A step of {{ $labels.run }} had a gradient that is not finite; it was not applied",
        severity="page",
    ),
    Alert(
        name="LossSpike",
        value=f"sum by (run) (increase({series('train_spikes_total', run=False)}[10m]))",
        condition="> 0",
        hold="0s",
        summary="Steps of {{ $labels.run }} stood out; their updates were left out",
    ),
    Alert(
        name="NoStep",
        value=f"max by (run) (changes({series('train_step', run=False)}[10m]))",
        condition="== 0",
        hold="1m",
        summary="{{ $labels.run }} has committed no step for 10 minutes",
        severity="page",
    ),
    Alert(
        name="ExpertImbalance",
        value=_max("moe_load_max_violation", "run, layer"),
        condition="> 2",
        hold="10m",
        summary="Layer {{ $labels.layer }} of {{ $labels.run }}: the busiest expert has over three times its share",
    ),
    Alert(
        name="DeadExperts",
        value=_max("moe_dead_experts", "run, layer"),
        condition="> 0",
        hold="10m",
        summary="Layer {{ $labels.layer }} of {{ $labels.run }} has {{ $value }} experts without a token",
    ),
    Alert(
        name="GoodputLow",
        value=_max("elastic_goodput_ratio"),
        condition="< 0.8",
        hold="30m",
        summary="{{ $labels.run }} keeps only {{ $value | humanizePercentage }} of its time",
    ),
    Alert(
        name="CheckpointOld",
        value=f"time() - {_max('checkpoint_last_success_timestamp_seconds')}",
        condition="> 3600",
        hold="1m",
        summary="The newest checkpoint of {{ $labels.run }} is {{ $value | humanizeDuration }} old",
    ),
    Alert(
        name="CheckpointFailed",
        value="max by (run) (increase({}[10m]))".format(
            series("elastic_events_total", 'kind="unsaved"', run=False)
        ),
        condition="> 0",
        hold="0s",
        summary="A checkpoint of {{ $labels.run }} could not be written; training goes on without it",
        severity="page",
    ),
    Alert(
        name="FirstTokenSlow",
        value=quantile(0.99, "time_to_first_token_seconds", window="5m", run=False),
        condition="> 2",
        hold="5m",
        summary="1 % of the requests to {{ $labels.run }} wait over {{ $value | humanizeDuration }} for a token",
        severity="page",
    ),
    Alert(
        name="RequestsFail",
        value=rate("requests_failed_total", window="5m", run=False),
        condition="> 0.1",
        hold="2m",
        summary="{{ $labels.run }} fails {{ $value | humanize }} requests a second",
        severity="page",
    ),
    Alert(
        name="ReplicasBelowTarget",
        value=_replicas("actual"),
        condition=f"< {_replicas('target')}",
        hold="2m",
        summary="{{ $labels.run }} has {{ $value }} replicas, fewer than it wants",
    ),
    Alert(
        name="TargetDown",
        value=series("up", 'job="sparseray"', run=False),
        condition="== 0",
        hold="15s",
        summary="{{ $labels.process }} of {{ $labels.run }} does not answer",
        severity="page",
    ),
)


def rules_yaml() -> str:
    """Return the rules file."""
    alerts = [
        {
            "alert": f"Sparseray{a.name}",
            "expr": f"{a.value} {a.condition}",
            "for": a.hold,
            "labels": {"severity": a.severity},
            "annotations": {"summary": a.summary, "runbook": f"docs/runbook.md#{a.name.lower()}"},
        }
        for a in ALERTS
    ]
    records = [{"record": name, "expr": expr} for name, expr in RECORDS.items()]
    groups = [{"name": "sparseray-records", "rules": records}, {"name": "sparseray-alerts", "rules": alerts}]
    head = "# Made from sparseray/dashboards/rules.py by `python -m sparseray dashboard generate`.\n"
    return head + yaml.safe_dump({"groups": groups}, sort_keys=False, width=110)
