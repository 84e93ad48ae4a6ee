"""Memory tables in host memory whose rows are trained on the device, staged there ahead of the step that reads them.

The same buckets, names and checkpoints as a memory shard's. A step's addresses follow from its tokens, so while a step
computes a thread gathers the rows of the next one, each once and with its moments, and sends them over a stream of their own.
At the commit they are updated on the device, and the thread brings them back into the tables. Of rows that two steps
in a row read, the later one takes the earlier one's result on the device. Whoever reads the tables waits until what was
committed has been written back. Update as in memory.py.

With several slots nothing is staged: gradients come by message, as to any shard, and are applied by the same operations.

Shapes: N addresses of a part, U distinct rows of a step, L parts, B buckets, D row width.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparseray.actors.state.gradient_sum import Determinism, GradientSum
from sparseray.actors.state.memory import ROUNDING_STEP, MemoryShard, as_tensor
from sparseray.actors.state.pieces import Key
from sparseray.actors.state.tables import SharedTable, version_of
from sparseray.kernels.dse.gather import gather_rows
from sparseray.kernels.dse.staging import distinct, scatter_rows, segments
from sparseray.kernels.ops import Ops
from sparseray.kernels.row_ops import to_numpy
from sparseray.model.config import ModelConfig

MOST_THREADS = 8
"""That gather or write rows at once; more of them wait for the same memory."""

Addresses = dict[int, Tensor]
"""Rows int64 [T, N] that a part's tokens read, by 0-based model layer; on the CPU."""


