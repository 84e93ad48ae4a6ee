"""The registry of metrics: name, kind, unit, labels, help and buckets of everything that is recorded.

Exporters, dashboards, alert rules and the table in docs/metrics.md are made from `REGISTRY`; tests hold
that no other name is recorded or asked for. Names carry `PREFIX` outside this code; units are base units.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Literal

PREFIX = "sparseray_"
# 1-2-5 down to 0.5 ms: a tiny model's latencies must not all fall into one bucket.
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
RECOVERY_BUCKETS = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 300.0)
FETCH_BUCKETS = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 1.0, 5.0)
BATCH_BUCKETS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0)

Source = Literal["scheduler", "slot", "server", "process"]


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One metric as code, exporters and dashboards know it.

    Args:
        kind: counter, gauge or histogram.
        unit: base unit; empty for counts and ratios.
        help: one line for people.
        source: who records it: the scheduler, a slot, the HTTP server, or every process of itself.
        labels: label names besides `slot`, which the processes of a run add, in this order.
        values: for a label with few possible values, all of them; such a series is there, at zero, from the
            start, so that a rate over its first event is right and a panel is never without data.
        buckets: upper bounds of a histogram.
    """

    kind: Literal["counter", "gauge", "histogram"]
    help: str
    unit: str = ""
    source: Source = "scheduler"
    labels: tuple[str, ...] = ()
    values: dict[str, tuple[str, ...]] = field(default_factory=dict)
    buckets: tuple[float, ...] = ()


_counter = partial(Metric, kind="counter")
_gauge = partial(Metric, kind="gauge")
_histogram = partial(Metric, kind="histogram")
_layer = ("layer",)

_TRAINING = {
    "train_step": _gauge(help="Last committed optimizer step"),
    "train_loss": _gauge(unit="nats", help="Cross-entropy of the last step, nats per token"),
    "train_aux_loss": _gauge(help="Balance loss of the last step"),
    "train_grad_norm": _gauge(help="Global gradient norm before clipping"),
    "train_learning_rate": _gauge(help="Learning rate of the last step"),
    "train_tokens_total": _counter(unit="tokens", help="Tokens trained on"),
    "train_flops_total": _counter(
        help="Floating-point operations of training, forward and backward, by formula"
    ),
    "train_peak_flops": _gauge(
        help="Operations per second that the run's threads reach in a plain fp32 matrix product, measured at start"
    ),
    "train_step_seconds": _histogram(
        unit="seconds", help="Wall time of one step, from its start to its commit", buckets=STEP_BUCKETS
    ),
    "train_phase_seconds_total": _counter(
        unit="seconds",
        help="Time of the slowest worker by phase; other is the step's time outside its shards",
        labels=("phase",),
        values={"phase": ("data", "fetch", "forward", "backward", "other")},
    ),
    "train_nonfinite_steps_total": _counter(help="Steps refused because their gradient norm was not finite"),
    "train_spikes_total": _counter(
        help="Steps left out because their loss or gradient norm stood out",
        labels=("reaction",),
        values={"reaction": ("skip", "rollback")},
    ),
    "eval_loss": _gauge(unit="nats", help="Validation cross-entropy, nats per token"),
    "eval_bpb": _gauge(help="Validation loss in bits per byte of text"),
    "checkpoint_save_seconds": _histogram(
        unit="seconds", help="Time that training waited for a checkpoint", buckets=STEP_BUCKETS
    ),
    "checkpoint_bytes": _gauge(unit="bytes", help="Size of the newest checkpoint"),
    "checkpoint_last_success_timestamp_seconds": _gauge(
        unit="seconds", help="When the newest checkpoint was finished, Unix time"
    ),
}

