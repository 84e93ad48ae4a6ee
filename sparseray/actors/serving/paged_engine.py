"""`PagedEngine`: continuous batching over paged caches, on a GPU one step ahead of the host.

A step runs the chunks of prompts and then one token of every request that decodes. On a GPU a call of `step` starts
the next step and then takes the tokens of the one before: the device reads them where the sampler left them, and
computes on while they are told. Where the host has a say in the next step (its sampler, penalties) it takes the tokens
first; where they address memory rows, once the layers that need none were started (decode_step.py). All lie on the
same stream, so pages change hands as soon as the host says so. On a CPU a step has ended when its call returns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sparseray.actors.serving.cache_pool import Lease, page_keys
from sparseray.actors.serving.cache_sizes import CacheSizes, new_pool, page_of
from sparseray.actors.serving.chunks import Chunk
from sparseray.actors.serving.device_sampler import FAILED, fits, is_adjusted, numbers_of, sample_rows
from sparseray.actors.serving.engine import Engine, Ongoing
from sparseray.actors.serving.paged_model import PagedModel
from sparseray.actors.serving.text_request import GenerationRequest, TokenEvent
from sparseray.errors import ConfigError
from sparseray.log import get_logger
from sparseray.model.dse import Memory
from sparseray.model.moe import Experts
from sparseray.model.transformer import Transformer

log = get_logger(__name__)

PREFILL_ROWS = 8192
"""Tokens of prompts that a GPU reads in one step."""
SHARE_OF_FREE_MEMORY = 0.8
PLACES_FOR_BEGUN = 2
"""Batches' worth of requests that a CPU computes at once where those beyond the first had begun elsewhere."""


@dataclass(frozen=True, kw_only=True)
class Flight:
    """A step that was started.

    Args:
        batch: its requests, and the hidden states of those whose prompt's log probabilities are wanted.
        sampled: requests that get a token from the device, in the order of `tokens`.
        tokens: int64, on the host once `done`.
        judged: requests that get their token from the sampler on the host, in the order of `logits`.
        logits: [.., V] on the host once `done`.
        done: reached when everything has arrived; None on a CPU.
        may_be_overtaken: the next step needs nothing of it from the host.
    """

    batch: list[tuple[Ongoing, Tensor | None]]
    sampled: list[Ongoing]
    tokens: Tensor | None
    judged: list[Ongoing]
    logits: Tensor | None
    done: torch.cuda.Event | None
    may_be_overtaken: bool


Taken = tuple[Ongoing, int, int, str | None] | TokenEvent
"""A token with its request, index and reason to finish, or a whole event."""


