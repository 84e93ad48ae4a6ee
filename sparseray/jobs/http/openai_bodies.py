"""A body becomes the requests of an engine, or an error object.

The first thing on a request's path, before a byte of the answer. Types and ranges come from `fields`, limits from
`limits`; prompts, conversations and constraints are read by the modules of these names. Here they meet: one
`GenerationRequest` per choice.
"""

from __future__ import annotations

import hashlib
import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sparseray.actors.serving.grammar import Grammars
from sparseray.actors.serving.text_request import GenerationRequest
from sparseray.jobs.http.api_error import ApiError
from sparseray.jobs.http.chat import ChatTemplate, read_messages
from sparseray.jobs.http.constraints import Tools, read_grammar, read_tools
from sparseray.jobs.http.fields import CHAT, COMPLETION, Field, Values, check_members, read_fields
from sparseray.jobs.http.limits import ApiLimits
from sparseray.jobs.http.prompts import PromptReader, check_text, too_long
from sparseray.jobs.http.text_stream import Vocabulary

DEFAULT_TOKENS = 16
"""Of a completion that asks for no number, and what a prompt that is cut to fit leaves to a chat that asks for none."""


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """What the HTTP side knows of the model.

    Args:
        names: that requests may ask for; answers state the one that was asked for.
        vocabulary: of the model.
        template: of conversations.
        grammars: over the vocabulary; None where constrained answers are not served.
        limits: of the server.
        fields: of the bodies, from `fields.table`.
        ignore_unknown: unknown fields are left out instead of refused.
    """

    names: tuple[str, ...]
    vocabulary: Vocabulary
    template: ChatTemplate
    grammars: Grammars | None
    limits: ApiLimits
    fields: Mapping[str, Field]
    ignore_unknown: bool = False

    def named(self, body: Mapping[str, Any]) -> str:
        """Return the name of the model that a body asks for, the first if it names none.

        Raises:
            ApiError: 404, there is no such model; 400, no name.
        """
        name = body.get("model", self.names[0])
        if not isinstance(name, str):
            raise ApiError(400, f"model must be a string, for example {self.names[0]!r}", param="model")
        if name not in self.names:
            known = " and ".join(map(repr, self.names))
            message = f"The model {name[:100]!r} does not exist; this server has {known}"
            raise ApiError(404, message, param="model", code="model_not_found")
        return name


@dataclass(frozen=True, kw_only=True)
class ApiRequest:
    """A validated body: one `GenerationRequest` per choice, prompts first, then samples of each.

    Args:
        stops: texts that end a choice; keep_stop: and that are part of it.
        echo: whether the prompt stands before the answer.
        prompt_logprobs: alternatives of each token of the prompt, apart from `echo`; None for none.
        tools: whether the answer is a call.
    """

    model: str
    is_chat: bool
    requests: tuple[GenerationRequest, ...]
    stops: tuple[str, ...]
    num_prompt_tokens: int
    keep_stop: bool = False
    keep_specials: bool = False
    echo: bool = False
    prompt_logprobs: int | None = None
    return_token_ids: bool = False
    tools: Tools = field(default_factory=Tools)
    stream: bool = False
    include_usage: bool = False
    continuous_usage: bool = False


def parse_request(
    body: Mapping[str, Any], *, is_chat: bool, served: ServedModel, request_id: str
) -> ApiRequest:
    """Validate the body of a completion or a chat completion.

    Args:
        body: from `parse_json`.
        is_chat: which of the two.
        served: the model.
        request_id: prefix of the requests' ids.

    Raises:
        ApiError: 400, or 404 for another model.
    """
    model = served.named(body)
    endpoint = CHAT if is_chat else COMPLETION
    try:
        values = read_fields(body, endpoint, served.fields, ignore_unknown=served.ignore_unknown)
        return _build(values, model, is_chat, served, request_id)
    except RecursionError as error:
        raise ApiError(400, "the body is nested too deeply", code="invalid_json") from error


