"""The dashboard of the cluster: who is there, what was lost and recovered, and how much time was productive."""

from sparseray.dashboards.panels import Dashboard, Panel, Query, mean, one, rate, series

_WHO = (
    Panel(
        title="Generation",
        meaning="Number of the plan in force; every change of slots or placement makes a new one.",
        unit="none",
        queries=one(f"max by (run) ({series('elastic_generation')})", record="generation"),
    ),
    Panel(
        title="Slots by role",
        meaning="A slot with several roles counts once in each.",
        unit="none",
        queries=one(f"max by (run, role) ({series('elastic_slots')})", "{{run}} {{role}}"),
    ),
    Panel(
        title="Slots lent",
        meaning="Slots that a training run does without while they serve (`cluster.lend`). They come back when the load has fallen.",
        unit="none",
        queries=one(f"max by (run) ({series('elastic_lent_slots')})"),
    ),
    Panel(
        title="Replicas, wanted and there",
        meaning="When actual is below target, the next loss may cost a restart from a checkpoint.",
        unit="none",
        queries=one(f"max by (run, state) ({series('elastic_replicas')})", "{{run}} {{state}}"),
    ),
    Panel(
        title="Processes that answer",
        meaning="1 for each process whose metrics can be read. A process that has left the run disappears here.",
        unit="none",
        queries=one(series("up"), "{{run}} {{process}}"),
    ),
    Panel(
        title="Silence of peers",
        meaning="Time since the scheduler last heard of each slot. At the deadline the slot counts as lost.",
        unit="s",
        queries=one(f"max by (run, peer) ({series('elastic_heartbeat_age_seconds')})", "{{run}} {{peer}}"),
    ),
    Panel(
        title="Messages dropped",
        meaning="Of an older generation, or twice: fencing at work after a change. In quiet times it stays flat.",
        unit="ops",
        when="fault",
        queries=one(rate("messages_dropped_total", by="run, reason"), "{{run}} {{reason}}"),
    ),
)
_CHANGES = (
    Panel(
        title="Events",
        meaning="Losses, recoveries, resizes and restores since the scheduler started.",
        unit="none",
        queries=one(f"max by (run, kind) ({series('elastic_events_total')})", "{{run}} {{kind}}"),
    ),
    Panel(
        title="Time of a recovery",
        meaning="Mean by phase since the start: noticing, deciding, moving state, first step after it.",
        unit="s",
        when="fault",
        queries=one(
            f"sum by (run, phase) ({series('elastic_recovery_seconds_sum')}) / sum by (run, phase) ({series('elastic_recovery_seconds_count')})",
            "{{run}} {{phase}}",
        ),
    ),
    Panel(
        title="Pause of a resize",
        meaning="Mean time that training stood still for a resize.",
        unit="s",
        when="resize",
        queries=one(mean("elastic_resize_pause_seconds", window="1h")),
    ),
    Panel(
        title="State moved",
        meaning="Bytes of weights, optimizer state and table rows that changed their slot.",
        unit="bytes",
        queries=one(f"max by (run) ({series('elastic_moved_bytes_total')})"),
    ),
    Panel(
        title="State pulled",
        meaning="Bytes that the slots that are there copied from others: from memory that they mapped, or out of messages,"
        " as between hosts.",
        unit="bytes",
        queries=one(f"sum by (run, path) ({series('elastic_pulled_bytes_total')})", "{{run}} {{path}}"),
    ),
    Panel(
        title="Time to pull state",
        meaning="Seconds that each slot has spent on it since it began; training stands still meanwhile.",
        unit="s",
        queries=one(f"sum by (run, process) ({series('elastic_pull_seconds_total')})", "{{run}} {{process}}"),
    ),
)
_GOODPUT = (
    Panel(
        title="Goodput",
        meaning="Time whose steps were kept, over all time of the run.",
        unit="percentunit",
        top=1.0,
        queries=one(f"max by (run) ({series('elastic_goodput_ratio')})"),
    ),
    Panel(
        title="Where the run's time went",
        meaning="Seconds since the start by state. lost are steps that had to be computed again.",
        unit="s",
        stack=True,
        queries=one(f"max by (run, state) ({series('elastic_time_seconds_total')})", "{{run}} {{state}}"),
    ),
)
_PROCESSES = (
    Panel(
        title="Processor time",
        meaning="Cores that each process uses.",
        unit="none",
        stack=True,
        queries=one(rate("process_cpu_seconds_total", by="run, process"), "{{run}} {{process}}"),
    ),
    Panel(
        title="Memory",
        meaning="Resident memory of each process.",
        unit="bytes",
        stack=True,
        queries=one(series("process_resident_memory_bytes"), "{{run}} {{process}}"),
    ),
    Panel(
        title="Age of the processes",
        meaning="Time since each process started; a new one starts at zero.",
        unit="s",
        queries=one(f"time() - {series('process_start_time_seconds')}", "{{run}} {{process}}"),
    ),
    Panel(
        title="Open files",
        meaning="Open file descriptors over those allowed.",
        unit="percentunit",
        queries=(
            Query(
                expr=f"{series('process_open_fds')} / {series('process_max_fds')}",
                legend="{{run}} {{process}}",
            ),
        ),
    ),
)

CLUSTER = Dashboard(
    uid="sparseray-cluster",
    title="sparseray: cluster and elasticity",
    meaning="Who is there, what was lost and recovered, and how much time was productive?",
    rows=(("Who is there", _WHO), ("Changes", _CHANGES), ("Goodput", _GOODPUT), ("Processes", _PROCESSES)),
)
