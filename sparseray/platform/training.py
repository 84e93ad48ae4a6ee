"""The training loop: drives one step after another through the slots, with a two-phase commit.

Phase one: attention workers run their logical shards, gradients are reduced, and every holder
reports norms and digests. Phase two: the decision is journalled, then every holder applies it.
A step that is not in the journal has not happened. Runs in the scheduler's thread.
"""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sparseray.actors.assignment import Plan
from sparseray.actors.mailbox import Mailbox
from sparseray.actors.messages import Message
from sparseray.errors import ConfigError, SlotLostError, UserError
from sparseray.platform import checkpoint
from sparseray.platform.config import OptimConfig, RunConfig, to_dict
from sparseray.platform.journal import Journal
from sparseray.platform.metrics import Metrics
from sparseray.platform.metrics_training import StepMetrics
from sparseray.platform.run_folder import RunFolder


def learning_rate(step: int, optim: OptimConfig, steps: int) -> float:
    """Linear warm-up, then a cosine to `min_lr_ratio`; `step` counts from 1."""
    if step <= optim.warmup_steps:
        return optim.lr * step / optim.warmup_steps
    progress = (step - optim.warmup_steps) / max(1, steps - optim.warmup_steps)
    floor = optim.lr * optim.min_lr_ratio
    return floor + (optim.lr - floor) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))


@dataclass
class StepReports:
    """What has come in for one step.

    Args:
        shards: logical shard to its report.
        counts: logical shard to tokens per moe layer and expert.
        norms: squared gradient norm of every logical tensor.
        digests: gradient digest by (tensor, slot).
        prepared: (slot, role) that are ready to commit.
    """

    shards: dict[int, dict[str, Any]] = field(default_factory=dict)
    counts: dict[int, np.ndarray] = field(default_factory=dict)
    norms: dict[str, float] = field(default_factory=dict)
    digests: dict[str, dict[int, int]] = field(default_factory=dict)
    prepared: set[tuple[int, str]] = field(default_factory=set)

    def take(self, message: Message) -> None:
        """Add one message."""
        body = message.body
        if message.kind == "shard":
            self.shards[message.shard] = body
            self.counts[message.shard] = message.arrays[0]
        else:
            self.prepared.add((message.source, body["role"]))
            self.norms |= body["norms"]
            for name, value in body["digests"].items():
                self.digests.setdefault(name, {})[message.source] = value

    def check_replicas(self) -> None:
        """Stop when replicas hold different gradients: that is a defect, and applying them would hide it."""
        for name, by_slot in self.digests.items():
            if len(set(by_slot.values())) > 1:
                raise RuntimeError(f"replicas disagree on the gradient of {name}: {by_slot}")


