"""The training loop: drives one step after another through the slots, with a two-phase commit.

Phase one: attention workers run their parts, gradients are reduced, and every holder
reports norms and digests. Phase two: the decision is journalled, then every holder applies it.
A step that is not in the journal has not happened; one that a loss cuts off runs again. Changes of
who holds what are in generations.py. Runs in the scheduler's thread.
"""

import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from sparseray.actors.state.assignment import Plan
from sparseray.actors.training.mixture import Mixture
from sparseray.actors.wire.messages import (
    Commit,
    Evaluate,
    Evaluated,
    Offered,
    PartDone,
    Prepared,
    RunStep,
    Saved,
    StillWriting,
)
from sparseray.errors import SlotsLostError, UserError
from sparseray.platform.config import RunConfig
from sparseray.platform.device import is_whole
from sparseray.platform.fleet.control import StalledError
from sparseray.platform.fleet.weights_port import is_offered
from sparseray.platform.generations import Generations
from sparseray.platform.metrics.training import StepMetrics
from sparseray.platform.offers import Offers
from sparseray.platform.opening import Validation
from sparseray.platform.planning.schedule import learning_rate
from sparseray.platform.planning.spikes import Reading
from sparseray.platform.reconciler import Reconciler
from sparseray.platform.run import checkpoint
from sparseray.platform.run.history import JobHistory
from sparseray.platform.saving import Checkpoints
from sparseray.platform.spikes import SpikeWatch, rollback_target
from sparseray.platform.step_reports import StepReports
from sparseray.platform.training import Training, from_newest


