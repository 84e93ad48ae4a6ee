"""`DraftingModel`: decode steps that judge a draft and make the next one without the host, and what makes the first one.

Newest token, draft and length of every slot stay on the device, so the next step can begin before the host knows how far
this one came (drafted_step.py). The module that drafts reads every token that the network has computed: of prompts after
their chunks, of an answer within the steps that draft. What is decoded without drafts is noted, and read later.

Shapes: S slots, B sequences, R rows, T tokens, H hidden, L steps that are noted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparseray.actors.serving.cache_pool import Lease
from sparseray.actors.serving.decode_step import DecodeStep
from sparseray.actors.serving.device_sampler import numbers_of
from sparseray.actors.serving.drafted_step import NEW, DraftedStep, Judged, Learn, draft_temperature
from sparseray.actors.serving.engine import REST
from sparseray.actors.serving.paged_model import PagedModel
from sparseray.actors.serving.text_request import GenerationRequest
from sparseray.kernels.paged import DraftState, Draws
from sparseray.model.dse import Memory
from sparseray.model.moe import Experts
from sparseray.model.transformer import Transformer


@dataclass(frozen=True, kw_only=True)
class Read:
    """Rows of a prompt, or of an answer, that the module reads.

    Args:
        lease, request: as of `Judged`.
        start: position of the first.
        following: the token after each; -1 for the one that was sampled last.
        hidden_TH: of the network; None for those of steps without drafts, which the model has noted.
        is_last: a draft follows.
    """

    lease: Lease
    request: GenerationRequest
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
    """`PagedModel` of a network with modules that predict further tokens.

    Args:
        model: the dense part.
        options: as of `PagedModel`.
    """

    def __init__(self, model: Transformer, **options: Any) -> None:
        super().__init__(model, **options)
        draft_S, length_S = (torch.zeros_like(self.latest_S) for _ in range(2))
        self.state_S = DraftState(latest_S=self.latest_S, draft_S=draft_S, length_S=length_S)
        self._notes_SLH = model.embedding.new_zeros(len(draft_S), REST, model.config.hidden)
        self._drafted: dict[int, DraftedStep] = {}

    def _new_decode(self, size: int) -> DecodeStep:
        where = self.model, self.pools, self.histories, self.latest_S, self.table_SW, self.recent_P
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
            drafts_B = self.model.ops.draw(self.model.logits(found_RH[last_B]), self._draws(ends))
            self.state_S.draft_S.index_copy_(0, slots_B, drafts_B.clamp_min(0).int())
            self.state_S.length_S.index_copy_(0, slots_B, lengths_B.int())

    def _draws(self, ends: Sequence[tuple[Read, int]]) -> Draws:
        """How the first drafts after what was read are drawn."""
        requests, vocab = [r.request for r, _ in ends], self.model.config.vocab_size
        numbers_B = numbers_of(requests, [r.start + len(r.following) + 1 for r, _ in ends])
        settings = [[draft_temperature(r, vocab) for r in requests], [r.min_p for r in requests]]
        temperature_R, min_p_R, number_R = self._to_device(np.array([*settings, numbers_B.tolist()]))
        return Draws(temperature_R=temperature_R, min_p_R=min_p_R, number_R=number_R)

    def decode_drafted(
        self, judged: Sequence[Judged], experts: Experts, memory: Memory | None, learn: Learn
    ) -> Tensor:
        """Run a step; int32 [B, 3] on the device, overwritten by the next call.

        Args:
            judged: requests whose prompts were read.
            experts: answers for experts.
            memory: for table rows; None for a model without them.
            learn: called once the layers that do without table rows were launched, and where a text changes logits.

        Returns:
            the token after the newest one, the one after the draft, and whether the draft was accepted, without which
            the second counts for nothing.
        """
        size = next(size for size in self._buckets if size >= len(judged))
        if size not in self._drafted:
            self._drafted[size] = self._new_drafted(size)
        step = self._drafted[size]
        outcome_B3 = step.decode(judged, experts, memory, learn)
        self._drafted_anew(step.slots_B)
        return outcome_B3

    def warm(self, experts: Experts, memory: Memory | None) -> None:
        """As of `PagedModel`, with the steps that draft.

        Args:
            experts, memory: as there.
        """
        super().warm(experts, memory)
        if self.device.type == "cuda":
            for size in reversed(self._buckets):
                self._drafted[size] = self._new_drafted(size)
                self._drafted[size].capture(experts, self._graphs)

    def _new_drafted(self, size: int) -> DraftedStep:
        where = self.model, self.pools, self.histories, self.state_S, self.table_SW, self.recent_P
        return DraftedStep(*where, page=self.page, size=size, rows=self._padded(NEW * size))

    def _drafted_anew(self, slots_B: Tensor) -> None:
        """The end of a step, for whoever knows better drafts."""
