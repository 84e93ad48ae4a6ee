"""The dashboard of a server: what its users feel, what waits, and what failed."""

from sparseray.dashboards.panels import Dashboard, Panel, Query, mean, one, quantile, quantiles, rate, series

_FELT = (
    Panel(
        title="Time to first token",
        meaning="From a request's arrival to its first token, waiting included.",
        unit="s",
        queries=quantiles("time_to_first_token_seconds"),
    ),
    Panel(
        title="Time between tokens",
        meaning="Between two tokens of one request; the first token is not in it.",
        unit="s",
        queries=quantiles("inter_token_latency_seconds"),
    ),
    Panel(
        title="Time of a request",
        meaning="From its arrival to its end.",
        unit="s",
        queries=quantiles("request_latency_seconds"),
    ),
    Panel(
        title="Requests by how they ended",
        meaning="Per second. stop and length are answers; cancelled ones were given up by their client.",
        unit="reqps",
        stack=True,
        queries=one(
            rate("requests_finished_total", by="run, finished_reason"), "{{run}} {{finished_reason}}"
        ),
    ),
    Panel(
        title="Tokens read and written",
        meaning="Prompt tokens of accepted requests, and tokens generated.",
        unit="suffix: tok/s",
        queries=(
            Query(expr=rate("prompt_tokens_total"), legend="{{run}} prompt"),
            Query(expr=rate("generation_tokens_total"), legend="{{run}} generated"),
        ),
    ),
    Panel(
        title="Requests that failed",
        meaning="overloaded: refused because too many were open. slot_lost: their worker fell silent. engine: computing failed too often.",
        unit="reqps",
        stack=True,
        queries=one(rate("requests_failed_total", by="run, reason"), "{{run}} {{reason}}"),
    ),
)
_LOAD = (
    Panel(
        title="Requests open",
        meaning="Open at the server; in the batch; waiting for a place in it.",
        unit="none",
        queries=(
            Query(expr=f"sum by (run) ({series('requests_open')})", legend="{{run}} open"),
            Query(expr=f"sum by (run) ({series('requests_running')})", legend="{{run}} in the batch"),
            Query(expr=f"sum by (run) ({series('requests_waiting')})", legend="{{run}} waiting"),
        ),
    ),
    Panel(
        title="Wait for a place in the batch",
        meaning="From a request's arrival at its worker to its first step.",
        unit="s",
        queries=quantiles("request_queue_seconds"),
    ),
    Panel(
        title="Use of the cache",
        meaning="Positions reserved by the batch, over those of a full batch of longest requests, by worker.",
        unit="percentunit",
        top=1.0,
        queries=one(f"max by (run, process) ({series('cache_usage_ratio')})", "{{run}} {{process}}"),
    ),
)
FIRST = 'place="1"'
_ENGINE = (
    Panel(
        title="Size of the batch",
        meaning="Mean number of requests in a step.",
        unit="none",
        queries=one(mean("engine_batch_requests")),
    ),
    Panel(
        title="Time of a step",
        meaning="One step of the batch, with its experts and memory rows.",
        unit="s",
        queries=quantiles("engine_step_seconds"),
    ),
    Panel(
        title="Accepted drafts",
        meaning="Of the tokens that the model's own modules drafted, by their place in the draft; nothing where none are.",
        unit="percentunit",
        top=1.0,
        queries=one(
            f"{rate('accepted_tokens_total', by='run, place')} / {rate('drafted_tokens_total', by='run, place')}",
            "{{run}} {{place}}",
        ),
    ),
    Panel(
        title="Tokens of a step and request",
        meaning="Where tokens are drafted: one, and the drafts that are accepted with it.",
        unit="none",
        queries=one(
            f"1 + {rate('accepted_tokens_total')} / {rate('drafted_tokens_total', FIRST)}",
        ),
    ),
    Panel(
        title="Failed steps and retries",
        meaning="Steps that failed, and requests that were queued again for it; no request is lost by that.",
        unit="ops",
        queries=(
            Query(expr=rate("engine_failed_steps_total"), legend="{{run}} failed steps"),
            Query(expr=rate("request_retries_total"), legend="{{run}} retries"),
        ),
    ),
    Panel(
        title="Fetch of memory rows",
        meaning="Median and 99 % of one fetch; every step has one for each memory layer.",
        unit="s",
        queries=(
            Query(expr=quantile(0.5, "dse_fetch_seconds"), legend="{{run}} p50"),
            Query(expr=quantile(0.99, "dse_fetch_seconds"), legend="{{run}} p99"),
        ),
    ),
)

_VERSIONS = (
    Panel(
        title="Version of the weights",
        meaning="Step of the checkpoint that is served; it moves where a run is followed, or weights are published.",
        unit="none",
        queries=one(f"max by (run) ({series('serving_version_step')})"),
    ),
    Panel(
        title="New versions",
        meaning="Weights that the server went on with since its start, without a request that failed.",
        unit="none",
        queries=one(f"sum by (run) ({series('serving_versions_total')})"),
    ),
)
_AUTOSCALING = (
    Panel(
        title="Slots that the server wants",
        meaning="By role: what users and the autoscaler ask for. What there is: the dashboard of the cluster.",
        unit="none",
        queries=one(f"max by (run, role) ({series('autoscale_wanted_slots')})", "{{run}} {{role}}"),
    ),
    Panel(
        title="Share in use",
        meaning="Of what all engines can do, and of the time of expert and memory shards. Engines are added above 85 %.",
        unit="percentunit",
        top=1.0,
        queries=one(f"max by (run, role) ({series('autoscale_busy_ratio')})", "{{run}} {{role}}"),
    ),
    Panel(
        title="Latencies and their targets",
        meaning="What nine of ten first and next tokens keep to, as the autoscaler sees it, and the targets; 0 for none.",
        unit="s",
        queries=(
            Query(
                expr=f"max by (run, token) ({series('autoscale_latency_seconds')})",
                legend="{{run}} {{token}}",
            ),
            Query(
                expr=f"max by (run, token) ({series('autoscale_target_seconds')})",
                legend="{{run}} {{token}} target",
            ),
        ),
    ),
    Panel(
        title="Changes by the autoscaler",
        meaning="Wishes since the server's start; each one's reason stands in the events, as `status` and `top` show them.",
        unit="none",
        queries=one(
            f"sum by (run, role, direction) ({series('autoscale_changes_total')})",
            "{{run}} {{role}} {{direction}}",
        ),
    ),
)

SERVING = Dashboard(
    uid="sparseray-serving",
    title="sparseray: serving",
    meaning="What do users feel, what waits, and what failed?",
    rows=(
        ("What users feel", _FELT),
        ("Load", _LOAD),
        ("Autoscaling", _AUTOSCALING),
        ("Versions", _VERSIONS),
        ("Engine", _ENGINE),
    ),
)
