"""Forward and backward of a part as one CUDA graph: the host launches a step's kernels by one call.

A part's shapes are always the same, and on a GPU nothing in it waits for the host, also where slots exchange through each
other's memory: then the device waits. So the first one of a second step is recorded, and replayed from then on: inputs are copied to where
the recording reads them, and gradients are left as a backward pass leaves them. The kernels, their order and so the bits are
those of the first run. Called by worker.py; `graph_of` says where there is a graph.
"""

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sparseray.actors.exchange.on_device import OnDeviceExchange
from sparseray.actors.exchange.protocol import Exchange, FetchedRows, Recording, Run
from sparseray.actors.peers.across import DeviceExchange
from sparseray.actors.state.dense import DenseState
from sparseray.actors.state.dense_slab import DenseSlabs
from sparseray.actors.training.objective import Batch, DeviceBatch, Loss, Objective, next_token, on_device
from sparseray.errors import SlotLostError
from sparseray.kernels.capture import capturing
from sparseray.log import get_logger

log = get_logger(__name__)

LEFT_FREE = 1 / 16
"""Of the device's memory, for what runs beside a graph or a checkpoint's copy, whose memory nobody else can use: evaluations above all."""


class Recordable(Exchange, Protocol):
    """An exchange in which a part may be recorded."""

    dense: DenseSlabs
    is_alone: bool
    """Whether passes of this slot concern nobody else."""

    @property
    def launches_beside(self) -> bool:
        """Whether whole parts are launched all the same, now and then."""
        ...

    def leaves(self) -> list[Tensor]:
        """What a backward pass leaves gradients at."""
        ...

    def built_in(self) -> tuple[object, ...] | None:
        """What a recording of the part at hand has of the exchange built in, beside the leaves; None where the host is needed."""
        ...

    def recorded(self, run: Run, record: Callable[[Run], Recording]) -> Recording:
        """Have a part recorded, of which nothing happens, so that a replay does what the part does.

        Args:
            run: passes of the part.
            record: records a run, this one and what belongs to it; raises as `Recorder.record` does, and all is as before.
        """
        ...

    @property
    def sum_bytes(self) -> int:
        """Bytes of the sums of gradients over the parts of a step."""
        ...


class Recorder(Protocol):
    """What records a run and replays it."""

    def launch(self, run: Run, *, is_new: bool) -> list[Tensor]:
        """Run what will be recorded, so that everything is compiled and opened by then.

        Args:
            run: of the recording.
            is_new: nothing like it was launched before.
        """
        ...

    def record(self, run: Run, beside: int, *, again: bool) -> Recording:
        """Record a run without computing anything.

        Args:
            run: reads and writes memory that stays where it is.
            beside: bytes of the device that must be free afterwards.
            again: and as much as the recording takes, for a run that is launched.

        Raises:
            RuntimeError: it cannot be recorded; torch.OutOfMemoryError: there is no room.
        """
        ...


