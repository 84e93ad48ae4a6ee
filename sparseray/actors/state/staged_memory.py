"""Memory tables in host memory whose rows are trained on the device, staged there ahead of the step that reads them.

The same buckets, names and checkpoints as a memory shard's. A step's addresses follow from its tokens, so while a step
computes a thread gathers the rows of the next one, each once and with its moments, and sends them over a stream of their own.
At the commit they are updated on the device, and the thread brings them back into the tables. Of rows that two steps
in a row read, the later one takes the earlier one's result on the device. Whoever reads the tables waits until what was
committed has been written back. The thread begins when a step's kernels have been launched: until then the device
may be waiting for the host, which two threads would share, from then on it computes. Update as in memory.py.

With several slots nothing is staged: gradients come by message, as to any shard, and are applied by the same operations.

Shapes: N addresses of a part, U distinct rows of a step, B buckets, D row width.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from sparseray.actors.state.gradient_sum import Determinism, GradientSum
from sparseray.actors.state.kept_rows import Bucket, KeptRows
from sparseray.actors.state.memory import ROUNDING_STEP, MemoryShard, as_tensor
from sparseray.actors.state.pieces import Key
from sparseray.actors.state.row_block import LayerRows, RowLayout
from sparseray.actors.state.tables import SharedTable, version_of
from sparseray.kernels.dse.gather import gather_rows
from sparseray.kernels.dse.staging import Move, RowSet, gather_fields, scatter_fields
from sparseray.kernels.ops import Ops
from sparseray.kernels.row_ops import to_numpy
from sparseray.model.config import ModelConfig

MOST_THREADS = 4
"""That move rows at once; each asks for the interpreter twice a step, which the thread that launches kernels needs."""

Addresses = dict[int, Tensor]
"""Rows int64 [T, N] that a part's tokens read, by 0-based model layer; on the CPU."""


