"""An attention worker: runs its parts of a step, forward and backward, one after another.

A part's loss and gradients depend on (seed, step, part) and the weights alone; which worker runs
it, and which slots answer for experts and rows, changes no bit. Called by roles.py once a step.
"""

import time
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from sparseray.actors.exchange.protocol import Exchange, FetchedRows, PartGradients
from sparseray.actors.state.dense import DenseState
from sparseray.actors.wire.messages import PartDone
from sparseray.model.statistics import Noted, collect
from sparseray.model.transformer import cross_entropy_sum

# Of one in so many steps a worker's first part notes statistics; they move slowly.
SAMPLE_EVERY = 10


class Batch(Protocol):
    """One part's tokens of one step: int64 [B, T], targets int64 [B, T], starts bool [B, T]."""

    @property
    def tokens_BT(self) -> Tensor: ...
    @property
    def targets_BT(self) -> Tensor: ...
    @property
    def document_starts_BT(self) -> Tensor: ...


Batches = Callable[[int, int], Batch]


class AttentionWorker:
    """Runs parts with the dense weights of one slot.

    Args:
        state: dense weights, shared with the slot that holds them.
        exchange: of the generation.
    """

    def __init__(self, state: DenseState, exchange: Exchange) -> None:
        self.state, self.exchange = state, exchange
        self.layers = state.model.config.dse.layers
        self.seconds: dict[str, float] = {}
        self.noted: Noted = []

    def run_step(
        self, step: int, parts: Sequence[int], batches: Batches, report: Callable[[int, PartDone], None]
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
        self._lap("data", started)
        for part, batch, rows in zip(parts, loaded, self._fetch(step, loaded)):
            self.exchange.begin(step, part)
            if part == parts[0] and step % SAMPLE_EVERY == 0:
                with collect() as self.noted:
                    done, gradients = self._run_part(batch, rows)
            else:
                done, gradients = self._run_part(batch, rows)
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

    def _run_part(self, batch: Batch, rows: FetchedRows) -> tuple[PartDone, PartGradients]:
        started = time.perf_counter()
        model, tokens = self.state.model, batch.targets_BT.numel()
        out = model(
            batch.tokens_BT,
            experts=self.exchange.experts,
            memory=None,
            document_starts_BT=batch.document_starts_BT,
            fetched=rows.differentiable(),
        )
        loss_sum = cross_entropy_sum(model, out.hidden_BTH, batch.targets_BT)
        started = self._lap("forward", started)
        # Every part has the same number of tokens, so this is the mean over the global batch.
        (loss_sum / (tokens * self.state.num_parts) + out.aux_loss / self.state.num_parts).backward()
        gradients = PartGradients(dense=self.state.take_gradient(), rows=rows.gradients())
        self._lap("backward", started)
        done = PartDone(
            loss_sum=float(loss_sum.detach()),
            aux_loss=float(out.aux_loss.detach()),
            tokens=tokens,
            seconds=dict(self.seconds),
            counts_LE=out.expert_counts_LE,
        )
        return done, gradients

    @torch.no_grad()
    def evaluate(self, step: int, parts: Sequence[int], batches: Batches) -> dict[int, tuple[float, int]]:
        """Return (loss sum in nats, tokens) of each part, with no effect on any state."""
        loaded = [batches(step, part) for part in parts]
        found: dict[int, tuple[float, int]] = {}
        for part, batch, rows in zip(parts, loaded, self._fetch(step, loaded)):
            self.exchange.begin(step, part)
            out = self.state.model(
                batch.tokens_BT,
                experts=self.exchange.experts,
                memory=None,
                document_starts_BT=batch.document_starts_BT,
                fetched=rows,
            )
            loss = cross_entropy_sum(self.state.model, out.hidden_BTH, batch.targets_BT)
            found[part] = (float(loss), batch.targets_BT.numel())
        return found

    def _lap(self, phase: str, started: float) -> float:
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - started
        return now