_SPARSE = {
    "moe_load_max_violation": _gauge(help="Largest expert load over the mean, minus one", labels=_layer),
    "moe_load_variation": _gauge(
        help="Standard deviation of the expert loads over their mean", labels=_layer
    ),
    "moe_load_entropy_ratio": _gauge(
        help="Entropy of the expert loads over its maximum; 1 is perfect balance", labels=_layer
    ),
    "moe_dead_experts": _gauge(help="Experts without a token in the last step", labels=_layer),
    "moe_expert_tokens_total": _counter(
        unit="tokens",
        help="Tokens by expert; only with metrics.per_expert",
        labels=("layer", "expert"),
    ),
    "moe_router_bias_range": _gauge(
        source="slot", help="Largest minus smallest router bias, sampled", labels=_layer
    ),
    "expert_rows_total": _counter(
        unit="rows",
        source="slot",
        help="Token rows that experts of this slot computed",
        labels=("direction",),
    ),
    "expert_seconds_total": _counter(
        unit="seconds",
        source="slot",
        help="Time that experts of this slot computed",
        labels=("direction",),
    ),
    "exchange_bytes_total": _counter(
        unit="bytes",
        source="slot",
        help="Tokens (dispatch) and rows (combine) written to other slots' memory",
        labels=("phase",),
        values={"phase": ("dispatch", "combine")},
    ),
    "exchange_seconds_total": _counter(
        unit="seconds",
        source="slot",
        help="Device time of that, and of waiting for other slots; a replayed part counts as the last one of its step",
        labels=("phase",),
        values={"phase": ("dispatch", "combine", "wait")},
    ),
    "nsa_branch_gate_mean": _gauge(
        source="slot", help="Mean gate of an attention branch, sampled", labels=("layer", "branch")
    ),
    "nsa_selected_block_ratio": _gauge(
        source="slot", help="Selected blocks over the blocks a query could select, sampled", labels=_layer
    ),
    "nsa_selected_distance_tokens": _gauge(
        unit="tokens",
        source="slot",
        help="Mean distance from a query to the start of its selected blocks, sampled",
        labels=_layer,
    ),
    "dse_gate_mean": _gauge(source="slot", help="Mean gate of a memory layer, sampled", labels=_layer),
    "dse_gate_active_ratio": _gauge(
        source="slot", help="Tokens whose memory gate is above one half, sampled", labels=_layer
    ),
    "dse_rows_total": _counter(unit="rows", source="slot", help="Table rows that tokens addressed here"),
    "dse_lookups_total": _counter(
        source="slot",
        help="Distinct table rows read: from the own slot, from memory shared with another one, or by message",
        labels=("tier",),
    ),
    "dse_unique_row_ratio": _gauge(
        source="slot", help="Distinct rows over rows of the last fetch: what fetching each once saves"
    ),
    "dse_fetch_seconds": _histogram(
        unit="seconds", source="slot", help="Time of one fetch of table rows", buckets=FETCH_BUCKETS
    ),
    "dse_update_rows_total": _counter(unit="rows", source="slot", help="Memory rows updated by this slot"),
    "dse_table_bytes": _gauge(
        unit="bytes", source="slot", help="Table rows held by this slot with their optimizer state"
    ),
}

_ELASTIC = {
    "elastic_generation": _gauge(help="Generation of the plan in force"),
    "elastic_slots": _gauge(help="Slots by role", labels=("role",)),
    "elastic_replicas": _gauge(help="Replicas of the state, wanted and present", labels=("state",)),
    "elastic_lent_slots": _gauge(help="Slots that a run does without while they serve"),
    "elastic_events_total": _counter(
        help="Changes of the run's slots",
        labels=("kind",),
        values={
            "kind": (
                "unsaved",
                "postponed",
                "spike",
                "lost",
                "recovered",
                "staged",
                "mended",
                "resized",
                "draining",
                "drained",
                "rebalanced",
                "autoscaled",
                "published",
                "refused",
                "restored",
                "lent",
                "returned",
                "fenced",
                "scheduler_restarted",
            )
        },
    ),
    "elastic_recovery_seconds": _histogram(
        unit="seconds",
        help="Time of a recovery by phase",
        labels=("phase",),
        values={"phase": ("detect", "decide", "move", "first_step", "total")},
        buckets=RECOVERY_BUCKETS,
    ),
    "elastic_moved_bytes_total": _counter(unit="bytes", help="State moved between slots"),
    "elastic_pulled_bytes_total": _counter(
        unit="bytes",
        source="slot",
        help="State that this slot copied from others: from memory that it mapped, or out of messages",
        labels=("path",),
        values={"path": ("mapped", "message")},
    ),
    "elastic_pull_seconds_total": _counter(unit="seconds", source="slot", help="Time that this took"),
    "elastic_resize_pause_seconds": _histogram(
        unit="seconds", help="Time that training stood still for a resize", buckets=RECOVERY_BUCKETS
    ),
    "elastic_goodput_ratio": _gauge(help="Productive time over all time of the run"),
    "elastic_time_seconds_total": _counter(
        unit="seconds",
        help="Time of the run by what it was spent on",
        labels=("state",),
        values={"state": ("productive", "lost", "recovering", "resizing", "checkpointing", "evaluating")},
    ),
    "elastic_heartbeat_age_seconds": _gauge(
        unit="seconds", help="Time since the scheduler last heard of a peer", labels=("peer",)
    ),
    "messages_dropped_total": _counter(
        help="Messages that the scheduler dropped, for instance of an older generation",
        labels=("reason",),
        values={"reason": ("generation", "duplicate", "malformed")},
    ),
}