def _build(values: Values, model: str, is_chat: bool, served: ServedModel, request_id: str) -> ApiRequest:
    limits, vocabulary = served.limits, served.vocabulary
    n = _num_choices(values, limits)
    ignore_eos = values.get("ignore_eos", False)
    stops = _texts(values, "stop", limits)
    tools, suffix = Tools(), _suffix(values, is_chat)
    reader = _reader(values, served)
    if is_chat:
        tools = read_tools(values, limits, template_takes_tools=served.template.takes_tools)
        prompts = [encode_chat(values, tools, served, reader)]
        stops += () if ignore_eos else served.template.stops
    else:
        prompts = reader.prompts(values.get("prompt"), suffix)
    if len(prompts) * n > limits.max_choices:
        message = f"{len(prompts)} prompts with n={n} exceed {limits.max_choices} choices"
        raise ApiError(400, message, param="n")
    grammar = read_grammar(values, tools, served.grammars, limits)
    logprobs, echo = _logprobs(values, is_chat, limits), values.get("echo", False)
    stream, options = values.get("stream", False), _stream_options(values)
    prompt_logprobs = values.get("prompt_logprobs")
    if prompt_logprobs is not None and stream:
        raise ApiError(400, "prompt_logprobs is not available with stream", param="prompt_logprobs")
    wanted = [top for top in (prompt_logprobs, logprobs if echo else None) if top is not None]
    # A grammar that is complete leaves nothing but the end of the document, so that always ends the text.
    ends = () if ignore_eos and not grammar else (vocabulary.eos_id,)
    common = _sampling(values, reader, served) | {
        "stop_token_ids": tuple(dict.fromkeys((*ends, *_ids(values, "stop_token_ids", reader, limits)))),
        "grammar": grammar,
        "logprobs": logprobs,
        "prompt_logprobs": max(wanted, default=None),
    }
    seed = values.get("seed")
    seed = secrets.randbits(63) if seed is None else seed
    return ApiRequest(
        model=model,
        is_chat=is_chat,
        requests=tuple(
            GenerationRequest(
                request_id=f"{request_id}-{which * n + sample}",
                prompt_tokens=prompt,
                max_tokens=_max_tokens(values, is_chat, len(prompt), limits),
                seed=sample_seed(seed, sample),
                **common,
            )
            for which, prompt in enumerate(prompts)
            for sample in range(n)
        ),
        stops=stops,
        num_prompt_tokens=sum(len(prompt) for prompt in prompts),
        keep_stop=values.get("include_stop_str_in_output", False),
        keep_specials=not values.get("skip_special_tokens", True),
        echo=echo,
        prompt_logprobs=prompt_logprobs,
        return_token_ids=values.get("return_token_ids", False),
        tools=tools,
        stream=stream,
        include_usage=stream and options[0],
        continuous_usage=stream and options[0] and options[1],
    )


def _reader(values: Values, served: ServedModel) -> PromptReader:
    asked = _asked_tokens(values)
    num_answer = DEFAULT_TOKENS if asked is None else asked
    truncate = values.get("truncate_prompt_tokens")
    begins = values.get("add_special_tokens", True)
    return PromptReader(served.vocabulary, served.limits, truncate, num_answer, begins=begins)


def _suffix(values: Values, is_chat: bool) -> str:
    """The text that comes after a completion; empty for none."""
    suffix: str = values.get("suffix", "")
    if suffix and (is_chat or values.get("echo")):
        where = "suffix" if is_chat else "echo"
        message = f"suffix is not available {'in a chat' if is_chat else 'with echo'}; leave {where} out"
        raise ApiError(400, message, param=where, code="unsupported")
    return suffix


def _num_choices(values: Values, limits: ApiLimits) -> int:
    n: int = values.get("n", 1)
    if n > limits.max_requests:
        raise ApiError(400, f"n={n} exceeds the {limits.max_requests} requests that may be open", param="n")
    if values.get("best_of", n) != n:
        raise ApiError(400, "best_of must equal n", param="best_of", code="unsupported")
    return n


def encode_chat(values: Values, tools: Tools, served: ServedModel, reader: PromptReader) -> tuple[int, ...]:
    """Return the prompt of a conversation.

    Args:
        values: of a chat's body, or of one to tokenize.
        tools: of the body.
        served: the model.
        reader: that knows how long a prompt may be.

    Raises:
        ApiError: 400, of another form or too long.
    """
    messages = read_messages(values, served.limits.max_messages, served.template)
    # What cannot fit is refused before it is written, and again before it is tokenised.
    reader.bounded("".join(message["content"] or "" for message in messages), "messages")
    go_on = values.get("continue_final_message", False)
    if go_on and values.get("add_generation_prompt", False):
        message = "continue_final_message and add_generation_prompt cannot both be true"
        raise ApiError(400, message, param="continue_final_message")
    text, mark = served.template.write(
        messages,
        served.vocabulary,
        tools=tools.definitions,
        begin_answer=values.get("add_generation_prompt", not go_on),
        go_on=go_on,
        variables=values.get("chat_template_kwargs"),
    )
    tokens = served.vocabulary.encode_marked(reader.bounded(text, "messages"), mark)
    return reader.cut(tokens or (served.vocabulary.eos_id,))


def sample_seed(seed: int, sample: int) -> int:
    """Return the seed of one of n samples; the first has the request's own."""
    if sample == 0:
        return seed % 2**64
    digest = hashlib.sha256(f"{seed % 2**64}:{sample}".encode()).digest()
    return int.from_bytes(digest[:8], "little")


def _sampling(values: Values, reader: PromptReader, served: ServedModel) -> dict[str, Any]:
    limits = served.limits
    return {
        "temperature": float(values.get("temperature", 1.0)),
        # 0 is commonly sent for "only the most probable token"; the smallest positive value means that.
        "top_p": float(values.get("top_p", 1.0)) or math.ulp(0.0),
        "top_k": max(0, values.get("top_k", 0)),
        "min_p": float(values.get("min_p", 0.0)),
        "repetition_penalty": float(values.get("repetition_penalty", 1.0)),
        "presence_penalty": float(values.get("presence_penalty", 0.0)),
        "frequency_penalty": float(values.get("frequency_penalty", 0.0)),
        "logit_bias": _logit_bias(values, reader, limits),
        "allowed_token_ids": _allowed(values, reader, limits),
        "bad_words": _bad_words(values, served),
        "min_tokens": values.get("min_tokens", 0),
        "priority": values.get("priority", 0),
    }


