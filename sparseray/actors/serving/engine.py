"""What an engine has whatever computes its steps: requests that wait or run, counters, and the sampler on the host.

The middle of a request's path: between the batch's caches and the sampler. No Ray and no sockets; whoever
owns an engine calls `step` in a loop. paged_engine.py computes the steps. One that fails (a lost expert shard) loses
no request: each one in it starts again from its prompt and the tokens that it already added.

Shapes: T tokens of a chunk, H hidden, V vocabulary.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from sparseray.actors.serving.cache_pool import Lease
from sparseray.actors.serving.sampler import adjusted, log_probabilities, sample, token_logprobs
from sparseray.actors.serving.text_request import GenerationRequest, TokenEvent, TokenLogprobs
from sparseray.errors import ConfigError
from sparseray.log import get_logger
from sparseray.model.dse import Memory
from sparseray.model.moe import Experts
from sparseray.model.transformer import Transformer

if TYPE_CHECKING:  # llguidance is loaded by who serves, not by who trains
    from sparseray.actors.serving.grammar import Grammars, GrammarState

logger = get_logger(__name__)

REST, RECENT = 16, 0.1
"""Steps without drafts where few are accepted, and the weight of a step's drafts in the share that is accepted lately."""


@dataclass(frozen=True, kw_only=True)
class EngineStats:
    """Counters of an engine since its start, and its queues now.

    Args:
        waiting, running: requests without and with a cache.
        steps, failed_steps: calls of the model, and those that raised.
        prompt_tokens, generated_tokens: tokens read (again, after a failure) and tokens added.
        largest_batch: most requests in one call of the model.
    """

    waiting: int = 0
    running: int = 0
    steps: int = 0
    failed_steps: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    largest_batch: int = 0


@dataclass(kw_only=True)
class StepCounts:
    """What happened since it was last asked for.

    Args:
        batch: requests in the last call of the model.
        failed_steps, retries: calls that raised, and requests that were queued again.
        queue_seconds: from its arrival to its place in the batch, of every request that got one.
        drafted, accepted: tokens that were drafted and judged, and those of them that stand in a text, by their place
            in the draft, from 1 on.
    """

    batch: int = 0
    failed_steps: int = 0
    retries: int = 0
    queue_seconds: list[float] = field(default_factory=list)
    drafted: Counter[int] = field(default_factory=Counter)
    accepted: Counter[int] = field(default_factory=Counter)


