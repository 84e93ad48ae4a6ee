"""`DraftingEngine`: `PagedEngine` whose greedy requests decode by drafts that the device makes, judges and counts itself.

What a GPU serves with `serve.speculate: mtp`; a CPU has speculative_engine.py. A step of such requests gives one token
or two (drafting_model.py) and stays one step ahead of the host, as other steps do. All other requests, those that draw
or whose logits the host changes, decode beside them without drafts.

Shapes: T tokens of a chunk, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from sparseray.actors.serving.device_sampler import fits
from sparseray.actors.serving.drafting_model import NEW, DraftingModel, Read
from sparseray.actors.serving.engine import Ongoing
from sparseray.actors.serving.paged_engine import Flight, PagedEngine, Taken, to_host
from sparseray.actors.serving.text_request import GenerationRequest
from sparseray.errors import ConfigError
from sparseray.model.transformer import Transformer


def drafts(request: GenerationRequest) -> bool:
    """Whether a request's tokens are the most probable ones, whatever it has said so far."""
    is_penalised = request.repetition_penalty != 1.0 or request.frequency_penalty or request.presence_penalty
    is_changed = is_penalised or request.logit_bias or (request.min_tokens and request.stop_token_ids)
    return request.temperature == 0.0 and not is_changed and fits(request)


@dataclass(frozen=True, kw_only=True)
class _DraftedFlight(Flight):
    """A step that was started, with requests that draft.

    Args:
        drafted: those that decode.
        outcome: [.., 3] of `DraftingModel.decode_drafted`, on the host once `done`.
    """

    drafted: list[Ongoing]
    outcome: Tensor | None


class DraftingEngine(PagedEngine):
    """`PagedEngine` of a model with modules that predict further tokens, of which the first drafts.

    Raises:
        ConfigError: the model has none, or has memory layers.
    """

    runs_on = DraftingModel

    def __init__(self, model: Transformer, *arguments: Any, **options: Any) -> None:
        depth, layers = model.config.mtp.depth, list(model.config.dse.layers)
        if not depth or layers:
            raise ConfigError(
                f"drafting on a GPU needs modules that predict further tokens (model.mtp.depth={depth}) and no memory"
                f" layers (model.dse.layers={layers}); leave serve.speculate at none"
            )
        self._read: list[tuple[Ongoing, int, Tensor]] = []
        super().__init__(model, *arguments, **options)

    def _num_read(self, request: GenerationRequest, tokens: list[int]) -> int:
        return len(tokens) if drafts(request) else super()._num_read(request, tokens)

    @property
    def _drafting(self) -> DraftingModel:
        return cast(DraftingModel, self.paged)

    @torch.no_grad()
    def _launch(self, batch: list[Ongoing]) -> Flight:
        """Start a step: as of `PagedEngine`, then what the module reads of prompts, then requests that draft."""
        drafted = [s for s in batch if not s.in_prompt and drafts(s.request)]
        self._read = []
        flight = super()._launch([s for s in batch if s not in drafted])
        if self._read:
            self._drafting.read([self._rows(*found) for found in self._read], self.experts)
        outcome = None
        if drafted:
            leases = [s.lease for s in drafted if s.lease is not None]
            outcome = to_host(self._drafting.decode_drafted(leases, self.experts))
            for sequence in drafted:
                sequence.pending += NEW
        if flight.done is not None:
            flight.done.record()
        known = {name: getattr(flight, name) for name in Flight.__dataclass_fields__}
        known["batch"] = [*flight.batch, *((s, None) for s in drafted)]
        return _DraftedFlight(**known, drafted=drafted, outcome=outcome)

    def _prefill(self, sequences: list[Ongoing]) -> list[Tensor]:
        starts = [s.computed for s in sequences]
        hidden = super()._prefill(sequences)
        self._read = [x for x in zip(sequences, starts, hidden) if drafts(x[0].request)]
        return hidden

    def _rows(self, sequence: Ongoing, start: int, hidden_TH: Tensor) -> Read:
        """What the module reads of a chunk that ran."""
        assert sequence.lease is not None
        stop = sequence.computed
        is_last = stop == len(sequence.tokens)
        following = [*sequence.tokens[start + 1 : stop + 1], *([-1] if is_last else [])]
        return Read(
            lease=sequence.lease, start=start, following=following, hidden_TH=hidden_TH, is_last=is_last
        )

    def _take(self, flight: Flight) -> list[Taken]:
        """Wait for a step, and append its tokens: of a request that drafts one, or two."""
        found = super()._take(flight)
        assert isinstance(flight, _DraftedFlight)
        if flight.outcome is None:
            return found
        told = len(found)
        for sequence, (first, second, accepted) in zip(flight.drafted, flight.outcome.tolist(), strict=True):
            if sequence.lease is None:
                continue
            sequence.pending -= NEW
            sequence.lease.length += 1 + accepted
            self._counts.drafted[1] += 1
            self._counts.accepted[1] += accepted
            event = self._event(self._add(sequence, first))
            found.append(replace(event, accepted=accepted, rejected=1 - accepted))
            if accepted and event.finish_reason is None:
                found.append(self._add(sequence, second))
        self._note_tokens(len(found) - told)
        return found
