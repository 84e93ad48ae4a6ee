"""`DraftingModel`: decode steps that judge a draft and make the next one without the host, as two CUDA graphs.

A step runs the newest token of every request and the draft after it through the network, and samples the token of each
place as without drafts, by the number that seed and position give. It accepts the draft where it is the first of them,
and has the model's first module for further tokens (model/mtp.py) read what was computed and draft again, by the number
of the place that it drafts for. Newest token, draft and length of every slot stay on the device, so the next step can
begin before the host knows how far this one came: a request's numbers are sent for all places that it may have reached.
What was computed for a rejected draft is overwritten by the next step, which begins in its place.

The graphs sample what is most probable, and what is drawn from all tokens. Where the tail is cut, or logits are changed
by penalties, the sampler of other steps (device_sampler.py) is launched after each graph for those rows.

Shapes: S slots, B sequences, R rows, N = 2 new tokens of a sequence, H hidden, V vocabulary, L steps that are noted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparseray.actors.serving.cache_pool import Lease
from sparseray.actors.serving.decode_step import DecodeStep
from sparseray.actors.serving.device_sampler import is_adjusted, is_sorted, numbers_of, sample_rows
from sparseray.actors.serving.engine import REST
from sparseray.actors.serving.paged_model import PagedModel
from sparseray.actors.serving.recording import nothing, recorded
from sparseray.actors.serving.text_request import GenerationRequest
from sparseray.kernels.ops import Pages
from sparseray.kernels.paged import DraftDraws, DraftState
from sparseray.model.dse import Memory
from sparseray.model.moe import Experts
from sparseray.model.paged import Paged
from sparseray.model.transformer import Transformer

NEW = 2
"""Tokens of a sequence in a step: the newest one and its draft."""

PLACES = 4
"""Places whose numbers a step may need: of two tokens and the next draft, for two lengths."""


@dataclass(eq=False)
class _Drafted:
    """Buffers of a step of at most B requests, and its graphs; two that the inputs are staged in, in turn."""

    staged: list[Tensor]
    inputs: Tensor
    tokens_R: Tensor
    positions_R: Tensor
    outcome_B3: Tensor
    paged: Paged
    draws: DraftDraws
    logits_RV: Tensor | None = None
    further_RV: Tensor | None = None
    graphs: Sequence[torch.cuda.CUDAGraph] = ()

    @property
    def slots_B(self) -> Tensor:
        return self.paged.slots_B


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A request whose draft is judged.

    Args:
        lease: of the request.
        request: says how tokens are drawn.
        tokens: that the host knows, of its prompt and its answer.
        length: tokens that it has in pages at least; at most one fewer than it has.
        draft: of the slot; read only where the request's logits are changed by its text.
    """

    lease: Lease
    request: GenerationRequest
    tokens: Sequence[int]
    length: int
    draft: int


@dataclass(frozen=True, kw_only=True)
class Read:
    """Rows of a prompt, or of an answer, that the module reads.

    Args:
        lease, request, tokens: as of `Judged`.
        start: position of the first.
        following: the token after each; -1 for the one that was sampled last.
        hidden_TH: of the network; None for those of steps without drafts, which the model has noted.
        is_last: a draft follows.
    """

    lease: Lease
    request: GenerationRequest
    tokens: Sequence[int]
    start: int
    following: list[int]
    hidden_TH: Tensor | None
    is_last: bool


class _NotingStep(DecodeStep):
    """A step without drafts; what it computes is noted, as the module reads it before it drafts again."""

    notes_SLH: Tensor

    def _computed(self, hidden_RH: Tensor) -> None:
        position_B, slot_B = (self._inputs[i, : self._paged.pages.num_sequences].long() for i in (1, 4))
        count = self.notes_SLH.shape[1]
        self.notes_SLH.flatten(0, 1).index_copy_(
            0, slot_B * count + position_B % count, hidden_RH[: len(slot_B)]
        )


