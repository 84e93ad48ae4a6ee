"""What is asked of an engine and what it answers: plain values that travel as msgpack.

The HTTP side makes requests (jobs/openai_api.py), an attention worker's engine answers with one
event per token (actors/engine.py).
"""

from dataclasses import asdict, dataclass
from typing import Any

TopLogprobs = tuple[tuple[int, float], ...]


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """One sequence to continue.

    Args:
        request_id: unique among open requests.
        prompt: token ids, at least one.
        max_tokens: tokens to add, 0 to only score the prompt.
        temperature: 0 is greedy.
        top_p: smallest set of most probable tokens whose mass reaches it.
        seed: with the position, all that a draw depends on.
        stop_token_ids: tokens that end the text; the last event carries them.
        num_logprobs: most probable tokens reported with each token; -1 for none, 0 for the token's own only.
        prompt_logprobs: report the same for the prompt's tokens.
    """

    request_id: str
    prompt: tuple[int, ...]
    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    stop_token_ids: tuple[int, ...] = ()
    num_logprobs: int = -1
    prompt_logprobs: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)

    @staticmethod
    def from_dict(value: dict[str, Any]) -> "GenerationRequest":
        """Rebuild from `to_dict`, lists for tuples allowed."""
        return GenerationRequest(
            **value | {"prompt": tuple(value["prompt"]), "stop_token_ids": tuple(value["stop_token_ids"])}
        )


@dataclass(frozen=True, kw_only=True)
class TokenLogprobs:
    """A token's log-probability and those of the most probable tokens, most probable first; nats."""

    token: int
    logprob: float
    top: TopLogprobs = ()


@dataclass(frozen=True, kw_only=True)
class TokenEvent:
    """One new token of a request.

    Args:
        request_id: whose it is.
        token: its id, -1 when the request asked for none.
        finish_reason: None while more will come; "stop" or "length" with the last.
        logprobs: if asked for.
        prompt_logprobs: with the first event, if asked for: one entry for each prompt token after the first.
    """

    request_id: str
    token: int
    finish_reason: str | None = None
    logprobs: TokenLogprobs | None = None
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)

    @staticmethod
    def from_dict(value: dict[str, Any]) -> "TokenEvent":
        """Rebuild from `to_dict`."""
        return TokenEvent(
            request_id=value["request_id"],
            token=value["token"],
            finish_reason=value["finish_reason"],
            logprobs=None if value["logprobs"] is None else _logprobs(value["logprobs"]),
            prompt_logprobs=tuple(_logprobs(item) for item in value["prompt_logprobs"]),
        )


def _logprobs(value: dict[str, Any]) -> TokenLogprobs:
    top = tuple((int(token), float(logprob)) for token, logprob in value["top"])
    return TokenLogprobs(token=value["token"], logprob=value["logprob"], top=top)
