"""`SpeculativeEngine`: tokens drafted by the model's own modules, judged some at a time in one pass of the network.

A step runs of every request that decodes its newest token and the drafts after it. The sampler then says of each place,
one after another, which token stands there, as it would without drafts: from the logits, the request's settings and the
number that seed and position give. A draft is accepted where it is that token; the first that is not ends the row, and
what was computed behind it is given up. So a text never depends on what was drafted, and a request that moves to another
engine goes on as if nothing had happened. The drafts come from the same sampler with the same numbers, which makes
them agree more often. A request few of whose drafts are accepted goes without for some steps; its modules then read
what they have missed in one pass.

Everything here asks that a row's bits depend on its own sequence alone (`Ops.chunks_keep_bits`), so it runs on a CPU.

Shapes: T tokens of a chunk, R rows, V vocabulary, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sparseray.actors.serving.device_sampler import fits, numbers_of, sample_rows
from sparseray.actors.serving.engine import RECENT, REST, Ongoing
from sparseray.actors.serving.paged_engine import PagedEngine
from sparseray.actors.serving.text_request import TokenEvent
from sparseray.errors import ConfigError


class SpeculativeEngine(PagedEngine):
    """`PagedEngine` of a model with modules that predict further tokens.

    Attributes:
        worth: share of accepted drafts below which they cost a small model more than they bring.

    Raises:
        ConfigError: the model has none, or its operations do not keep bits.
    """

    worth = 0.5

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        config = self.model.config
        if not self.model.mtp or not self.model.ops.chunks_keep_bits:
            raise ConfigError(
                f"drafting needs modules that predict further tokens (model.mtp.depth={config.mtp.depth}) and a CPU's"
                " compiled operations; leave serve.speculate at none"
            )
        # The state of a convolution can be taken back by no more than it reaches.
        reach = min((len(rows_SLH[0]) for rows_SLH in self.paged.histories.values()), default=0)
        self.most_drafts = min(config.mtp.depth, reach - 1) if reach else config.mtp.depth
        resets = bool(config.dse.layers) and config.dse.reset_at_document
        self.document_end = config.dse.document_end_id if resets else -1

    def step(self) -> list[TokenEvent]:
        """Run the next chunks and drafts, judge them, and draft again; see `Engine.step`."""
        events, self._failed = self._failed, []
        batch: list[Ongoing] = []
        try:
            self._admit()
            batch = self._select()
            self._hold_recent(batch)
            if batch:
                self._advance_all(batch, events)
                self._draft([s for s in batch if s.lease is not None])
        except Exception as error:
            self._lose(None, batch, error)
            # What was judged is told by the next step.
            self._failed = [*events, *self._failed]
            raise
        return events

    def _release(self, sequence: Ongoing) -> None:
        super()._release(sequence)
        sequence.drafts, sequence.unread_TH = [], None

    @torch.no_grad()
    def _advance_all(self, batch: list[Ongoing], events: list[TokenEvent]) -> None:
        """Run the network once, and take the tokens that it gives."""
        before = {id(s): self._lease(s).length for s in batch}
        states = {id(s): self.paged.state(self._lease(s)) for s in batch if s.drafts}
        hidden = dict(zip(map(id, batch), self._prefill(batch)))
        self._note_step(len(batch))
        ready = [s for s in batch if s.computed >= len(s.tokens)]
        choices = self._choices(ready, hidden)
        for sequence in batch:
            hidden_TH = hidden[id(sequence)]
            if id(sequence) in choices:
                ran, kept = len(hidden_TH), self._judge(sequence, choices[id(sequence)], hidden_TH, events)
                if sequence.lease is None:
                    continue
                if kept < ran:
                    self.paged.rewind(sequence.lease, before[id(sequence)] + kept, ran, states[id(sequence)])
                hidden_TH = hidden_TH[:kept]
            else:
                self._advance(sequence, hidden_TH, None)
            unread_TH = sequence.unread_TH
            sequence.unread_TH = hidden_TH if unread_TH is None else torch.cat([unread_TH, hidden_TH])

    def _choices(
        self, ready: list[Ongoing], hidden: dict[int, Tensor]
    ) -> dict[int, Callable[[int], TokenEvent | None]]:
        """For every request that gets tokens what gives the one of a place: 0 after what is known, then after each draft."""
        if not ready:
            return {}
        sizes = [1 + len(s.drafts) for s in ready]
        rows_RV = self.model.logits(torch.cat([hidden[id(s)][-n:] for s, n in zip(ready, sizes)]))
        split = dict(zip(map(id, ready), rows_RV.split(sizes)))
        here = [s for s in ready if fits(s.request)]
        chosen: dict[int, list[int]] = {}
        if here:
            tokens = self._sample_drafted(here, torch.cat([split[id(s)] for s in here]))
            for sequence in here:
                chosen[id(sequence)] = [tokens.pop(0) for _ in range(1 + len(sequence.drafts))]

        def choice(sequence: Ongoing) -> Callable[[int], TokenEvent | None]:
            if id(sequence) in chosen:
                return lambda place: self._event(self._add(sequence, chosen[id(sequence)][place]))
            logits = split[id(sequence)].float().numpy()
            hidden_TH = hidden[id(sequence)]

            def judged(place: int) -> TokenEvent | None:
                event = self._advance(sequence, None if place else hidden_TH, logits[place])
                if event is not None:
                    self._end_at(sequence, event.finish_reason)
                return event

            return judged

        return {id(s): choice(s) for s in ready}

    @staticmethod
    def _sample_drafted(sequences: list[Ongoing], logits_RV: Tensor) -> list[int]:
        """A token for every place of every request, as if the drafts before it stood in the text."""
        requests, known = [], []
        for s in sequences:
            for place in range(1 + len(s.drafts)):
                requests.append(s.request)
                known.append([*s.tokens, *s.drafts[:place]])
        numbers_R = numbers_of(requests, [len(tokens) for tokens in known])
        return [int(t) for t in sample_rows(logits_RV, requests, known, numbers_R)]

    def _judge(
        self,
        sequence: Ongoing,
        choice: Callable[[int], TokenEvent | None],
        hidden_TH: Tensor,
        events: list[TokenEvent],
    ) -> int:
        """Take tokens until a draft is not the one that stands there; how many rows of the chunk remain.

        Args:
            sequence: whose newest chunk ran.
            choice: of `_choices`.
            hidden_TH: of the chunk.
            events: added to.
        """
        drafts, sequence.drafts = sequence.drafts, []
        accepted, is_over = 0, False
        while not is_over:
            event = choice(accepted)
            if event is None:
                break
            is_drafted = accepted < len(drafts) and event.token_id == drafts[accepted]
            accepted += is_drafted
            is_over = not is_drafted or event.finish_reason is not None
            rejected = len(drafts) - accepted if is_over else 0
            events.append(replace(event, accepted=int(is_drafted), rejected=rejected))
            if fits(sequence.request) and event.token_id is not None:
                self._note_tokens(1)
        self._counts.drafted.update(range(1, len(drafts) + 1))
        self._counts.accepted.update(range(1, accepted + 1))
        if drafts:
            sequence.share += RECENT * (accepted / len(drafts) - sequence.share)
            if sequence.share < self.worth:
                # A little above, so that some drafts have their chance afterwards.
                sequence.share, sequence.rest = self.worth + RECENT, REST
        return len(hidden_TH) - len(drafts) + accepted

    @torch.no_grad()
    def _draft(self, sequences: list[Ongoing]) -> None:
        """Have the modules read what the network has computed, and predict what comes after the newest token."""
        wanted = [s for s in sequences if self._is_due(s)]
        if not wanted:
            return
        hidden, known = [], {id(s): list(s.tokens) for s in wanted}
        for s in wanted:
            assert s.unread_TH is not None
            hidden.append(s.unread_TH)
        starts = [s.computed - len(h) for s, h in zip(wanted, hidden)]
        for module in range(len(self.model.mtp)):
            rows = [
                (self._lease(s), start, known[id(s)][start + module + 1 : s.computed + module + 1])
                for s, start in zip(wanted, starts)
            ]
            hidden = self.paged.predict(module, rows, hidden, self.experts)
            newest = [
                (s, h[-1:]) for s, h in zip(wanted, hidden) if len(known[id(s)]) == s.computed + module + 1
            ]
            if newest:
                self._predict(newest, known)
        for s, start in zip(wanted, starts):
            s.drafts = [] if s.in_prompt else self._usable(s, known[id(s)][len(s.tokens) :])
            final = min(s.computed, len(s.tokens) - len(self.model.mtp))
            unread_TH, s.unread_TH = s.unread_TH, None
            if unread_TH is not None and final < s.computed:
                s.unread_TH = unread_TH[max(0, final - start) :].clone()

    def _is_due(self, sequence: Ongoing) -> bool:
        """Whether its modules read on now: always within the prompt, and then where drafts can be of use."""
        if sequence.in_prompt:
            return True
        sequence.rest = max(0, sequence.rest - 1)
        return not sequence.rest and len(sequence.tokens) + 1 < self._end(sequence)

    def _predict(self, newest: list[tuple[Ongoing, Tensor]], known: dict[int, list[int]]) -> None:
        """Append to what is known of each request the token that its hidden state [1, H] predicts."""
        logits_RV = self.model.logits(torch.cat([h for _, h in newest]))
        tokens = [known[id(s)] for s, _ in newest]
        requests = [s.request for s, _ in newest]
        numbers_R = numbers_of(requests, [len(found) for found in tokens])
        for found, token in zip(tokens, sample_rows(logits_RV, requests, tokens, numbers_R)):
            # Of logits that are not finite any draft will do: the network has the last word.
            found.append(max(int(token), 0))

    def _usable(self, sequence: Ongoing, drafts: list[int]) -> list[int]:
        """The drafts that may be judged: within the request's limit, and not beyond a document's end."""
        left = self._end(sequence) - len(sequence.tokens) - 1
        drafts = drafts[: min(left, self.most_drafts)]
        if sequence.tokens[-1] == self.document_end:
            return []
        if self.document_end in drafts:
            return drafts[: drafts.index(self.document_end) + 1]
        return drafts
