"""The fields of a body: name, type, range and meaning of each, in one table.

Validation, the refusal of unknown fields and `/openapi.json` all follow from it. A field whose other values
would change the answer, and which is not supported, stands here with the values that change nothing.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from sparseray.jobs.http.api_error import ApiError
from sparseray.jobs.http.limits import ApiLimits

COMPLETION, CHAT, TOKENIZE, DETOKENIZE = "completion", "chat", "tokenize", "detokenize"
GENERATE = (COMPLETION, CHAT)
LARGE = 2**31 - 1
TYPES = {
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "string": str,
    "object": dict,
    "array": list,
}


@dataclass(frozen=True, kw_only=True)
class Field:
    """One field of a body.

    Args:
        kind: JSON types it may have; empty where the code that reads it decides.
        on: endpoints that have it.
        about: what it does.
        low, high: range of a number.
        neutral: the only values accepted, none of which changes the answer; None where all are.
        schema: JSON Schema of what the kind does not say.
    """

    kind: tuple[str, ...]
    on: tuple[str, ...]
    about: str
    low: float | None = None
    high: float | None = None
    neutral: tuple[Any, ...] | None = None
    schema: Mapping[str, Any] | None = None


def _integer(low: int, high: int, about: str, on: tuple[str, ...] = GENERATE) -> Field:
    return Field(kind=("integer",), low=low, high=high, about=about, on=on)


def _number(low: float, high: float, about: str) -> Field:
    return Field(kind=("number",), low=low, high=high, about=about, on=GENERATE)


def _boolean(about: str, on: tuple[str, ...] = GENERATE) -> Field:
    return Field(kind=("boolean",), about=about, on=on)


def _neutral(*values: Any, about: str = "not supported", on: tuple[str, ...] = GENERATE) -> Field:
    return Field(kind=(), neutral=values, about=about, on=on)


def _ignored(*kind: str) -> Field:
    return Field(kind=kind, about="read and not used: it changes no answer", on=GENERATE)


def _ids(about: str, on: tuple[str, ...] = GENERATE) -> Field:
    return Field(kind=("array",), about=about, on=on, schema={"items": {"type": "integer"}})


def _array_of(*kinds: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [{"type": "array", "items": dict(kind)} for kind in kinds]


def table(limits: ApiLimits) -> dict[str, Field]:
    """Return every field of every endpoint."""
    return {
        **_prompts(limits),
        **_draws(limits),
        **_answers(limits),
        **_chats(limits),
        **_constraints(),
        **_unused(),
    }


def _prompts(limits: ApiLimits) -> dict[str, Field]:
    """What is asked."""
    messages = {"items": {"type": "object"}, "minItems": 1, "maxItems": limits.max_messages}
    text, (ids,) = {"type": "string"}, _array_of({"type": "integer"})
    prompts = {"anyOf": [text, *_array_of(text, {"type": "integer"}, ids)]}
    return {
        "model": Field(kind=("string",), about="name that is served", on=(*GENERATE, TOKENIZE, DETOKENIZE)),
        "prompt": Field(
            kind=("string", "array"),
            on=(COMPLETION, TOKENIZE),
            about="a text, token ids, or a list of either; an empty text starts a document",
            schema=prompts,
        ),
        "suffix": Field(
            kind=("string",), on=GENERATE, about="text after a completion: what stands between is written"
        ),
        "messages": Field(kind=("array",), on=(CHAT, TOKENIZE), about="the conversation", schema=messages),
        "tokens": _ids("token ids to turn into text", (DETOKENIZE,)),
        "add_special_tokens": _boolean(
            "begin a text with the token that the tokenizer puts there, as by default; a chat's template writes its own",
            (*GENERATE, TOKENIZE),
        ),
        "return_token_strs": _boolean("also return each token as a string", (TOKENIZE,)),
    }


def _draws(limits: ApiLimits) -> dict[str, Field]:
    """How many tokens of how many answers, and how they are drawn."""
    return {
        "max_tokens": _integer(0, LARGE, "most tokens of a choice; 16, or in a chat the rest of the context"),
        "max_completion_tokens": _integer(0, LARGE, "newer name of max_tokens"),
        "min_tokens": _integer(0, LARGE, "tokens before a choice may stop"),
        "n": _integer(1, limits.max_choices, "choices of each prompt"),
        "best_of": _integer(1, limits.max_choices, "must equal n"),
        "seed": _integer(-(2**63), 2**64 - 1, "of the random numbers; the same seed gives the same text"),
        "temperature": _number(0.0, 2.0, "0 for the most probable token"),
        "top_p": _number(0.0, 1.0, "smallest set of most probable tokens with this probability"),
        "top_k": _integer(-1, LARGE, "draw from this many most probable tokens; 0 or -1 for all"),
        "min_p": _number(0.0, 1.0, "draw from tokens at least this share as probable as the best"),
        "repetition_penalty": _number(0.01, 100.0, "above 1 makes tokens of prompt and answer less likely"),
        "presence_penalty": _number(-2.0, 2.0, "taken from the logit of every token of the answer"),
        "frequency_penalty": _number(-2.0, 2.0, "the same for each time that it occurs"),
        "logit_bias": Field(
            kind=("object",),
            on=GENERATE,
            about="token id to what is added to its logit, from -100 to 100",
            schema={"additionalProperties": {"type": "number", "minimum": -100, "maximum": 100}},
        ),
        "allowed_token_ids": _ids("the only tokens that may be drawn"),
        "bad_words": Field(
            kind=("array",),
            on=GENERATE,
            about="words that the answer never holds",
            schema={"items": {"type": "string"}},
        ),
    }


def _answers(limits: ApiLimits) -> dict[str, Field]:
    """Where an answer ends, and what of it is sent."""
    return {
        "stop": Field(
            kind=("string", "array"),
            on=GENERATE,
            about="texts before which the answer ends",
            schema={"anyOf": [{"type": "string"}, *_array_of({"type": "string"})]},
        ),
        "stop_token_ids": _ids("tokens that end the answer"),
        "include_stop_str_in_output": _boolean("show the text that ended the answer"),
        "ignore_eos": _boolean("go on after the end of a document"),
        "skip_special_tokens": _boolean("leave special tokens out of the text, as by default"),
        "truncate_prompt_tokens": _integer(
            -1,
            limits.max_model_len,
            "keep the last tokens of the prompt; -1 for as many as fit beside the answer",
        ),
        "prompt_logprobs": _integer(0, limits.max_logprobs, "log probabilities of the prompt's tokens"),
        "logprobs": Field(
            kind=("integer", "boolean"),
            on=GENERATE,
            about="alternatives of each token (completions), or whether there are log probabilities (chat)",
        ),
        "top_logprobs": _integer(0, limits.max_logprobs, "alternatives of each token", (CHAT,)),
        "echo": _boolean("return the prompt before the answer", (COMPLETION,)),
        "return_token_ids": _boolean("also return the token ids of prompt and answer"),
        "priority": _integer(-(2**31), LARGE, "lower values enter the batch first"),
        "stream": _boolean("send the answer as server-sent events"),
        "stream_options": Field(
            kind=("object",),
            on=GENERATE,
            about="include_usage: counts in a last chunk; continuous_usage_stats: in every chunk",
            schema={
                "properties": {
                    "include_usage": {"type": ["boolean", "null"]},
                    "continuous_usage_stats": {"type": ["boolean", "null"]},
                },
            },
        ),
    }


def _chats(limits: ApiLimits) -> dict[str, Field]:
    """What only a conversation has."""
    both_chat = (CHAT, TOKENIZE)
    tools = {"items": {"type": "object"}, "maxItems": limits.max_tools}
    return {
        "add_generation_prompt": _boolean("begin the assistant's turn, as by default", both_chat),
        "continue_final_message": _boolean("go on inside the last message", both_chat),
        "chat_template_kwargs": Field(
            kind=("object",), on=both_chat, about="variables of the checkpoint's chat template"
        ),
        "tools": Field(kind=("array",), on=both_chat, about="functions that may be called", schema=tools),
        "tool_choice": Field(
            kind=("string", "object"), on=(CHAT,), about="none, required, or the function that must be called"
        ),
        "parallel_tool_calls": _boolean("false for one call at most", (CHAT,)),
    }


def _constraints() -> dict[str, Field]:
    schema = Field(kind=("object", "string"), on=GENERATE, about="JSON Schema that the answer fits")
    text = Field(kind=("string",), on=GENERATE, about="older name of a member of structured_outputs")
    return {
        "response_format": Field(
            kind=("object",), on=GENERATE, about="type: text, json_object, or json_schema with its schema"
        ),
        "structured_outputs": Field(
            kind=("object",), on=GENERATE, about="one of json, regex, choice, grammar (Lark), json_object"
        ),
        "guided_json": schema,
        "guided_regex": text,
        "guided_grammar": text,
        "guided_choice": Field(
            kind=("array",),
            on=GENERATE,
            about="texts of which the answer is one",
            schema={"items": {"type": "string"}},
        ),
    }


def _unused() -> dict[str, Field]:
    """Fields that change nothing, and those that are known and not supported."""
    return {
        **{
            name: _ignored("string")
            for name in ("user", "safety_identifier", "prompt_cache_key", "request_id")
        },
        **{name: _ignored("string") for name in ("service_tier", "cache_salt", "prompt_cache_retention")},
        "guided_decoding_backend": _ignored("string"),
        "metadata": _ignored("object"),
        "store": _neutral(False),
        "functions": _neutral([]),
        "function_call": _neutral("none"),
        "modalities": _neutral(["text"]),
        "audio": _neutral(),
        "prediction": _neutral(),
        "reasoning_effort": _neutral("none"),
        "verbosity": _neutral(),
        "web_search_options": _neutral(),
        "use_beam_search": _neutral(False),
        "length_penalty": _neutral(1.0),
        "spaces_between_special_tokens": _neutral(True),
        "return_tokens_as_token_ids": _neutral(False),
        "chat_template": _neutral(),
        "documents": _neutral([]),
        "mm_processor_kwargs": _neutral({}),
        "logits_processors": _neutral([]),
        "vllm_xargs": _neutral({}),
        "kv_transfer_params": _neutral(),
        "prompt_embeds": _neutral(),
        "guided_whitespace_pattern": _neutral(),
        "structural_tag": _neutral(),
        "thinking_token_budget": _neutral(),
    }


@dataclass(frozen=True)
class Values:
    """The fields of a body whose types and ranges were checked; null stands for an absent field.

    Attributes:
        body: the fields by name.
        ignores_unknown: members of a field that nobody knows are left out instead of refused.
    """

    body: Mapping[str, Any]
    ignores_unknown: bool = False

    def get(self, name: str, default: Any = None) -> Any:
        """Return a field's value, or the default."""
        value = self.body.get(name)
        return default if value is None else value


