"""The serving engine of one attention worker: continuous batching over caches.

Requests join and leave between two steps. A step takes one prefill chunk or one token of every
running request through the model at once; chunk borders depend on the request alone, and rows are
batch invariant (model/decode.py), so a request's text does not depend on its company.
"""

from collections import deque
from dataclasses import dataclass, field

import numpy as np
import torch

from sparseray.actors.generation import GenerationRequest, TokenEvent, TokenLogprobs
from sparseray.actors.sampler import sample, token_logprobs
from sparseray.model.cache import Cache
from sparseray.model.decode import forward_chunks
from sparseray.model.dse import Memory
from sparseray.model.moe import Experts
from sparseray.model.transformer import Transformer


@dataclass
class _Running:
    """A request in the batch: its cache, what was computed of the prompt, what was generated."""

    request: GenerationRequest
    cache: Cache
    done: int = 0
    generated: list[int] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)

    def next_tokens(self, chunk: int) -> tuple[int, ...]:
        """Tokens of the next step: the next prompt chunk, or the last generated token."""
        prompt = self.request.prompt
        return prompt[self.done : self.done + chunk] if self.done < len(prompt) else (self.generated[-1],)


class Engine:
    """Generates for many requests at once.

    Args:
        model: dense weights.
        experts, memory: as the model wants them; memory is None without memory layers.
        max_batch: requests that share a step; more wait.
        max_model_len: prompt and generated tokens of one request.
        prefill_chunk: prompt tokens of one request per step.
    """

    def __init__(
        self,
        model: Transformer,
        experts: Experts,
        memory: Memory | None,
        *,
        max_batch: int,
        max_model_len: int,
        prefill_chunk: int,
    ) -> None:
        self.model, self.experts, self.memory = model, experts, memory
        self.max_batch, self.max_model_len, self.prefill_chunk = max_batch, max_model_len, prefill_chunk
        self.waiting: deque[GenerationRequest] = deque()
        self.running: dict[str, _Running] = {}
        self.steps = 0
        self.largest_batch = 0

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self.waiting or self.running)

    def add(self, request: GenerationRequest) -> None:
        """Queue a request.

        Raises:
            ValueError: its prompt is empty or it could exceed `max_model_len`; the server checks before.
        """
        if not request.prompt or len(request.prompt) + request.max_tokens > self.max_model_len:
            raise ValueError(
                f"request {request.request_id}: {len(request.prompt)} + {request.max_tokens} tokens "
                f"do not fit 1 to {self.max_model_len}"
            )
        self.waiting.append(request)

    def cancel(self, request_id: str) -> None:
        """Forget a request, whether it waits, runs or has ended."""
        self.waiting = deque(r for r in self.waiting if r.request_id != request_id)
        self.running.pop(request_id, None)

    def clear(self) -> None:
        """Forget all requests; after a failed step their caches hold half of it."""
        self.waiting.clear()
        self.running.clear()

    @torch.no_grad()
    def step(self) -> list[TokenEvent]:
        """Run one step of the batch and return the tokens it gave."""
        while self.waiting and len(self.running) < self.max_batch:
            request = self.waiting.popleft()
            length = len(request.prompt) + request.max_tokens
            self.running[request.request_id] = _Running(request, Cache(self.model.config, length))
        if not self.running:
            return []
        batch = list(self.running.values())
        self.steps, self.largest_batch = self.steps + 1, max(self.largest_batch, len(batch))
        tokens = [torch.tensor(one.next_tokens(self.prefill_chunk)) for one in batch]
        chunks = [(chunk, one.cache) for chunk, one in zip(tokens, batch)]
        hidden = forward_chunks(self.model, chunks, experts=self.experts, memory=self.memory)
        ready = []
        for one, chunk, hidden_TH in zip(batch, tokens, hidden):
            if one.request.prompt_logprobs and one.done < len(one.request.prompt):
                self._score_prompt(one, hidden_TH)
            one.done += len(chunk)
            if one.done >= len(one.request.prompt):
                ready.append((one, hidden_TH[-1]))
        if not ready:
            return []
        logits_BV = self.model.logits(torch.stack([last_H for _, last_H in ready])).float().numpy()
        return [self._advance(one, logits_V) for (one, _), logits_V in zip(ready, logits_BV)]

    def _score_prompt(self, one: _Running, hidden_TH: torch.Tensor) -> None:
        """Log-probabilities of the prompt tokens that follow each position of a chunk."""
        following = one.request.prompt[one.done + 1 : one.done + 1 + len(hidden_TH)]
        logits_TV = self.model.logits(hidden_TH[: len(following)]).float().numpy() if following else ()
        for logits_V, token in zip(logits_TV, following):
            one.prompt_logprobs.append(token_logprobs(logits_V, token, max(0, one.request.num_logprobs)))

    def _advance(self, one: _Running, logits_V: np.ndarray) -> TokenEvent:
        """Choose the next token of a request and end it when it is complete."""
        request = one.request
        scored = () if one.generated else tuple(one.prompt_logprobs)
        if request.max_tokens == 0:
            self.running.pop(request.request_id)
            return TokenEvent(
                request_id=request.request_id, token=-1, finish_reason="length", prompt_logprobs=scored
            )
        position = len(request.prompt) + len(one.generated)
        token = sample(
            logits_V,
            temperature=request.temperature,
            top_p=request.top_p,
            seed=request.seed,
            position=position,
        )
        logprobs = (
            token_logprobs(logits_V, token, request.num_logprobs) if request.num_logprobs >= 0 else None
        )
        one.generated.append(token)
        reason = None
        if token in request.stop_token_ids:
            reason = "stop"
        elif len(one.generated) == request.max_tokens:
            reason = "length"
        if reason:
            self.running.pop(request.request_id)
        return TokenEvent(
            request_id=request.request_id,
            token=token,
            finish_reason=reason,
            logprobs=logprobs,
            prompt_logprobs=scored,
        )
