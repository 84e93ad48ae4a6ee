"""What an answer must look like: formats, schemas, expressions, grammars and required calls, as one grammar.

A body may state one of them. The grammar is checked here, before the request reaches an engine, and followed
there (`actors/serving/grammar.py`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sparseray.actors.serving.grammar import (
    Grammars,
    choice_grammar,
    json_grammar,
    lark_grammar,
    regex_grammar,
)
from sparseray.errors import ConfigError
from sparseray.jobs.http.api_error import ApiError
from sparseray.jobs.http.fields import Values, check_members
from sparseray.jobs.http.limits import ApiLimits
from sparseray.jobs.http.prompts import check_text

KINDS = ("json", "regex", "choice", "grammar", "json_object")
COMPILED_FIELDS = {
    "response_format",
    "structured_outputs",
    "tools",
    *(f"guided_{kind}" for kind in KINDS[:4]),
}
"""Fields of a body that may take long to read, however short they are."""


@dataclass(frozen=True, kw_only=True)
class Tools:
    """The functions of a body, and which must be called: a name, "" for any of them, None for none.

    Several calls may come at once unless `is_single`.
    """

    definitions: tuple[dict[str, Any], ...] = ()
    required: str | None = None
    is_single: bool = False


def read_tools(values: Values, limits: ApiLimits, *, template_takes_tools: bool) -> Tools:
    """Return the tools of a chat's body.

    Raises:
        ApiError: 400, of another form, or without a place in the chat template.
    """
    definitions, choice = values.get("tools", []), values.get("tool_choice")
    if not definitions:
        if choice not in (None, "none"):
            raise ApiError(400, "tool_choice needs tools", param="tool_choice")
        return Tools()
    if not template_takes_tools:
        raise ApiError(
            400, "this model's chat template has no place for tools", param="tools", code="unsupported"
        )
    if len(definitions) > limits.max_tools:
        raise ApiError(400, f"tools must be at most {limits.max_tools}", param="tools")
    names = []
    for index, tool in enumerate(definitions):
        function = tool.get("function") if isinstance(tool, dict) and tool.get("type") == "function" else None
        if (
            not isinstance(function, dict)
            or not isinstance(function.get("name"), str)
            or not function["name"]
        ):
            raise ApiError(400, f"tools[{index}] must be a function with a name", param="tools")
        if not isinstance(function.get("parameters", {}), dict):
            raise ApiError(400, f"tools[{index}].function.parameters must be an object", param="tools")
        names.append(function["name"])
    check_text(json.dumps(definitions, ensure_ascii=False), "tools")
    tools = tuple(definitions)
    if choice == "none":
        return Tools(definitions=tools)
    if choice == "required":
        return Tools(definitions=tools, required="", is_single=not values.get("parallel_tool_calls", True))
    if isinstance(choice, dict):
        function = choice.get("function")
        name = function.get("name") if isinstance(function, dict) else None
        if name not in names:
            raise ApiError(400, "tool_choice must name one of the tools", param="tool_choice")
        return Tools(definitions=tools, required=name)
    message = 'tool_choice "auto" is not supported; give "required", "none", or the function to call'
    raise ApiError(400, message, param="tool_choice", code="unsupported")


def read_grammar(values: Values, tools: Tools, grammars: Grammars | None, limits: ApiLimits) -> str:
    """Return the grammar that a body asks for; empty for none.

    Raises:
        ApiError: 400, more than one, of another form, or not to be followed.
    """
    found = [*_older(values), *_structured(values), *_format(values), *_calls(tools)]
    if not found:
        return ""
    if len(found) > 1:
        message = f"{found[0][0]} and {found[1][0]} cannot both say what the answer looks like; give one"
        raise ApiError(400, message, param=found[1][0])
    name, kind, value = found[0]
    if grammars is None:
        raise ApiError(400, f"{name} is not supported by this server", param=name, code="unsupported")
    size = len(check_text(json.dumps(value, ensure_ascii=False), name).encode())
    if size > limits.max_grammar_bytes:
        raise ApiError(400, f"{name} has {size} bytes; at most {limits.max_grammar_bytes}", param=name)
    try:
        grammar = _grammar(kind, value, name)
        grammars.check(grammar)
    except (ConfigError, ValueError) as error:
        raise ApiError(400, f"{name}: {error}"[:400], param=name) from error
    return grammar


Stated = tuple[str, str, Any]


def _older(values: Values) -> list[Stated]:
    names = [(f"guided_{kind}", kind) for kind in ("json", "regex", "choice", "grammar")]
    return [(name, kind, values.get(name)) for name, kind in names if values.get(name) is not None]


def _structured(values: Values) -> list[Stated]:
    given = values.get("structured_outputs", {})
    check_members(given, KINDS, "structured_outputs")
    return [(f"structured_outputs.{kind}", kind, value) for kind, value in given.items() if value is not None]


def _format(values: Values) -> list[Stated]:
    given = values.get("response_format", {})
    kind, wrapped = given.get("type", "text"), given.get("json_schema")
    if not values.ignores_unknown:
        is_schema = kind == "json_schema"
        check_members(given, ("type", "json_schema") if is_schema else ("type",), "response_format")
        if is_schema and isinstance(wrapped, dict):
            known = ("name", "description", "schema", "strict")
            check_members(wrapped, known, "response_format.json_schema")
    if kind == "text":
        return []
    if kind == "json_object":
        return [("response_format", "json_object", True)]
    schema = wrapped.get("schema") if isinstance(wrapped, dict) else None
    if kind == "json_schema" and isinstance(schema, dict):
        return [("response_format", "json", schema)]
    message = "response_format.type must be text, json_object, or json_schema with json_schema.schema"
    raise ApiError(400, message, param="response_format")


def _calls(tools: Tools) -> list[Stated]:
    if tools.required is None:
        return []
    functions = [tool["function"] for tool in tools.definitions]
    if tools.required:
        (function,) = [one for one in functions if one["name"] == tools.required][:1]
        return [("tool_choice", "json", function.get("parameters") or {"type": "object"})]
    calls = _any_calls(functions) | ({"maxItems": 1} if tools.is_single else {})
    return [("tool_choice", "json", calls)]


def _any_calls(functions: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The schema of a list of calls; definitions that a function's parameters refer to come to the top."""
    kinds: list[dict[str, Any]] = []
    definitions: dict[str, Any] = {}
    for function in functions:
        parameters = dict(function.get("parameters") or {"type": "object"})
        definitions |= parameters.pop("$defs", {})
        call = {"name": {"const": function["name"]}, "parameters": parameters}
        kinds.append(
            {"type": "object", "properties": call, "required": list(call), "additionalProperties": False}
        )
    return {"type": "array", "minItems": 1, "items": {"anyOf": kinds}, "$defs": definitions}