def _logit_bias(values: Values, reader: PromptReader, limits: ApiLimits) -> tuple[tuple[int, float], ...]:
    given = values.get("logit_bias", {})
    if len(given) > limits.max_named_tokens:
        raise ApiError(400, f"logit_bias may hold {limits.max_named_tokens} tokens", param="logit_bias")
    found = {}
    for name, bias in given.items():
        is_number = isinstance(bias, int | float) and not isinstance(bias, bool) and -100 <= bias <= 100
        if not is_number or not name.isascii() or not name.isdigit() or len(name) > 10:
            message = "logit_bias must give token ids (as text) a number from -100 to 100 each"
            raise ApiError(400, message, param="logit_bias")
        found[reader.ids([int(name)], "logit_bias")[0]] = float(bias)
    return tuple(sorted(found.items()))


def _ids(values: Values, name: str, reader: PromptReader, limits: ApiLimits) -> tuple[int, ...]:
    given = values.get(name, [])
    if len(given) > limits.max_named_tokens or not all(type(token) is int for token in given):
        raise ApiError(400, f"{name} must be at most {limits.max_named_tokens} token ids", param=name)
    return tuple(dict.fromkeys(reader.ids(given, name)))


def _allowed(values: Values, reader: PromptReader, limits: ApiLimits) -> tuple[int, ...]:
    if values.get("allowed_token_ids") == []:
        raise ApiError(400, "allowed_token_ids must not be empty", param="allowed_token_ids")
    return _ids(values, "allowed_token_ids", reader, limits)


def _bad_words(values: Values, served: ServedModel) -> tuple[tuple[int, ...], ...]:
    """Each word as it stands at a beginning, and after a space where that gives other tokens of the same number."""
    found: list[tuple[int, ...]] = []
    for word in _texts(values, "bad_words", served.limits):
        plain = served.vocabulary.encode(word.lstrip() or word)
        spaced = served.vocabulary.encode(" " + word.lstrip())
        found.append(plain)
        if spaced[0] != plain[0] and len(spaced) == len(plain):
            found.append(spaced)
    return tuple(dict.fromkeys(found))


def _texts(values: Values, name: str, limits: ApiLimits) -> tuple[str, ...]:
    given = values.get(name, [])
    texts: Sequence[Any] = [given] if isinstance(given, str) else given
    if len(texts) > limits.max_stops:
        raise ApiError(400, f"{name} must be at most {limits.max_stops} texts", param=name)
    for text in texts:
        if not isinstance(text, str) or not 1 <= len(text) <= limits.max_stop_chars:
            message = f"each text of {name} must have 1 to {limits.max_stop_chars} characters"
            raise ApiError(400, message, param=name)
    return tuple(check_text(text, name) for text in texts)


def _logprobs(values: Values, is_chat: bool, limits: ApiLimits) -> int | None:
    given, top = values.get("logprobs"), values.get("top_logprobs")
    if is_chat:
        if given is not None and not isinstance(given, bool):
            raise ApiError(400, "logprobs must be true or false in a chat", param="logprobs")
        if top and not given:
            raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
        return (top or 0) if given else None
    if given is not None and (isinstance(given, bool) or not 0 <= given <= limits.max_logprobs):
        raise ApiError(400, f"logprobs must be an integer from 0 to {limits.max_logprobs}", param="logprobs")
    return None if given is None else int(given)


def _asked_tokens(values: Values) -> int | None:
    found: int | None = values.get("max_completion_tokens", values.get("max_tokens"))
    return found


def _max_tokens(values: Values, is_chat: bool, num_prompt: int, limits: ApiLimits) -> int:
    """What is asked for, else 16 (completions) or the rest of the context (chat)."""
    room, where = limits.max_model_len - num_prompt, "messages" if is_chat else "prompt"
    asked = _asked_tokens(values)
    if is_chat and asked == 0:
        raise ApiError(400, "max_tokens must be at least 1", param="max_tokens")
    if room < (0 if asked == 0 else 1) or (asked or 0) > room:
        raise too_long(limits, num_prompt, where, asked=asked)
    found = asked if asked is not None else room if is_chat else min(DEFAULT_TOKENS, room)
    if values.get("min_tokens", 0) > found:
        raise ApiError(400, f"min_tokens exceeds max_tokens={found}", param="min_tokens")
    return found


def _stream_options(values: Values) -> tuple[bool, bool]:
    options = values.get("stream_options", {})
    found = [options.get(name) for name in ("include_usage", "continuous_usage_stats")]
    if not all(one is None or isinstance(one, bool) for one in found):
        raise ApiError(400, "the members of stream_options must be true or false", param="stream_options")
    known = ("include_usage", "continuous_usage_stats", "include_obfuscation")
    check_members(options, known, "stream_options")
    return bool(found[0]), bool(found[1])
