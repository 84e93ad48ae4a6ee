r"""Validation of OpenAI-style bodies: JSON in, generation requests or an error object out.

The first thing on a request's path, before a byte of the answer. Every field has a type, a range and a limit;
unknown fields are ignored, and known ones that would change the answer but are not supported are refused.

Chat template, plain text: the messages joined by newlines as `role: content`, then `assistant:`, so
`system: ...\nuser: ...\nassistant:`. Unless `ignore_eos` is set, an answer also ends before `\nuser:`.
"""

from __future__ import annotations

import hashlib
import json
import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sparseray.actors.serving.text_request import GenerationRequest
from sparseray.jobs.http.text_stream import Vocabulary

ROLES = ("system", "developer", "user", "assistant", "tool")
CHAT_STOP = "\nuser:"
# Neutral values of fields that are not supported: anything else would silently give another answer.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (None, 0),
    "presence_penalty": (None, 0),
    "logit_bias": (None, {}),
    "suffix": (None, ""),
    "tools": (None, []),
    "functions": (None, []),
    "response_format": (None, {"type": "text"}),
}


class ApiError(Exception):
    """A refused request: its HTTP status and the fields of OpenAI's error object."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def to_dict(self) -> dict[str, Any]:
        """Return the body of the answer."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        if self.status == 429:
            kind = "rate_limit_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True, kw_only=True)
class ApiLimits:
    """Limits of what one HTTP request may ask for."""

    max_model_len: int
    vocab_size: int
    max_body_bytes: int = 4 * 2**20
    max_choices: int = 32
    max_stops: int = 16
    max_stop_chars: int = 256
    max_logprobs: int = 20
    max_messages: int = 1024
    max_requests: int = 64
    body_timeout_s: float = 30.0
    send_timeout_s: float = 60.0


@dataclass(frozen=True, kw_only=True)
class ApiRequest:
    """A validated body: one `GenerationRequest` per choice, prompts first, then samples of each."""

    model: str
    is_chat: bool
    requests: tuple[GenerationRequest, ...]
    stops: tuple[str, ...]
    num_prompt_tokens: int
    echo: bool = False
    stream: bool = False
    include_usage: bool = False


@dataclass(frozen=True)
class _Fields:
    """Typed access to a JSON object; null stands for an absent field."""

    body: Mapping[str, Any]

    def integer(self, name: str, low: int, high: int) -> int | None:
        value = self.body.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise ApiError(400, f"{name} must be an integer from {low} to {high}", param=name)
        return value

    def number(self, name: str, low: float, high: float, default: float) -> float:
        value = self.body.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise ApiError(400, f"{name} must be a number from {low} to {high}", param=name)
        return float(value)

    def boolean(self, name: str) -> bool:
        value = self.body.get(name)
        if value is not None and not isinstance(value, bool):
            raise ApiError(400, f"{name} must be true or false", param=name)
        return bool(value)


