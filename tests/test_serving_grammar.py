"""Constrained answers: formats, schemas, expressions, grammars and choices are followed, or refused."""

from __future__ import annotations

import json
import re
from typing import Any

import jsonschema
import pytest
from serving_parts import Service, read_events, serving

CHAT = "/v1/chat/completions"
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["x", "y"]}, "maxItems": 2},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
LARK = 'start: "(" start ")" | "x"'


def answers(service: Service, count: int = 4, **fields: Any) -> list[dict[str, Any]]:
    """Finished choices of several seeds."""
    body = {"prompt": "the dog", "max_tokens": 120, **fields}
    choices = [service.choice(**body, seed=seed) for seed in range(count)]
    return [choice for choice in choices if choice["finish_reason"] == "stop"]


@pytest.mark.parametrize(
    "fields",
    [
        {"guided_json": SCHEMA},
        {"guided_json": json.dumps(SCHEMA)},
        {"structured_outputs": {"json": SCHEMA}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}},
        {"guided_json": SCHEMA, "ignore_eos": True, "temperature": 0},
    ],
)
def test_answers_fit_their_schema(service: Service, fields: dict[str, Any]) -> None:
    found = answers(service, **fields)
    assert found
    for choice in found:
        jsonschema.validate(json.loads(choice["text"]), SCHEMA)


def test_a_schema_is_followed_in_a_chat_and_a_stream(service: Service) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA, "strict": True}}
    body = {
        "messages": [{"role": "user", "content": "a"}],
        "response_format": form,
        "seed": 1,
        "max_tokens": 120,
    }
    whole = service.post(body, CHAT).json()["choices"][0]
    jsonschema.validate(json.loads(whole["message"]["content"]), SCHEMA)
    events = read_events(service.post({**body, "stream": True}, CHAT).text)
    text = "".join(event["choices"][0]["delta"]["content"] for event in events)
    assert text == whole["message"]["content"]


def test_other_constraints_are_followed(service: Service) -> None:
    for choice in answers(service, response_format={"type": "json_object"}, logit_bias={"93": 20, "2": 20}):
        assert isinstance(json.loads(choice["text"]), dict)
    for choice in answers(service, guided_regex="[ab]{3}-[0-9]{2}"):
        assert re.fullmatch("[ab]{3}-[0-9]{2}", choice["text"])
    words = ['the "dog"', "東京", "a\\b"]
    found = answers(service, 8, guided_choice=words)
    assert {choice["text"] for choice in found} <= set(words) and len(found) == 8
    for choice in answers(service, structured_outputs={"grammar": LARK}, logit_bias={"88": 9}):
        assert re.fullmatch(r"\(*x\)*", choice["text"])


def test_a_constrained_answer_does_not_depend_on_its_company(service: Service) -> None:
    import threading

    alone = answers(service, 1, guided_json=SCHEMA)
    threads = [threading.Thread(target=lambda: answers(service, 2, guided_regex="a{40}")) for _ in range(3)]
    for thread in threads:
        thread.start()
    assert answers(service, 1, guided_json=SCHEMA) == alone
    for thread in threads:
        thread.join()


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"guided_json": {"type": "foo"}}, "guided_json"),
        ({"guided_json": "["}, "guided_json"),
        ({"guided_json": '"a"'}, "guided_json"),
        ({"guided_json": {"$ref": "#/nowhere"}}, "guided_json"),
        ({"guided_json": {"$ref": "http://127.0.0.1/schema"}}, "guided_json"),
        ({"guided_json": {"type": "string", "pattern": "("}}, "guided_json"),
        ({"guided_regex": "((("}, "guided_regex"),
        ({"guided_regex": ""}, "guided_regex"),
        ({"guided_grammar": "start: nowhere"}, "guided_grammar"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_choice": [1]}, "guided_choice"),
        ({"structured_outputs": {"json_object": False}}, "structured_outputs.json_object"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag"),
        ({"structured_outputs": {"json": {}, "regex": "a"}}, "structured_outputs.regex"),
        ({"guided_regex": "a", "response_format": {"type": "json_object"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "xml"}}, "response_format"),
    ],
)
def test_constraints_that_cannot_be_followed_are_refused(
    service: Service, fields: dict[str, Any], param: str
) -> None:
    answer = service.post({"prompt": "a", **fields})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text


def test_objects_have_only_the_properties_that_are_named_unless_the_schema_says_otherwise() -> None:
    from sparseray.jobs.http.constraints import _closed

    inner = {"properties": {"properties": {"type": "string"}}}
    schema = {"properties": {"a": inner, "b": {"const": inner}}, "$defs": {"c": {"anyOf": [inner]}}}
    closed = {**inner, "additionalProperties": False}
    assert _closed(schema) == {
        "properties": {"a": closed, "b": {"const": inner}},
        "$defs": {"c": {"anyOf": [closed]}},
        "additionalProperties": False,
    }
    for says in ({"additionalProperties": True}, {"patternProperties": {"x": True}}, {"$ref": "#"}):
        assert _closed({**inner, **says}) == {**inner, **says}


def test_a_schema_without_a_word_on_other_properties_gets_none(service: Service) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
    found = answers(service, guided_json=schema)
    assert found and all(set(json.loads(choice["text"])) == {"a"} for choice in found)


def test_a_server_without_grammars_says_so(service: Service) -> None:
    with serving(service.parts, grammars=None) as served:
        error = served.post({"prompt": "a", "guided_regex": "a"}).json()["error"]
        assert (error["param"], error["code"]) == ("guided_regex", "unsupported")