class PagedEngine(Engine):
    """Runs many requests on one model and one pool of pages.

    Attributes:
        runs_on: the kind of model over pages.

    Args:
        model, experts, memory, max_batch, max_model_len, max_failures, grammars: as in `Engine`.
        prefill_chunk: as in `Engine`.
        cache_bytes: of all pages; None takes what the device has left, and on a CPU what a full batch needs.
        page: tokens of a page; None chooses.
    """

    runs_on: Callable[..., PagedModel] = PagedModel

    def __init__(
        self,
        model: Transformer,
        experts: Experts,
        memory: Memory | None,
        *,
        cache_bytes: int | None = None,
        page: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(model, experts, memory, **options)
        device = model.embedding.device
        config, dtype, page = model.config, model.embedding.dtype, page or page_of(model)
        # Whoever reads a text already is given a place at once; a GPU's graphs are made for full batches.
        self.places = self.max_batch * (1 if device.type == "cuda" else PLACES_FOR_BEGUN)
        if cache_bytes is None and device.type == "cuda":
            cache_bytes = int(torch.cuda.mem_get_info(device)[0] * SHARE_OF_FREE_MEMORY)
        rows = self.prefill_chunk
        caches = CacheSizes.of(config, page=page, dtype=dtype, places=self.places, prompt_rows=rows)
        counts = caches.fitting(1 + self.max_batch * -(-self.max_model_len // page), cache_bytes)
        self.pool = new_pool(config, counts, page, self.places)
        sizes = {"page": page, "num_slots": self.places, "max_len": self.max_model_len, "prompt_rows": rows}
        self.paged = self.runs_on(model, num_pages=counts, **sizes)
        size = caches.bytes(counts.whole) / 2**30
        log.info("cache: %d pages of %d tokens, %d recent, %.2f GiB", counts.whole, page, counts.recent, size)
        self._flight: Flight | None = None
        self._taken: list[Taken] = []
        self.paged.warm(experts, memory)

    @property
    def cache_usage(self) -> float:
        """Pages that requests hold, of all."""
        return self.pool.usage

    def add(self, request: GenerationRequest) -> None:
        """Queue a request.

        Raises:
            ConfigError: it cannot be computed, or would not fit an empty cache.
        """
        total = len(request.prompt_tokens) + request.max_tokens
        if total > self.pool.most_tokens:
            raise ConfigError(
                f"request {request.request_id}: {total} tokens do not fit the cache of {self.pool.most_tokens};"
                " shorten the request or raise serve.cache_gib"
            )
        super().add(request)

    def cancel(self, request_id: str) -> bool:
        """Forget a request between two steps; no event follows. Returns whether it was there."""
        for sequence in self._running:
            if sequence.request.request_id == request_id:
                self._release(sequence)
        return super().cancel(request_id)

    def step(self) -> list[TokenEvent]:
        """Start the next step and take the tokens of the one before; see `Engine.step`."""
        events, self._failed = self._failed, []
        self._taken = []
        batch: list[Ongoing] = []
        try:
            if self._flight is not None and not self._may_overtake(self._flight):
                self._learn()
            self._admit()
            batch = self._select()
            self._hold_recent(batch)
            begun = self._launch(batch) if batch else None
            if begun is not None:
                self._note_step(len(batch))
            self._learn()
            self._flight = begun
            if begun is not None and begun.done is None:
                self._learn()
        except Exception as error:
            self._lose(self._flight, batch, error)
            # What was taken is told by the next step.
            self._failed = [*events, *(self._event(found) for found in self._taken), *self._failed]
            raise
        return events + [self._event(found) for found in self._taken]

    def _may_overtake(self, flight: Flight) -> bool:
        """Whether the next step can start before the tokens of the one under way are taken."""
        return flight.may_be_overtaken

    def _learn(self) -> None:
        """Take the tokens of the step that is under way, unless they are taken: as late as something needs them."""
        if self._flight is not None:
            self._taken += self._take(self._flight)
            self._flight = None

    def _lose(self, flight: Flight | None, batch: list[Ongoing], error: Exception) -> None:
        """Begin again with all requests of the steps that are not taken."""
        self._flight = None
        lost = [*batch, *([] if flight is None else [sequence for sequence, _ in flight.batch])]
        self._restart([s for s in dict.fromkeys(lost) if s.lease is not None], error)

    def _release(self, sequence: Ongoing) -> None:
        if sequence.lease is not None:
            self.pool.release(sequence.lease)
            sequence.lease = None

    def _restart(self, batch: list[Ongoing], error: Exception) -> None:
        for sequence in batch:
            self._release(sequence)
        super()._restart(batch, error)

    def _admit(self) -> None:
        """Give pages to waiting requests, in the order of `Engine`, until one does not fit."""
        while self._waiting:
            sequence = min(self._waiting, key=lambda waiting: waiting.request.priority)
            request = sequence.request
            if len(self._running) >= (self.places if request.resume_tokens else self.max_batch):
                return
            if sequence.prefix is None:
                # A prefix that is not computed has no hidden states to take log probabilities from.
                known = sequence.tokens[: sequence.num_read] if request.prompt_logprobs is None else ()
                sequence.prefix = known, page_keys(known, self.pool.page)
            prefix, keys = sequence.prefix
            lease = self.pool.acquire(prefix, sequence.num_prompt + request.max_tokens, keys)
            if lease is None:
                return
            sequence.prefix = None
            self._waiting.remove(sequence)
            self.paged.begin(lease)
            sequence.lease = lease
            self._running.append(sequence)
            self._note_admitted(sequence)

    def _select(self) -> list[Ongoing]:
        """All requests that decode, and the oldest that read their prompt, of one chunk's tokens together.

        A request whose last token is on its way is left out.
        """
        found, used = [], 0
        for sequence in self._running:
            if not sequence.in_prompt:
                if len(sequence.tokens) + sequence.pending < self._end(sequence):
                    found.append(sequence)
                continue
            count = len(sequence.next_chunk(self.prefill_chunk))
            if not used or used + count <= self.prefill_chunk:
                found.append(sequence)
                used += count
        return found

    def _hold_recent(self, batch: list[Ongoing]) -> None:
        """Take the recent pages back that nothing reads any more, and give those that the batch writes, drafts too."""
        if self.pool.recent is None:
            return
        for sequence in self._running:
            lease = self._lease(sequence)
            self.pool.trim(lease, lease.length - self._lag(sequence))
        for sequence in batch:
            lease, more = self._lease(sequence), max(2, 1 + len(sequence.drafts))
            if sequence.in_prompt:
                more = len(sequence.next_chunk(self.prefill_chunk))
            self.pool.extend(lease, lease.length + sequence.pending + more)
        self.paged.place_recent(self.pool.recent.take_moved())

    def _lag(self, sequence: Ongoing) -> int:
        """Newest tokens of a request that may be computed again, or that modules have still to read."""
        return sequence.pending + (0 if sequence.unread_TH is None else len(sequence.unread_TH))

    @staticmethod
    def _lease(sequence: Ongoing) -> Lease:
        assert sequence.lease is not None
        return sequence.lease

    @staticmethod
    def _end(sequence: Ongoing) -> int:
        """Tokens of a request that reaches its limit."""
        return sequence.num_prompt + sequence.request.max_tokens

    @torch.no_grad()
    def _launch(self, batch: list[Ongoing]) -> Flight:
        """Start a step: prompts, then decoding, then the sampler.

        Where chunks change no bit, single tokens go through with those of prompts.
        """
        is_one = self.model.ops.chunks_keep_bits and any(s.in_prompt for s in batch)
        prompts = [s for s in batch if is_one or s.in_prompt]
        decoding = [] if is_one else [s for s in batch if not s.in_prompt]
        hidden = self._prefill(prompts) if prompts else []
        whole = [i for i, s in enumerate(prompts) if s.computed == len(s.tokens)]
        ready, logits = [prompts[i] for i in whole], []
        if whole:
            logits.append(self.model.logits(torch.cat([hidden[i][-1:] for i in whole])))
        if decoding:
            chunks = [self._chunk(s, 1) for s in decoding]
            found = self.paged.decode(chunks, self.experts, self.memory, self._learn)
            for chunk in chunks:
                chunk.lease.length += 1
            known = [i for i, s in enumerate(decoding) if s.computed == len(s.tokens) + s.pending]
            # Those that ended with a token that was learnt meanwhile are not among them.
            if known:
                ready += [decoding[i] for i in known]
                logits.append(found if len(known) == len(decoding) else _pick(found, known))
        wanted = [h if s.request.prompt_logprobs is not None else None for s, h in zip(prompts, hidden)]
        rows: list[tuple[Ongoing, Tensor | None]] = list(zip(prompts, wanted))
        rows += [(s, None) for s in decoding]
        return self._sample(rows, ready, logits)

    def _chunk(self, sequence: Ongoing, count: int) -> Chunk:
        known = [*sequence.tokens, *sequence.drafts] if sequence.drafts else sequence.tokens
        return Chunk(lease=self._lease(sequence), known=known, count=count)

    def _prefill(self, sequences: list[Ongoing]) -> list[Tensor]:
        """Start the next chunk of each; hidden states [T, H]."""
        chunks = [self._chunk(s, len(s.next_chunk(self.prefill_chunk))) for s in sequences]
        hidden = self.paged.prefill(chunks, self.experts, self.memory)
        tokens = 0
        for sequence, chunk in zip(sequences, chunks):
            is_prompt = sequence.in_prompt
            chunk.lease.length += chunk.count
            if is_prompt:
                self.pool.publish(chunk.lease, self.paged.state(chunk.lease))
                tokens += chunk.count
        self._stats = replace(self._stats, prompt_tokens=self._stats.prompt_tokens + tokens)
        return hidden

    @torch.no_grad()
    def _sample(
        self, batch: list[tuple[Ongoing, Tensor | None]], ready: list[Ongoing], logits: list[Tensor]
    ) -> Flight:
        """Choose tokens where that can be done on the device, and send everything to the host."""
        tokens = judged_logits = done = None
        here = [i for i, s in enumerate(ready) if fits(s.request)]
        there = [i for i, s in enumerate(ready) if not fits(s.request)]
        if ready:
            logits_RV = torch.cat(logits) if len(logits) > 1 else logits[0]
            if here:
                rows_RV = logits_RV if not there else _pick(logits_RV, here)
                chosen = [ready[i] for i in here]
                known = [s.tokens for s in chosen]
                requests = [s.request for s in chosen]
                numbers_R = numbers_of(requests, [len(s.tokens) + s.pending for s in chosen])
                found = sample_rows(rows_RV, requests, known, numbers_R, self.model.ops)
                tokens = to_host(found)
                self.paged.keep(found, [s.lease for s in chosen if s.lease is not None])
                for sequence in chosen:
                    sequence.pending += 1
            if there:
                judged_logits = to_host(_pick(logits_RV, there).float())
        if self.paged.device.type == "cuda":
            done = torch.cuda.Event()
            done.record()
        return Flight(
            batch=batch,
            sampled=[ready[i] for i in here],
            tokens=tokens,
            judged=[ready[i] for i in there],
            logits=judged_logits,
            done=done,
            may_be_overtaken=not there
            and all(hidden_TH is None for _, hidden_TH in batch)
            and not any(is_adjusted(s.request, s.tokens) for s in ready),
        )

    def _take(self, flight: Flight) -> list[Taken]:
        """Wait for a step; append its tokens, and free the pages of requests that ended."""
        if flight.done is not None:
            flight.done.synchronize()
        found: list[Taken] = []
        if flight.tokens is not None:
            for sequence, token in zip(flight.sampled, flight.tokens.tolist(), strict=True):
                if sequence.lease is not None:
                    sequence.pending -= 1
                    found.append(self._add(sequence, token))
            self._note_tokens(len(found))
        judged = {} if flight.logits is None else dict(zip(map(id, flight.judged), flight.logits.numpy()))
        for sequence, hidden_TH in flight.batch:
            if sequence.lease is not None and (hidden_TH is not None or id(sequence) in judged):
                event = self._advance(sequence, hidden_TH, judged.get(id(sequence)))
                if event is not None:
                    found.append(event)
                    self._end_at(sequence, event.finish_reason)
        return found

    def _add(self, sequence: Ongoing, token: int) -> Taken:
        """Append a sampled token."""
        request, index = sequence.request, len(sequence.tokens) - sequence.num_prompt
        if token == FAILED:
            self._end_at(sequence, "error")
            return self._error(sequence, "the model's logits are not finite; its weights or rows are damaged")
        sequence.tokens.append(token)
        finish = "length" if index + 1 == request.max_tokens else None
        if token in request.stop_token_ids:
            finish = "stop"
        self._end_at(sequence, finish)
        return sequence, token, index, finish

    def _end_at(self, sequence: Ongoing, finish: str | None) -> None:
        if finish is not None:
            self._running.remove(sequence)
            self._release(sequence)

    @staticmethod
    def _event(found: Taken) -> TokenEvent:
        if isinstance(found, TokenEvent):
            return found
        sequence, token, index, finish = found
        request_id = sequence.request.request_id
        return TokenEvent(request_id=request_id, index=index, token_id=token, finish_reason=finish)


def _pick(rows: Tensor, at: list[int]) -> Tensor:
    """Some of the rows; a list as an index would wait for the device."""
    return rows[torch.tensor(at).to(rows.device, non_blocking=True)]


def to_host(values: Tensor) -> Tensor:
    """A copy on the host, complete once the stream has come so far."""
    if not values.is_cuda:
        return values
    copy = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    return copy.copy_(values, non_blocking=True)
