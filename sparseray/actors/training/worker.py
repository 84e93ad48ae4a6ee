"""An attention worker: runs its parts of a step, forward and backward, one after another.

A part's loss and gradients depend on (seed, step, part) and the weights alone; which worker runs
it, and which slots answer for experts and rows, changes no bit. Called by roles.py once a step.
"""

import time
from collections.abc import Callable, Sequence

import torch

from sparseray.actors.exchange.protocol import Exchange, FetchedRows, PartGradients
from sparseray.actors.state.dense import DenseState
from sparseray.actors.training.objective import Batch, BatchSource, Objective, next_token
from sparseray.actors.wire.messages import PartDone
from sparseray.model.statistics import Noted, collect

# Of one in so many steps a worker's first part notes statistics; they move slowly.
SAMPLE_EVERY = 10


class AttentionWorker:
    """Runs parts with the dense weights of one slot.

    Args:
        state: dense weights, shared with the slot that holds them.
        exchange: of the generation.
        objective: what to train for.
    """

    def __init__(self, state: DenseState, exchange: Exchange, objective: Objective = next_token) -> None:
        self.state, self.exchange, self.objective = state, exchange, objective
        self.layers = state.model.config.dse.layers
        self.seconds: dict[str, float] = {}
        self.noted: Noted = []

    def run_step(
        self, step: int, parts: Sequence[int], batches: BatchSource, report: Callable[[int, PartDone], None]
    ) -> None:
        """Run the parts of one step, send each one's gradients on their way and report its loss.

        Args:
            step: number of the step.
            parts: that this worker runs.
            batches: data by (step, part).
            report: told (part, what it gave).
        """
        self.seconds = dict.fromkeys(("data", "fetch", "forward", "backward"), 0.0)
        started = time.perf_counter()
        loaded = [batches(step, part) for part in parts]
        weight = batches.weight(step)
        self._lap("data", started)
        for part, batch, rows in zip(parts, loaded, self._fetch(step, loaded)):
            self.exchange.begin(step, part)
            if part == parts[0] and step % SAMPLE_EVERY == 0:
                with collect() as self.noted:
                    done, gradients = self._run_part(batch, rows, weight)
            else:
                done, gradients = self._run_part(batch, rows, weight)
            self.exchange.reduce(step, part, gradients)
            report(part, done)

    def _fetch(self, step: int, batches: Sequence[Batch]) -> list[FetchedRows]:
        """Hash the tokens of all batches and fetch their memory rows at once."""
        started = time.perf_counter()
        if not self.layers or not batches:
            return [FetchedRows(addresses={}, values={}) for _ in batches]
        self.exchange.begin(step, -1)
        hashed = [self.state.model.memory_rows(b.tokens_BT, b.document_starts_BT) for b in batches]
        fetched = self.exchange.prefetch(
            {layer: torch.cat([h[layer] for h in hashed]) for layer in self.layers}
        )
        self._lap("fetch", started)
        return fetched.split([b.tokens_BT.numel() for b in batches])

    def _run_part(self, batch: Batch, rows: FetchedRows, weight: float) -> tuple[PartDone, PartGradients]:
        """Forward and backward of one part; `weight` is that of the whole global batch."""
        started = time.perf_counter()
        loss = self.objective(self.state.model, batch, self.exchange, rows.differentiable())
        started = self._lap("forward", started)
        (loss.sum / weight + loss.aux / self.state.num_parts).backward()
        gradients = PartGradients(dense=self.state.take_gradient(), rows=rows.gradients())
        self._lap("backward", started)
        done = PartDone(
            loss_sum=float(loss.sum.detach()),
            weight=loss.weight,
            aux_loss=float(loss.aux.detach()),
            metrics=loss.metrics,
            tokens=batch.targets_BT.numel(),
            seconds=dict(self.seconds),
            counts_LE=loss.counts_LE,
        )
        return done, gradients

    @torch.no_grad()
    def evaluate(
        self, step: int, parts: Sequence[int], batches: BatchSource
    ) -> dict[int, tuple[float, float]]:
        """Return (loss sum in nats, weight) of each part, with no effect on any state.

        Args:
            step: that the requests belong to.
            parts: batches to compute.
            batches: data by (step, part).
        """
        loaded = [batches(step, part) for part in parts]
        found: dict[int, tuple[float, float]] = {}
        for part, batch, rows in zip(parts, loaded, self._fetch(step, loaded)):
            self.exchange.begin(step, part)
            loss = self.objective(self.state.model, batch, self.exchange, rows)
            found[part] = (float(loss.sum), loss.weight)
        return found

    def _lap(self, phase: str, started: float) -> float:
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - started
        return now
