"""`DraftingModel`: decode steps that judge a draft and make the next one without the host, as one CUDA graph.

A step runs the newest token of every request and the draft after it through the network, takes the most probable token
of each place, accepts the draft where it is the first of them, and has the model's first module for further tokens
(model/mtp.py) read what was computed and draft again. Newest token, draft and length of every slot stay on the device,
so the next step can begin before the host knows how far this one came. What was computed for a rejected draft is
overwritten by the next step, which begins in its place.

Shapes: S slots, B sequences, R rows, N = 2 new tokens of a sequence, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparseray.actors.serving.cache_pool import Lease
from sparseray.actors.serving.paged_model import PagedModel
from sparseray.actors.serving.recording import captured
from sparseray.kernels.ops import Pages, Recent
from sparseray.kernels.paged import DraftState
from sparseray.model.dse import Memory
from sparseray.model.moe import Experts
from sparseray.model.paged import Paged

NEW = 2
"""Tokens of a sequence in a step: the newest one and its draft."""


@dataclass(eq=False)
class _Drafted:
    """Buffers of a step of at most B requests, and its graph; two that the inputs are staged in, in turn."""

    staged: list[Tensor]
    slots_B: Tensor
    tokens_R: Tensor
    positions_R: Tensor
    outcome_B3: Tensor
    paged: Paged
    graph: torch.cuda.CUDAGraph | None = None


@dataclass(frozen=True, kw_only=True)
class Read:
    """Rows of a prompt that the module reads.

    Args:
        lease: of the request.
        start: position of the first.
        following: the token after each; -1 for the one that was sampled last.
        hidden_TH: of the network.
        is_last: a draft follows.
    """

    lease: Lease
    start: int
    following: list[int]
    hidden_TH: Tensor
    is_last: bool


class DraftingModel(PagedModel):
    """`PagedModel` of a network with modules that predict further tokens, and without memory layers."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        draft_S, length_S = (torch.zeros_like(self.latest_S) for _ in range(2))
        self.state_S = DraftState(latest_S=self.latest_S, draft_S=draft_S, length_S=length_S)
        self._drafted: dict[int, _Drafted] = {}

    @torch.no_grad()
    def read(self, reads: Sequence[Read], experts: Experts) -> None:
        """Have the module read rows of prompts, and draft where their last row is among them.

        Args:
            reads: of several requests.
            experts: answers for experts.
        """
        placed = self._place([(r.lease, r.start, r.following) for r in reads])
        rows, bounds = len(placed.tokens_R), placed.bounds
        slots = np.zeros(rows, dtype=np.int64)
        for r, (start, stop) in zip(reads, pairwise(bounds)):
            slots[start:stop] = r.lease.slot
        hidden_RH = torch.cat([r.hidden_TH for r in reads])
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
            drafts_B = self.model.logits(found_RH[last_B]).argmax(-1)
            self.state_S.draft_S.index_copy_(0, slots_B, drafts_B.int())
            self.state_S.length_S.index_copy_(0, slots_B, lengths_B.int())

    def decode_drafted(self, leases: Sequence[Lease], experts: Experts) -> Tensor:
        """Run a step; int32 [B, 3] on the device, overwritten by the next call.

        Args:
            leases: of requests whose prompts were read.
            experts: answers for experts.

        Returns:
            the token after the newest one, the one after the draft, and whether the draft was accepted, without which
            the second counts for nothing.
        """
        count = len(leases)
        size = next(size for size in self._buckets if size >= count)
        if size not in self._drafted:
            self._drafted[size] = self._new_drafted(size)
        step = self._drafted[size]
        step.staged.reverse()
        staged = step.staged[0].numpy()
        staged[:] = 0
        staged[:count] = [lease.slot for lease in leases]
        step.slots_B.copy_(step.staged[0], non_blocking=True)
        if step.graph is None:
            return self._run_drafted(step, experts)[:count].clone()
        step.graph.replay()
        return step.outcome_B3[:count]

    def warm(self, experts: Experts, memory: Memory | None) -> None:
        """As of `PagedModel`, with the steps that draft.

        Args:
            experts, memory: as there.
        """
        super().warm(experts, memory)
        if self.device.type == "cuda":
            for size in reversed(self._buckets):
                step = self._drafted[size] = self._new_drafted(size)
                run = partial(self._run_drafted, step, experts)
                step.graph, _ = captured(run, self._graphs)

    def _new_drafted(self, size: int) -> _Drafted:
        rows, is_cuda = self._padded(NEW * size), self.device.type == "cuda"
        empty = torch.zeros(size, dtype=torch.int32)
        staged = [empty.pin_memory() if is_cuda else empty.clone() for _ in range(2)]
        slots_B = empty.to(self.device, copy=True)
        table_BW = torch.zeros(size, self.width, dtype=torch.int32, device=self.device)
        places_R = torch.zeros(rows, dtype=torch.int32, device=self.device)
        pages = Pages(
            page=self.page,
            table_BW=table_BW,
            context_lens_B=torch.zeros_like(slots_B),
            places_R=places_R,
            num_new=NEW,
            recent=None if self.recent_P is None else Recent.beside(table_BW, places_R),
        )
        paged = Paged(pages=pages, pools=self.pools, histories=self.histories, slots_B=slots_B)
        # Rows of padding stay what they are: token 0 at position 0.
        tokens_R, positions_R = (torch.zeros_like(pages.places_R) for _ in range(2))
        return _Drafted(staged, slots_B, tokens_R, positions_R, slots_B.new_zeros(size, NEW + 1), paged)

    @torch.no_grad()
    def _run_drafted(self, step: _Drafted, experts: Experts) -> Tensor:
        """The outcome [B, 3] of what lies in the buffers."""
        model, ops, slots_B, count = self.model, self.model.ops, step.slots_B, NEW * len(step.slots_B)
        ops.draft_rows(
            self.state_S, slots_B, self.table_SW, step.paged.pages, step.tokens_R, step.positions_R
        )
        self._find_recent(step.paged.pages)
        hidden_RH = model.run_paged(
            step.tokens_R, step.positions_R, step.paged, rows=count, experts=experts, fetched=None, starts_1R=None
        )  # fmt: skip
        outcome_B3 = step.outcome_B3
        ops.judge_drafts(model.logits(hidden_RH[:count]), self.state_S, slots_B, outcome_B3, step.tokens_R)
        further_RH = model.predict_paged(
            0, step.tokens_R, hidden_RH, step.positions_R, step.paged, rows=count, experts=experts
        )
        ops.next_drafts(model.logits(further_RH[:count]), outcome_B3, self.state_S, slots_B)
        self._drafted_anew(slots_B)
        return outcome_B3

    def _drafted_anew(self, slots_B: Tensor) -> None:
        """The end of a step, for whoever knows better drafts."""
