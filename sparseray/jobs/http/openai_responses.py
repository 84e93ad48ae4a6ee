"""OpenAI-style answers: whole responses and the chunks of a stream, from the deltas of the choices.

The last thing on a request's path before the socket.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from sparseray.actors.serving.text_request import TokenLogprobs
from sparseray.jobs.http.openai_bodies import ApiRequest
from sparseray.jobs.http.text_stream import Delta, TokenEntry, Vocabulary

DONE = b"data: [DONE]\n\n"


def sse(body: dict[str, Any]) -> bytes:
    """Return one server-sent event."""
    return b"data: " + json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


@dataclass
class Choice:
    """What a choice has gathered, for an answer that is not streamed."""

    pieces: list[str] = field(default_factory=list)
    entries: list[TokenEntry] = field(default_factory=list)
    finish_reason: str | None = None

    def add(self, delta: Delta) -> None:
        """Append a delta."""
        self.pieces.append(delta.text)
        self.entries += delta.entries
        self.finish_reason = delta.finish_reason or self.finish_reason


class Renderer:
    """Builds the bodies of one request's answer.

    Args:
        request: validated.
        response_id, created_s: as the answer states them.
        vocabulary: for the names of tokens.
    """

    def __init__(
        self, request: ApiRequest, *, response_id: str, created_s: int, vocabulary: Vocabulary
    ) -> None:
        self._request, self._vocabulary = request, vocabulary
        self._head = {"id": response_id, "created": created_s, "model": request.model}
        self._wants_logprobs = request.requests[0].logprobs is not None
        self._roles: set[int] = set()

    def response(self, choices: Sequence[Choice], completion_tokens: int) -> dict[str, Any]:
        """Return the whole answer."""
        rendered = []
        for index, choice in enumerate(choices):
            text = "".join(choice.pieces)
            content: dict[str, Any] = {"text": text}
            if self._request.is_chat:
                content = {"message": {"role": "assistant", "content": text, "refusal": None}}
            logprobs = self._logprobs(choice.entries) if self._wants_logprobs else None
            rendered.append(
                {"index": index, **content, "logprobs": logprobs, "finish_reason": choice.finish_reason}
            )
        kind = "chat.completion" if self._request.is_chat else "text_completion"
        return {**self._head, "object": kind, "choices": rendered, "usage": self.usage(completion_tokens)}

    def chunk(self, index: int, delta: Delta) -> dict[str, Any] | None:
        """Return the chunk of a delta; None if it has nothing to say."""
        if not (delta.text or delta.entries or delta.finish_reason):
            return None
        content: dict[str, Any] = {"text": delta.text}
        if self._request.is_chat:
            content = {"delta": {"content": delta.text}}
            if index not in self._roles:
                self._roles.add(index)
                content["delta"] = {"role": "assistant", "content": delta.text}
        logprobs = self._logprobs(delta.entries) if self._wants_logprobs and delta.entries else None
        choice = {"index": index, **content, "logprobs": logprobs, "finish_reason": delta.finish_reason}
        return {**self._chunk_head(), "choices": [choice]}

    def usage_chunk(self, completion_tokens: int) -> dict[str, Any]:
        """Return the last chunk of a stream with `include_usage`."""
        return {**self._chunk_head(), "choices": [], "usage": self.usage(completion_tokens)}

    def usage(self, completion_tokens: int) -> dict[str, int]:
        """Return the token counts."""
        prompt = self._request.num_prompt_tokens
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt + completion_tokens,
        }

    def _chunk_head(self) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self._request.is_chat else "text_completion"
        return {**self._head, "object": kind, **({"usage": None} if self._request.include_usage else {})}

    def _logprobs(self, entries: Sequence[TokenEntry]) -> dict[str, Any]:
        if self._request.is_chat:
            return {"content": [self._chat_entry(entry.logprobs) for entry in entries], "refusal": None}
        label = self._vocabulary.label
        return {
            "tokens": [label(entry.logprobs.token_id) for entry in entries],
            "token_logprobs": [entry.logprobs.logprob for entry in entries],
            "top_logprobs": [
                {label(token): logprob for token, logprob in entry.logprobs.top}
                if entry.logprobs.top
                else None
                for entry in entries
            ],
            "text_offset": [entry.offset for entry in entries],
        }

    def _chat_entry(self, logprobs: TokenLogprobs) -> dict[str, Any]:
        top = [self._named(token, logprob) for token, logprob in logprobs.top]
        return {**self._named(logprobs.token_id, logprobs.logprob), "top_logprobs": top}

    def _named(self, token_id: int, logprob: float | None) -> dict[str, Any]:
        data = self._vocabulary.label_bytes(token_id)
        return {"token": data.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(data)}
