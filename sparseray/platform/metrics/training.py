"""From one step's record to its series: loss, throughput, utilisation, and the balance of the experts.

Called by the training loop once a step, and by its checkpoints; nothing else of a run is known here.
"""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from sparseray.model.counts import flops_per_token
from sparseray.platform.config import RunConfig
from sparseray.platform.metrics.exporter import Metrics


class StepMetrics:
    """Records the steps of one run.

    Args:
        metrics: of the scheduler.
        config: the run.
    """

    def __init__(self, metrics: Metrics, config: RunConfig) -> None:
        self._metrics, self._layers = metrics, config.model.moe_layers
        self._flops = flops_per_token(config.model, config.train.seq_len)["training"]
        self._per_expert = config.metrics.per_expert
        cluster = config.cluster
        slots = cluster.attention_workers + (0 if cluster.colocated else cluster.expert_shards)
        metrics.record("train_peak_flops", peak_flops(slots * cluster.threads_per_slot))

    def step(self, record: dict[str, Any], phases: Sequence[dict[str, float]]) -> None:
        """Record one committed step.

        Args:
            record: the line of metrics.jsonl.
            phases: seconds by phase of every logical shard's worker so far.
        """
        metrics = self._metrics
        for name in ("step", "loss", "aux_loss", "grad_norm"):
            if record[name] is not None:
                metrics.record(f"train_{name}", record[name])
        if "spike" in record:
            metrics.record("train_spikes_total", 1, reaction=record["spike"])
        metrics.record("train_learning_rate", record["lr"])
        metrics.record("train_tokens_total", record["tokens"])
        metrics.record("train_flops_total", record["tokens"] * self._flops)
        metrics.record("train_step_seconds", record["seconds"])
        slowest = {phase: max(p[phase] for p in phases) for phase in phases[0]}
        for phase, seconds in slowest.items():
            metrics.record("train_phase_seconds_total", seconds, phase=phase)
        other = max(0.0, record["seconds"] - sum(slowest.values()))
        metrics.record("train_phase_seconds_total", other, phase="other")
        for layer, counts in zip(self._layers, record["expert_load"]):
            for name, value in balance(counts).items():
                metrics.record(f"moe_{name}", value, layer=str(layer))
            if self._per_expert:
                for expert, count in enumerate(counts):
                    metrics.record("moe_expert_tokens_total", count, layer=str(layer), expert=str(expert))

    def checkpoint(self, seconds: float, num_bytes: int) -> None:
        """Record a finished checkpoint.

        Args:
            seconds: that it took.
            num_bytes: of all its files.
        """
        self._metrics.record("checkpoint_save_seconds", seconds)
        self._metrics.record("checkpoint_bytes", num_bytes)
        self._metrics.record("checkpoint_last_success_timestamp_seconds", time.time())

    def refused(self) -> None:
        """Record a step whose gradient was not finite."""
        self._metrics.record("train_nonfinite_steps_total", 1)


def balance(counts_E: Sequence[int]) -> dict[str, float]:
    """Figures of one layer's expert loads, by the name of their metric without its prefix."""
    load_E = np.asarray(counts_E, np.float64)
    mean = max(float(load_E.mean()), 1e-9)
    share_E = load_E[load_E > 0] / max(float(load_E.sum()), 1e-9)
    entropy = float(-(share_E * np.log(share_E)).sum())
    return {
        "load_max_violation": float(load_E.max()) / mean - 1.0,
        "load_variation": float(load_E.std()) / mean,
        "load_entropy_ratio": entropy / float(np.log(len(load_E))) if len(load_E) > 1 else 1.0,
        "dead_experts": float((load_E == 0).sum()),
    }


def peak_flops(threads: int, size: int = 384, repeats: int = 5) -> float:
    """Measure a plain fp32 matrix product here, in operations per second, for `threads` threads at most one a core.

    Utilisation is told against this figure, so that it means the same on every machine; a few milliseconds.

    Args:
        threads: at most one a core is used.
        size: rows and columns of the matrices.
        repeats: products; the fastest counts.
    """
    a = torch.ones(size, size)
    best = float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        torch.mm(a, a)
        best = min(best, time.perf_counter() - started)
    cores = min(threads, torch.multiprocessing.cpu_count())
    return 2.0 * size**3 / best / torch.get_num_threads() * cores