def parse_json(data: bytes) -> dict[str, Any]:
    """Return the JSON object of a body.

    Raises:
        ApiError: 400, not JSON or not an object.
    """

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        body = json.loads(data.decode("utf-8"), parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not valid JSON: {error}"[:200], code="invalid_json") from error
    if not isinstance(body, dict):
        raise ApiError(400, "the body must be a JSON object", code="invalid_json")
    return body


def parse_request(
    body: Mapping[str, Any],
    *,
    is_chat: bool,
    model: str,
    vocabulary: Vocabulary,
    limits: ApiLimits,
    request_id: str,
) -> ApiRequest:
    """Validate the body of a completion or a chat completion.

    Args:
        body: from `parse_json`.
        is_chat: which of the two.
        model: name that is served.
        vocabulary: of the model.
        limits: of the server.
        request_id: prefix of the requests' ids.

    Raises:
        ApiError: 400, or 404 for another model.
    """
    fields = _Fields(body)
    _check_model(body, model)
    for name, neutral in UNSUPPORTED.items():
        if body.get(name) not in neutral:
            raise ApiError(400, f"{name} is not supported; leave it out", param=name, code="unsupported")
    n = fields.integer("n", 1, limits.max_choices) or 1
    if (fields.integer("best_of", 1, limits.max_choices) or n) != n:
        raise ApiError(400, "best_of is not supported; leave it out", param="best_of", code="unsupported")
    ignore_eos = fields.boolean("ignore_eos")
    stops = _stops(body.get("stop"), limits)
    if is_chat:
        prompts = [vocabulary.encode(chat_text(body.get("messages"), limits))]
        stops += () if ignore_eos else (CHAT_STOP,)
    else:
        prompts = _prompts(body, vocabulary, limits)
    if len(prompts) * n > limits.max_choices:
        raise ApiError(
            400, f"{len(prompts)} prompts with n={n} exceed {limits.max_choices} choices", param="n"
        )
    logprobs = _logprobs(fields, is_chat, limits)
    echo = not is_chat and fields.boolean("echo")
    seed = fields.integer("seed", -(2**63), 2**64 - 1)
    seed = secrets.randbits(63) if seed is None else seed
    requests = tuple(
        GenerationRequest(
            request_id=f"{request_id}-{which * n + sample}",
            prompt_tokens=prompt,
            max_tokens=_max_tokens(fields, is_chat, len(prompt), limits),
            temperature=fields.number("temperature", 0.0, 2.0, 1.0),
            top_p=_top_p(fields),
            seed=sample_seed(seed, sample),
            stop_token_ids=() if ignore_eos else (vocabulary.eos_id,),
            logprobs=logprobs,
            prompt_logprobs=logprobs if echo else None,
        )
        for which, prompt in enumerate(prompts)
        for sample in range(n)
    )
    stream = fields.boolean("stream")
    return ApiRequest(
        model=model,
        is_chat=is_chat,
        requests=requests,
        stops=stops,
        num_prompt_tokens=sum(len(prompt) for prompt in prompts),
        echo=echo,
        stream=stream,
        include_usage=stream and _include_usage(body),
    )


def sample_seed(seed: int, sample: int) -> int:
    """Return the seed of one of n samples; the first has the request's own."""
    if sample == 0:
        return seed % 2**64
    digest = hashlib.sha256(f"{seed % 2**64}:{sample}".encode()).digest()
    return int.from_bytes(digest[:8], "little")


def chat_text(messages: Any, limits: ApiLimits) -> str:
    """Return the text of a conversation (template: see the module).

    Raises:
        ApiError: 400, messages of another form.
    """
    if not isinstance(messages, list) or not messages:
        raise ApiError(400, "messages must be a non-empty list", param="messages")
    if len(messages) > limits.max_messages:
        raise ApiError(400, f"messages must be at most {limits.max_messages}", param="messages")
    lines = []
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise ApiError(400, f"{where}.role must be one of {', '.join(ROLES)}", param=where)
        lines.append(f"{message['role']}: {_content(message.get('content'), where)}")
    return "\n".join([*lines, "assistant:"])


def _content(content: Any, where: str) -> str:
    if isinstance(content, str):
        return _text(content, where)
    if not isinstance(content, list):
        raise ApiError(400, f"{where}.content must be a string or a list of text parts", param=where)
    parts = []
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise ApiError(
                400, f'{where}.content: only {{"type": "text", "text": ...}} parts are supported', param=where
            )
        parts.append(_text(part["text"], where))
    return "".join(parts)


def _text(text: str, where: str) -> str:
    """Refuse lone surrogates, which JSON can spell and UTF-8 cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ApiError(400, f"{where} holds a lone surrogate, which is no character", param=where) from error
    return text


def _check_model(body: Mapping[str, Any], model: str) -> None:
    asked = body.get("model", model)
    if not isinstance(asked, str):
        raise ApiError(400, f"model must be a string, for example {model!r}", param="model")
    if asked != model:
        message = f"model {asked[:100]!r} does not exist; this server has {model!r}"
        raise ApiError(404, message, param="model", code="model_not_found")


def _prompts(body: Mapping[str, Any], vocabulary: Vocabulary, limits: ApiLimits) -> list[tuple[int, ...]]:
    """String, list of ids, list of strings or list of lists of ids; an empty string starts a document."""
    prompt = body.get("prompt")
    is_ids = isinstance(prompt, list) and prompt and all(type(token) is int for token in prompt)
    items = [prompt] if isinstance(prompt, str) or is_ids else prompt
    if not isinstance(items, list) or not items:
        raise ApiError(400, "prompt must be a string, token ids, or a non-empty list of them", param="prompt")
    if len(items) > limits.max_choices:
        raise ApiError(400, f"prompt may hold at most {limits.max_choices} prompts", param="prompt")
    prompts = []
    for item in items:
        if isinstance(item, str):
            prompts.append(vocabulary.encode(_text(item, "prompt")) or (vocabulary.eos_id,))
        elif isinstance(item, list) and item and all(type(token) is int for token in item):
            if not all(0 <= token < limits.vocab_size for token in item):
                raise ApiError(400, f"token ids must be from 0 to {limits.vocab_size - 1}", param="prompt")
            prompts.append(tuple(item))
        else:
            raise ApiError(
                400, "each prompt must be a string or a non-empty list of token ids", param="prompt"
            )
    return prompts


def _stops(stop: Any, limits: ApiLimits) -> tuple[str, ...]:
    stops = [stop] if isinstance(stop, str) else [] if stop is None else stop
    if not isinstance(stops, list) or len(stops) > limits.max_stops:
        raise ApiError(400, f"stop must be a string or at most {limits.max_stops} strings", param="stop")
    for value in stops:
        if not isinstance(value, str) or not 1 <= len(value) <= limits.max_stop_chars:
            message = f"each stop string must have 1 to {limits.max_stop_chars} characters"
            raise ApiError(400, message, param="stop")
    return tuple(stops)


def _logprobs(fields: _Fields, is_chat: bool, limits: ApiLimits) -> int | None:
    if not is_chat:
        return fields.integer("logprobs", 0, limits.max_logprobs)
    top = fields.integer("top_logprobs", 0, limits.max_logprobs)
    if not fields.boolean("logprobs"):
        if top:
            raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
        return None
    return top or 0


def _top_p(fields: _Fields) -> float:
    top_p = fields.number("top_p", 0.0, 1.0, 1.0)
    # top_p 0 is commonly sent for "only the most probable token"; the smallest positive value means that.
    return top_p or math.ulp(0.0)


def _max_tokens(fields: _Fields, is_chat: bool, num_prompt: int, limits: ApiLimits) -> int:
    """What is asked for, else 16 (completions) or the rest of the context (chat)."""
    room = limits.max_model_len - num_prompt
    high = 2**31 - 1
    asked = fields.integer("max_tokens", 1 if is_chat else 0, high)
    newer = fields.integer("max_completion_tokens", 1 if is_chat else 0, high)
    asked = newer if newer is not None else asked
    if room < (0 if asked == 0 else 1) or (asked or 0) > room:
        raise ApiError(
            400,
            f"the prompt has {num_prompt} tokens and max_tokens is {asked}; together they must be at most"
            f" {limits.max_model_len}",
            param="messages" if is_chat else "prompt",
            code="context_length_exceeded",
        )
    return asked if asked is not None else room if is_chat else min(16, room)


def _include_usage(body: Mapping[str, Any]) -> bool:
    options = body.get("stream_options")
    if options is None:
        return False
    if not isinstance(options, dict):
        raise ApiError(400, "stream_options must be an object", param="stream_options")
    return _Fields(options).boolean("include_usage")