def _closed(schema: Any) -> Any:
    """Return a schema whose objects have only the properties that it names, unless it says otherwise.

    So vLLM's default has it: an answer with arguments that nobody named is of no use. Parts of `allOf` would
    close each other out, so schemas with it are left as they are.
    """
    if isinstance(schema, list):
        return [_closed(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    maps = ("properties", "$defs", "definitions", "patternProperties")
    literal = ("enum", "const", "default", "examples", "required")
    found = {
        key: {name: _closed(one) for name, one in value.items()}
        if key in maps and isinstance(value, dict)
        else value
        if key in literal
        else _closed(value)
        for key, value in schema.items()
    }
    open_words = ("additionalProperties", "unevaluatedProperties", "patternProperties", "$ref")
    if "properties" in schema and not any(word in schema for word in open_words):
        found["additionalProperties"] = False
    return found


def _grammar(kind: str, value: Any, name: str) -> str:
    if kind == "json_object":
        if value is not True:
            raise ValueError("must be true")
        return json_grammar('{"type": "object"}')
    if kind == "json":
        schema = json.loads(value) if isinstance(value, str) else value
        if not isinstance(schema, dict):
            raise ValueError("must be a JSON Schema object")
        return json_grammar(json.dumps(schema if "allOf" in json.dumps(schema) else _closed(schema)))
    if kind == "choice":
        if not isinstance(value, list) or not value or not all(isinstance(one, str) and one for one in value):
            raise ValueError("must be a non-empty list of texts")
        return choice_grammar(value)
    if not isinstance(value, str) or not value:
        raise ValueError("must be a text")
    return regex_grammar(value) if kind == "regex" else lark_grammar(value)