def read_fields(
    body: Mapping[str, Any], endpoint: str, fields: Mapping[str, Field], *, ignore_unknown: bool
) -> Values:
    """Check the fields of a body.

    Args:
        body: from `parse_json`.
        endpoint: whose fields they are.
        fields: from `table`.
        ignore_unknown: leave unknown fields out instead of refusing them.

    Raises:
        ApiError: 400, unknown, not supported, of another type, or out of range.
    """
    own = {name: field for name, field in fields.items() if endpoint in field.on}
    known: dict[str, Any] = {}
    for name, value in body.items():
        field = own.get(name)
        if field is None:
            if ignore_unknown:
                continue
            close = difflib.get_close_matches(name[:64], own, n=1, cutoff=0.7)
            hint = f"did you mean {close[0]!r}?" if close else "leave it out"
            message = f"{name[:64]!r} is not a field that this server knows; {hint}"
            raise ApiError(400, message, param=name[:64], code="unknown_field")
        if value is not None:
            _check(name, field, value)
            known[name] = value
    return Values(known, ignore_unknown)


def check_members(given: Mapping[str, Any], known: Collection[str], where: str) -> None:
    """See that an object has no member that nobody reads.

    Args:
        given: the object.
        known: its members that are read.
        where: the field, for the message.

    Raises:
        ApiError: 400, names the first that is not known.
    """
    unknown = next((name for name in given if name not in known), None)
    if unknown is not None:
        member = f"{where}.{unknown[:64]}"
        message = f"{member} is not known; leave it out, or give one of {', '.join(known)}"
        raise ApiError(400, message, param=member, code="unknown_field")