class Trainer:
    """Drives a run from the step it holds to its last one, through losses and changes of its slots.

    Args:
        config: the run.
        training: what its slots are told.
        generations, reconciler: who holds what, and what is wanted.
        validation: how the validation loss is measured.
        on_record: told of every step's record.
        should_stop: asked between two steps.
    """

    def __init__(
        self,
        config: RunConfig,
        training: Training,
        generations: Generations,
        reconciler: Reconciler,
        *,
        validation: Validation,
        on_record: Callable[[dict[str, Any]], None],
        should_stop: Callable[[], bool],
    ) -> None:
        self.config, self.training, self.control = config, training, generations.control
        self.generations, self.reconciler = generations, reconciler
        self.journal, self.folder, self.ledger = generations.journal, training.folder, reconciler.ledger
        self.metrics = generations.events.metrics
        self.validation = validation
        self.on_record, self.should_stop = on_record, should_stop
        self.step_metrics = StepMetrics(self.metrics, config)
        self.offers = Offers(self.control.mailbox.job)
        self.spikes = SpikeWatch(config.train, config.optim)
        self._mixture = Mixture.parse(config.data.mixture) if config.data.mixture else None
        self.step = 0
        self._due: list[Callable[[], None]] = []
        self._is_last = False
        self.checkpoints = Checkpoints(
            config, generations, self.folder, self.ledger, self.step_metrics, on_record
        )

    @property
    def plan(self) -> Plan:
        """The placement in force."""
        assert self.generations.plan is not None
        return self.generations.plan

    def start(self) -> None:
        """Give every slot its roles and its state, from the newest checkpoint or from the seed."""
        found = self.training.newest()
        self.step = found.step
        self.folder.rewind(self.step)
        self.spikes.begin(self.folder.records())
        self.generations.begin(self.step, found.restore)
        if is_offered(found.restore.checkpoint):
            self.generations.tell("restored", self.step, f"going on with {found.text}")

    def take_over(self, history: JobHistory) -> None:
        """Go on where a scheduler that died had stopped: at the last step in its journal."""
        assert history.plan is not None
        self.step = history.step
        if (last := history.commit) is not None:
            record = last.record
            self.training.commit = Commit(
                step=last.step,
                lr=last.lr,
                memory_lr=last.memory_lr,
                scale=last.scale,
                counts_LE=torch.tensor(record["expert_load"], dtype=torch.int64),
                is_skipped="spike" in record,
            )
            # A line that was cut short by the kill would swallow the next one.
            self.folder.rewind(self.step)
            records = self.folder.records()
            if not records or records[-1]["step"] < self.step:
                self.folder.append(record)
        self.spikes.begin(self.folder.records())
        self.checkpoints.take_over(self.step, self.training.begin)
        self._set_due()
        self.generations.take_over(history.plan, self.step)

    def run(self) -> None:
        """Train to the last step or until asked to stop; leaves a checkpoint."""
        self._is_last = self._is_last or self.step >= self.config.train.steps
        while self._due or not self._is_last:
            try:
                if self._due:
                    self._due[0]()
                    self._due.pop(0)
                else:
                    self.reconciler.reconcile(self.step)
                    self.checkpoints.cut_off(self.step)
                    self.offers.look(self.step, self.plan, self.control)
                    self.train_step()
                    self._set_due()
            except (SlotsLostError, StalledError) as error:
                with self.ledger.state("recovering", failed="recovering"):
                    step = self.generations.recover(error, self.step)
                self.checkpoints.cut_off(step)
                self.offers.forget()
                if step != self.step:
                    self.step, self._due, self._is_last = step, [], False
                    self.spikes.begin(self.folder.records())

    def _set_due(self) -> None:
        """What follows the step that was committed last."""
        train = self.config.train
        # Asked once a step: a stop that comes while a checkpoint is written must find the next one too.
        self._is_last = self.step >= train.steps or self.should_stop()
        self._due = [self.roll_back] if self.spikes.wants_rollback else []
        if self._is_last or (train.eval_every and self.step % train.eval_every == 0):
            self._due.append(self.evaluate)
        if self.checkpoints.is_due(self.step) or self._is_last:
            self._due.append(self.save)

    def train_step(self) -> None:
        """Run one step and commit it."""
        with self.ledger.state("productive"):
            started, step = time.perf_counter(), self.step + 1
            # Where all compute in step those without parts do too, and those with rows alone write checkpoints beside it.
            slots = sorted(self.plan.holders) if is_whole(self.config) else self.plan.attention
            self.control.post(slots, RunStep(), step=step)
            reports = self._collect(step)
            record = self._decide(reports, step, time.perf_counter() - started)
        self.step = step
        self.folder.append(record)
        self.spikes.count(record)
        self.on_record(record)
        self.reconciler.count(reports.counts_LE)
        self.generations.settled(step)
        if "spike" in record:
            self.generations.tell("spike", step, f"{record['why']}; its update was left out")
        self._measure(reports, record)

    def _decide(self, reports: StepReports, step: int, seconds: float) -> dict[str, Any]:
        """Commit a step, with its update or without; return its record."""
        optim = self.config.optim
        lr, counts = (
            learning_rate(step, optim, self.config.train.steps, self.training.begin),
            reports.counts_LE,
        )
        norm = math.sqrt(math.fsum(reports.norms.values()))
        record = self._record_of(reports, step, counts, lr, norm, seconds)
        try:
            why = self.spikes.look(step, Reading(loss=record["loss"], norm=norm))
        except UserError:
            self.step_metrics.refused()
            raise
        if why:
            record |= {"spike": self.config.train.spike, "why": why}
            # No line of JSON has a number that is none.
            record |= {k: None for k in ("loss", "aux_loss", "grad_norm") if not math.isfinite(record[k])}
        scale = min(1.0, optim.clip / (norm + 1e-6)) if optim.clip and not why else 1.0
        factors = {"lr": lr, "memory_lr": lr * optim.memory_lr_scale, "scale": scale}
        self.journal.append("commit", generation=self.plan.generation, record=record, step=step, **factors)
        self.training.commit = commit = Commit(
            step=step, counts_LE=torch.from_numpy(counts), is_skipped=bool(why), **factors
        )
        self.control.post(self.plan.addresses, commit, step=step)
        return record

    def _collect(self, step: int) -> StepReports:
        reports, plan = StepReports(), self.plan
        roles = (("dense", plan.dense), ("expert", plan.expert_holders), ("memory", plan.memory_holders))
        expected = {(slot, role) for role, slots in roles for slot in slots}
        for message in self.control.messages(PartDone, Prepared, Saved, StillWriting, Offered):
            if isinstance(message.body, Saved | StillWriting):
                self.checkpoints.hear(message)
                continue
            if isinstance(message.body, Offered):
                self.offers.hear(message.source, message.body)
                continue
            if message.step != step:
                continue
            reports.take(message)
            if len(reports.parts) == self.config.train.logical_shards and reports.prepared >= expected:
                break
        reports.check_replicas()
        return reports

    def _record_of(
        self, reports: StepReports, step: int, counts: np.ndarray, lr: float, norm: float, seconds: float
    ) -> dict[str, Any]:
        order = sorted(reports.parts)
        tokens = sum(reports.parts[part].tokens for part in order)
        peak = max(reports.parts[part].device_bytes for part in order)
        weight = math.fsum(reports.parts[part].weight for part in order)
        load = counts.max(1) / np.maximum(counts.mean(1), 1e-9) if counts.size else np.ones(1)
        return {
            "step": step,
            "loss": math.fsum(reports.parts[part].loss_sum for part in order) / weight,
            "aux_loss": math.fsum(reports.parts[part].aux_loss for part in order) / len(order),
            "grad_norm": norm,
            "lr": lr,
            "tokens": tokens,
            "seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "expert_load_max_over_mean": float(load.max()),
            "expert_load": counts.tolist(),
            "generation": self.plan.generation,
            "time": time.time(),
            **({"losses": reports.losses} if reports.losses else {}),
            **({"sources": self._tokens_by_source(step)} if self._mixture else {}),
            **({"device_gib": peak / 2**30} if peak else {}),
        }

    def _tokens_by_source(self, step: int) -> dict[str, int]:
        """Tokens of each named source in a step."""
        assert self._mixture is not None
        train = self.config.train
        counts = self._mixture.counts(step, train.logical_shards * train.sequences_per_shard)
        return {name: count * train.seq_len for name, count in counts.items()}

    def _measure(self, reports: StepReports, record: dict[str, Any]) -> None:
        order = sorted(reports.parts)
        self.step_metrics.step(record, [reports.parts[part].seconds for part in order])

    def roll_back(self) -> None:
        """Go on from the weights of the last scheduled checkpoint; the steps since then are data left out."""
        target = rollback_target(self.folder.checkpoints, self.config.train, self.step)
        if target is None:  # Before the first one a step is left out, and that is all.
            return
        with self.ledger.state("recovering"):
            text = f"weights of {target}, {self.step - checkpoint.step_of(target)} steps back; those are left out"
            self.generations.reload(self.step, from_newest(target, None), text)

    def evaluate(self) -> None:
        """Measure the validation loss; it changes no state."""
        batches = tuple(
            (index, self.plan.part_owners[index % self.config.train.logical_shards])
            for index in range(self.validation.batches)
        )
        found: dict[int, tuple[float, float]] = {}
        with self.ledger.state("evaluating"):
            slots = self.plan.peers if is_whole(self.config) else self.plan.attention
            self.control.post(slots, Evaluate(batches=batches), step=self.step + 1)
            for message in self.control.messages(Evaluated, Saved, StillWriting):
                if not isinstance(message.body, Evaluated):
                    self.checkpoints.hear(message)
                    continue
                found |= message.body.losses
                if len(found) == len(batches):
                    break
        tokens = round(math.fsum(value[1] for value in found.values()))
        loss = math.fsum(found[index][0] for index in sorted(found)) / tokens
        bits = loss / math.log(2.0) / self.validation.bytes_per_token
        record = {"step": self.step, "eval_loss": loss, "eval_bits_per_byte": bits, "eval_tokens": tokens}
        self.folder.append_evaluation(record)
        self.on_record(record)
        self.metrics.record("eval_loss", loss)
        self.metrics.record("eval_bpb", bits)

    def save(self) -> None:
        """Write a checkpoint of the committed step."""
        self.checkpoints.save(self.step, is_last=self._is_last)
