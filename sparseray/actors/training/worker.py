"""An attention worker: runs its parts of a step, forward and backward, as many at once as its exchange allows.

A part's loss and gradients depend on (seed, step, part) and the weights alone; which worker runs
it, and which slots answer for experts and rows, changes no bit. Called by roles.py once a step.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from sparseray.actors.exchange.on_device import ToHost
from sparseray.actors.exchange.protocol import Exchange, FetchedRows, PartGradients, fetch_together
from sparseray.actors.state.dense import DenseState, Twin
from sparseray.actors.state.staged_memory import Addresses
from sparseray.actors.training.objective import Batch, BatchSource, Loss, Objective, next_token, on_device
from sparseray.actors.training.part_graph import graph_of
from sparseray.actors.wire.messages import PartDone
from sparseray.model.statistics import Noted, collect

SAMPLE_EVERY = {"cpu": 10, "cuda": 100}
"""Of one in so many steps a worker's first part notes statistics, by device; they move slowly, and a GPU waits.

Layers that are computed again note none: what is noted runs other operations, and both passes must run the same.
"""


_Call = tuple[DenseState | Twin, int, int, Batch, FetchedRows, float]


@dataclass(frozen=True, kw_only=True)
class _Ran:
    """What one part gave, and the seconds of its passes."""

    loss: Loss
    gradients: PartGradients
    forward_s: float
    backward_s: float


class _Found:
    """Losses and counts of all parts on their way to the host, behind what computes them and before the last sums.

    They are told while the device makes those sums and their norms, which everybody waits for.

    Args:
        losses: of the parts.
        device: where they are.
    """

    def __init__(self, losses: Sequence[Loss], device: torch.device) -> None:
        scalars = [s.detach() for loss in losses for s in (loss.sum, loss.aux, *loss.metrics.values())]
        self._scalars = ToHost(torch.stack(scalars))
        self._counts = ToHost(torch.stack([loss.counts_LE for loss in losses]))
        # Asking takes the host a while, and it has time now.
        self.peak = torch.cuda.max_memory_reserved(device) if device.type == "cuda" else 0

    def read(self) -> tuple[list[float], Tensor]:
        """The losses one after another, and the counts."""
        return self._scalars.read().tolist(), self._counts.read()


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
        self.sampled: int | None = None
        self.lanes: list[DenseState | Twin] = [state]
        self.lanes += [Twin(state.model) for _ in range(1, exchange.abreast)]
        self.graph = graph_of(state, exchange, objective)

    def run_step(
        self, step: int, parts: Sequence[int], batches: BatchSource, report: Callable[[int, PartDone], None]
    ) -> None:
        """Run the parts of one step, send each one's gradients on their way, and report the losses.

        Args:
            step: number of the step.
            parts: that this worker runs.
            batches: data by (step, part).
            report: told (part, what it gave).
        """
        self.seconds = dict.fromkeys(("data", "fetch", "forward", "backward"), 0.0)
        is_due = step % SAMPLE_EVERY[self.state.device.type] == 0 and not self.state.model.recompute
        self.sampled = parts[0] if parts and is_due else None
        started = time.perf_counter()
        loaded = [batches(step, part) for part in parts]
        weight = batches.weight(step)
        self._lap("data", started)
        losses: list[Loss] = []

        def addresses(of: int) -> list[Addresses]:
            return [self._addresses(b) for b in (loaded if of == step else [batches(of, p) for p in parts])]

        rows = self._fetch(step, loaded, lambda: self.exchange.fetch(step, addresses))
        for first in range(0, len(parts), len(self.lanes)):
            side_by_side = range(len(parts))[first : first + len(self.lanes)]
            calls = [
                (lane, step, parts[i], loaded[i], rows[i], weight)
                for lane, i in zip(self.lanes, side_by_side)
            ]
            for i, ran in zip(side_by_side, self._run(calls)):
                self.seconds["forward"] += ran.forward_s / len(calls)
                self.seconds["backward"] += ran.backward_s / len(calls)
                started = time.perf_counter()
                losses.append(ran.loss)
                if len(losses) == len(parts):
                    found = _Found(losses, self.state.device)
                self.exchange.reduce(step, parts[i], ran.gradients)
                self._lap("backward", started)
        if losses:
            started = time.perf_counter()
            read = found.read()
            self._lap("backward", started)
            for part, done in zip(parts, self._told(loaded, losses, *read, found.peak)):
                report(part, done)
            self.exchange.conclude(step)

    def _told(
        self,
        batches: Sequence[Batch],
        losses: Sequence[Loss],
        scalars: list[float],
        counts: Tensor,
        peak: int,
    ) -> list[PartDone]:
        """What the parts gave, in the order of the step."""
        each = len(scalars) // len(losses)
        return [
            PartDone(
                loss_sum=scalars[each * index],
                weight=loss.weight,
                aux_loss=scalars[each * index + 1],
                metrics=dict(zip(loss.metrics, scalars[each * index + 2 :])),
                tokens=batch.targets_BT.numel(),
                seconds=dict(self.seconds),
                counts_LE=counts[index],
                device_bytes=peak,
            )
            for index, (batch, loss) in enumerate(zip(batches, losses))
        ]

    def _fetch(
        self, step: int, batches: Sequence[Batch], fetch: Callable[[], list[FetchedRows]]
    ) -> list[FetchedRows]:
        """Fetch the memory rows of all batches at once, if there is a memory."""
        started = time.perf_counter()
        if not self.layers or not batches:
            return [FetchedRows(addresses={}, values={}) for _ in batches]
        self.exchange.begin(step, -1)
        fetched = fetch()
        self._lap("fetch", started)
        return fetched

    def _addresses(self, batch: Batch) -> Addresses:
        """Hash the tokens of a batch on the CPU, where they and the tables are."""
        layout = self.state.model.layout
        assert layout is not None
        return {
            layer: layout.rows(layer, batch.tokens_BT, None, batch.document_starts_BT).flatten(0, 1)
            for layer in self.layers
        }

    def _run(self, calls: Sequence[_Call]) -> list[_Ran]:
        """Run parts, one in each lane; a lane computes in one thread, whatever the slot has, so its bits are one's."""
        if len(self.lanes) == 1:
            return [self._run_part(*call) for call in calls]
        with ThreadPoolExecutor(len(calls), "part", lambda: torch.set_num_threads(1)) as pool:
            return list(pool.map(lambda call: self._run_part(*call), calls))

    def _run_part(
        self, lane: DenseState | Twin, step: int, part: int, batch: Batch, rows: FetchedRows, weight: float
    ) -> _Ran:
        """Forward and backward of one part; `weight` is that of the whole global batch."""
        self.exchange.begin(step, part)
        started, is_sampled = time.perf_counter(), part == self.sampled
        graph = self.graph
        if is_sampled and graph is not None and not graph.is_alone:
            # A replay notes nothing: a forward pass of its own does, but in company that would be everybody's.
            graph = None
        if is_sampled:
            with collect() as self.noted, torch.set_grad_enabled(graph is None):
                loss = self._loss(lane, batch, rows.differentiable() if graph is None else rows, step)
        elif graph is None:
            loss = self._loss(lane, batch, rows.differentiable(), step)
        between = time.perf_counter()
        if graph is None:
            loss.backward(weight, self.state.num_parts)
        else:
            loss = graph(batch, rows, step=step, weight=weight)
        gradients = PartGradients(dense=lane.take_gradients(), rows=rows.gradients())
        backward_s = time.perf_counter() - between
        return _Ran(loss=loss, gradients=gradients, forward_s=between - started, backward_s=backward_s)

    def _loss(self, lane: DenseState | Twin, batch: Batch, rows: FetchedRows, step: int | None) -> Loss:
        """Run the objective where the weights are; without a step for an evaluation."""
        there = on_device(batch, self.state.device)
        return self.objective(lane.model, there, self.exchange, rows, step=step)

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

        def fetch() -> list[FetchedRows]:
            return fetch_together(self.exchange.prefetch, list(map(self._addresses, loaded)))

        for part, batch, rows in zip(parts, loaded, self._fetch(step, loaded, fetch)):
            self.exchange.begin(step, part)
            loss = self._loss(self.state, batch, rows, None)
            self.exchange.await_device()
            found[part] = (float(loss.sum), loss.weight)
        return found

    def _lap(self, phase: str, started: float) -> float:
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - started
        return now