def _check(name: str, field: Field, value: Any) -> None:
    if field.neutral is not None:
        if not any(
            value == one and isinstance(value, bool) == isinstance(one, bool) for one in field.neutral
        ):
            raise ApiError(400, f"{name} is not supported; leave it out", param=name, code="unsupported")
        return
    if not any(_is_a(value, kind) for kind in field.kind):
        kinds = " or ".join("true or false" if k == "boolean" else f"a JSON {k}" for k in field.kind)
        raise ApiError(400, f"{name} must be {kinds}", param=name)
    if field.low is not None and field.high is not None and not field.low <= value <= field.high:
        shown = "an integer" if field.kind == ("integer",) else "a number"
        raise ApiError(400, f"{name} must be {shown} from {field.low} to {field.high}", param=name)


def _is_a(value: Any, kind: str) -> bool:
    if kind in ("integer", "number") and isinstance(value, bool):
        return False
    return isinstance(value, TYPES[kind])  # type: ignore[arg-type]


def parse_json(data: bytes) -> dict[str, Any]:
    """Return the JSON object of a body; a byte order mark before it is no part of it.

    Raises:
        ApiError: 400, not JSON or not an object.
    """

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        body = json.loads(data.decode("utf-8-sig"), parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not valid JSON: {error}"[:200], code="invalid_json") from error
    if not isinstance(body, dict):
        raise ApiError(400, "the body must be a JSON object", code="invalid_json")
    return body
