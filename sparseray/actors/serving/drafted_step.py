"""`DraftedStep`: the newest token of at most so many requests and a draft after each, on a GPU as CUDA graphs.

Part of `DraftingModel`, as `DecodeStep` is of `PagedModel`. The network runs both tokens; each place's token is sampled as
without drafts, by the number that seed and position give, and the draft is accepted where it is the first of them. Then the
model's first module for further tokens (model/mtp.py) reads what was computed and drafts again, by the number of the place
that it drafts for. Where a request's tokens lie, the device knows alone: its numbers are sent for all places that it may
have reached. What was computed for a rejected draft is overwritten by the next step, which begins in its place.

The graphs sample what is most probable, and what is drawn from all tokens. Where a tail is cut, or logits are changed, the
sampler of other steps (device_sampler.py) is launched between two graphs for those rows. Table rows follow from tokens: a
step of a model with memory layers is cut before the first of them, and waits there for the rows of both tokens, which the
host learns, hashes and sends meanwhile.

Shapes: S slots, B sequences, R rows, N = 2 new tokens of a sequence, H hidden, V vocabulary, W pages of a sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparseray.actors.serving.cache_pool import Lease
from sparseray.actors.serving.chunks import Chunk, document_starts, memory_rows, resets
from sparseray.actors.serving.decode_step import beside, copying
from sparseray.actors.serving.device_sampler import is_adjusted, is_sorted, numbers_of, sample_rows
from sparseray.actors.serving.recording import nothing, recorded
from sparseray.actors.serving.text_request import GenerationRequest
from sparseray.kernels.ops import Pages, Recent
from sparseray.kernels.paged import DraftDraws, DraftState, History, settle
from sparseray.model.dse import Memory
from sparseray.model.moe import Experts
from sparseray.model.paged import Paged
from sparseray.model.transformer import Transformer

NEW = 2
"""Tokens of a sequence in a step: the newest one and its draft."""

PLACES = 4
"""Places whose numbers a step may need: of two tokens and the next draft, for two lengths."""

Learn = Callable[[], Sequence[int]]
"""Makes the newest tokens known to the host, and gives the drafts of all slots."""


def draft_temperature(request: GenerationRequest, vocab: int) -> float:
    """How a draft is drawn: as the token will be, or the most probable one where that is drawn from a sorted tail.

    Sorting brings no more that is accepted: 28.5 % of drafts for 27.9 at temperature 0.8 and top_p 0.95 (docs/log.md).

    Args:
        request: drafted for.
        vocab: tokens of the model.
    """
    return 0.0 if is_sorted(request, vocab) else request.temperature


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A request whose draft is judged.

    Args:
        lease: of the request.
        request: says how tokens are drawn.
        tokens: of its prompt and its answer, as far as the host knows; more once it has learnt.
        length: tokens that it has in pages at least; at most one fewer than it has.
    """

    lease: Lease
    request: GenerationRequest
    tokens: Sequence[int]
    length: int


