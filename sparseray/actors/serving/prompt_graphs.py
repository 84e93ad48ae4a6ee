"""`PromptGraphs`: chunks of prompts as CUDA graphs, one for each of a few numbers of rows.

Part of `PagedModel`. Launching a chunk's kernels one by one takes the host longer than the device needs for them. Where
the attention of every layer reads the chunks' bounds on the device, and no memory layer needs the host, a graph takes
any chunks that fit: their tokens, places and bounds lie in one buffer that one copy fills; rows that are left over are
padding, which is computed and belongs to nobody.

Shapes: R rows, B sequences, S slots, W pages of a sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from sparseray.actors.serving.cache_pool import Lease
from sparseray.actors.serving.chunks import placing
from sparseray.actors.serving.recording import captured
from sparseray.kernels.ops import Pages
from sparseray.model.attention import attention_of
from sparseray.model.moe import Experts
from sparseray.model.paged import Paged
from sparseray.model.transformer import Transformer

ROWS = (128, 256, 512, 1024, 1536, 2048, 3072, 4096, 5120, 6144, 8192)
"""Rows of a graph: the step from one to the next is the padding that is computed at most."""
MOST_CHUNKS = 64
"""Sequences of a call; with more it is launched kernel by kernel."""


class PromptGraph:
    """Chunks of at most so many rows together.

    Args:
        model, pools, table_SW, page: of `PagedModel`.
        rows: R.
    """

    hidden_RH: Tensor

    def __init__(
        self, model: Transformer, pools: Sequence[object], table_SW: Tensor, page: int, rows: int
    ) -> None:
        self.model, self.table_SW, self.rows, self.page = model, table_SW, rows, page
        device, sizes = table_SW.device, [rows] * 3 + [MOST_CHUNKS, MOST_CHUNKS, MOST_CHUNKS + 1]
        empty = torch.zeros(sum(sizes), dtype=torch.int32)
        # Of two calls that are under way, the first may still be copied.
        self._staged = [empty.pin_memory() if device.type == "cuda" else empty.clone() for _ in range(2)]
        self._inputs = empty.to(device, copy=True)
        self._sizes = sizes
        self.tokens_R, self.positions_R, places_R, slots_B, contexts_B, bounds = self._inputs.split(sizes)
        pages = Pages(
            page=page,
            table_BW=table_SW.new_zeros(MOST_CHUNKS, table_SW.shape[1]),
            context_lens_B=contexts_B,
            places_R=places_R,
            cu_seqlens=bounds,
        )
        self.paged = Paged(pages=pages, pools=pools, histories={}, slots_B=slots_B)
        self._replay: Callable[[], object] | None = None

    @torch.no_grad()
    def run(self, experts: Experts) -> Tensor:
        """Hidden states [R, H] of what lies in the buffers.

        Args:
            experts: answers for experts.
        """
        torch.index_select(self.table_SW, 0, self.paged.slots_B, out=self.paged.pages.table_BW)
        return self.model.run_paged(
            self.tokens_R,
            self.positions_R,
            self.paged,
            rows=self.rows,
            experts=experts,
            fetched=None,
            starts_1R=None,
        )

    def capture(self, experts: Experts, pool: Any) -> None:
        """Make the graph.

        Args:
            experts: that it will call.
            pool: of memory, as of `captured`.
        """
        graph, self.hidden_RH = captured(partial(self.run, experts), pool)
        self._replay = graph.replay

    def place(self, pieces: Sequence[tuple[Lease, int, Sequence[int]]]) -> list[int]:
        """Send (lease, first position, tokens) of some sequences; the bounds of their rows."""
        at = placing(pieces, self.page, self.rows)
        self._staged.reverse()
        rows_3R, (slots_B, contexts_B, bounds) = (
            self._staged[0].numpy()[: 3 * self.rows].reshape(3, -1),
            (x.numpy() for x in self._staged[0].split(self._sizes)[3:]),
        )
        rows_3R[:] = at.rows_3R
        count = len(pieces)
        slots_B[:count], contexts_B[:count] = at.slots_B, at.contexts_B
        slots_B[count:] = contexts_B[count:] = 0
        # Sequences that there are not have no rows.
        bounds[: count + 1], bounds[count + 1 :] = at.bounds, at.bounds[-1]
        self._inputs.copy_(self._staged[0], non_blocking=True)
        found: list[int] = at.bounds.tolist()
        return found

    def replay(self, pieces: Sequence[tuple[Lease, int, Sequence[int]]]) -> list[Tensor]:
        """Hidden states [T, H] of each of (lease, first position, tokens), overwritten by the next call."""
        assert self._replay is not None
        bounds = self.place(pieces)
        self._replay()
        return [self.hidden_RH[start:stop] for start, stop in pairwise(bounds)]


class PromptGraphs:
    """The graphs of a model, none where it cannot be captured.

    Attributes:
        sizes: rows of each graph that is or will be there.

    Args:
        model, pools, table_SW, page: of `PagedModel`.
        most: rows of the largest.
    """

    def __init__(
        self, model: Transformer, pools: Sequence[object], table_SW: Tensor, page: int, most: int
    ) -> None:
        config = model.config
        fits = table_SW.is_cuda and most > 0 and not config.dse.layers
        fits = fits and all(attention_of(config, layer).takes_bounds for layer in range(config.num_layers))
        self.sizes = sorted({min(rows, most) for rows in ROWS} | {most}) if fits else []
        self._made: list[PromptGraph] = []
        self._new = [partial(PromptGraph, model, pools, table_SW, page, rows) for rows in self.sizes]

    def capture(self, experts: Experts) -> None:
        """Make them, the largest first, whose memory the others share; no other graph writes there.

        Args:
            experts: that they will call.
        """
        pool = torch.cuda.graph_pool_handle() if self._new else None
        self._made.clear()
        for new in reversed(self._new):
            graph = new()
            graph.capture(experts, pool)
            self._made.insert(0, graph)

    def of(self, rows: int, chunks: int) -> PromptGraph | None:
        """The smallest that holds some chunks, if there is one.

        Args:
            rows: of all chunks together.
            chunks: how many there are.
        """
        if chunks > MOST_CHUNKS:
            return None
        return next((graph for graph in self._made if graph.rows >= rows), None)
