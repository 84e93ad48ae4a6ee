"""What the ingress sends to an engine and what comes back, inside the messages of serving/messages.py.

The first objects on the path of a request. Nothing here knows text: token ids go in, token ids come out, and
the ingress turns them into characters.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """One continuation to compute.

    Args:
        request_id: unique among the requests of an engine.
        prompt_tokens: token ids, at least one.
        max_tokens: most tokens to add, `resume_tokens` included; 0 only reads the prompt.
        temperature: 0 for the most probable token (lowest id on ties).
        top_p: smallest set of most probable tokens with at least this probability, in (0, 1].
        seed: of the request's random numbers; any integer, taken modulo 2**64.
        top_k: only this many most probable tokens may be drawn; 0 for all.
        min_p: only tokens at least this share as probable as the best one may be drawn, in [0, 1].
        repetition_penalty: divides the positive and multiplies the negative logits of tokens that the prompt or
            the continuation holds; 1 for none.
        presence_penalty, frequency_penalty: taken from the logit of a token that the continuation holds, once,
            and once for each time.
        logit_bias: (token id, what is added to its logit).
        allowed_token_ids: the only tokens that may be drawn; empty for all.
        bad_words: token sequences that the continuation never completes.
        grammar: that the continuation follows, as `Grammars` takes it; empty for none.
        min_tokens: tokens added before a stop token may come.
        priority: lower values enter the batch first.
        stop_token_ids: tokens that end the text (the end of a document); empty to ignore them.
        logprobs: also return the chosen token's log probability and those of this many best tokens; None for
            neither.
        prompt_logprobs: the same for the prompt's tokens, with the first event.
        resume_tokens: tokens that another engine already added; the continuation starts after them.
    """

    request_id: str
    prompt_tokens: tuple[int, ...]
    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed_token_ids: tuple[int, ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()
    grammar: str = ""
    min_tokens: int = 0
    priority: int = 0
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    resume_tokens: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class TokenLogprobs:
    """Log probabilities at one position, of the model itself: before temperature and top-p.

    Args:
        token_id: the token that stands there.
        logprob: its log probability; None for the first token of a prompt, which nothing predicts.
        rank: tokens that are at least as probable, itself included; 0 where nothing predicts.
        top: (token id, log probability) of the best tokens, best first.
    """

    token_id: int
    logprob: float | None
    rank: int = 0
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, kw_only=True)
class TokenEvent:
    """One token of a request, or its end.

    Args:
        request_id: of the request.
        index: number of tokens added before this one.
        token_id: the token; None where the event only ends the request.
        logprobs: of the token, if asked for.
        prompt_logprobs: of each prompt token, on a request's first event, if asked for.
        finish_reason: "stop" (a stop token, which is the event's token), "length" or "error" on the last
            event, else None.
        error: what went wrong, with finish_reason "error".
        accepted, rejected: whether the token had been drafted, and drafted tokens that were dropped with it.
    """

    request_id: str
    index: int
    token_id: int | None = None
    logprobs: TokenLogprobs | None = None
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None
    finish_reason: str | None = None
    error: str | None = None
    accepted: int = 0
    rejected: int = 0

    @property
    def is_plain(self) -> bool:
        """Whether there is nothing to it but its token, and perhaps that it is the last."""
        more = self.error or self.accepted or self.rejected
        return not more and self.logprobs is None and self.prompt_logprobs is None