class DraftingModel(PagedModel):
    """`PagedModel` of a network with modules that predict further tokens, and without memory layers.

    Args:
        model: the dense part.
        options: as of `PagedModel`.
    """

    def __init__(self, model: Transformer, **options: Any) -> None:
        super().__init__(model, **options)
        draft_S, length_S = (torch.zeros_like(self.latest_S) for _ in range(2))
        self.state_S = DraftState(latest_S=self.latest_S, draft_S=draft_S, length_S=length_S)
        self._notes_SLH = model.embedding.new_zeros(len(draft_S), REST, model.config.hidden)
        self._drafted: dict[int, _Drafted] = {}

    def _new_decode(self, size: int) -> DecodeStep:
        where = self.model, self.pools, self.histories, self.latest_S, self.table_SW
        step = _NotingStep(*where, page=self.page, size=size, rows=self._padded(size))
        step.notes_SLH = self._notes_SLH
        return step

    def _hidden(self, read: Read) -> Tensor:
        """Hidden states [T, H] of what is read."""
        if read.hidden_TH is not None:
            return read.hidden_TH
        notes_LH = self._notes_SLH[read.lease.slot]
        at_T = (read.start + np.arange(len(read.following))) % len(notes_LH)
        return notes_LH[self._to_device(at_T)]

    @torch.no_grad()
    def read(self, reads: Sequence[Read], experts: Experts) -> None:
        """Have the module read rows of prompts or answers, and draft where their last row is among them.

        Args:
            reads: of several requests.
            experts: answers for experts.
        """
        placed = self._place([(r.lease, r.start, r.following) for r in reads])
        rows, bounds = len(placed.tokens_R), placed.bounds
        slots = np.zeros(rows, dtype=np.int64)
        for r, (start, stop) in zip(reads, pairwise(bounds)):
            slots[start:stop] = r.lease.slot
        hidden_RH = torch.cat([self._hidden(r) for r in reads])
        found_RH = self.model.predict_paged(
            0,
            torch.where(placed.tokens_R < 0, self.latest_S[self._to_device(slots)].long(), placed.tokens_R),
            torch.nn.functional.pad(hidden_RH, (0, 0, 0, rows - len(hidden_RH))),
            placed.positions_R,
            placed.paged,
            rows=bounds[-1],
            experts=experts,
        )
        ends = [(r, stop) for r, stop in zip(reads, bounds[1:]) if r.is_last]
        if ends:
            at = np.array([[r.lease.slot, stop - 1, r.start + len(r.following)] for r, stop in ends])
            slots_B, last_B, lengths_B = self._to_device(at.T.copy())
            requests, known = [r.request for r, _ in ends], [r.tokens for r, _ in ends]
            numbers_B = numbers_of(requests, (at[:, 2] + 1).tolist())
            drafts_B = sample_rows(
                self.model.logits(found_RH[last_B]), requests, known, numbers_B, self.model.ops
            )
            self.state_S.draft_S.index_copy_(0, slots_B, drafts_B.clamp_min(0).int())
            self.state_S.length_S.index_copy_(0, slots_B, lengths_B.int())

    @torch.no_grad()
    def decode_drafted(self, judged: Sequence[Judged], experts: Experts) -> Tensor:
        """Run a step; int32 [B, 3] on the device, overwritten by the next call.

        Args:
            judged: requests whose prompts were read.
            experts: answers for experts.

        Returns:
            the token after the newest one, the one after the draft, and whether the draft was accepted, without which
            the second counts for nothing.
        """
        count = len(judged)
        size = next(size for size in self._buckets if size >= count)
        if size not in self._drafted:
            self._drafted[size] = self._new_drafted(size)
        step, vocab = self._drafted[size], self.model.config.vocab_size
        self._stage(step, judged)
        others = [
            b for b, j in enumerate(judged) if is_adjusted(j.request, j.tokens) or is_sorted(j.request, vocab)
        ]
        judge = partial(self._judge_others, step, judged, others) if others else nothing
        if step.graphs:
            network, module = step.graphs
            network.replay()
            judge()
            module.replay()
        else:
            self._run_drafted(step, experts, judge)
        if others:
            self._draft_others(step, judged, others)
        self._drafted_anew(step.slots_B)
        return step.outcome_B3[:count] if step.graphs else step.outcome_B3[:count].clone()

    @staticmethod
    def _stage(step: _Drafted, judged: Sequence[Judged]) -> None:
        """Send what is known of the requests: slots, least lengths, and how they draw."""
        step.staged.reverse()
        count, size = len(judged), len(step.slots_B)
        staged = step.staged[0].numpy()
        staged[:] = 0
        staged[:count] = [j.lease.slot for j in judged]
        staged[size : size + count] = [j.length for j in judged]
        settings = staged[2 * size :].view(np.float64)
        settings[:count] = [j.request.temperature for j in judged]
        settings[size : size + count] = [j.request.min_p for j in judged]
        places = [j.length + 1 + n for j in judged for n in range(PLACES)]
        numbers_R = numbers_of([j.request for j in judged for _ in range(PLACES)], places)
        settings[2 * size :][: len(numbers_R)] = numbers_R.numpy()
        step.inputs.copy_(step.staged[0], non_blocking=True)

    def _judge_others(self, step: _Drafted, judged: Sequence[Judged], others: Sequence[int]) -> None:
        """Sample both rows of some requests again, as steps without drafts would, and judge their drafts by that."""
        assert step.logits_RV is not None
        at_N, requests, known = self._to_device(np.array(others)), [], []
        for j in (judged[b] for b in others):
            requests += [j.request] * NEW
            known += [j.tokens, [*j.tokens, j.draft]]
        slots_N = step.slots_B[at_N]
        least_N = self.state_S.length_S[slots_N] - step.draws.least_B[at_N]
        places_BN = (least_N[:, None] + torch.arange(NEW, device=self.device)).long()
        numbers_R = step.draws.numbers_B4[at_N].gather(1, places_BN).flatten()
        rows_RV = step.logits_RV.unflatten(0, (-1, NEW))[at_N].flatten(0, 1)
        found_BN = sample_rows(rows_RV, requests, known, numbers_R, self.model.ops).int().view(-1, NEW)
        stands_B1 = (found_BN[:, :1] == self.state_S.draft_S[slots_N, None]).int()
        step.outcome_B3.index_copy_(0, at_N, torch.cat([found_BN, stands_B1], 1))
        step.tokens_R[: NEW * len(step.slots_B)].view(-1, NEW).index_copy_(0, at_N, found_BN.clamp_min(0))

    def _draft_others(self, step: _Drafted, judged: Sequence[Judged], others: Sequence[int]) -> None:
        """Sample the drafts of some requests again, as `_judge_others` will."""
        assert step.further_RV is not None
        at_N, chosen = self._to_device(np.array(others)), [judged[b] for b in others]
        slots_N, accepted_N = step.slots_B[at_N].long(), step.outcome_B3[at_N, NEW].long()
        place_N = (self.state_S.length_S[slots_N] - step.draws.least_B[at_N]).long()
        numbers_N = step.draws.numbers_B4[at_N, place_N]
        rows_NV = step.further_RV.unflatten(0, (-1, NEW))[at_N, accepted_N]
        # Of its text this knows what the host does: a draft may be wrong.
        known = [[*j.tokens, j.draft] for j in chosen]
        found_N = sample_rows(rows_NV, [j.request for j in chosen], known, numbers_N, self.model.ops)
        self.state_S.draft_S.index_copy_(0, slots_N, found_N.clamp_min(0).int())

    def warm(self, experts: Experts, memory: Memory | None) -> None:
        """As of `PagedModel`, with the steps that draft.

        Args:
            experts, memory: as there.
        """
        super().warm(experts, memory)
        if self.device.type == "cuda":
            for size in reversed(self._buckets):
                step = self._drafted[size] = self._new_drafted(size)
                step.graphs, _ = recorded(partial(self._run_drafted, step, experts), self._graphs)

    def _new_drafted(self, size: int) -> _Drafted:
        rows, is_cuda = self._padded(NEW * size), self.device.type == "cuda"
        # Slots and least lengths; then numbers of 64 bits, in two places each: temperatures, min_p, and PLACES of a request.
        empty = torch.zeros((2 + 2 * (2 + PLACES)) * size, dtype=torch.int32)
        staged = [empty.pin_memory() if is_cuda else empty.clone() for _ in range(2)]
        inputs = empty.to(self.device, copy=True)
        slots_B, least_B = inputs[: 2 * size].view(2, size)
        settings = inputs[2 * size :].view(torch.float64)
        temperature_B, min_p_B, numbers_B4 = settings.split([size, size, PLACES * size])
        pages = Pages(
            page=self.page,
            table_BW=torch.zeros(size, self.width, dtype=torch.int32, device=self.device),
            context_lens_B=torch.zeros_like(slots_B),
            places_R=torch.zeros(rows, dtype=torch.int32, device=self.device),
            num_new=NEW,
        )
        paged = Paged(pages=pages, pools=self.pools, histories=self.histories, slots_B=slots_B)
        # Rows of padding stay what they are: token 0 at position 0.
        tokens_R, positions_R = (torch.zeros_like(pages.places_R) for _ in range(2))
        draws = DraftDraws(
            least_B=least_B,
            temperature_B=temperature_B,
            min_p_B=min_p_B,
            numbers_B4=numbers_B4.view(size, PLACES),
        )
        outcome_B3 = slots_B.new_zeros(size, NEW + 1)
        return _Drafted(staged, inputs, tokens_R, positions_R, outcome_B3, paged, draws)

    @torch.no_grad()
    def _run_drafted(self, step: _Drafted, experts: Experts, judge: Callable[[], None]) -> Tensor:
        """The outcome [B, 3] of what lies in the buffers.

        Args:
            step: has them.
            experts: answers for experts.
            judge: called once the drafts are judged.
        """
        model, ops, slots_B, count = self.model, self.model.ops, step.slots_B, NEW * len(step.slots_B)
        ops.draft_rows(
            self.state_S, slots_B, self.table_SW, step.paged.pages, step.tokens_R, step.positions_R
        )
        hidden_RH = model.run_paged(
            step.tokens_R, step.positions_R, step.paged, rows=count, experts=experts, fetched=None, starts_1R=None
        )  # fmt: skip
        outcome_B3, step.logits_RV = step.outcome_B3, model.logits(hidden_RH[:count])
        ops.judge_drafts(step.logits_RV, step.draws, self.state_S, slots_B, outcome_B3, step.tokens_R)
        judge()
        further_RH = model.predict_paged(
            0, step.tokens_R, hidden_RH, step.positions_R, step.paged, rows=count, experts=experts
        )
        step.further_RV = model.logits(further_RH[:count])
        ops.next_drafts(step.further_RV, step.draws, outcome_B3, self.state_S, slots_B)
        return outcome_B3

    def _drafted_anew(self, slots_B: Tensor) -> None:
        """The end of a step, for whoever knows better drafts."""