class CudaRecorder:
    """CUDA graphs of one device.

    Args:
        device: whose memory and kernels are recorded.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self._stream = device, torch.cuda.Stream(device)

    def launch(self, run: Run, *, is_new: bool) -> list[Tensor]:
        """Run it on the stream of the recording: autograd's nodes keep the stream that they were made on.

        Args:
            run, is_new: as in `Recorder`.
        """
        if is_new:
            # What torch keeps for one stream is of no use to another.
            torch.cuda.empty_cache()
        here = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(here)
        with torch.cuda.stream(self._stream):
            found = run()
        here.wait_stream(self._stream)
        return found

    def record(self, run: Run, beside: int, *, again: bool) -> Recording:
        """As in `Recorder`. What torch keeps for later goes back to the device first, so that the peak hardly grows.

        Args:
            run, beside, again: as in `Recorder`.
        """
        gc.collect()
        torch.cuda.empty_cache()
        before = torch.cuda.mem_get_info(self.device)[0]
        graph, here = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.device)
        try:
            with capturing(graph, stream=self._stream):
                found = run()
        finally:
            # A recording that failed leaves its stream behind as the current one.
            torch.cuda.set_stream(here)
        free = torch.cuda.mem_get_info(self.device)[0]
        beside += before - free if again else 0
        if free < beside:
            raise torch.OutOfMemoryError(
                f"it leaves {free / 2**30:.1f} GiB, and {beside / 2**30:.1f} GiB are wanted beside it"
            )
        return graph.replay, found


def recorder_of(device: torch.device) -> Recorder | None:
    """What records on a device; None where nothing does."""
    return CudaRecorder(device) if device.type == "cuda" else None


@dataclass(frozen=True, kw_only=True)
class _Recording:
    """A recorded part: where it reads from, what replays it, and what that fills."""

    batch: DeviceBatch
    rows: FetchedRows
    replay: Callable[[], object]
    found: list[Tensor]


class PartGraph:
    """Runs parts; one that is like the one before it is replayed.

    Args:
        exchange: of a slot with a GPU.
        recorder: of that device.
    """

    def __init__(self, exchange: Recordable, recorder: Recorder) -> None:
        self.exchange, self.dense = exchange, exchange.dense
        self._recorder: Recorder | None = recorder
        self._key: tuple[object, ...] = ()
        self._since = 0
        """Step of the first part with this key. Recording takes as long as a part, and after a change that step was waited for."""
        self._recording: _Recording | None = None
        self._metrics: list[str] = []

    @property
    def is_alone(self) -> bool:
        """Whether a pass beside a replay concerns nobody else."""
        return self.exchange.is_alone

    @property
    def is_recorded(self) -> bool:
        """Whether the next part that is like the last one is replayed."""
        return self._recording is not None

    def __call__(self, batch: Batch, rows: FetchedRows, *, step: int, weight: float) -> Loss:
        """Run one part forward and backward; its gradients are left at the leaves and the rows.

        Args:
            batch: on the CPU.
            rows: of its tokens.
            step: that it is of.
            weight: of the whole global batch.
        """
        model, leaves = self.dense.model, self.exchange.leaves()
        there = on_device(batch, self.dense.device)

        def run(batch: DeviceBatch, rows: FetchedRows) -> list[Tensor]:
            return self._passes(leaves, batch, rows, step, weight)

        # What a recording has built in: the sizes, factors of the loss, and where everything lies that it reads.
        lies, exchanged = [t.data_ptr() for t in (*leaves, *model.buffers())], self.exchange.built_in()
        key = (batch.tokens_BT.shape, weight, model.config.mtp.weight_at(step), exchanged, *lies)
        is_new = key != self._key
        if self._recorder is None or exchanged is None or batch.weights_BT is not None:
            found = run(there, rows)
        elif is_new or (self._recording is None and step == self._since):
            if is_new:
                self._key, self._since, self._recording = key, step, None
            found = self._recorder.launch(lambda: run(there, rows), is_new=is_new)
        elif self._recording is None and not self._record(run, there, rows, leaves):
            found = run(there, rows)
        else:
            found = self._replayed(there, rows)
        loss_sum, aux, counts_LE, *rest = found
        metrics = dict(zip(self._metrics, rest))
        for leaf, gradient in zip((*leaves, *rows.values.values()), rest[len(metrics) :], strict=True):
            leaf.grad = gradient
        counted = batch.targets_BT.numel() if batch.weights_BT is None else batch.weights_BT.double().sum()
        return Loss(sum=loss_sum, weight=float(counted), aux=aux, counts_LE=counts_LE, metrics=metrics)

    def _passes(
        self, leaves: list[Tensor], batch: DeviceBatch, rows: FetchedRows, step: int, weight: float
    ) -> list[Tensor]:
        """Loss, balance loss, counts and further losses, then the gradients of leaves and rows."""
        rows = rows.differentiable()
        loss = next_token(self.dense.model, batch, self.exchange, rows, step=step)
        loss.backward(weight, self.dense.num_parts)
        self._metrics = list(loss.metrics)
        found = [loss.sum.detach(), loss.aux.detach(), loss.counts_LE, *loss.metrics.values()]
        for leaf in (*leaves, *rows.values.values()):
            found.append(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad)
            leaf.grad = None
        return found

    def _replayed(self, batch: DeviceBatch, rows: FetchedRows) -> list[Tensor]:
        """What `_passes` gives, from the recording."""
        recording = self._recording
        assert recording is not None
        with torch.no_grad():
            for own, new in zip(_inputs(recording.batch, recording.rows), _inputs(batch, rows), strict=True):
                own.copy_(new)
        recording.replay()
        # Gradients are added up, or used as they are, before the next replay; losses and counts are read later.
        few = 3 + len(self._metrics)
        return [tensor.clone() for tensor in recording.found[:few]] + recording.found[few:]

    def _record(
        self,
        run: Callable[[DeviceBatch, FetchedRows], list[Tensor]],
        batch: DeviceBatch,
        rows: FetchedRows,
        leaves: list[Tensor],
    ) -> bool:
        """Make the recording; where that fails, parts are launched by the host from now on."""
        own = DeviceBatch(
            tokens_BT=batch.tokens_BT.clone(),
            targets_BT=batch.targets_BT.clone(),
            weights_BT=None,
            document_starts_BT=batch.document_starts_BT.clone(),
        )
        kept = FetchedRows(
            addresses=rows.addresses, values={layer: v.detach().clone() for layer, v in rows.values.items()}
        )
        recorder, beside, again = self._recorder, self._beside(), self.exchange.launches_beside
        assert recorder is not None
        try:
            replay, found = self.exchange.recorded(
                lambda: run(own, kept), lambda whole: recorder.record(whole, beside, again=again)
            )
        except SlotLostError:
            raise
        except RuntimeError as error:
            is_full = isinstance(error, torch.OutOfMemoryError)
            log.warning("parts run without a CUDA graph: %s", error, exc_info=None if is_full else error)
            self._recorder = None
            for leaf in leaves:
                leaf.grad = None
            return False
        log.info("parts run as one CUDA graph from now on")
        self._recording = _Recording(batch=own, rows=kept, replay=replay, found=found)
        return True

    def _beside(self) -> int:
        """Bytes that other work needs: an evaluation's, and the sums over parts in fp32."""
        device, sums = self.dense.device, self.exchange.sum_bytes
        if device.type != "cuda":
            return sums
        return sums + int(LEFT_FREE * torch.cuda.get_device_properties(device).total_memory)


def _inputs(batch: DeviceBatch, rows: FetchedRows) -> list[Tensor]:
    return [batch.tokens_BT, batch.targets_BT, batch.document_starts_BT, *rows.values.values()]


def graph_of(state: DenseState, exchange: Exchange, objective: Objective) -> PartGraph | None:
    """The graph of a worker's parts; None where the host must launch them.

    There is one on a GPU whose slot has all roles, or exchanges in step, for the objective that is known to wait for
    nothing. Parts in which an exchange needs the host (`Recordable.built_in`) are launched by `PartGraph` all the same, and
    so are batches with weights of their own, whose sum is read by the host, and parts that could not be recorded.

    Args:
        state: dense weights of the slot.
        exchange: of the generation.
        objective: what to train for.
    """
    if not isinstance(exchange, OnDeviceExchange | DeviceExchange) or objective is not next_token:
        return None
    recorder = recorder_of(state.device)
    return None if recorder is None else PartGraph(exchange, recorder)