class Trainer:
    """Drives a run from the step it holds to its last one.

    Args:
        config: the run.
        plan: placement in force.
        mailbox: the scheduler's.
        journal, folder, metrics: where decisions, results and series go.
        layout: folder of the DSE identity, empty without memory.
        bytes_per_token: of the validation split, for bits per byte.
        on_record: told of every step's record.
        should_stop: asked between two steps.
    """

    def __init__(
        self,
        config: RunConfig,
        plan: Plan,
        mailbox: Mailbox,
        journal: Journal,
        folder: RunFolder,
        metrics: Metrics,
        *,
        layout: str,
        bytes_per_token: float,
        validation_batches: int,
        on_record: Callable[[dict[str, Any]], None],
        should_stop: Callable[[], bool],
    ) -> None:
        self.config, self.plan, self.mailbox = config, plan, mailbox
        self.journal, self.folder, self.metrics = journal, folder, metrics
        self.layout, self.bytes_per_token = layout, bytes_per_token
        self.validation_batches = validation_batches
        self.on_record, self.should_stop = on_record, should_stop
        self.step_metrics = StepMetrics(metrics, config)
        self.step = 0
        self.expected = self._expected_reports()

    def _expected_reports(self) -> set[tuple[int, str]]:
        plan = self.plan
        roles = (("dense", plan.dense), ("expert", plan.expert_holders), ("memory", plan.memory_holders))
        return {(slot, role) for role, slots in roles for slot in slots}

    def run(self) -> None:
        """Install the plan, train to the last step, leave a checkpoint."""
        self.install()
        train = self.config.train
        is_last = self.step >= train.steps or self.should_stop()
        while not is_last:
            self.train_step()
            # Asked once a step: a stop that comes while a checkpoint is written must find the next one too.
            is_last = self.step == train.steps or self.should_stop()
            if is_last or (train.eval_every and self.step % train.eval_every == 0):
                self.evaluate()
            if is_last or (train.checkpoint_every and self.step % train.checkpoint_every == 0):
                self.save()

    def install(self) -> None:
        """Give every slot its roles and its state, from the newest checkpoint or from the seed."""
        newest = self.folder.newest_checkpoint()
        self.step = checkpoint.read_manifest(newest)["step"] if newest else 0
        self.folder.rewind(self.step)
        self.journal.append("plan", generation=self.plan.generation, step=self.step, plan=self.plan.to_dict())
        self.mailbox.generation = self.plan.generation
        self.mailbox.transport.connect(self.plan.addresses)
        body = {
            "plan": self.plan.to_dict(),
            "config": to_dict(self.config),
            "layout": self.layout,
            "layout_sha256": self.folder.layout_sha256(),
            "scheduler": self.mailbox.transport.address,
            "step": self.step,
            "checkpoint": str(newest or ""),
        }
        for slot in self.plan.addresses:
            self.mailbox.post(slot, "plan", step=self.step, body=body)
        waiting = set(self.plan.addresses)
        for message in self._messages("installed", self.config.cluster.deadline_s + 120):
            waiting.discard(message.source)
            if not waiting:
                break
        self.metrics.record("elastic_generation", self.plan.generation)
        for role in ("attention", "expert", "memory"):
            count = sum(role in self.plan.roles_of(slot) for slot in self.plan.addresses)
            self.metrics.record("elastic_slots", count, role=role)

    def train_step(self) -> None:
        """Run one step and commit it."""
        started, step = time.perf_counter(), self.step + 1
        for slot in self.plan.attention:
            self.mailbox.post(slot, "step", step=step)
        reports = self._collect(step)
        lr = learning_rate(step, self.config.optim, self.config.train.steps)
        norm = math.sqrt(math.fsum(reports.norms.values()))
        if not math.isfinite(norm):
            self.step_metrics.refused()
            raise UserError(
                f"the gradient norm of step {step} is {norm}: nothing was applied; "
                f"lower optim.lr={self.config.optim.lr:g} and resume from the last checkpoint"
            )
        scale = min(1.0, self.config.optim.clip / (norm + 1e-6)) if self.config.optim.clip else 1.0
        counts = sum(reports.counts.values())
        self.journal.append(
            "commit", generation=self.plan.generation, step=step, lr=lr, scale=scale, norm=norm
        )
        body = {"lr": lr, "memory_lr": lr * self.config.optim.memory_lr_scale, "scale": scale}
        for slot in self.plan.addresses:
            self.mailbox.post(slot, "commit", step=step, body=body, arrays=(np.asarray(counts),))
        self.step = step
        self._record(reports, np.asarray(counts), lr, norm, time.perf_counter() - started)

    def _collect(self, step: int) -> StepReports:
        reports = StepReports()
        for message in self._messages("shard prepared", self.config.cluster.deadline_s):
            if message.step != step:
                continue
            reports.take(message)
            if len(reports.shards) == self.config.train.logical_shards and reports.prepared >= self.expected:
                break
        reports.check_replicas()
        return reports

    def _messages(self, kinds: str, deadline_s: float) -> Iterable[Message]:
        """Yield messages of the given kinds; raise what a slot reports as its failure."""
        deadline = time.monotonic() + deadline_s
        while True:
            message = self.mailbox.next(max(0.0, deadline - time.monotonic()))
            if message is None:
                raise SlotLostError(
                    f"no {kinds.replace(' ', ' or ')} message for {deadline_s:g} s after step {self.step}; "
                    "the run resumes from its last checkpoint with the same command"
                )
            if message.kind == "failed":
                kind = UserError if message.body["user"] else RuntimeError
                raise kind(f"slot {message.source}: {message.body['error']}")
            if message.kind in kinds.split():
                deadline = time.monotonic() + deadline_s
                yield message

    def _record(
        self, reports: StepReports, counts: np.ndarray, lr: float, norm: float, seconds: float
    ) -> None:
        order = sorted(reports.shards)
        tokens = sum(reports.shards[shard]["tokens"] for shard in order)
        loss = math.fsum(reports.shards[shard]["loss_sum"] for shard in order) / tokens
        aux = math.fsum(reports.shards[shard]["aux_loss"] for shard in order) / len(order)
        load = counts.max(1) / np.maximum(counts.mean(1), 1e-9) if counts.size else np.ones(1)
        record = {
            "step": self.step,
            "loss": loss,
            "aux_loss": aux,
            "grad_norm": norm,
            "lr": lr,
            "tokens": tokens,
            "seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "expert_load_max_over_mean": float(load.max()),
            "expert_load": counts.tolist(),
            "generation": self.plan.generation,
            "time": time.time(),
        }
        self.folder.append(record)
        self.on_record(record)
        self.step_metrics.step(record, [reports.shards[shard]["seconds"] for shard in order])

    def evaluate(self) -> None:
        """Measure the validation loss; it changes no state."""
        batches = [
            (index, self.plan.shard_owners[index % self.config.train.logical_shards])
            for index in range(self.validation_batches)
        ]
        for slot in self.plan.attention:
            self.mailbox.post(slot, "evaluate", step=self.step + 1, body={"batches": batches})
        found: dict[int, tuple[float, int]] = {}
        for message in self._messages("evaluated", self.config.cluster.deadline_s):
            found |= {int(index): tuple(value) for index, value in message.body["losses"].items()}
            if len(found) == len(batches):
                break
        tokens = sum(value[1] for value in found.values())
        loss = math.fsum(found[index][0] for index in sorted(found)) / tokens
        bits = loss / math.log(2.0) / self.bytes_per_token
        record = {"step": self.step, "eval_loss": loss, "eval_bits_per_byte": bits, "eval_tokens": tokens}
        self.folder.append_evaluation(record)
        self.on_record(record)
        self.metrics.record("eval_loss", loss)
        self.metrics.record("eval_bpb", bits)

    def save(self) -> None:
        """Write a checkpoint of the committed step; it counts once its folder has its final name."""
        started = time.perf_counter()
        unfinished = checkpoint.begin(self.folder.checkpoints, self.step)
        self.folder.copy_identity(unfinished)
        for slot in self.plan.addresses:
            self.mailbox.post(slot, "checkpoint", step=self.step, body={"directory": str(unfinished)})
        tensors: dict[str, Any] = {}
        waiting = set(self.plan.addresses)
        for message in self._messages("saved", self.config.cluster.deadline_s + 60):
            tensors |= message.body["tensors"]
            waiting.discard(message.source)
            if not waiting:
                break
        files = {path.name: path.stat().st_size for path in sorted(unfinished.iterdir()) if path.is_file()}
        manifest = {
            "format": checkpoint.FORMAT,
            "step": self.step,
            "digest": checkpoint.digest(tensors),
            "config": to_dict(self.config),
            "dse_layout_sha256": self.folder.layout_sha256(),
            "files": files,
            "tensors": dict(sorted(tensors.items())),
        }
        final = checkpoint.finish(unfinished, manifest)
        self.journal.append(
            "checkpoint", generation=self.plan.generation, step=self.step, digest=manifest["digest"]
        )
        checkpoint.prune(self.folder.checkpoints, self.config.train.keep_checkpoints)
        seconds = time.perf_counter() - started
        self.step_metrics.checkpoint(seconds, sum(files.values()))
        self.on_record(
            {"step": self.step, "checkpoint": str(final), "digest": manifest["digest"], "seconds": seconds}
        )


def validation_batch_count(windows: int, config: RunConfig) -> int:
    """Validation batches that a split of `windows` sequences can give.

    Raises:
        ConfigError: not even one.
    """
    per_batch = config.train.sequences_per_shard
    if windows < per_batch:
        raise ConfigError(
            f"the validation split has {windows} sequences of {config.train.seq_len} tokens and a batch takes {per_batch}; "
            "prepare more data, or lower train.seq_len or train.sequences_per_shard"
        )
    return min(config.train.eval_batches, windows // per_batch)
