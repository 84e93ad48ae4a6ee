"""`PagedModel`: one step of the model on paged caches, as chunks of prompts and as one token of many requests.

Between the engine, which knows requests, and the network. On a GPU there is a decode step for each number of requests
in `buckets`, captured at the start (decode_step.py). Nothing here waits for the device.

Shapes: R rows, B sequences, V vocabulary, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparseray.actors.serving.cache_pool import Lease, table_of
from sparseray.actors.serving.chunks import Chunk, document_starts, memory_rows, placing, resets
from sparseray.actors.serving.decode_step import DecodeStep
from sparseray.actors.serving.device_sampler import sample_all_ways
from sparseray.actors.serving.prompt_graphs import PromptGraphs
from sparseray.actors.serving.recording import nothing
from sparseray.kernels.moe.reference import group_by_expert
from sparseray.kernels.ops import Pages, Recent
from sparseray.model.attention import attention_of
from sparseray.model.dse import Memory, Rows
from sparseray.model.moe import Experts
from sparseray.model.paged import PageCounts, Paged, new_histories
from sparseray.model.transformer import Transformer

WARM_PROMPTS = (32, 1024)
"""Tokens of prompts that bring all kernels for reading one into memory."""
WARM_ROWS = 1024
"""Experts of up to so many rows choose among kernels by their number; beyond, there is one."""


def buckets(most: int) -> tuple[int, ...]:
    """Numbers of requests that have a decode step of their own: powers of two, and the largest."""
    return tuple(sorted({*(1 << i for i in range(most.bit_length()) if 1 << i <= most), most}))


@dataclass(frozen=True)
class _Placed:
    """Rows of a call, padded, and where they lie; `bounds` separates those of its sequences."""

    tokens_R: Tensor
    positions_R: Tensor
    paged: Paged
    bounds: list[int]


@dataclass(frozen=True)
class _NoRows:
    """A memory of zeros."""

    width: int

    def prefetch(self, rows: dict[int, Tensor]) -> Rows:
        """Zeros for every row."""
        return lambda layer: torch.zeros(*rows[layer].shape, self.width)


class PagedModel:
    """The network over pools of pages.

    Args:
        model: the dense part.
        num_pages, page: of the pools; tokens of a page are a multiple of the selection blocks.
        num_slots: requests at a time.
        max_len: tokens of the longest request.
        prompt_rows: tokens of prompts that a call reads at most, where graphs are wanted for them.
    """

    warm_prompts: tuple[int, ...] = WARM_PROMPTS
    warm_rows: int = WARM_ROWS

    def __init__(
        self,
        model: Transformer,
        *,
        num_pages: PageCounts,
        page: int,
        num_slots: int,
        max_len: int,
        prompt_rows: int = 0,
    ) -> None:
        config, device = model.config, model.embedding.device
        self.model, self.page, self.device = model, page, device
        self.width = -(-max_len // page)
        dtype = model.embedding.dtype
        self.pools = [
            attention_of(config, layer).new_pool(config, num_pages, page, dtype, device)
            for layer in range(config.num_blocks)
        ]
        self.histories = new_histories(config, num_slots + 1, device)
        # The newest token of every slot, as the sampler on the device chose it.
        self.latest_S = torch.zeros(num_slots + 1, dtype=torch.int32, device=device)
        # Slots that sampled last, on the host and on the device: from step to step they are mostly the same.
        self._kept = list[int](), torch.zeros(0, dtype=torch.int64, device=device)
        self.table_SW = torch.zeros(num_slots + 1, self.width, dtype=torch.int32, device=device)
        # The recent page of every page, where there are any.
        self.recent_P = (
            torch.zeros(num_pages.whole, dtype=torch.int32, device=device) if num_pages.recent else None
        )
        # Of no use to a model without memory layers.
        self._layout = model.layout if config.dse.layers else None
        self._decodes: dict[int, DecodeStep] = {}
        self._is_compiled = False
        self._graphs = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        self._prompts = PromptGraphs(model, self.pools, self.table_SW, page, self._padded(prompt_rows))
        # A CPU captures nothing, and pays for every row.
        self._buckets = buckets(num_slots) if device.type == "cuda" else range(1, num_slots + 1)

    def begin(self, lease: Lease) -> None:
        """Take a request's pages over, and the state of its shared prefix."""
        row = table_of(lease, self.width)
        self.table_SW[lease.slot].copy_(
            row.pin_memory() if self.device.type == "cuda" else row, non_blocking=True
        )
        for layer, history_SLH in self.histories.items():
            if lease.state is None:
                history_SLH[lease.slot].zero_()
            else:
                history_SLH[lease.slot].copy_(lease.state[layer])

    def place_recent(self, moved: Mapping[int, int]) -> None:
        """Let the rows of pages that have got a recent page lie there.

        Args:
            moved: the recent page of each such page.
        """
        if moved:
            assert self.recent_P is not None
            at = self._to_device(np.array([list(moved), list(moved.values())]))
            self.recent_P.index_copy_(0, at[0], at[1].int())

    def keep(self, tokens_R: Tensor, leases: Sequence[Lease]) -> None:
        """Remember sampled tokens for a step that starts before the host knows them.

        Args:
            tokens_R: int64, on the device.
            leases: of the requests that they belong to, one for each.
        """
        slots = [lease.slot for lease in leases]
        if slots != self._kept[0]:
            self._kept = slots, self._to_device(np.array(slots))
        self.latest_S.index_copy_(0, self._kept[1], tokens_R.clamp_min(0).int())

    def state(self, lease: Lease) -> dict[int, Tensor] | None:
        """A copy of what a request keeps beside its pages, if anything."""
        return {layer: h[lease.slot].clone() for layer, h in self.histories.items()} or None

    def _padded(self, rows: int) -> int:
        unit = self.model.ops.row_padding
        return -(-rows // unit) * unit

    def _to_device(self, values: NDArray[np.generic]) -> Tensor:
        found = torch.from_numpy(values)
        return found.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else found

    def _fetch(self, rows: dict[int, Tensor], memory: Memory | None) -> dict[int, Tensor]:
        """The rows at these addresses, of every memory layer, on the device."""
        assert memory is not None, "a model with memory layers is served with its memory"
        fetched = memory.prefetch(rows)
        return {layer: fetched(layer).to(self.device, non_blocking=True) for layer in rows}

    @torch.no_grad()
    def prefill(self, chunks: Sequence[Chunk], experts: Experts, memory: Memory | None) -> list[Tensor]:
        """Run the next chunk of several prompts; hidden states [T, H] of each.

        Args:
            chunks: tokens of each prompt and where they lie.
            experts: answers for experts.
            memory: for table rows; None for a model without them.

        Returns:
            views that the next call may overwrite.
        """
        pieces = [(chunk.lease, chunk.lease.length, chunk.tokens) for chunk in chunks]
        graph = self._prompts.of(sum(chunk.count for chunk in chunks), len(chunks))
        if graph is not None:
            return graph.replay(pieces)
        # Gathered when the first layer asks for them: those before it have been launched by then.
        values = cache(lambda: self._fetch(memory_rows(chunks, self._layout), memory))
        starts = document_starts(chunks, self._layout)
        placed = self._place(pieces)
        hidden_RH = self.model.run_paged(
            placed.tokens_R,
            placed.positions_R,
            placed.paged,
            rows=placed.bounds[-1],
            experts=experts,
            fetched=lambda layer: values()[layer],
            starts_1R=self._to_device(starts)[None] if resets(self._layout) else None,
        )
        return [hidden_RH[start:stop] for start, stop in pairwise(placed.bounds)]

    def _place(self, pieces: Sequence[tuple[Lease, int, Sequence[int]]]) -> _Placed:
        """Where the rows of (lease, first position, tokens) lie."""
        at = placing(pieces, self.page, self._padded(sum(len(tokens) for _, _, tokens in pieces)))
        tokens_R, positions_R, places_R = self._to_device(at.rows_3R)
        slots_B, bounds = self._to_device(at.slots_B), at.bounds.tolist()
        table_BW = self.table_SW[slots_B]
        pages = Pages(
            page=self.page,
            table_BW=table_BW,
            context_lens_B=self._to_device(at.contexts_B),
            places_R=places_R,
            chunks=tuple((a, b, n) for (a, b), n in zip(pairwise(bounds), at.contexts_B.tolist())),
            cu_seqlens=self._to_device(at.bounds),
            recent=Recent.beside(self.recent_P, table_BW, places_R),
        )
        self.model.ops.recent_pages(pages)
        slots = tuple(at.slots_B.tolist())
        paged = Paged(pages=pages, pools=self.pools, histories=self.histories, slots_B=slots_B, slots=slots)
        return _Placed(tokens_R, positions_R, paged, bounds)

    def predict(
        self,
        module: int,
        rows: Sequence[tuple[Lease, int, Sequence[int]]],
        hidden: Sequence[Tensor],
        experts: Experts,
    ) -> list[Tensor]:
        """Run the next rows of several sequences through a module that predicts further tokens.

        Args:
            module: 0-based.
            rows: (lease, first position, tokens `module` + 1 places after the rows) of each sequence.
            hidden: [T, H] of each sequence's rows, of the network or of the module before.
            experts: answers for experts.

        Returns:
            hidden states [T, H] of each, which predict one token further.
        """
        placed = self._place(rows)
        hidden_RH = torch.cat(list(hidden))
        padding = len(placed.tokens_R) - len(hidden_RH)
        found_RH = self.model.predict_paged(
            module,
            placed.tokens_R,
            torch.nn.functional.pad(hidden_RH, (0, 0, 0, padding)) if padding else hidden_RH,
            placed.positions_R,
            placed.paged,
            rows=placed.bounds[-1],
            experts=experts,
        )
        return [found_RH[start:stop] for start, stop in pairwise(placed.bounds)]

    def rewind(self, lease: Lease, length: int, ran: int, before: dict[int, Tensor] | None) -> None:
        """Take a request back into the chunk that it ran last, none of whose tokens begins a document.

        What lies in pages is overwritten later; what the convolutions reach back to is put together again.

        Args:
            lease: of the request, which has moved on by all of the chunk.
            length: tokens that remain.
            ran: tokens of the chunk.
            before: `state` before it ran.
        """
        kept = ran - (lease.length - length)
        lease.length = length
        for layer, old_LH in (before or {}).items():
            now_LH = self.histories[layer][lease.slot]
            seen = torch.cat([old_LH, now_LH[len(now_LH) - ran :]])
            now_LH.copy_(seen[kept : kept + len(now_LH)])

    def _new_decode(self, size: int) -> DecodeStep:
        where = self.model, self.pools, self.histories, self.latest_S, self.table_SW, self.recent_P
        return DecodeStep(*where, page=self.page, size=size, rows=self._padded(size))

    def warm(self, experts: Experts, memory: Memory | None) -> None:
        """Launch whatever steps may launch, and capture the decode steps; on a CPU load the compiled loops.

        A kernel that is compiled when a request needs it makes all others wait for seconds.

        Args:
            experts: that the captured steps will call; a CPU's are left alone.
            memory: of a model with memory layers.
        """
        if self.device.type != "cuda":
            return self._load_loops()
        if not self._is_compiled:
            self.launch_prompts(experts, memory)
            sample_all_ways(self.model)
            self._is_compiled = True
        self._prompts.capture(experts)
        for size in reversed(self._buckets):
            self._decodes[size] = self._new_decode(size)
            self._decodes[size].capture(experts, self._graphs)

    def launch_prompts(self, experts: Experts, memory: Memory | None) -> None:
        """Launch whatever reading prompts may launch.

        Args:
            experts, memory: as of `warm`.
        """
        for chunks in self._rehearsal():
            self.prefill(chunks, experts, memory)
        if self._is_launching and self.model.config.moe_layers:
            self._launch_experts(experts)

    @property
    def _is_launching(self) -> bool:
        """Whether prompts are read without graphs."""
        return not self._prompts.sizes

    def _rehearsal(self) -> Iterator[list[Chunk]]:
        """Prompts that between them launch all that any do: kernels differ by the rows, by the context and by the company."""
        # The last page may reach beyond the positions that the model knows.
        longest = min(self.width * self.page, self.model.config.max_seq_len)
        rows = self.warm_prompts[0]
        sizes = [(0, count, 1) for count in self.warm_prompts]
        if self._is_launching:
            sizes += [(end - rows, rows, 1) for end in buckets(longest) if end > rows]
            sizes += [(0, 1, company) for company in self._buckets if company <= self.warm_prompts[-1]]
        for start, count, company in sizes:
            count = min(count, longest)
            end, pages = start + count, [0] * self.width
            leases = [Lease(pages=pages, length=start, max_len=end, slot=0) for _ in range(company)]
            yield [Chunk(lease=lease, known=[0] * end, count=count) for lease in leases]

    @torch.no_grad()
    def _launch_experts(self, experts: Experts) -> None:
        moe, most = self.model.config.moe, self.warm_rows
        x_TH = self.model.embedding.new_zeros(most, self.model.config.hidden)
        ids_TK = torch.arange(most * moe.top_k, device=self.device).view(most, moe.top_k) % moe.num_experts
        weights_TK = torch.ones(most, moe.top_k, device=self.device)
        for rows in range(1, most + 1):
            experts(self.model.config.moe_layers[0], x_TH[:rows], ids_TK[:rows], weights_TK[:rows])

    def _load_loops(self) -> None:
        """Run a token of nobody through everything that is compiled."""
        config = self.model.config

        def experts(layer: int, x_TH: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor) -> Tensor:
            inner, hidden = config.moe.expert_dim, config.hidden
            slabs = x_TH.new_zeros(1, 2 * inner, hidden), x_TH.new_zeros(1, hidden, inner)
            rows_R, _ = group_by_expert(topk_ids_TK, config.moe.num_experts)
            return self.model.ops.expert_rows(x_TH, rows_R[:1] * 0, [(0, 1)], *slabs).to(x_TH.dtype)

        lease = Lease(pages=[0] * self.width, length=0, max_len=1, slot=0)
        chunk = Chunk(lease=lease, known=[0], count=1)
        self.prefill([chunk], experts, _NoRows(config.dse.head_dim))
        self.decode([chunk], experts, _NoRows(config.dse.head_dim))

    def decode(
        self,
        chunks: Sequence[Chunk],
        experts: Experts,
        memory: Memory | None,
        learn: Callable[[], None] = nothing,
    ) -> Tensor:
        """Run the newest token of several requests; logits [B, V], overwritten by the next call.

        Args:
            chunks: one token of each request and where it lies.
            experts: answers for experts.
            memory: for table rows; None for a model without them.
            learn: makes the newest tokens known to the host; called once the layers that do without were launched.
        """
        size = next(size for size in self._buckets if size >= len(chunks))
        if size not in self._decodes:
            self._decodes[size] = self._new_decode(size)
        return self._decodes[size].decode(chunks, experts, memory, learn)