@dataclass(eq=False)
class Ongoing:
    """A request with what was computed of it so far.

    Args:
        request: as it came.
        tokens: of its prompt and its answer.
        num_read: of them that are read in chunks; the others one by one, as when they were first computed.
        lease: its pages, while it is in the batch.
        pending: tokens that the device has chosen and not told.
        drafts: tokens that may follow, to be judged in the next step.
        unread_TH: hidden states of the newest tokens that the drafting modules have still to read, once they know what
            follows.
        prefix: tokens that may be in pages already, and their pages' keys, while it waits for pages: it asks in every step.
        share, rest: of its drafts that were accepted lately, and steps that it goes without any.
    """

    request: GenerationRequest
    tokens: list[int]
    num_read: int
    lease: Lease | None = None
    pending: int = 0
    failures: int = 0
    queued_s: float = field(default_factory=time.perf_counter)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    grammar: GrammarState | None = None
    drafts: list[int] = field(default_factory=list)
    unread_TH: Tensor | None = None
    prefix: tuple[Sequence[int], list[bytes]] | None = None
    share: float = 1.0
    rest: int = 0

    @property
    def num_prompt(self) -> int:
        return len(self.request.prompt_tokens)

    @property
    def computed(self) -> int:
        return self.lease.length if self.lease is not None else 0

    @property
    def in_prompt(self) -> bool:
        """Whether it still reads what is known of it."""
        return self.computed < self.num_read

    def next_chunk(self, size: int) -> list[int]:
        """What is read: up to the next multiple of `size`, or where a state is stored; then one token, with drafts."""
        start = self.computed
        if not self.in_prompt:
            return [*self.tokens[start : start + 1], *self.drafts]
        stop = min(self.num_read, (start // size + 1) * size)
        if self.lease is not None and start < self.lease.stop < stop:
            stop = self.lease.stop
        return self.tokens[start:stop]


class Engine(ABC):
    """Runs many requests on one model.

    Args:
        model: the dense part (it holds the memory's layout).
        experts, memory: the routed experts and the memory tables; may be replaced between two steps.
        max_batch: most requests with a cache.
        max_model_len: most tokens of a request, prompt and continuation; at most the model's.
        prefill_chunk: tokens of all prompts together in one step, so that decoding goes on beside them.
        max_failures: failed steps after which a request ends with an error.
        grammars: over the model's vocabulary; without them, requests with a grammar are refused.

    Raises:
        ConfigError: a limit is out of range.
    """

    def __init__(
        self,
        model: Transformer,
        experts: Experts,
        memory: Memory | None,
        *,
        max_batch: int = 16,
        max_model_len: int | None = None,
        prefill_chunk: int = 64,
        max_failures: int = 3,
        grammars: Grammars | None = None,
    ) -> None:
        longest = model.config.max_seq_len
        self.max_model_len = longest if max_model_len is None else max_model_len
        if not 1 <= self.max_model_len <= longest:
            raise ConfigError(
                f"max_model_len={max_model_len} is outside 1..model.max_seq_len={longest}; lower it"
            )
        for name, value in (
            ("max_batch", max_batch),
            ("prefill_chunk", prefill_chunk),
            ("max_failures", max_failures),
        ):
            if value < 1:
                raise ConfigError(f"{name}={value} must be at least 1")
        self.model, self.experts, self.memory = model, experts, memory
        self.max_batch, self.prefill_chunk = max_batch, prefill_chunk
        self.max_failures = max_failures
        self._grammars = grammars
        self._waiting: deque[Ongoing] = deque()
        self._running: list[Ongoing] = []
        self._failed: list[TokenEvent] = []
        self._stats, self._counts = EngineStats(), StepCounts()

    @property
    def has_work(self) -> bool:
        """Whether `step` has something to do."""
        return bool(self._waiting or self._running or self._failed)

    @property
    def stats(self) -> EngineStats:
        """The counters now."""
        return replace(self._stats, waiting=len(self._waiting), running=len(self._running))

    @property
    @abstractmethod
    def cache_usage(self) -> float:
        """Share of the caches that requests hold."""

    def take_counts(self) -> StepCounts:
        """Return what happened since the last call."""
        counts, self._counts = self._counts, StepCounts()
        return counts

    def add(self, request: GenerationRequest) -> None:
        """Queue a request.

        Raises:
            ConfigError: it cannot be computed: empty or too long, unknown tokens, or a used id.
        """
        total = len(request.prompt_tokens) + request.max_tokens
        vocab = self.model.config.vocab_size
        if not request.prompt_tokens or total > self.max_model_len:
            raise ConfigError(
                f"request {request.request_id}: {len(request.prompt_tokens)} prompt tokens and"
                f" max_tokens={request.max_tokens} must be at least 1 and together at most"
                f" max_model_len={self.max_model_len}; shorten the request"
            )
        tokens = [*request.prompt_tokens, *request.resume_tokens]
        named = [token for token, _ in request.logit_bias] + [
            token for word in request.bad_words for token in word
        ]
        named += [*request.allowed_token_ids, *request.stop_token_ids]
        asked = [*tokens, *named]
        if not 0 <= min(asked) <= max(asked) < vocab:
            raise ConfigError(f"request {request.request_id}: a token id is outside 0..{vocab - 1}")
        if request.max_tokens < len(request.resume_tokens) + (request.max_tokens > 0):
            raise ConfigError(
                f"request {request.request_id}: resume_tokens already reach max_tokens={request.max_tokens}"
            )
        if any(s.request.request_id == request.request_id for s in (*self._waiting, *self._running)):
            raise ConfigError(f"request id {request.request_id} is in use; choose another")
        sequence = Ongoing(request, tokens, self._num_read(request, tokens))
        if request.grammar:
            if self._grammars is None:
                raise ConfigError(f"request {request.request_id}: this engine has no tokenizer for a grammar")
            sequence.grammar = self._grammars.start(request.grammar, request.resume_tokens)
        self._waiting.append(sequence)

    @property
    def request_ids(self) -> tuple[str, ...]:
        """Requests that are queued or in the batch."""
        return tuple(s.request.request_id for s in (*self._running, *self._waiting))

    def cancel(self, request_id: str) -> bool:
        """Forget a request between two steps; no event follows. Returns whether it was there."""
        before = len(self._waiting) + len(self._running)
        self._waiting = deque(s for s in self._waiting if s.request.request_id != request_id)
        self._running = [s for s in self._running if s.request.request_id != request_id]
        return len(self._waiting) + len(self._running) < before

    @abstractmethod
    def step(self) -> list[TokenEvent]:
        """Compute the next chunk of the requests in the batch.

        Returns:
            The events of the requests that got a token or ended, in the order of the batch.

        Raises:
            Exception: whatever the model's call raised. Its requests wait to be computed again; those that
                failed too often end with an error event of the next step.
        """

    def _num_read(self, request: GenerationRequest, tokens: list[int]) -> int:
        """How many of a request's tokens are read in chunks: all, where that gives the bits of one by one.

        A GPU's bits depend on the company anyway, and one by one a request that has moved would wait for seconds.
        """
        in_chunks = self.model.ops.chunks_keep_bits or self.model.embedding.is_cuda
        return len(tokens) if in_chunks else len(request.prompt_tokens)

    def _note_admitted(self, sequence: Ongoing) -> None:
        self._counts.queue_seconds.append(time.perf_counter() - sequence.queued_s)

    def _note_step(self, batch: int) -> None:
        largest = max(self._stats.largest_batch, batch)
        self._stats = replace(self._stats, steps=self._stats.steps + 1, largest_batch=largest)
        self._counts.batch = batch

    def _note_tokens(self, count: int) -> None:
        self._stats = replace(self._stats, generated_tokens=self._stats.generated_tokens + count)

    def _restart(self, batch: list[Ongoing], error: Exception) -> None:
        """Put the requests of a failed step back at the head of the queue, without their caches."""
        self._stats = replace(self._stats, failed_steps=self._stats.failed_steps + 1)
        self._counts.failed_steps += 1
        for sequence in reversed(batch):
            self._running.remove(sequence)
            sequence.prompt_logprobs, sequence.pending = [], 0
            sequence.num_read = self._num_read(sequence.request, sequence.tokens)
            sequence.failures += 1
            if sequence.failures < self.max_failures:
                sequence.queued_s = time.perf_counter()
                self._waiting.appendleft(sequence)
                self._counts.retries += 1
            else:
                self._failed.append(self._error(sequence, f"{sequence.failures} steps failed: {error}"))

    def _error(self, sequence: Ongoing, message: str) -> TokenEvent:
        request_id = sequence.request.request_id
        logger.warning("request %s ends with an error: %s", request_id, message)
        index = len(sequence.tokens) - sequence.num_prompt
        return TokenEvent(request_id=request_id, index=index, finish_reason="error", error=message)

    @torch.no_grad()
    def _advance(
        self, sequence: Ongoing, hidden_TH: Tensor | None, logits_V: NDArray[Any] | None
    ) -> TokenEvent | None:
        """Note the prompt's log probabilities, and sample once all known tokens are in the cache."""
        try:
            if hidden_TH is not None:
                self._read_prompt(sequence, hidden_TH)
            return None if logits_V is None else self._next_token(sequence, logits_V)
        except FloatingPointError as error:
            return self._error(sequence, str(error))

    def _read_prompt(self, sequence: Ongoing, hidden_TH: Tensor) -> None:
        top = sequence.request.prompt_logprobs
        if top is None or len(sequence.prompt_logprobs) == sequence.num_prompt:
            return
        found = sequence.prompt_logprobs
        if not found:
            found.append(TokenLogprobs(token_id=sequence.tokens[0], logprob=None))
        start = sequence.computed - hidden_TH.shape[0]
        targets = sequence.request.prompt_tokens[start + 1 : sequence.computed + 1]
        if targets:
            logits_TV = self.model.logits(hidden_TH[: len(targets)]).float().cpu().numpy()
            for token, logits_V in zip(targets, logits_TV, strict=True):
                found.append(token_logprobs(log_probabilities(logits_V), token, top))

    def _next_token(self, sequence: Ongoing, logits_V: NDArray[Any]) -> TokenEvent:
        request, index = sequence.request, len(sequence.tokens) - sequence.num_prompt
        prompt_logprobs = None
        if request.prompt_logprobs is not None and index == len(request.resume_tokens):
            prompt_logprobs = tuple(sequence.prompt_logprobs)
        event = TokenEvent(request_id=request.request_id, index=index, prompt_logprobs=prompt_logprobs)
        if request.max_tokens == 0:
            return replace(event, finish_reason="length")
        mask_V = None if sequence.grammar is None else sequence.grammar.mask()
        scores_V = adjusted(logits_V, request, sequence.tokens, mask_V)
        token = sample(scores_V, request, position=len(sequence.tokens))
        if token is None:
            # Its constraints leave nothing that may follow: the text ends here.
            return replace(event, finish_reason="stop")
        sequence.tokens.append(token)
        if sequence.grammar is not None:
            sequence.grammar.add(token)
        self._note_tokens(1)
        finish = "length" if index + 1 == request.max_tokens else None
        if token in request.stop_token_ids:
            finish = "stop"
        chosen = None
        if request.logprobs is not None:
            chosen = token_logprobs(log_probabilities(logits_V), token, request.logprobs)
        return replace(event, token_id=token, logprobs=chosen, finish_reason=finish)