_SERVING = {
    "requests_open": _gauge(
        source="server", help="Requests that are open, in a batch or waiting for a place"
    ),
    "requests_running": _gauge(source="slot", help="Requests in the batch"),
    "requests_waiting": _gauge(source="slot", help="Requests that wait for a place in the batch"),
    "cache_usage_ratio": _gauge(
        source="slot",
        help="Pages of the caches that requests hold, of all",
    ),
    "prompt_tokens_total": _counter(
        unit="tokens", source="server", help="Prompt tokens of accepted requests"
    ),
    "generation_tokens_total": _counter(unit="tokens", source="server", help="Tokens generated"),
    "requests_finished_total": _counter(
        source="server",
        help="Requests by the reason they ended for",
        labels=("finished_reason",),
        values={"finished_reason": ("stop", "length", "cancelled", "error")},
    ),
    "requests_failed_total": _counter(
        source="server",
        help="Requests that the server could not answer, by reason",
        labels=("reason",),
        values={"reason": ("overloaded", "slot_lost", "engine")},
    ),
    "request_retries_total": _counter(
        source="slot", help="Requests put back into the queue because a step of their batch failed"
    ),
    "time_to_first_token_seconds": _histogram(
        source="server",
        unit="seconds",
        help="From a request's arrival to its first token",
        buckets=LATENCY_BUCKETS,
    ),
    "inter_token_latency_seconds": _histogram(
        source="server",
        unit="seconds",
        help="Between two tokens of one request; the first token is not in it",
        buckets=LATENCY_BUCKETS,
    ),
    "request_latency_seconds": _histogram(
        source="server",
        unit="seconds",
        help="From a request's arrival to its end",
        buckets=LATENCY_BUCKETS,
    ),
    "request_queue_seconds": _histogram(
        source="slot",
        unit="seconds",
        help="From a request's arrival at its worker to its place in the batch",
        buckets=LATENCY_BUCKETS,
    ),
    "engine_step_seconds": _histogram(
        source="slot", unit="seconds", help="Time of one step of the serving batch", buckets=LATENCY_BUCKETS
    ),
    "engine_batch_requests": _histogram(
        source="slot", help="Requests in the batch, once a step", buckets=BATCH_BUCKETS
    ),
    "drafted_tokens_total": _counter(
        source="slot",
        help="Tokens that were drafted and judged, by their place in the draft",
        labels=("place",),
    ),
    "accepted_tokens_total": _counter(
        source="slot", help="Drafted tokens that stand in a text", labels=("place",)
    ),
    "engine_failed_steps_total": _counter(source="slot", help="Steps of the serving batch that failed"),
    "serving_version_step": _gauge(help="Step of the weights that a server serves"),
    "serving_versions_total": _counter(help="New weights that a server went on with"),
    "autoscale_wanted_slots": _gauge(help="Slots of a role that a server wants", labels=("role",)),
    "autoscale_busy_ratio": _gauge(
        help="Share in use of what engines can do, and of their time that shards answer, over five seconds",
        labels=("role",),
    ),
    "autoscale_latency_seconds": _gauge(
        unit="seconds",
        help="Within which nine of ten first or next tokens of warm engines came, over two seconds; 0 for too few",
        labels=("token",),
        values={"token": ("first", "next")},
    ),
    "autoscale_target_seconds": _gauge(
        unit="seconds",
        help="Within which nine of ten first or next tokens shall come; 0 for any time",
        labels=("token",),
        values={"token": ("first", "next")},
    ),
    "autoscale_changes_total": _counter(
        help="Wishes of the autoscaler, by role and direction",
        labels=("role", "direction"),
        values={"role": ("attention", "experts", "memory"), "direction": ("up", "down")},
    ),
}

_process = partial(Metric, source="process")
_PROCESS = {
    "process_resident_memory_bytes": _process(
        kind="gauge", unit="bytes", help="Resident memory of the process"
    ),
    "process_virtual_memory_bytes": _process(kind="gauge", unit="bytes", help="Mapped memory of the process"),
    "process_cpu_seconds_total": _process(
        kind="counter", unit="seconds", help="Processor time of the process"
    ),
    "process_start_time_seconds": _process(
        kind="gauge", unit="seconds", help="Start of the process, Unix time"
    ),
    "process_open_fds": _process(kind="gauge", help="Open file descriptors of the process"),
    "process_max_fds": _process(kind="gauge", help="Most file descriptors that the process may open"),
}

REGISTRY: dict[str, Metric] = {**_TRAINING, **_SPARSE, **_ELASTIC, **_SERVING, **_PROCESS}

# Series of the page and the dashboards that other exporters give.
EXTERNAL = ("up",)

SECTIONS = {
    "Training and checkpoints": tuple(_TRAINING),
    "Experts, attention and memory": tuple(_SPARSE),
    "Elasticity": tuple(_ELASTIC),
    "Serving": tuple(_SERVING),
    "Every process": tuple(_PROCESS),
}


def table() -> str:
    """Return docs/metrics.md: what is recorded, by whom, in which unit."""
    lines = [
        "# Metrics",
        "",
        "Made from `sparseray/platform/metrics/registry.py` by `python -m sparseray dashboard generate`; a test",
        f"holds it current. Every name begins with `{PREFIX}`. Labels besides those listed: `run` and `process` from",
        "the discovery file, and `slot` on what scheduler and slots record. Histograms are exact: their `_sum` is",
        "the sum of what was observed. Time to first token runs from a request's arrival at the server; inter-token",
        "latency never includes the first token.",
    ]
    for title, names in SECTIONS.items():
        lines += [
            "",
            f"## {title}",
            "",
            "| name | kind | unit | labels | recorded by | meaning |",
            "|---|---|---|---|---|---|",
        ]
        for name in names:
            m = REGISTRY[name]
            labels = ", ".join(f"`{label}`" for label in m.labels)
            lines.append(f"| `{name}` | {m.kind} | {m.unit} | {labels} | {m.source} | {m.help} |")
    return "\n".join(lines) + "\n"