@dataclass(frozen=True, kw_only=True)
class LayerRows:
    """One layer's rows of a step: in host memory as they are gathered, then on the device.

    Args:
        ids_U: int64, rising; where the rows lie in the table.
        weight_UD, m_UD, v_U, t_U: the rows with their moments and updates.
        places: int64 [N] of each part, the row of each address.
        orders, firsts: of each part, the order of its gradients' sums (`Ops.row_sums`).
        buckets_B1: int64, the first row of each bucket, and their number.
    """

    ids_U: Tensor
    weight_UD: Tensor
    m_UD: Tensor
    v_U: Tensor
    t_U: Tensor
    places: tuple[Tensor, ...]
    orders: tuple[Tensor, ...]
    firsts: tuple[Tensor, ...]
    buckets_B1: Tensor

    @property
    def fields(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What an update changes, in the table's order."""
        return self.weight_UD, self.m_UD, self.v_U, self.t_U

    def to(self, device: torch.device) -> "LayerRows":
        """Send all of it on its way."""
        sent: dict[str, Any] = {
            name: tuple(x.to(device, non_blocking=True) for x in value)
            if isinstance(value, tuple)
            else value.to(device, non_blocking=True)
            for name, value in vars(self).items()
        }
        return LayerRows(**sent)

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Let nothing else take the memory before what a stream has to do by now is done."""
        for tensor in (self.ids_U, *self.fields, *self.places, *self.orders, *self.firsts, self.buckets_B1):
            tensor.record_stream(stream)


@dataclass(frozen=True, kw_only=True)
class StagedStep:
    """The rows that a step reads and changes.

    Args:
        parts: addresses of each part.
        host_ids: int64 [U] of each layer.
        layers: on the device.
        sent: when they are there; None without a GPU.
    """

    parts: Sequence[Addresses]
    host_ids: list[np.ndarray]
    layers: list[LayerRows]
    sent: torch.cuda.Event | None


class StagedMemory(MemoryShard):
    """`MemoryShard` of a slot with a device, which trains the rows there; it stages them where it holds every bucket.

    Args:
        config, table_rows, seed, num_parts, betas, eps: as in `MemoryShard`.
        device: where rows are trained.
        ops: update them.
        determinism: order of the sum over parts.
    """

    def __init__(
        self,
        config: ModelConfig,
        table_rows: Sequence[int],
        *,
        seed: int,
        num_parts: int,
        betas: tuple[float, float],
        eps: float,
        device: torch.device,
        ops: Ops,
        determinism: Determinism,
    ) -> None:
        self.device, self.ops = device, ops
        self.sum = GradientSum(num_parts, determinism)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._threads = max(1, min(MOST_THREADS, (os.cpu_count() or 1) // 2))
        self._pool = ThreadPoolExecutor(self._threads, "rows")
        # One thread, so that what is begun first is done first.
        self._work = ThreadPoolExecutor(1, "staging", lambda: torch.set_num_threads(1))
        self._written: Future[None] | None = None
        self._ahead: tuple[int, Future[StagedStep]] | None = None
        self._open: StagedStep | None = None
        self._last: StagedStep | None = None
        super().__init__(config, table_rows, seed=seed, num_parts=num_parts, betas=betas, eps=eps)

    # -- a step, in the work thread ---------------------------------------------------------------

    def open_step(self, step: int, addresses: Callable[[int], Sequence[Addresses]]) -> StagedStep:
        """Take the rows of a step as they are after the commit before it, and begin to stage the next one's.

        Args:
            step: that begins.
            addresses: of the parts of any step; called in another thread.
        """
        if self._ahead is None or self._ahead[0] != step:
            self._ahead = step, self._work.submit(self._stage, addresses, step)
        staged = self._ahead[1].result()
        self._ahead = step + 1, self._work.submit(self._stage, addresses, step + 1)
        if staged.sent is not None:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(staged.sent)
            for rows in staged.layers:
                rows.record_stream(stream)
        if self._last is not None:
            for rows, newer in zip(staged.layers, self._last.layers):
                self.ops.take_newer(rows.fields, rows.ids_U, newer.fields, newer.ids_U)
        self._open = staged
        return staged

    def add_row_gradients(self, part: int, gradients: Sequence[Tensor]) -> None:
        """Add a part's row gradients to their sums on the device.

        Args:
            part: logical part of the open step.
            gradients: [N, D] of each memory layer.
        """
        assert self._open is not None
        self.sum.add(
            part,
            [
                self.ops.row_sums(gradient, rows.orders[part], rows.firsts[part])
                for gradient, rows in zip(gradients, self._open.layers)
            ],
        )

    def norms_on_device(self) -> list[Tensor]:
        """Squared norms fp32 [B] of each layer's reduced gradients by bucket."""
        assert self._open is not None and self.sum.total is not None
        layers = zip(self.sum.total, self._open.layers)
        return [self.ops.range_norms(total, rows.buckets_B1) for total, rows in layers]

    @property
    def is_reduced(self) -> bool:
        """Whether the gradients of the step are complete."""
        return super().is_reduced if self._open is None else self.sum.total is not None

    def norms(self) -> dict[str, float]:
        """As in `MemoryShard`, with the bits of `norms_on_device`."""
        return {
            f"bucket.{key[0]}.{key[1]}": float(
                self.ops.range_norms(sums_UD, torch.tensor([0, len(sums_UD)]).to(self.device))
            )
            for key in self.primary
            for sums_UD in [torch.from_numpy(self.reduced[key][1]).to(self.device)]
        }

    def apply(self, *, lr: float, scale: float) -> int:
        """Update the step's rows on the device and begin to write them back; returns how many they are.

        Args:
            lr: learning rate of this step.
            scale: factor on the gradients (global-norm clipping).
        """
        if self._open is None:
            return self._apply_received(lr=lr, scale=scale)
        staged, totals = self._open, self.sum.total
        assert staged is not None and totals is not None, "no reduced gradient yet"
        self.settle()
        for layer, rows, total in zip(self.layers, staged.layers, totals):
            self.ops.row_adam(
                *rows.fields,
                rows.ids_U,
                total,
                scale=scale,
                lr=lr,
                betas=self.betas,
                eps=self.eps,
                seed=self.seed + ROUNDING_STEP * layer,
            )
        self.updates += 1
        done = torch.cuda.current_stream(self.device).record_event() if self._stream is not None else None
        version = version_of(self.generation, self.updates)
        self._written = self._work.submit(self._write_back, staged, done, version)
        self.discard()
        self._last = staged
        return sum(map(len, staged.host_ids))

    def _apply_received(self, *, lr: float, scale: float) -> int:
        """Apply what came by message, without having staged anything."""
        updated = 0
        for index, layer in enumerate(self.layers):
            parts = [self.reduced[key] for key in self.owned if key[0] == index]
            if not parts:
                continue
            ids_U, sums_UD = (np.concatenate([part[i] for part in parts]) for i in range(2))
            columns, table = _columns(self.tables[index]), self.tables[index]
            rows = [as_tensor(of_all[ids_U]).to(self.device) for of_all in columns]
            self.ops.row_adam(
                rows[0],
                rows[1],
                rows[2].view(-1),
                rows[3].view(-1),
                torch.from_numpy(ids_U).to(self.device),
                torch.from_numpy(sums_UD).to(self.device),
                scale=scale,
                lr=lr,
                betas=self.betas,
                eps=self.eps,
                seed=self.seed + ROUNDING_STEP * layer,
            )
            table.change()
            for of_all, field in zip(columns, rows):
                scatter_rows(of_all, ids_U, to_numpy(field), self._pool)
            updated += len(ids_U)
        self.updates += 1
        self.discard()
        self._publish()
        return updated

    def pass_over(self) -> None:
        """Count a step whose gradients are dropped."""
        self.settle()
        self._last = None
        super().pass_over()

    def discard(self) -> None:
        """Forget the gradients of the step; the rows stay."""
        self.sum.clear()
        self._open = None
        super().discard()

    # -- the tables, as others see them --------------------------------------------------------------

    def settle(self) -> None:
        """Return once the tables are as the last commit left them."""
        if self._written is not None:
            self._written.result()
            self._written = None

    def assign(self, owned: Sequence[Key], primary: Sequence[Key], *, generation: int = 0) -> None:
        """As in `MemoryShard`, of all buckets or none; what was staged is of the generation before.

        Args:
            owned: buckets that follow the updates.
            primary: those of them that answer for rows.
            generation: of the plan that says so.
        """
        self.settle()
        self._ahead = self._last = None
        super().assign(owned, primary, generation=generation)

    def gather(self, layer: int, rows_N: Tensor) -> Tensor:
        """As in `MemoryShard`.

        Args:
            layer: index among the memory layers.
            rows_N: int64.
        """
        self.settle()
        return super().gather(layer, rows_N)

    def _fields(self, key: Key) -> list[Tensor]:
        self.settle()
        return super()._fields(key)

    # -- in the staging thread ------------------------------------------------------------------------

    def _stage(self, addresses: Callable[[int], Sequence[Addresses]], step: int) -> StagedStep:
        """Gather the rows of a step as they are in the tables, and send them on their way."""
        parts, host_ids, layers = addresses(step), [], []
        for index, layer in enumerate(self.layers):
            per_part = [part[layer].reshape(-1).numpy() for part in parts]
            ids_U, places = distinct(np.concatenate(per_part))
            host_ids.append(ids_U)
            ends = np.cumsum([len(part) for part in per_part])[:-1]
            gathered = self._gather(index, ids_U, np.split(places, ends))
            with torch.cuda.stream(self._stream) if self._stream is not None else nullcontext():
                layers.append(gathered.to(self.device))
        sent = self._stream.record_event() if self._stream is not None else None
        return StagedStep(parts=parts, host_ids=host_ids, layers=layers, sent=sent)

    def _gather(self, index: int, ids_U: np.ndarray, places: Sequence[np.ndarray]) -> LayerRows:
        """Rows with their moments in host memory that a copy engine can read."""
        fields = []
        for of_all in _columns(self.tables[index]):
            shape, dtype = (len(ids_U), of_all.shape[1]), as_tensor(of_all[:0]).dtype
            found = torch.empty(shape, dtype=dtype, pin_memory=self._stream is not None)
            gather_rows(of_all, ids_U, to_numpy(found), threads=self._threads, pool=self._pool)
            fields.append(found)
        weight_UD, m_UD, v_U1, t_U1 = fields
        orders, firsts = zip(*(segments(of_part, len(ids_U)) for of_part in places))
        send = [self._host(torch.from_numpy(x)) for x in (*places, *orders, *firsts)]
        count = len(places)
        return LayerRows(
            ids_U=self._host(torch.from_numpy(ids_U)),
            weight_UD=weight_UD,
            m_UD=m_UD,
            v_U=v_U1.view(-1),
            t_U=t_U1.view(-1),
            places=tuple(send[:count]),
            orders=tuple(send[count : 2 * count]),
            firsts=tuple(send[2 * count :]),
            buckets_B1=self._host(torch.from_numpy(np.searchsorted(ids_U, self.bounds[index]))),
        )

    def _host(self, tensor: Tensor) -> Tensor:
        return tensor.pin_memory() if self._stream is not None else tensor

    def _write_back(self, staged: StagedStep, done: torch.cuda.Event | None, version: int) -> None:
        """Bring a step's rows into the tables once they are updated."""
        layers = staged.layers
        if self._stream is not None and done is not None:
            self._stream.wait_event(done)
            with torch.cuda.stream(self._stream):
                fetched = [[_to_host(field) for field in rows.fields] for rows in layers]
            self._stream.synchronize()
        else:
            fetched = [list(rows.fields) for rows in layers]
        for table, ids_U, fields in zip(self.tables, staged.host_ids, fetched):
            table.change()
            for of_all, field in zip(_columns(table), fields):
                scatter_rows(of_all, ids_U, to_numpy(field.view(len(ids_U), -1)), self._pool)
            table.publish(version)


def _columns(table: SharedTable) -> list[np.ndarray]:
    """Fields of a table, each with its rows' elements in a second axis."""
    return [table.weight, table.m, table.v.reshape(-1, 1), table.t.reshape(-1, 1)]


def _to_host(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
