"""`DecodeStep`: the newest token of at most so many requests, on a GPU as CUDA graphs.

Part of `PagedModel`. What changes from step to step lies in one buffer that one copy fills, and is known before the
tokens are, which the device itself has chosen. Table rows are not: they follow from the tokens. So a step is cut before
the first layer with a memory. While the layers before it run, the host learns the tokens, gathers their rows and sends
them over a stream of their own; what comes after the cut waits for them. A model whose first layer has a memory is not
cut, and waits for its rows with everything.

Shapes: R rows, B sequences, V vocabulary, S slots, W pages of a sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparseray.actors.serving.chunks import Chunk, document_starts, looked_back, newest_rows, resets
from sparseray.actors.serving.recording import nothing, recorded
from sparseray.kernels.ops import Pages, Recent
from sparseray.model.dse import Memory
from sparseray.model.moe import Experts
from sparseray.model.paged import Paged
from sparseray.model.transformer import Transformer

FIELDS = ("token", "position", "context", "place", "slot", "start")


@cache
def copying(device: torch.device) -> torch.cuda.Stream:
    """The stream of table rows on their way."""
    return torch.cuda.Stream(device)


@contextmanager
def beside(device: torch.device) -> Iterator[None]:
    """What is launched within does not wait for what was launched before; what comes after waits for it."""
    if device.type != "cuda":
        yield
        return
    try:
        with torch.cuda.stream(copying(device)):
            yield
    finally:
        # Even if it failed: a plan that came meanwhile was entered within.
        torch.cuda.current_stream(device).wait_stream(copying(device))


class DecodeStep:
    """A step of B requests, some of which may be nobody's.

    The inputs are staged in turn in two buffers: of two steps that are under way, the first may still be copied.

    Attributes:
        graphs: in the order in which they are launched; none where the step is launched kernel by kernel.

    Args:
        model, pools, histories, latest_S, table_SW, recent_P, page: of `PagedModel`.
        size: B.
        rows: R.
    """

    logits_RV: Tensor

    def __init__(
        self,
        model: Transformer,
        pools: Sequence[object],
        histories: dict[int, Tensor],
        latest_S: Tensor,
        table_SW: Tensor,
        recent_P: Tensor | None,
        *,
        page: int,
        size: int,
        rows: int,
    ) -> None:
        self.model, self.latest_S, self.table_SW, self.page = model, latest_S, table_SW, page
        self.device, dse = table_SW.device, model.config.dse
        # Of no use to a model without memory layers.
        self.layout = model.layout if histories else None
        # A place that no request has: one token on page 0, so that nothing is divided by nothing.
        empty = torch.zeros(len(FIELDS), rows, dtype=torch.int32)
        empty[2] = 1
        self._staged = [empty.pin_memory() if self.device.type == "cuda" else empty.clone() for _ in range(2)]
        self._inputs = empty.to(self.device, copy=True)
        per_token = len(dse.orders) * dse.heads
        self._values = {
            layer: torch.zeros(size, per_token, dse.head_dim, dtype=model.embedding.dtype, device=self.device)
            for layer in histories
        }
        self._first = min(histories, default=0)
        slots_B, table_BW = self._inputs[4, :size], table_SW.new_zeros(size, table_SW.shape[1])
        pages = Pages(
            page=page,
            table_BW=table_BW,
            context_lens_B=self._inputs[2, :size],
            places_R=self._inputs[3],
            recent=Recent.beside(recent_P, table_BW, self._inputs[3]),
        )
        self._paged = Paged(pages=pages, pools=pools, histories=histories, slots_B=slots_B)
        self.graphs: list[torch.cuda.CUDAGraph] = []

    @torch.no_grad()
    def _run(self, experts: Experts, at_memory: Callable[[], None]) -> Tensor:
        """Logits [R, V] of what lies in the buffers.

        Args:
            experts: answers for experts.
            at_memory: called before the first layer that reads table rows.
        """
        pages, inputs = self._paged.pages, self._inputs
        torch.index_select(self.table_SW, 0, self._paged.slots_B, out=pages.table_BW)
        self.model.ops.recent_pages(pages)

        def fetched(layer: int) -> Tensor:
            if layer == self._first:
                at_memory()
            return self._values[layer]

        hidden_RH = self.model.run_paged(
            torch.where(inputs[0] < 0, self.latest_S[inputs[4]], inputs[0]),
            inputs[1],
            self._paged,
            rows=pages.num_sequences,
            experts=experts,
            fetched=fetched,
            starts_1R=inputs[5].bool()[None] if resets(self.layout) else None,
        )
        self._computed(hidden_RH)
        return self.model.logits(hidden_RH)

    def _computed(self, hidden_RH: Tensor) -> None:
        """Hidden states are there, for whoever needs them later."""

    def capture(self, experts: Experts, pool: Any) -> None:
        """Make the graphs.

        Args:
            experts: that they will call.
            pool: of memory, as of `recorded`.
        """
        is_cut = self._first > 0
        self.graphs, self.logits_RV = recorded(
            lambda cut: self._run(experts, cut if is_cut else nothing), pool
        )

    @torch.no_grad()
    def decode(
        self, chunks: Sequence[Chunk], experts: Experts, memory: Memory | None, learn: Callable[[], None]
    ) -> Tensor:
        """Logits [B, V] of the newest token of some requests, overwritten by the next call.

        Args:
            chunks: one token of each request and where it lies.
            experts, memory: as of `PagedModel.decode`.
            learn: as there.
        """
        count = len(chunks)
        rows_come = partial(self._rows_come, chunks, memory, learn)
        if self._values and self.device.type == "cuda":
            # The last step may still be reading the rows that are written over.
            copying(self.device).wait_stream(torch.cuda.current_stream(self.device))
        self._stage(chunks)
        if not self.graphs:
            return self._run(experts, rows_come)[:count]
        *before, last = self.graphs
        for graph in before:
            graph.replay()
        if self._values:
            rows_come()
        last.replay()
        return self.logits_RV[:count]

    def _stage(self, chunks: Sequence[Chunk]) -> None:
        """Send what is known of the requests."""
        self._staged.reverse()
        staged, count = self._staged[0].numpy(), len(chunks)
        staged[:] = 0
        staged[2] = 1
        lengths = [chunk.lease.length for chunk in chunks]
        positions = np.array(lengths)
        at = np.array([chunk.lease.pages[chunk.lease.length // self.page] for chunk in chunks])
        staged[0, :count] = [c.known[n] if n < len(c.known) else -1 for c, n in zip(chunks, lengths)]
        staged[1, :count] = positions
        staged[2, :count] = positions + 1
        staged[3, :count] = at * self.page + positions % self.page
        staged[4, :count] = [chunk.lease.slot for chunk in chunks]
        staged[5, :count] = document_starts(chunks, self.layout)
        self._inputs.copy_(self._staged[0], non_blocking=True)

    def _rows_come(self, chunks: Sequence[Chunk], memory: Memory | None, learn: Callable[[], None]) -> None:
        """Learn the tokens and send their table rows, which what is launched next waits for."""
        assert memory is not None and self.layout is not None, (
            "a model with memory layers is served with its memory"
        )
        known_BP = looked_back(chunks, self.layout)
        learn()
        addresses = newest_rows(chunks, known_BP, self.layout)
        with beside(self.device):
            fetched = memory.prefetch(addresses)
            for layer, values in self._values.items():
                values[: len(chunks)].copy_(fetched(layer), non_blocking=True)
