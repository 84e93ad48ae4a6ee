"""The dashboard of a training run: is it learning, how fast, and where the time goes."""

from sparseray.dashboards.panels import Dashboard, Panel, Query, mean, one, quantile, rate, series

_PHASES = rate("train_phase_seconds_total", by="run, phase")
_NOW = (
    Panel(
        title="Step now",
        meaning="Last committed optimizer step of each run.",
        unit="none",
        kind="stat",
        queries=one(f"max by (run) ({series('train_step')})", record="step"),
    ),
    Panel(
        title="Loss now",
        meaning="Cross-entropy of the last step in nats per token. A uniform guess costs the logarithm of the vocabulary.",
        unit="none",
        kind="stat",
        queries=one(f"max by (run) ({series('train_loss')})", record="loss"),
    ),
    Panel(
        title="Tokens per second now",
        meaning="Tokens trained on per second, by the newest samples.",
        unit="suffix: tok/s",
        kind="stat",
        queries=one(rate("train_tokens_total"), record="tokens_per_second"),
    ),
    Panel(
        title="Age of the checkpoint",
        meaning="What a loss of everything would cost now: time since the newest checkpoint was finished.",
        unit="s",
        kind="stat",
        queries=one(f"time() - max by (run) ({series('checkpoint_last_success_timestamp_seconds')})"),
    ),
)
_LEARNING = (
    Panel(
        title="Loss",
        meaning="Cross-entropy of every step, and of the validation text. When the second rises while the first falls, the model memorises.",
        unit="none",
        queries=(
            Query(expr=f"max by (run) ({series('train_loss')})", legend="{{run}} training", record="loss"),
            Query(
                expr=f"max by (run) ({series('eval_loss')})", legend="{{run}} validation", record="eval_loss"
            ),
        ),
    ),
    Panel(
        title="Validation, bits per byte",
        meaning="Validation loss per byte of text: comparable between vocabularies.",
        unit="none",
        queries=one(f"max by (run) ({series('eval_bpb')})", record="eval_bits_per_byte"),
    ),
    Panel(
        title="Gradient norm",
        meaning="Global norm before clipping, logarithmic. Peaks that come back point to bad data or too high a learning rate.",
        unit="none",
        log=True,
        queries=one(f"max by (run) ({series('train_grad_norm')})", record="grad_norm"),
    ),
    Panel(
        title="Learning rate",
        meaning="Warm-up, then a cosine.",
        unit="none",
        queries=one(f"max by (run) ({series('train_learning_rate')})", record="lr"),
    ),
    Panel(
        title="Balance loss",
        meaning="The small loss that keeps the experts of a sequence balanced, coefficient included.",
        unit="none",
        queries=one(f"max by (run) ({series('train_aux_loss')})", record="aux_loss"),
    ),
    Panel(
        title="Steps refused",
        meaning="Steps whose gradient was not finite. None of them was applied; more than zero ends the run.",
        unit="none",
        queries=one(f"max by (run) ({series('train_nonfinite_steps_total')})"),
    ),
    Panel(
        title="Loss spikes",
        meaning="Steps whose loss or gradient norm stood out; their update was left out, as train.spike says.",
        unit="none",
        queries=one(f"sum by (run, reaction) ({series('train_spikes_total')})", "{{run}} {{reaction}}"),
    ),
)
_SPEED = (
    Panel(
        title="Tokens per second",
        meaning="Throughput of the whole run.",
        unit="suffix: tok/s",
        queries=one(rate("train_tokens_total"), record="tokens_per_second"),
    ),
    Panel(
        title="FLOPs utilisation",
        meaning="Operations that the model needs by formula, forward and backward, over what the run's threads reach in a plain fp32 matrix product on this machine.",
        unit="percentunit",
        queries=one(f"{rate('train_flops_total')} / max by (run) ({series('train_peak_flops')})"),
    ),
    Panel(
        title="Step time",
        meaning="Median and 95 % of the steps, and their mean. A 95 % far above the median is a slot that stumbles.",
        unit="s",
        queries=(
            Query(expr=quantile(0.5, "train_step_seconds"), legend="{{run}} p50"),
            Query(expr=quantile(0.95, "train_step_seconds"), legend="{{run}} p95"),
            Query(expr=mean("train_step_seconds"), legend="{{run}} mean", record="seconds"),
        ),
    ),
    Panel(
        title="Where a step's time goes",
        meaning="Seconds per second by phase of the slowest worker. Forward and backward include waiting for experts; other is reduction, commit and messages.",
        unit="percentunit",
        stack=True,
        queries=one(_PHASES, "{{run}} {{phase}}"),
    ),
    Panel(
        title="Share of waiting for data",
        meaning="Reading tokens and fetching memory rows, over the time of a step. It should be close to zero.",
        unit="percentunit",
        queries=one(
            rate("train_phase_seconds_total", 'phase=~"data|fetch"')
            + " / "
            + rate("train_phase_seconds_total")
        ),
    ),
    Panel(
        title="Memory of the processes",
        meaning="Resident memory of every process of the run.",
        unit="bytes",
        queries=one(series("process_resident_memory_bytes"), "{{run}} {{process}}"),
    ),
)
_CHECKPOINTS = (
    Panel(
        title="Time that training waited for checkpoints",
        meaning="Mean over all checkpoints since the scheduler started. Nothing is trained meanwhile.",
        unit="s",
        queries=one(
            f"max by (run) ({series('checkpoint_save_seconds_sum')}) / max by (run) ({series('checkpoint_save_seconds_count')})"
        ),
    ),
    Panel(
        title="Size of the newest checkpoint",
        meaning="All files of the folder.",
        unit="bytes",
        queries=one(f"max by (run) ({series('checkpoint_bytes')})"),
    ),
    Panel(
        title="Checkpoints so far",
        meaning="Finished since the scheduler started.",
        unit="none",
        queries=one(f"max by (run) ({series('checkpoint_save_seconds_count')})"),
    ),
)

TRAINING = Dashboard(
    uid="sparseray-training",
    title="sparseray: training",
    meaning="Is it learning, how fast, and where does the time go?",
    rows=(("Now", _NOW), ("Learning", _LEARNING), ("Speed", _SPEED), ("Checkpoints", _CHECKPOINTS)),
)
