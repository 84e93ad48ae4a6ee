"""Fetchers: rows of a table in host memory on their way to the GPU, ahead of the layers that use them.

Addresses follow from tokens alone, so rows are fetched while the model computes: `RowFetcher` reads
them over the bus from a few programs on a stream of its own, `StagedRowFetcher` lets CPU threads
gather and the copy engine move them, which takes no multiprocessor. Oracle: plain indexing.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparseray.kernels.dse.gather import gather_parts
from sparseray.kernels.dse.rows import gather_rows

PART_BYTES = 8 << 20
"""The copy engine moves a part of this size while the CPU gathers the next."""


@dataclass(frozen=True, kw_only=True)
class Fetch:
    """Rows on their way; `wait` orders the current stream behind them."""

    rows_ND: Tensor
    done: torch.cuda.Event

    def wait(self) -> Tensor:
        """Return the rows for use on the current stream."""
        stream = torch.cuda.current_stream()
        stream.wait_event(self.done)
        self.rows_ND.record_stream(stream)
        return self.rows_ND


class RowFetcher:
    """Fetches rows of one host table on a stream of its own, ahead of their use.

    The tables of several layers may lie behind one another in `table_RD`: one call fetches the rows of
    all of them. Allocations are made on the fetching stream. With `ascending` the addresses are sorted
    first and the rows put back in their places, so that neighbours in the table are read together.
    """

    def __init__(
        self,
        table_RD: Tensor,
        *,
        programs: int = 16,
        block: int = 128,
        warps: int = 1,
        ascending: bool = False,
    ) -> None:
        self.table_RD = table_RD
        self.programs, self.block, self.warps = programs, block, warps
        self.ascending = ascending
        self.stream = torch.cuda.Stream(priority=-1)

    def fetch(self, rows_N: Tensor) -> Fetch:
        """Start copying; `rows_N` (int64, on the GPU) must be complete on the current stream."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            wanted_N, order_N = rows_N.flatten(), None
            if self.ascending:
                wanted_N, order_N = torch.sort(wanted_N)
            rows_ND = gather_rows(
                self.table_RD,
                wanted_N,
                order_N=order_N,
                programs=self.programs,
                block=self.block,
                warps=self.warps,
            )
            rows_N.record_stream(self.stream)
            done = torch.cuda.Event()
            done.record(self.stream)
        return Fetch(rows_ND=rows_ND, done=done)


class StagedRowFetcher:
    """Fetches rows without any multiprocessor: CPU threads gather into pinned memory, DMA copies it.

    For addresses that are known on the CPU (the data loader hashes there). `fetch` returns at once; two
    staging buffers take turns.
    """

    def __init__(
        self,
        table_RD: Tensor,
        *,
        max_rows: int,
        threads: int,
        device: torch.device,
        part_bytes: int = PART_BYTES,
        streaming: bool = True,
    ) -> None:
        width = table_RD.shape[1] * table_RD.element_size()
        self.table = table_RD.view(torch.uint8).view(-1, width).numpy()
        self.dtype, self.threads, self.device = table_RD.dtype, threads, device
        self.part_rows, self.streaming = max(1, part_bytes // width), streaming
        self.staging = [torch.empty(max_rows, width, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        self.copied: list[torch.cuda.Event | None] = [None, None]
        self.stream = torch.cuda.Stream(device)
        self.worker, self.pool = ThreadPoolExecutor(1), ThreadPoolExecutor(max(1, threads - 1))
        self.turn = 0

    def fetch(self, rows_N: NDArray[np.int64]) -> Future[Fetch]:
        """Start gathering and copying `rows_N`; the future holds the rows on their way."""
        self.turn ^= 1
        return self.worker.submit(self._fetch, rows_N, self.turn)

    def _fetch(self, rows_N: NDArray[np.int64], turn: int) -> Fetch:
        busy = self.copied[turn]
        if busy is not None:
            busy.synchronize()
        staged = self.staging[turn][: rows_N.shape[0]]
        with torch.cuda.stream(self.stream):
            rows_ND = torch.empty_like(staged, device=self.device)
            parts = gather_parts(
                self.table,
                rows_N,
                staged.numpy(),
                part_rows=self.part_rows,
                threads=self.threads,
                pool=self.pool,
                streaming=self.streaming,
            )
            for part in parts:
                rows_ND[part].copy_(staged[part], non_blocking=True)
            rows_ND = rows_ND.view(self.dtype)
            done = torch.cuda.Event()
            done.record(self.stream)
        self.copied[turn] = done
        return Fetch(rows_ND=rows_ND, done=done)
