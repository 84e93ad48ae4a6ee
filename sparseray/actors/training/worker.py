"""An attention worker: runs its parts of a step, forward and backward, one after another.

A part's loss and gradients depend on (seed, step, part) and the weights alone; which worker runs
it, and which slots answer for experts and rows, changes no bit. Called by slot.py once a step.
"""

import time
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from sparseray.actors.exchange.by_message import RemoteExperts, RemoteMemory
from sparseray.actors.exchange.reduction import PartResult
from sparseray.actors.state.dense import DenseState
from sparseray.kernels.dse.cpu import segment_sum_rows
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
        experts, memory: the remote sides of the model's seams.
        begin: told (step, part) before the requests of that part are sent.
    """

    def __init__(
        self,
        state: DenseState,
        experts: RemoteExperts,
        memory: RemoteMemory,
        begin: Callable[[int, int], None],
    ) -> None:
        self.state = state
        self.experts, self.memory, self.begin = experts, memory, begin
        self.layers = state.model.config.dse.layers
        self.seconds: dict[str, float] = {}
        self.noted: Noted = []

    def run_step(
        self, step: int, parts: Sequence[int], batches: Batches, finish: Callable[[int, PartResult], None]
    ) -> None:
        """Run the parts of one step and hand each result to `finish` as soon as it is there."""
        self.seconds = dict.fromkeys(("data", "fetch", "forward", "backward"), 0.0)
        started = time.perf_counter()
        loaded = [batches(step, part) for part in parts]
        self._lap("data", started)
        fetched = self._fetch(step, loaded)
        for part, batch, (values, rows) in zip(parts, loaded, fetched):
            self.begin(step, part)
            self.experts.part = part
            if part == parts[0] and step % SAMPLE_EVERY == 0:
                with collect() as self.noted:
                    result = self._run_part(batch, values, rows)
            else:
                result = self._run_part(batch, values, rows)
            finish(part, result)

    def _fetch(self, step: int, batches: Sequence[Batch]) -> list[tuple[list[Tensor], list[np.ndarray]]]:
        """Fetch the memory rows of all batches at once: (values, row addresses) of every memory layer, per batch."""
        started = time.perf_counter()
        if not self.layers:
            return [([], []) for _ in batches]
        self.begin(step, -1)
        addresses = [
            [
                rows.reshape(-1).numpy()
                for rows in self.state.model.memory_rows(b.tokens_BT, b.document_starts_BT).values()
            ]
            for b in batches
        ]
        fetched = self.memory.fetch([np.concatenate(per_layer) for per_layer in zip(*addresses)])
        split = [
            torch.split(values, [len(rows) for rows in per_layer])
            for values, per_layer in zip(fetched, zip(*addresses))
        ]
        self._lap("fetch", started)
        return list(zip(map(list, zip(*split)), addresses))

    def _run_part(self, batch: Batch, values: list[Tensor], rows: list[np.ndarray]) -> PartResult:
        started = time.perf_counter()
        model, tokens = self.state.model, batch.targets_BT.numel()
        self.memory.prepare(self.layers, values, train=True)
        out = model(
            batch.tokens_BT,
            experts=self.experts,
            memory=self.memory,
            document_starts_BT=batch.document_starts_BT,
        )
        loss_sum = cross_entropy_sum(model, out.hidden_BTH, batch.targets_BT)
        started = self._lap("forward", started)
        # Every part has the same number of tokens, so this is the mean over the global batch.
        (loss_sum / (tokens * self.state.num_parts) + out.aux_loss / self.state.num_parts).backward()
        gradients = [self.memory.ready[layer].grad for layer in self.layers]
        result = PartResult(
            loss_sum=float(loss_sum.detach()),
            aux_loss=float(out.aux_loss.detach()),
            tokens=tokens,
            counts_LE=out.expert_counts_LE,
            gradient=self.state.take_gradient(),
            rows=[segment_sum_rows(r, g.numpy()) for r, g in zip(rows, gradients) if g is not None],
        )
        assert len(result.rows) == len(self.layers), "no gradient reached a memory layer's rows"
        self._lap("backward", started)
        return result

    @torch.no_grad()
    def evaluate(self, step: int, parts: Sequence[int], batches: Batches) -> dict[int, tuple[float, int]]:
        """Return (loss sum in nats, tokens) of each part, with no effect on any state."""
        loaded = [batches(step, part) for part in parts]
        found: dict[int, tuple[float, int]] = {}
        for part, batch, (values, _) in zip(parts, loaded, self._fetch(step, loaded)):
            self.begin(step, part)
            self.experts.part = part
            self.memory.prepare(self.layers, values, train=False)
            out = self.state.model(
                batch.tokens_BT,
                experts=self.experts,
                memory=self.memory,
                document_starts_BT=batch.document_starts_BT,
            )
            loss = cross_entropy_sum(self.state.model, out.hidden_BTH, batch.targets_BT)
            found[part] = (float(loss), batch.targets_BT.numel())
        return found

    def _lap(self, phase: str, started: float) -> float:
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - started
        return now
