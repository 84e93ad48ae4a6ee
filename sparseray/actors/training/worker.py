"""An attention worker: runs its parts of a step, forward and backward, one after another.

A part's loss and gradients depend on (seed, step, part) and the weights alone; which worker runs
it, and which slots answer for experts and rows, changes no bit. Called by roles.py once a step.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sparseray.actors.exchange.protocol import Exchange, FetchedRows, PartGradients
from sparseray.actors.state.dense import DenseState
from sparseray.actors.wire.messages import PartDone
from sparseray.model.statistics import Noted, collect
from sparseray.model.transformer import Output, cross_entropy_sum

SAMPLE_EVERY = {"cpu": 10, "cuda": 100}
"""Of one in so many steps a worker's first part notes statistics, by device; they move slowly, and a GPU waits."""


class Batch(Protocol):
    """One part's tokens of one step: int64 [B, T], targets int64 [B, T], starts bool [B, T]."""

    @property
    def tokens_BT(self) -> Tensor: ...
    @property
    def targets_BT(self) -> Tensor: ...
    @property
    def document_starts_BT(self) -> Tensor: ...


Batches = Callable[[int, int], Batch]


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a part gave, on the device: cross-entropy sum and balance loss (scalars), and int64 [L, E] counts."""

    loss_sum: Tensor
    aux_loss: Tensor
    counts_LE: Tensor
    tokens: int


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
        """Run the parts of one step, send each one's gradients on their way, and report the losses.

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
        results: list[Result] = []
        for part, batch, rows in zip(parts, loaded, self._fetch(step, loaded)):
            self.exchange.begin(step, part)
            if part == parts[0] and step % SAMPLE_EVERY[self.state.device.type] == 0:
                with collect() as self.noted:
                    result, gradients = self._run_part(batch, rows)
            else:
                result, gradients = self._run_part(batch, rows)
            started = time.perf_counter()
            self.exchange.reduce(step, part, gradients)
            self._lap("backward", started)
            results.append(result)
        for part, done in zip(parts, self._read(results)):
            report(part, done)

    def _read(self, results: Sequence[Result]) -> list[PartDone]:
        """Bring what the parts gave to the host, all at once: nothing before waits for a device."""
        if not results:
            return []
        losses = torch.stack([loss for r in results for loss in (r.loss_sum, r.aux_loss)]).tolist()
        counts = torch.stack([r.counts_LE for r in results]).cpu()
        device = self.state.device
        peak = torch.cuda.max_memory_reserved(device) if device.type == "cuda" else 0
        return [
            PartDone(
                loss_sum=losses[2 * index],
                aux_loss=losses[2 * index + 1],
                tokens=result.tokens,
                seconds=dict(self.seconds),
                counts_LE=counts[index],
                device_bytes=peak,
            )
            for index, result in enumerate(results)
        ]

    def _fetch(self, step: int, batches: Sequence[Batch]) -> list[FetchedRows]:
        """Hash the tokens of all batches and fetch their memory rows at once."""
        started = time.perf_counter()
        if not self.layers or not batches:
            return [FetchedRows(addresses={}, values={}) for _ in batches]
        self.exchange.begin(step, -1)
        layout = self.state.model.layout
        assert layout is not None
        # On the CPU, where tokens and tables are.
        hashed = {
            layer: torch.cat(
                [layout.rows(layer, b.tokens_BT, None, b.document_starts_BT).flatten(0, 1) for b in batches]
            )
            for layer in self.layers
        }
        fetched = self.exchange.prefetch(hashed)
        self._lap("fetch", started)
        return fetched.split([b.tokens_BT.numel() for b in batches])

    def _forward(self, batch: Batch, rows: FetchedRows) -> tuple[Output, Tensor]:
        """Run the network and the loss: (output, cross-entropy sum)."""
        model, device = self.state.model, self.state.device
        out = model(
            batch.tokens_BT.to(device, non_blocking=True),
            experts=self.exchange.experts,
            memory=None,
            document_starts_BT=batch.document_starts_BT.to(device, non_blocking=True),
            fetched=rows,
        )
        return out, cross_entropy_sum(model, out.hidden_BTH, batch.targets_BT.to(device, non_blocking=True))

    def _run_part(self, batch: Batch, rows: FetchedRows) -> tuple[Result, PartGradients]:
        started, tokens = time.perf_counter(), batch.targets_BT.numel()
        out, loss_sum = self._forward(batch, rows.differentiable())
        started = self._lap("forward", started)
        # Every part has the same number of tokens, so this is the mean over the global batch.
        (loss_sum / (tokens * self.state.num_parts) + out.aux_loss / self.state.num_parts).backward()
        gradients = PartGradients(dense=self.state.take_gradients(), rows=rows.gradients())
        self._lap("backward", started)
        result = Result(
            loss_sum=loss_sum.detach(),
            aux_loss=out.aux_loss.detach(),
            counts_LE=out.expert_counts_LE,
            tokens=tokens,
        )
        return result, gradients

    @torch.no_grad()
    def evaluate(self, step: int, parts: Sequence[int], batches: Batches) -> dict[int, tuple[float, int]]:
        """Return (loss sum in nats, tokens) of each part, with no effect on any state."""
        loaded = [batches(step, part) for part in parts]
        found: dict[int, tuple[float, int]] = {}
        for part, batch, rows in zip(parts, loaded, self._fetch(step, loaded)):
            self.exchange.begin(step, part)
            _, loss = self._forward(batch, rows)
            found[part] = (float(loss), batch.targets_BT.numel())
        return found

    def _lap(self, phase: str, started: float) -> float:
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - started
        return now
