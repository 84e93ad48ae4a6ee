"""The dashboard of what is sparse: experts (computation), NSA (attention) and DSE (memory)."""

from sparseray.dashboards.panels import Dashboard, Panel, one, quantiles, rate, series

_LAYER = "{{run}} layer {{layer}}"


def _layers(name: str) -> str:
    return f"max by (run, layer) ({series(name)})"


_EXPERTS = (
    Panel(
        title="Largest load over the mean, minus one",
        meaning="Zero is perfect balance; at 2 the busiest expert has three times its share and the step waits for it.",
        unit="none",
        queries=one(_layers("moe_load_max_violation"), _LAYER, record="max_violation"),
    ),
    Panel(
        title="Variation of the loads",
        meaning="Standard deviation over mean: how uneven all experts are, not only the busiest.",
        unit="none",
        queries=one(_layers("moe_load_variation"), _LAYER, record="variation"),
    ),
    Panel(
        title="Entropy of the loads",
        meaning="Over its maximum: 1 is perfect balance, 0 is one expert for all tokens.",
        unit="percentunit",
        queries=one(_layers("moe_load_entropy_ratio"), _LAYER, record="entropy_ratio"),
    ),
    Panel(
        title="Dead experts",
        meaning="Experts without a token in the last step. In a large batch none should stay dead.",
        unit="none",
        queries=one(_layers("moe_dead_experts"), _LAYER, record="dead_experts"),
    ),
    Panel(
        title="Range of the router biases",
        meaning="What the loss-free balance had to add. A range that grows without end means that it does not get through.",
        unit="none",
        queries=one(_layers("moe_router_bias_range"), _LAYER),
    ),
    Panel(
        title="Tokens per expert",
        meaning="Only with --metrics.per_expert true: tokens per second of every expert.",
        unit="suffix: tok/s",
        when="asked",
        queries=one(
            rate("moe_expert_tokens_total", by="run, layer, expert"),
            "{{run}} {{layer}}/{{expert}}",
            "per_expert",
        ),
    ),
    Panel(
        title="Rows computed by expert slots",
        meaning="Token rows per second, forward and backward, by slot: are the slots equally busy?",
        unit="suffix: rows/s",
        queries=one(
            rate("expert_rows_total", by="run, process, direction"), "{{run}} {{process}} {{direction}}"
        ),
    ),
    Panel(
        title="Time that experts compute",
        meaning="Seconds per second by slot; the rest of an expert slot's time is waiting.",
        unit="percentunit",
        queries=one(rate("expert_seconds_total", by="run, process"), "{{run}} {{process}}"),
    ),
    Panel(
        title="Share of exchange with other slots",
        meaning="Of slots that exchange through each other's memory: tokens out, rows back, waiting. The one that waits least"
        " is the straggler.",
        unit="percentunit",
        queries=one(
            rate("exchange_seconds_total", by="run, process, phase"), "{{run}} {{process}} {{phase}}"
        ),
    ),
    Panel(
        title="Bytes exchanged with other slots",
        meaning="Tokens (dispatch) and rows (combine), by the slot that writes them.",
        unit="Bps",
        queries=one(rate("exchange_bytes_total", by="run, process, phase"), "{{run}} {{process}} {{phase}}"),
    ),
)
_ATTENTION = (
    Panel(
        title="Gates of the branches",
        meaning="Mean gate of compressed, selected and window attention, by layer. A branch at zero is not used.",
        unit="percentunit",
        queries=one(
            f"avg by (run, layer, branch) ({series('nsa_branch_gate_mean')})", "{{run}} {{layer}} {{branch}}"
        ),
    ),
    Panel(
        title="Share of blocks selected",
        meaning="Selected over selectable blocks: the sparsity that the selection reaches at this length.",
        unit="percentunit",
        queries=one(_layers("nsa_selected_block_ratio"), _LAYER),
    ),
    Panel(
        title="Reach of the selection",
        meaning="Mean distance from a query to its selected blocks, in tokens. Short reach everywhere means that the window would do.",
        unit="suffix: tokens",
        queries=one(_layers("nsa_selected_distance_tokens"), _LAYER),
    ),
)
_MEMORY = (
    Panel(
        title="Gate of the memory",
        meaning="Mean gate of each memory layer: how much of what was read is let through.",
        unit="percentunit",
        queries=one(f"avg by (run, layer) ({series('dse_gate_mean')})", _LAYER),
    ),
    Panel(
        title="Tokens that use the memory",
        meaning="Share of tokens whose gate is above one half.",
        unit="percentunit",
        queries=one(f"avg by (run, layer) ({series('dse_gate_active_ratio')})", _LAYER),
    ),
    Panel(
        title="Rows addressed",
        meaning="Table rows per second that tokens addressed, repeats included.",
        unit="suffix: rows/s",
        queries=one(rate("dse_rows_total")),
    ),
    Panel(
        title="Distinct rows of a fetch",
        meaning="Distinct over addressed rows: the rest is saved by fetching each row once.",
        unit="percentunit",
        queries=one(f"avg by (run) ({series('dse_unique_row_ratio')})"),
    ),
    Panel(
        title="Where rows come from",
        meaning="Distinct rows per second: from tables in the own slot (local), from those of slots on the same host "
        "(shared), by message (remote).",
        unit="suffix: rows/s",
        stack=True,
        queries=one(rate("dse_lookups_total", by="run, tier"), "{{run}} {{tier}}"),
    ),
    Panel(
        title="Time of a fetch",
        meaning="From the addresses to all rows. It is before the forward pass, so a step waits for it.",
        unit="s",
        queries=quantiles("dse_fetch_seconds"),
    ),
    Panel(
        title="Rows trained",
        meaning="Rows that the row-wise Adam updated, per second.",
        unit="suffix: rows/s",
        queries=one(rate("dse_update_rows_total")),
    ),
    Panel(
        title="Size of the tables",
        meaning="Rows and optimizer state by slot.",
        unit="bytes",
        stack=True,
        queries=one(f"max by (run, process) ({series('dse_table_bytes')})", "{{run}} {{process}}"),
    ),
)

SPARSE = Dashboard(
    uid="sparseray-sparse",
    title="sparseray: experts and memory",
    meaning="Are the experts balanced, what does attention select, and is the memory used?",
    rows=(("Experts", _EXPERTS), ("Attention (NSA)", _ATTENTION), ("Memory (DSE)", _MEMORY)),
)
