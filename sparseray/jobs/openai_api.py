"""The OpenAI surface: bodies to requests, tokens to answers; pure, no sockets.

A body is checked whole before anything is generated. Unknown fields are ignored, as clients send
many. Chat messages become `role: content` lines that end with `assistant:`; the model is a base
model, and this is only a readable convention.
"""

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tokenizers import Tokenizer

from sparseray.actors.generation import GenerationRequest, TokenEvent, TokenLogprobs

MAX_CHOICES = 128
MAX_STOPS = 4
MAX_STOP_CHARS = 1024
MAX_LOGPROBS = 20
DEFAULT_MAX_TOKENS = 16


class APIError(Exception):
    """A request that cannot be served, as the OpenAI error object and an HTTP status."""

    def __init__(
        self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        kind = "invalid_request_error" if status < 500 else "server_error"
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one server accepts."""

    model_name: str
    vocab_size: int
    max_model_len: int
    eos_id: int


@dataclass(frozen=True, kw_only=True)
class Parsed:
    """A checked body.

    Args:
        requests: one for every choice.
        prompt_tokens: of all prompts, each counted once whatever the number of its choices.
        stops: texts that end an answer and are not part of it.
        is_chat, is_stream, include_usage, echo: what the client asked for.
        num_logprobs: as in `GenerationRequest`.
    """

    requests: tuple[GenerationRequest, ...]
    prompt_tokens: int
    stops: tuple[str, ...]
    is_chat: bool
    is_stream: bool
    include_usage: bool
    echo: bool
    num_logprobs: int
    model: str
    answer_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))


def _number(body: dict[str, Any], name: str, default: float, low: float, high: float) -> float:
    value = body.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise APIError(f"{name} must be a number from {low:g} to {high:g}, got {value!r}", param=name)
    return float(value)


def _integer(body: dict[str, Any], name: str, default: int, low: int, high: int) -> int:
    value = body.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise APIError(f"{name} must be a whole number from {low} to {high}, got {value!r}", param=name)
    return value


def _flag(body: dict[str, Any], name: str) -> bool:
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise APIError(f"{name} must be true or false, got {value!r}", param=name)
    return bool(value)


def _stops(body: dict[str, Any]) -> tuple[str, ...]:
    value = body.get("stop")
    stops = [] if value is None else [value] if isinstance(value, str) else value
    is_ok = isinstance(stops, list) and len(stops) <= MAX_STOPS
    if not is_ok or not all(isinstance(stop, str) and 0 < len(stop) <= MAX_STOP_CHARS for stop in stops):
        raise APIError(f"stop must be a string or up to {MAX_STOPS} non-empty strings", param="stop")
    return tuple(stops)


def _is_ids(value: object) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(token, int) and not isinstance(token, bool) for token in value)
    )


def _prompts(body: dict[str, Any], tokenizer: Tokenizer) -> list[list[int]]:
    """Token ids of every prompt: a string, ids, a list of strings or a list of id lists."""
    value = body.get("prompt")
    if isinstance(value, str) or _is_ids(value):
        value = [value]
    if not isinstance(value, list) or not value or len(value) > MAX_CHOICES:
        raise APIError(
            f"prompt must be a string, a list of token ids, or a list of up to {MAX_CHOICES} of either",
            param="prompt",
        )
    prompts = []
    for one in value:
        if isinstance(one, str):
            prompts.append(_encode(tokenizer, one, "prompt"))
        elif _is_ids(one):
            prompts.append(one)
        else:
            raise APIError("each prompt must be a string or a non-empty list of token ids", param="prompt")
    return prompts


def _chat_prompt(body: dict[str, Any], tokenizer: Tokenizer) -> list[list[int]]:
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise APIError("messages must be a non-empty list", param="messages")
    lines = []
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise APIError("each message needs a role and a content", param="messages")
        content = message.get("content")
        if isinstance(content, list):
            if not all(
                isinstance(p, dict) and p.get("type") == "text" and isinstance(p.get("text"), str)
                for p in content
            ):
                raise APIError("content parts must be of type text", param="messages")
            content = "".join(part["text"] for part in content)
        if not isinstance(content, str):
            raise APIError("content must be a string or a list of text parts", param="messages")
        lines.append(f"{message['role']}: {content}\n")
    text = "".join(lines) + "assistant:"
    return [_encode(tokenizer, text, "messages")]


def _encode(tokenizer: Tokenizer, text: str, param: str) -> list[int]:
    """Token ids of a text; JSON can spell half a surrogate pair, which is no text."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise APIError("the text has a lone surrogate (half of a \\u pair)", param=param) from None
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids


def _num_logprobs(body: dict[str, Any], is_chat: bool) -> int:
    if not is_chat:
        return _integer(body, "logprobs", -1, 0, MAX_LOGPROBS)
    wants = _flag(body, "logprobs")
    top = _integer(body, "top_logprobs", 0, 0, MAX_LOGPROBS)
    if top and not wants:
        raise APIError("top_logprobs needs logprobs: true", param="top_logprobs")
    return top if wants else -1


def parse(body: object, tokenizer: Tokenizer, limits: Limits, *, is_chat: bool) -> Parsed:
    """Check a body and turn it into requests.

    Raises:
        APIError: with a 4xx status; nothing has been generated.
    """
    if not isinstance(body, dict):
        raise APIError("the body must be a JSON object")
    model = body.get("model", limits.model_name)
    if model != limits.model_name:
        raise APIError(
            f"model {model!r} does not exist; this server has {limits.model_name!r}",
            status=404,
            param="model",
            code="model_not_found",
        )
    prompts = _chat_prompt(body, tokenizer) if is_chat else _prompts(body, tokenizer)
    logprobs = _num_logprobs(body, is_chat)
    echo = not is_chat and _flag(body, "echo")
    lowest = 0 if echo else 1
    name = "max_completion_tokens" if body.get("max_completion_tokens") is not None else "max_tokens"
    asked = _integer(body, name, DEFAULT_MAX_TOKENS, lowest, 1 << 30)
    choices = _integer(body, "n", 1, 1, MAX_CHOICES)
    if choices * len(prompts) > MAX_CHOICES:
        raise APIError(f"n times the number of prompts must not exceed {MAX_CHOICES}", param="n")
    seed = _integer(body, "seed", uuid.uuid4().int & 0x7FFFFFFF, -(1 << 63), (1 << 63) - 1)
    options = body.get("stream_options") or {}
    if not isinstance(options, dict):
        raise APIError("stream_options must be an object", param="stream_options")
    temperature = _number(body, "temperature", 1.0, 0.0, 100.0)
    top_p = _number(body, "top_p", 1.0, 1e-6, 1.0)
    stop_ids = () if _flag(body, "ignore_eos") else (limits.eos_id,)
    answer_id = uuid.uuid4().hex
    requests: list[GenerationRequest] = []
    for prompt in prompts:
        _check_prompt(prompt, asked, limits, is_default=body.get(name) is None)
        room = limits.max_model_len - len(prompt)
        for choice in range(choices):
            requests.append(
                GenerationRequest(
                    request_id=f"{answer_id}-{len(requests)}",
                    prompt=tuple(prompt),
                    max_tokens=min(asked, room),
                    temperature=temperature,
                    top_p=top_p,
                    seed=seed + choice,
                    stop_token_ids=stop_ids,
                    num_logprobs=logprobs,
                    prompt_logprobs=echo and logprobs >= 0,
                )
            )
    return Parsed(
        requests=tuple(requests),
        prompt_tokens=sum(len(prompt) for prompt in prompts),
        stops=_stops(body),
        is_chat=is_chat,
        is_stream=_flag(body, "stream"),
        include_usage=_flag(options, "include_usage"),
        echo=echo,
        num_logprobs=logprobs,
        model=limits.model_name,
        answer_id=answer_id,
    )


def _check_prompt(prompt: Sequence[int], asked: int, limits: Limits, *, is_default: bool) -> None:
    param = "prompt"
    if not prompt:
        raise APIError("the prompt has no tokens", param=param)
    if not all(0 <= token < limits.vocab_size for token in prompt):
        raise APIError(f"token ids must be from 0 to {limits.vocab_size - 1}", param=param)
    wanted = 1 if is_default else asked
    if len(prompt) + wanted > limits.max_model_len:
        raise APIError(
            f"this model's maximum context length is {limits.max_model_len} tokens, and the request asks for "
            f"{len(prompt) + wanted} ({len(prompt)} in the prompt, {wanted} to generate); shorten one of them",
            param=param,
            code="context_length_exceeded",
        )


class TextBuilder:
    """Turns a choice's tokens into text that can be sent: whole characters, and never a part of a stop string.

    Args:
        tokenizer: of the model.
        stops: texts that end the answer.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str]) -> None:
        self._tokenizer, self._stops = tokenizer, stops
        self._tokens: list[int] = []
        self.text = ""
        self.sent = 0
        self.is_stopped = False

    def add(self, token: int, *, is_last: bool) -> str:
        """Add a token and return the text that became certain."""
        self._tokens.append(token)
        return self._certain(is_last)

    def finish(self) -> str:
        """Return what was held back, when no token will come any more."""
        return self._certain(is_last=True)

    def _certain(self, is_last: bool) -> str:
        self.text = self._tokenizer.decode(self._tokens, skip_special_tokens=True)
        found = [place for place in (self.text.find(stop) for stop in self._stops) if place >= 0]
        if found:
            self.is_stopped, self.text = True, self.text[: min(found)]
        held = 0 if is_last or self.is_stopped else self._held()
        start, self.sent = self.sent, max(self.sent, len(self.text) - held)
        return self.text[start : self.sent]

    def _held(self) -> int:
        """Characters at the end that may still change or turn out to begin a stop string."""
        whole = self.text.rstrip("\ufffd")
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for size in range(min(longest, len(whole)), 0, -1):
            if any(stop.startswith(whole[-size:]) for stop in self._stops):
                return size + len(self.text) - len(whole)
        return len(self.text) - len(whole)


def completion_logprobs(
    tokenizer: Tokenizer, entries: Sequence[TokenLogprobs | None], tokens: Sequence[int], offset: int = 0
) -> dict[str, Any]:
    """The `logprobs` object of a completion; None stands for a token without a score (the first of an echo)."""
    texts = [token_text(tokenizer, token) for token in tokens]
    offsets = [offset + sum(len(text) for text in texts[:i]) for i in range(len(texts))]
    return {
        "tokens": texts,
        "token_logprobs": [None if e is None else e.logprob for e in entries],
        "top_logprobs": [
            None if e is None else {token_text(tokenizer, token): logprob for token, logprob in e.top}
            for e in entries
        ],
        "text_offset": offsets,
    }


def chat_logprobs(tokenizer: Tokenizer, entries: Sequence[TokenLogprobs]) -> dict[str, Any]:
    """The `logprobs` object of a chat choice."""

    def item(token: int, logprob: float) -> dict[str, Any]:
        text = token_text(tokenizer, token)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    content = [
        item(entry.token, entry.logprob)
        | {"top_logprobs": [item(token, value) for token, value in entry.top]}
        for entry in entries
    ]
    return {"content": content}


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """Text of one token, special ones by name."""
    text: str = tokenizer.decode([token], skip_special_tokens=False)
    return text


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """The `usage` object."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def envelope(parsed: Parsed, *, is_chunk: bool) -> dict[str, Any]:
    """What every answer and every streamed chunk carries."""
    kind = "text_completion"
    if parsed.is_chat:
        kind = "chat.completion.chunk" if is_chunk else "chat.completion"
    prefix = "chatcmpl-" if parsed.is_chat else "cmpl-"
    return {"id": prefix + parsed.answer_id, "object": kind, "created": parsed.created, "model": parsed.model}


def choice(
    parsed: Parsed,
    index: int,
    text: str,
    finish_reason: str | None,
    logprobs: dict[str, Any] | None,
    *,
    is_chunk: bool,
) -> dict[str, Any]:
    """One entry of `choices`."""
    shared = {"index": index, "finish_reason": finish_reason, "logprobs": logprobs}
    if not parsed.is_chat:
        return {**shared, "text": text}
    content = {"content": text}
    return (
        {**shared, "delta": content} if is_chunk else {**shared, "message": {"role": "assistant", **content}}
    )


def event_logprobs(
    parsed: Parsed, tokenizer: Tokenizer, events: Sequence[TokenEvent], offset: int = 0
) -> dict[str, Any] | None:
    """The `logprobs` object of some events, with the prompt's if it is echoed; None when not asked for."""
    if parsed.num_logprobs < 0:
        return None
    scored = [event.logprobs for event in events if event.logprobs is not None]
    if parsed.is_chat:
        return chat_logprobs(tokenizer, scored)
    return completion_logprobs(tokenizer, scored, [entry.token for entry in scored], offset)