class DraftedStep:
    """A step of B requests, some of which may be nobody's.

    The inputs are staged in turn in two buffers: of two steps that are under way, the first may still be copied.

    Attributes:
        graphs: in the order in which they are launched; none where the step is launched kernel by kernel.

    Args:
        model, pools, histories, table_SW, recent_P, page: of `PagedModel`.
        state_S: of all slots.
        size: B.
        rows: R.
    """

    slots_B: Tensor
    _logits_RV: Tensor

    def __init__(
        self,
        model: Transformer,
        pools: Sequence[object],
        histories: dict[int, Tensor],
        state_S: DraftState,
        table_SW: Tensor,
        recent_P: Tensor | None,
        *,
        page: int,
        size: int,
        rows: int,
    ) -> None:
        self.model, self.state_S, self.table_SW, self.size = model, state_S, table_SW, size
        self.device, dse = table_SW.device, model.config.dse
        # Of no use to a model without memory layers.
        self.layout = model.layout if histories else None
        # Slots and least lengths; then numbers of 64 bits, in two places each: temperatures, min_p, PLACES of a request.
        empty = torch.zeros((2 + 2 * (2 + PLACES)) * size, dtype=torch.int32)
        self._staged = [empty.pin_memory() if self.device.type == "cuda" else empty.clone() for _ in range(2)]
        self._inputs = empty.to(self.device, copy=True)
        self.slots_B, least_B = self._inputs[: 2 * size].view(2, size)
        settings = self._inputs[2 * size :].view(torch.float64)
        temperature_B, min_p_B, numbers_B4 = settings.split([size, size, PLACES * size])
        self._draws = DraftDraws(
            least_B=least_B,
            temperature_B=temperature_B,
            min_p_B=min_p_B,
            numbers_B4=numbers_B4.view(size, PLACES),
        )
        per_token, dtype = len(dse.orders) * dse.heads, model.embedding.dtype
        self._values = {
            layer: torch.zeros(NEW * size, per_token, dse.head_dim, dtype=dtype, device=self.device)
            for layer in histories
        }
        self._first = min(histories, default=0)
        # Rows of padding stay what they are: token 0 at position 0, within a document.
        self._starts_1R = torch.zeros(1, rows, dtype=torch.bool, device=self.device)
        self._tokens_R, self._positions_R, places_R = (
            torch.zeros(rows, dtype=torch.int32, device=self.device) for _ in range(3)
        )
        table_BW = table_SW.new_zeros(size, table_SW.shape[1])
        pages = Pages(
            page=page,
            table_BW=table_BW,
            context_lens_B=torch.zeros_like(least_B),
            places_R=places_R,
            num_new=NEW,
            recent=Recent.beside(recent_P, table_BW, places_R),
        )
        self._paged = Paged(pages=pages, pools=pools, histories=histories, slots_B=self.slots_B)
        self._outcome_B3 = self.slots_B.new_zeros(size, NEW + 1)
        self.graphs: list[torch.cuda.CUDAGraph] = []

    @torch.no_grad()
    def _run(self, experts: Experts, at_memory: Callable[[], None], at_judged: Callable[[], None]) -> Tensor:
        """The outcome [B, 3] of what lies in the buffers.

        Args:
            experts: answers for experts.
            at_memory: called before the first layer that reads table rows.
            at_judged: called once the drafts are judged.
        """
        model, ops, slots_B, count = self.model, self.model.ops, self.slots_B, NEW * self.size
        paged, pages, tokens_R, positions_R = (
            self._paged,
            self._paged.pages,
            self._tokens_R,
            self._positions_R,
        )
        ops.draft_rows(self.state_S, slots_B, self.table_SW, pages, tokens_R, positions_R)
        ops.recent_pages(pages)

        def fetched(layer: int) -> Tensor:
            if layer == self._first:
                at_memory()
            return self._values[layer]

        starts_1R = self._starts_1R if resets(self.layout) else None
        hidden_RH = model.run_paged(
            tokens_R, positions_R, paged, rows=count, experts=experts, fetched=fetched, starts_1R=starts_1R
        )
        self._logits_RV, outcome_B3 = model.logits(hidden_RH[:count]), self._outcome_B3
        ops.judge_drafts(self._logits_RV, self._draws, self.state_S, slots_B, outcome_B3, tokens_R)
        at_judged()
        for history_SLH in paged.histories.values():
            starts_R = None if starts_1R is None else starts_1R[0]
            settle(History(history_SLH, slots_B, ()), pages, starts_R, outcome_B3[:, NEW])
        further_RH = model.predict_paged(
            0, tokens_R, hidden_RH, positions_R, paged, rows=count, experts=experts
        )
        further_RV = model.logits(further_RH[:count])
        ops.next_drafts(further_RV, self._draws, outcome_B3, self.state_S, slots_B)
        return outcome_B3

    def capture(self, experts: Experts, pool: Any) -> None:
        """Make the graphs.

        Args:
            experts: that they will call.
            pool: of memory, as of `recorded`.
        """
        is_cut = self._first > 0
        self.graphs, _ = recorded(lambda cut: self._run(experts, cut if is_cut else nothing, cut), pool)

    @torch.no_grad()
    def decode(
        self, judged: Sequence[Judged], experts: Experts, memory: Memory | None, learn: Learn
    ) -> Tensor:
        """The outcome [B, 3] of some requests, as `DraftingModel.decode_drafted` has it.

        Args:
            judged, experts, memory, learn: as there.
        """
        if self._values and self.device.type == "cuda":
            # The last step may still be reading the rows that are written over.
            copying(self.device).wait_stream(torch.cuda.current_stream(self.device))
        others = [b for b, j in enumerate(judged) if self._is_other(j)]
        rows_come = partial(self._rows_come, judged, memory, learn)
        judge = partial(self._judge_others, judged, others, learn) if others else nothing
        self._stage(judged)
        if self.graphs:
            *before, network, module = self.graphs
            for graph in before:
                graph.replay()
            if self._values:
                rows_come()
            network.replay()
            judge()
            module.replay()
        else:
            self._run(experts, rows_come, judge)
        return self._outcome_B3[: len(judged)]

    def _is_other(self, judged: Judged) -> bool:
        """Whether a request's tokens are not sampled within the graphs."""
        vocab = self.model.config.vocab_size
        return is_adjusted(judged.request, judged.tokens) or is_sorted(judged.request, vocab)

    def _stage(self, judged: Sequence[Judged]) -> None:
        """Send what is known of the requests: slots, least lengths, and how they draw."""
        self._staged.reverse()
        count, size = len(judged), self.size
        staged = self._staged[0].numpy()
        staged[:] = 0
        staged[:count] = [j.lease.slot for j in judged]
        staged[size : size + count] = [j.length for j in judged]
        settings = staged[2 * size :].view(np.float64)
        settings[:count] = [draft_temperature(j.request, self.model.config.vocab_size) for j in judged]
        settings[size : size + count] = [j.request.min_p for j in judged]
        places = [j.length + 1 + n for j in judged for n in range(PLACES)]
        numbers_R = numbers_of([j.request for j in judged for _ in range(PLACES)], places)
        settings[2 * size :][: len(numbers_R)] = numbers_R.numpy()
        self._inputs.copy_(self._staged[0], non_blocking=True)

    def _rows_come(self, judged: Sequence[Judged], memory: Memory | None, learn: Learn) -> None:
        """Learn the tokens and send their table rows and the drafts', which what is launched next waits for."""
        assert memory is not None, "a model with memory layers is served with its memory"
        drafts, chunks = learn(), []
        for j in judged:
            # One that turned out to have ended has some rows or other.
            known = [*j.tokens, drafts[j.lease.slot], *[0] * NEW]
            chunks.append(Chunk(lease=j.lease, known=known, count=NEW))
        starts = torch.from_numpy(document_starts(chunks, self.layout))
        starts = starts.pin_memory() if self.device.type == "cuda" else starts
        with beside(self.device):
            fetched = memory.prefetch(memory_rows(chunks, self.layout))
            for layer, values in self._values.items():
                values[: NEW * len(chunks)].copy_(fetched(layer), non_blocking=True)
            self._starts_1R[0, : len(starts)].copy_(starts, non_blocking=True)

    def _judge_others(self, judged: Sequence[Judged], others: Sequence[int], learn: Learn) -> None:
        """Sample both rows of some requests again, as steps without drafts would, and judge their drafts by that."""
        at_N, requests, known = self._at(others), list[GenerationRequest](), list[Sequence[int]]()
        for j in (judged[b] for b in others):
            requests += [j.request] * NEW
            # Without changes by its text nobody looks at it, and nothing is waited for.
            drafted = [learn()[j.lease.slot]] if is_adjusted(j.request, j.tokens) else []
            known += [j.tokens, [*j.tokens, *drafted]]
        slots_N = self.slots_B[at_N]
        first_N = self.state_S.length_S[slots_N] - self._draws.least_B[at_N]
        places_BN = first_N[:, None] + torch.arange(NEW, device=self.device)
        numbers_R = self._draws.numbers_B4[at_N].gather(1, places_BN).flatten()
        rows_RV = self._logits_RV.unflatten(0, (-1, NEW))[at_N].flatten(0, 1)
        found_BN = sample_rows(rows_RV, requests, known, numbers_R, self.model.ops).int().view(-1, NEW)
        stands_B1 = (found_BN[:, :1] == self.state_S.draft_S[slots_N, None]).int()
        self._outcome_B3.index_copy_(0, at_N, torch.cat([found_BN, stands_B1], 1))
        self._tokens_R[: NEW * self.size].view(-1, NEW).index_copy_(0, at_N, found_BN.clamp_min(0))

    def _at(self, others: Sequence[int]) -> Tensor:
        at_N = torch.tensor(others)
        return at_N.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else at_N
