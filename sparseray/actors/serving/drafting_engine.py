"""`DraftingEngine`: `PagedEngine` whose requests decode by drafts that the device makes, judges and counts itself.

What a GPU serves with `serve.speculate: mtp`; a CPU has speculative_engine.py. A step of such requests gives one token
or two (drafting_model.py) and starts before the host knows what the one before gave, as other steps do. Requests whose
tokens the host chooses decode beside them without drafts. A pass of two tokens takes the device longer than one of
one, for all requests together: where few drafts are accepted all go without for some steps. The module reads what they
have missed in one pass then.

Shapes: T tokens of a chunk, H hidden, S slots.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from sparseray.actors.serving.cache_pool import Lease
from sparseray.actors.serving.device_sampler import fits, is_adjusted
from sparseray.actors.serving.drafted_step import NEW, Judged
from sparseray.actors.serving.drafting_model import DraftingModel, Read
from sparseray.actors.serving.engine import RECENT, REST, Ongoing
from sparseray.actors.serving.paged_engine import Flight, PagedEngine, Taken, to_host
from sparseray.actors.serving.text_request import GenerationRequest
from sparseray.errors import ConfigError
from sparseray.model.transformer import Transformer


@dataclass(frozen=True, kw_only=True)
class _DraftedFlight(Flight):
    """A step that was started, with requests that draft.

    Args:
        drafted: those that decode.
        outcome: [.., 3] of `DraftingModel.decode_drafted`, on the host once `done`.
        drafts_S: of all slots, on the host once `done`; None where the next step needs none there.
    """

    drafted: list[Ongoing]
    outcome: Tensor | None
    drafts_S: Tensor | None


class DraftingEngine(PagedEngine):
    """`PagedEngine` of a model with modules that predict further tokens, of which the first drafts.

    Attributes:
        worth: share of accepted drafts below which they cost more than they bring: a step that judges drafts took 1.19
            to 1.22 times one that does not (benchmarks/results/serve_gpu_h200_2026-11-29.md).

    Raises:
        ConfigError: the model has none.
    """

    worth = 0.25
    runs_on = DraftingModel

    def __init__(self, model: Transformer, *arguments: Any, **options: Any) -> None:
        if not model.mtp:
            raise ConfigError(
                f"drafting needs modules that predict further tokens (model.mtp.depth={model.config.mtp.depth}); leave"
                " serve.speculate at none"
            )
        self._read: list[tuple[Ongoing, int, Tensor | None]] = []
        # Steps that all go without drafts, tokens of each slot that the module has not read, and drafts of all slots.
        self._rest, self._unread, self._drafts = 0, dict[int, int](), list[int]()
        super().__init__(model, *arguments, **options)

    def _num_read(self, request: GenerationRequest, tokens: list[int]) -> int:
        return len(tokens) if fits(request) else super()._num_read(request, tokens)

    @property
    def _drafting(self) -> DraftingModel:
        return cast(DraftingModel, self.paged)

    def _may_overtake(self, flight: Flight) -> bool:
        """Not where drafts end, as the host has to know how far they came, nor where the module reads what it missed."""
        assert isinstance(flight, _DraftedFlight)
        is_turn = bool(flight.drafted) if self._rest > 1 else bool(self._unread)
        return super()._may_overtake(flight) and not is_turn

    def _lag(self, sequence: Ongoing) -> int:
        return super()._lag(sequence) + self._unread.get(self._lease(sequence).slot, 0)

    def _release(self, sequence: Ongoing) -> None:
        if sequence.lease is not None:
            self._unread.pop(sequence.lease.slot, None)
        super()._release(sequence)

    @torch.no_grad()
    def _launch(self, batch: list[Ongoing]) -> Flight:
        """Start a step: as of `PagedEngine`, then what the module reads, then requests that draft."""
        able = [s for s in batch if not s.in_prompt and fits(s.request)]
        drafted = [] if self._rest else [s for s in able if s.lease and s.lease.slot not in self._unread]
        self._rest, self._read = max(0, self._rest - 1), []
        flight = super()._launch([s for s in batch if s not in drafted])
        self._note([s for s in able if s not in drafted])
        if self._read:
            self._drafting.read([self._rows(*found) for found in self._read], self.experts)
        outcome = drafts_S = None
        # Some may have ended with a token that was learnt meanwhile.
        drafted = [s for s in drafted if s.lease is not None]
        if drafted:
            judged = [self._judged(s, s.lease) for s in drafted if s.lease is not None]
            found_B3 = self._drafting.decode_drafted(judged, self.experts, self.memory, self._learnt)
            outcome = to_host(found_B3.clone())
            for sequence in drafted:
                sequence.pending += NEW
        if self.memory is not None or any(is_adjusted(s.request, s.tokens) for s in batch):
            drafts_S = to_host(self._drafting.state_S.draft_S.clone())
        if flight.done is not None:
            flight.done.record()
        known = {name: getattr(flight, name) for name in Flight.__dataclass_fields__}
        known["batch"] = [*flight.batch, *((s, None) for s in drafted)]
        return _DraftedFlight(**known, drafted=drafted, outcome=outcome, drafts_S=drafts_S)

    def _prefill(self, sequences: list[Ongoing]) -> list[Tensor]:
        starts = [s.computed for s in sequences]
        hidden = super()._prefill(sequences)
        self._read = [x for x in zip(sequences, starts, hidden) if fits(x[0].request)]
        return hidden

    def _note(self, sequences: list[Ongoing]) -> None:
        """Count what requests have decoded without drafts; once drafts may follow, the module reads it."""
        for sequence in sequences:
            if sequence.lease is None:
                continue
            slot = sequence.lease.slot
            self._unread[slot] = self._unread.get(slot, 0) + 1
            if not self._rest:
                self._read.append((sequence, sequence.computed - self._unread.pop(slot), None))

    def _rows(self, sequence: Ongoing, start: int, hidden_TH: Tensor | None) -> Read:
        """What the module reads of a chunk that ran, or of steps without drafts."""
        assert sequence.lease is not None
        stop, tokens = sequence.computed, sequence.tokens
        is_last = stop == len(tokens)
        following = [*tokens[start + 1 : stop + 1], *([-1] if is_last else [])]
        return Read(
            lease=sequence.lease, request=sequence.request, start=start, following=following, hidden_TH=hidden_TH,
            is_last=is_last,
        )  # fmt: skip

    def _judged(self, sequence: Ongoing, lease: Lease) -> Judged:
        """What is known of a request when a step with its draft starts."""
        known = len(sequence.tokens)
        return Judged(
            lease=lease,
            request=sequence.request,
            tokens=sequence.tokens,
            length=known if sequence.pending else known - 1,
        )

    def _learnt(self) -> list[int]:
        """The drafts of all slots, once the step under way is taken."""
        self._learn()
        return self._drafts

    def _take(self, flight: Flight) -> list[Taken]:
        """Wait for a step, and append its tokens: of a request that drafts one, or two."""
        found = super()._take(flight)
        assert isinstance(flight, _DraftedFlight)
        if flight.drafts_S is not None:
            self._drafts = flight.drafts_S.tolist()
        if flight.outcome is None:
            return found
        told = len(found)
        for sequence, (first, second, accepted) in zip(flight.drafted, flight.outcome.tolist(), strict=True):
            if sequence.lease is None:
                continue
            sequence.pending -= NEW
            sequence.lease.length += 1 + accepted
            sequence.share += RECENT * (accepted - sequence.share)
            self._counts.drafted[1] += 1
            self._counts.accepted[1] += accepted
            event = self._event(self._add(sequence, first))
            found.append(replace(event, accepted=accepted, rejected=1 - accepted))
            if accepted and event.finish_reason is None:
                found.append(self._add(sequence, second))
        self._note_tokens(len(found) - told)
        self._see_worth(flight.drafted)
        return found

    def _see_worth(self, drafted: list[Ongoing]) -> None:
        """All go without drafts for a while where few of them were accepted lately."""
        if sum(s.share for s in drafted) < self.worth * len(drafted):
            self._rest = REST
            for sequence in drafted:
                # A little above, so that some drafts have their chance afterwards.
                sequence.share = self.worth + RECENT