@dataclass(frozen=True, kw_only=True)
class StagedStep:
    """The rows that a step reads and changes.

    Args:
        parts: addresses of each part.
        host: the rows of each layer as they were gathered; they come back to the same memory.
        layers: on the device.
        sent: when they are there; None without a GPU.
    """

    parts: Sequence[Addresses]
    host: list[LayerRows]
    layers: list[LayerRows]
    sent: torch.cuda.Event | None

    @property
    def num_rows(self) -> int:
        """Distinct rows of all layers."""
        return sum(rows.layout.num_rows for rows in self.layers)


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
        self._kept: list[KeptRows] = []
        # One thread, so that what is begun first is done first.
        self._work = ThreadPoolExecutor(1, "staging", lambda: torch.set_num_threads(1))
        self._written: Future[None] | None = None
        self._ahead: tuple[int, Future[StagedStep]] | None = None
        # What the thread is given when the step's kernels have been launched.
        self._unwritten: tuple[StagedStep, torch.cuda.Event | None, int] | None = None
        self._next: tuple[Callable[[int], Sequence[Addresses]], int] | None = None
        self._sets = [RowSet(rows) for rows in table_rows]
        self._open: StagedStep | None = None
        self._last: StagedStep | None = None
        super().__init__(config, table_rows, seed=seed, num_parts=num_parts, betas=betas, eps=eps)

    # -- a step, in the work thread ---------------------------------------------------------------

    def open_step(self, step: int, addresses: Callable[[int], Sequence[Addresses]]) -> StagedStep:
        """Take the rows of a step as they are after the commit before it; the next one's are staged beside it.

        Args:
            step: that begins.
            addresses: of the parts of any step; called in another thread.
        """
        if self._ahead is None or self._ahead[0] != step:
            self._next = addresses, step
            self._begin()
        assert self._ahead is not None
        staged = self._ahead[1].result()
        self._next = addresses, step + 1
        if staged.sent is not None:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(staged.sent)
            for rows in staged.layers:
                # Nothing else may take the memory before what the stream has to do by now is done.
                rows.block.record_stream(stream)
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
        if self.sum.total is not None:
            self._begin()

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
        """Update the step's rows on the device, from where they are written back; returns how many they are.

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
        self._unwritten = staged, done, version_of(self.generation, self.updates)
        self.discard()
        self._last = staged
        return staged.num_rows

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
            self._scatter([(index, (ids_U, columns, [to_numpy(field) for field in rows]))])
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
        self._begin()
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
        self._next = None
        self.settle()
        self._ahead = self._last = None
        super().assign(owned, primary, generation=generation)

    def gather(self, layer: int, rows_N: Tensor) -> Tensor:
        """As in `MemoryShard`, into memory that a copy engine can read.

        Args:
            layer: index among the memory layers.
            rows_N: int64.
        """
        self.settle()
        weight_RD = self.tables[layer].weight
        shape, dtype = (len(rows_N), weight_RD.shape[1]), as_tensor(weight_RD[:0]).dtype
        found = torch.empty(shape, dtype=dtype, pin_memory=self._stream is not None)
        gather_rows(weight_RD, rows_N.cpu().numpy(), to_numpy(found))
        return found

    def begin_copy(self) -> KeptRows | None:
        """As in `MemoryShard`; updates go on meanwhile."""
        self.settle()
        buckets = []
        for key in sorted(self.held):
            start, stop = self._range(key)
            names = self.tensor_names([key])
            buckets.append(Bucket(layer=key[0], start=start, stop=stop, names=names))
        kept = KeptRows(buckets, [table.num_rows for table in self.tables])
        # No other thread writes now: what was committed is written, and what comes next begins here.
        self._kept.append(kept)
        return kept

    def _scatter(self, moves: Sequence[tuple[int, Move]]) -> None:
        """Write rows, rising, into the tables of these layers."""
        self._kept = [kept for kept in self._kept if kept.is_open]
        for kept in self._kept:
            kept.keep(moves, self._threads, self._pool)
        scatter_fields([move for _, move in moves], threads=self._threads, pool=self._pool)

    def _fields(self, key: Key) -> list[Tensor]:
        self.settle()
        return super()._fields(key)

    def _begin(self) -> None:
        """Give the thread the rows to write back, then those to stage, which it finds as they were written."""
        if self._unwritten is not None:
            self._written = self._work.submit(self._write_back, *self._unwritten)
            self._unwritten = None
        if self._next is not None:
            self._ahead = self._next[1], self._work.submit(self._stage, *self._next)
            self._next = None

    # -- in the staging thread ------------------------------------------------------------------------

    def _stage(self, addresses: Callable[[int], Sequence[Addresses]], step: int) -> StagedStep:
        """Gather the rows of a step as they are in the tables, and send them on their way."""
        parts = addresses(step)
        host = list(self._pool.map(partial(self._find, parts), range(len(self.layers))))
        moves = [self._move(index, rows) for index, rows in enumerate(host)]
        gather_fields(moves, threads=self._threads, pool=self._pool)
        with torch.cuda.stream(self._stream) if self._stream is not None else nullcontext():
            layers = [rows.to(self.device) for rows in host]
        sent = self._stream.record_event() if self._stream is not None else None
        return StagedStep(parts=parts, host=host, layers=layers, sent=sent)

    def _find(self, parts: Sequence[Addresses], index: int) -> LayerRows:
        """Which rows a step reads of a layer, in host memory that a copy engine can read; without their fields yet."""
        per_part = [part[self.layers[index]].reshape(-1).numpy() for part in parts]
        found, table, bounds = self._sets[index], self.tables[index], self.bounds[index]
        try:
            layout = RowLayout(
                num_rows=found.open(per_part),
                width=table.width,
                row_dtype=as_tensor(table.weight[:0]).dtype,
                addresses=tuple(map(len, per_part)),
                num_buckets=len(bounds) - 1,
            )
            block = torch.empty(layout.num_bytes, dtype=torch.uint8, pin_memory=self._stream is not None)
            rows = layout.rows(block)
            found.list(rows.ids_U.numpy())
            for rows_N, *of_part in zip(per_part, rows.places, rows.orders, rows.firsts):
                found.segments(rows_N, *(x.numpy() for x in of_part))
        finally:
            found.close()
        rows.buckets_B1.numpy()[:] = np.searchsorted(rows.ids_U.numpy(), bounds)
        return rows

    def _move(self, index: int, rows: LayerRows) -> Move:
        """A layer's rows in host memory, and where in its table they belong."""
        fields = [to_numpy(field.view(rows.layout.num_rows, -1)) for field in rows.fields]
        return rows.ids_U.numpy(), _columns(self.tables[index]), fields

    def _write_back(self, staged: StagedStep, done: torch.cuda.Event | None, version: int) -> None:
        """Bring a step's rows into the tables once they are updated."""
        if self._stream is not None and done is not None:
            self._stream.wait_event(done)
            with torch.cuda.stream(self._stream):
                for rows, device_rows in zip(staged.host, staged.layers):
                    rows.fetch_fields(device_rows)
            self._stream.synchronize()
        for table in self.tables:
            table.change()
        self._scatter([(index, self._move(index, rows)) for index, rows in enumerate(staged.host)])
        for table in self.tables:
            table.publish(version)


def _columns(table: SharedTable) -> list[np.ndarray]:
    """Fields of a table, each with its rows' elements in a second axis."""
    return [table.weight, table.m, table.v.reshape(-1, 1), table.t.reshape(-1, 1)]
