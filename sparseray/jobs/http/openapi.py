"""`/openapi.json`: what the server takes and gives, from the table of fields that it checks bodies by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparseray.jobs.http.fields import CHAT, COMPLETION, DETOKENIZE, TOKENIZE, Field

TEXT, INTEGER, NUMBER = {"type": "string"}, {"type": "integer"}, {"type": "number"}


def describe(fields: Mapping[str, Field], version: str, root_path: str) -> dict[str, Any]:
    """Return the description, OpenAPI 3.1.

    Args:
        fields: from `fields.table`.
        version: of the package.
        root_path: path under which a proxy shows the server.
    """
    return {
        "openapi": "3.1.0",
        "info": {"title": "sparseray", "version": version},
        "servers": [{"url": root_path or "/"}],
        "paths": {
            "/v1/completions": _post("createCompletion", "CompletionRequest", "Completion", is_stream=True),
            "/v1/chat/completions": _post(
                "createChatCompletion", "ChatRequest", "ChatCompletion", is_stream=True
            ),
            "/v1/models": _get("listModels", "ModelList"),
            "/v1/models/{model}": {
                **_get("retrieveModel", "Model"),
                "parameters": [{"name": "model", "in": "path", "required": True, "schema": TEXT}],
            },
            "/tokenize": _post("tokenize", "TokenizeRequest", "Tokens"),
            "/detokenize": _post("detokenize", "DetokenizeRequest", "Text"),
            "/tokenizer_info": _get("tokenizerInfo", "TokenizerInfo"),
            "/version": _get("version", "Version"),
            "/load": _get("load", "Load"),
            "/health": _get("health", "Health"),
            "/ready": _get("ready", "Health"),
            "/ping": {
                "get": {"operationId": "ping", "responses": {"200": {"description": "the server is there"}}}
            },
            "/metrics": {
                "get": {
                    "operationId": "metrics",
                    "responses": {
                        "200": {"description": "for Prometheus", "content": {"text/plain": {"schema": TEXT}}}
                    },
                }
            },
        },
        "components": {
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
            "schemas": {
                "CompletionRequest": _body(fields, COMPLETION, ["prompt"]),
                "ChatRequest": _body(fields, CHAT, ["messages"]),
                "TokenizeRequest": _body(fields, TOKENIZE, []),
                "DetokenizeRequest": _body(fields, DETOKENIZE, ["tokens"]),
                **_answers(),
            },
        },
    }


def _body(fields: Mapping[str, Field], endpoint: str, required: list[str]) -> dict[str, Any]:
    properties = {name: _property(field) for name, field in fields.items() if endpoint in field.on}
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _property(field: Field) -> dict[str, Any]:
    """What a field may be; null stands for an absent one. Made so that generators of clients understand it."""
    about = {"description": field.about}
    if field.neutral is not None:
        kinds = [_just(value) for value in field.neutral] + [{"type": "null"}]
        return about | {"anyOf": [kind for i, kind in enumerate(kinds) if kind not in kinds[:i]]}
    schema = dict(field.schema or {})
    if "anyOf" in schema:
        return about | {"anyOf": [*schema["anyOf"], {"type": "null"}]}
    found: dict[str, Any] = about | {"type": [*field.kind, "null"]} | schema
    return found if field.low is None else found | {"minimum": field.low, "maximum": field.high}


def _just(value: Any) -> dict[str, Any]:
    """A schema that this value alone fits."""
    if isinstance(value, bool):
        # Generators know no booleans of one value.
        return {"type": "boolean"}
    if isinstance(value, list):
        items = {"type": "string", "enum": value} if value else {}
        return {"type": "array", "items": items, "maxItems": len(value)}
    if isinstance(value, dict):
        return {"type": "object", "maxProperties": 0}
    return {"const": value}


def _get(operation: str, answer: str) -> dict[str, Any]:
    return {"get": {"operationId": operation, "responses": _responses(answer)}}


def _post(operation: str, body: str, answer: str, *, is_stream: bool = False) -> dict[str, Any]:
    content = {"application/json": {"schema": _reference(body)}}
    return {
        "post": {
            "operationId": operation,
            "requestBody": {"required": True, "content": content},
            "responses": _responses(answer, is_stream=is_stream),
            "security": [{}, {"key": []}],
        }
    }


def _responses(answer: str, *, is_stream: bool = False) -> dict[str, Any]:
    content: dict[str, Any] = {"application/json": {"schema": _reference(answer)}}
    if is_stream:
        content["text/event-stream"] = {"schema": TEXT}
    error = {
        "description": "refused or failed",
        "content": {"application/json": {"schema": _reference("Error")}},
    }
    return {"200": {"description": "answered", "content": content}, "default": error}


def _reference(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}


def _object(optional: Mapping[str, Any] | None = None, **required: Any) -> dict[str, Any]:
    properties = {**required, **(optional or {})}
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }


def _list(of: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": dict(of)}


def _or_null(of: Mapping[str, Any]) -> dict[str, Any]:
    return {"anyOf": [dict(of), {"type": "null"}]}


def _answers() -> dict[str, Any]:
    logprobs = {"type": ["object", "null"]}
    prompt = {"prompt_token_ids": _list(INTEGER), "prompt_logprobs": _list(_or_null({"type": "object"}))}
    ends = {
        "logprobs": logprobs,
        "finish_reason": _or_null(TEXT),
        "stop_reason": {"type": ["string", "integer", "null"]},
    }
    function = _object(name=TEXT, arguments=TEXT)
    calls = _list(_object(id=TEXT, type={"const": "function"}, function=function))
    message = _object(
        {"tool_calls": calls}, role={"const": "assistant"}, content=_or_null(TEXT), refusal={"type": "null"}
    )
    tokens = {"token_ids": _list(INTEGER)}
    head = {"id": TEXT, "created": INTEGER, "model": TEXT, "usage": _reference("Usage")}
    text_choice = _object({**tokens, **prompt}, index=INTEGER, text=TEXT, **ends)
    chat_choice = _object(tokens, index=INTEGER, message=message, **ends)
    error = _object(message=TEXT, type=TEXT, param=_or_null(TEXT), code=_or_null(TEXT))
    model = _object(
        id=TEXT,
        object={"const": "model"},
        created=INTEGER,
        owned_by=TEXT,
        root=TEXT,
        parent=_or_null(TEXT),
        max_model_len=INTEGER,
        permission=_list({"type": "object"}),
        version=_or_null(TEXT),
    )
    known = {"system_fingerprint": TEXT}
    return {
        "Usage": _object(
            {
                "completion_tokens_details": _object(
                    accepted_prediction_tokens=INTEGER, rejected_prediction_tokens=INTEGER
                )
            },
            prompt_tokens=INTEGER,
            completion_tokens=INTEGER,
            total_tokens=INTEGER,
        ),
        "Completion": _object(known, object={"const": "text_completion"}, choices=_list(text_choice), **head),
        "ChatCompletion": _object(
            prompt | known, object={"const": "chat.completion"}, choices=_list(chat_choice), **head
        ),
        "Error": _object(error=error),
        "Model": model,
        "ModelList": _object(object={"const": "list"}, data=_list(_reference("Model"))),
        "Tokens": _object(
            count=INTEGER, max_model_len=INTEGER, tokens=_list(INTEGER), token_strs=_or_null(_list(TEXT))
        ),
        "Text": _object(prompt=TEXT),
        "TokenizerInfo": {"type": "object", "properties": {"eos_token": TEXT, "vocab_size": INTEGER}},
        "Version": _object(version=TEXT),
        "Load": _object(server_load=INTEGER),
        "Health": _object(status={"enum": ["ok", "down"]}),
    }
