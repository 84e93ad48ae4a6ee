"""OpenAI-style answers: whole responses and the chunks of a stream, from the deltas of the choices.

The last thing on a request's path before the socket.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from sparseray.actors.serving.text_request import TokenLogprobs
from sparseray.jobs.http.openai_bodies import ApiRequest
from sparseray.jobs.http.text_stream import Delta, PromptTokens, TokenEntry, Vocabulary

DONE = b"data: [DONE]\n\n"


def sse(body: dict[str, Any]) -> bytes:
    """Return one server-sent event."""
    return b"data: " + json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


@dataclass(kw_only=True)
class Spent:
    """Tokens of an answer so far: of all choices, and drafted ones that stand in them and that do not."""

    tokens: int = 0
    accepted: int = 0
    rejected: int = 0


@dataclass
class Choice:
    """What a choice has gathered, for an answer that is not streamed."""

    pieces: list[str] = field(default_factory=list)
    entries: list[TokenEntry] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    prompt: PromptTokens | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    def add(self, delta: Delta) -> None:
        """Append a delta."""
        self.pieces.append(delta.text)
        self.entries += delta.entries
        self.tokens += delta.tokens
        self.prompt = delta.prompt or self.prompt
        self.finish_reason, self.stop_reason = delta.finish_reason, delta.stop_reason


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
        self._plain_head = {"id": response_id, "created": created_s, "model": request.model}
        self.version = ""
        self._wants_logprobs = request.requests[0].logprobs is not None
        self._roles: set[int] = set()
        self._texts: dict[int, str] = {}

    @property
    def _head(self) -> dict[str, Any]:
        """What every body begins with; it names the weights, where they are known to have a version."""
        return {**self._plain_head, **({"system_fingerprint": self.version} if self.version else {})}

    def response(self, choices: Sequence[Choice], spent: Spent) -> dict[str, Any]:
        """Return the whole answer."""
        rendered = []
        for index, choice in enumerate(choices):
            text, reason = "".join(choice.pieces), choice.finish_reason
            content: dict[str, Any] = {"text": text}
            if self._request.is_chat:
                content = {"message": {"role": "assistant", "content": text, "refusal": None}}
                if self._request.tools.required is not None:
                    calls, reason = self._calls(text), self._reason(reason)
                    content["message"] |= {"content": None, "tool_calls": calls} if calls else {}
            logprobs = self._logprobs(choice.entries) if self._wants_logprobs else None
            rendered.append(
                {
                    "index": index,
                    **content,
                    "logprobs": logprobs,
                    "finish_reason": reason,
                    "stop_reason": choice.stop_reason,
                    **self._token_ids(choice.tokens),
                    **({} if self._request.is_chat else self._prompt(choice.prompt)),
                }
            )
        kind = "chat.completion" if self._request.is_chat else "text_completion"
        prompt = self._prompt(choices[0].prompt) if self._request.is_chat else {}
        return {
            **self._head,
            "object": kind,
            "choices": rendered,
            "usage": self.usage(spent),
            **prompt,
        }

    def chunk(self, index: int, delta: Delta, spent: Spent) -> dict[str, Any] | None:
        """Return the chunk of a delta; None if it has nothing to say.

        Args:
            index: of the choice.
            delta: of its text.
            spent: for all choices so far.
        """
        calls = None
        if self._request.tools.required is not None:
            delta, calls = self._gathered(index, delta)
        says = delta.text or delta.entries or delta.finish_reason
        if not (says or (self._request.return_token_ids and delta.tokens)):
            return None
        content: dict[str, Any] = {"text": delta.text}
        if self._request.is_chat:
            is_first = index not in self._roles
            self._roles.add(index)
            content = {"delta": {**({"role": "assistant"} if is_first else {}), "content": delta.text}}
            if calls:
                content["delta"] |= {"content": None, "tool_calls": calls}
        logprobs = self._logprobs(delta.entries) if self._wants_logprobs and delta.entries else None
        choice = {
            "index": index,
            **content,
            "logprobs": logprobs,
            "finish_reason": self._reason(delta.finish_reason) if calls else delta.finish_reason,
            "stop_reason": delta.stop_reason,
            **self._token_ids(delta.tokens),
        }
        prompt = self._prompt(delta.prompt) if delta.prompt is not None else {}
        if not self._request.is_chat:
            choice |= prompt
        usage = {"usage": self.usage(spent)} if self._request.continuous_usage else {}
        return {
            **self._chunk_head(),
            "choices": [choice],
            **usage,
            **(prompt if self._request.is_chat else {}),
        }

    def usage_chunk(self, spent: Spent) -> dict[str, Any]:
        """Return the last chunk of a stream with `include_usage`."""
        return {**self._chunk_head(), "choices": [], "usage": self.usage(spent)}

    def _token_ids(self, tokens: Sequence[int]) -> dict[str, Any]:
        return {"token_ids": list(tokens)} if self._request.return_token_ids else {}

    def _prompt(self, prompt: PromptTokens | None) -> dict[str, Any]:
        """What was asked for of the prompt."""
        found: dict[str, Any] = {}
        if prompt is not None and self._request.return_token_ids:
            found["prompt_token_ids"] = list(prompt.tokens)
        if self._request.prompt_logprobs is not None:
            entries = (prompt.logprobs if prompt is not None else None) or ()
            found["prompt_logprobs"] = [self._ranked(entry) for entry in entries]
        return found

    def _ranked(self, entry: TokenLogprobs) -> dict[str, Any] | None:
        """A token of the prompt and its best alternatives by id, as vLLM writes them."""
        if entry.logprob is None:
            return None
        top = entry.top[: self._request.prompt_logprobs]
        ranked = {token: (logprob, rank + 1) for rank, (token, logprob) in enumerate(top)}
        ranked.setdefault(entry.token_id, (entry.logprob, entry.rank))
        return {
            str(token): {"logprob": logprob, "rank": rank, "decoded_token": self._vocabulary.label(token)}
            for token, (logprob, rank) in ranked.items()
        }

    def _gathered(self, index: int, delta: Delta) -> tuple[Delta, list[dict[str, Any]] | None]:
        """Hold a call's text back until it is whole."""
        self._texts[index] = self._texts.get(index, "") + delta.text
        if delta.finish_reason is None:
            return replace(delta, text=""), None
        calls = self._calls(self._texts[index])
        if not calls:
            return replace(delta, text=self._texts[index]), None
        return replace(delta, text=""), [{"index": at, **call} for at, call in enumerate(calls)]

    def _calls(self, text: str) -> list[dict[str, Any]]:
        """The calls that a text spells by its grammar; none if it was cut short."""
        name = self._request.tools.required
        try:
            found = json.loads(text)
        except ValueError:
            return []
        calls = [{"name": name, "parameters": found}] if name else found
        return [
            {
                "id": f"call_{secrets.token_hex(12)}",
                "type": "function",
                "function": {
                    "name": call["name"],
                    "arguments": json.dumps(call["parameters"], ensure_ascii=False),
                },
            }
            for call in calls
        ]

    def _reason(self, reason: str | None) -> str | None:
        """A required call ends with "tool_calls"; one that was named, with "stop", as OpenAI has it."""
        return "tool_calls" if reason == "stop" and self._request.tools.required == "" else reason

    def usage(self, spent: Spent) -> dict[str, Any]:
        """Return the token counts; those of drafts where there were any."""
        prompt = self._request.num_prompt_tokens
        details = {"accepted_prediction_tokens": spent.accepted, "rejected_prediction_tokens": spent.rejected}
        return {
            "prompt_tokens": prompt,
            "completion_tokens": spent.tokens,
            "total_tokens": prompt + spent.tokens,
            **({"completion_tokens_details": details} if any(details.values()) else {}),
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
