"""A model whose tokenizer puts a token before every text (DeepSeek's `add_bos_token`) is asked as it was trained."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serving_parts import Parts, Service, make_tokenizer, served_by, serving

from sparseray.jobs.http.chat import ChatTemplate
from sparseray.jobs.http.openai_bodies import parse_request
from sparseray.jobs.http.text_stream import Vocabulary
from sparseray.jobs.tokens.infilling import FAMILIES

BEGIN = 4
NAMES = ("<|endoftext|>", *FAMILIES[0], "<|begin|>")


@pytest.fixture(scope="module")
def begun() -> Vocabulary:
    return Vocabulary(make_tokenizer(NAMES), 0, "<|begin|>")


@pytest.fixture(scope="module")
def server(parts: Parts, begun: Vocabulary) -> Iterator[Service]:
    with serving(parts, vocabulary=begun, template=ChatTemplate("{{ messages[0].content }}")) as found:
        yield found


def prompts_of(vocabulary: Vocabulary, is_chat: bool = False, **fields: Any) -> list[tuple[int, ...]]:
    served = served_by(vocabulary=vocabulary, template=ChatTemplate("{{ messages[0].content }}"))
    found = parse_request(fields, is_chat=is_chat, served=served, request_id="r")
    return [request.prompt_tokens for request in found.requests]


def test_a_text_begins_with_the_token_and_ids_are_as_they_are_given(begun: Vocabulary) -> None:
    the = begun.encode("the")
    assert prompts_of(begun, prompt="the") == [(BEGIN, *the)]
    assert prompts_of(begun, prompt="the", add_special_tokens=False) == [the]
    assert prompts_of(begun, prompt=list(the)) == [the]
    assert prompts_of(begun, prompt=["the", ""]) == [(BEGIN, *the), (BEGIN,)]
    assert prompts_of(begun, prompt="", add_special_tokens=False) == [(0,)]
    assert prompts_of(begun, prompt="the" * 9, truncate_prompt_tokens=2) == [begun.encode("the" * 9)[-2:]]


def test_a_gap_between_texts_is_asked_for_after_it(begun: Vocabulary) -> None:
    the, dog = begun.encode("the"), begun.encode("dog")
    assert prompts_of(begun, prompt="the", suffix="dog") == [(BEGIN, 1, *the, 2, *dog, 3)]
    assert prompts_of(begun, prompt="", suffix="dog") == [(BEGIN, 1, 2, *dog, 3)]
    assert prompts_of(begun, prompt=list(the), suffix="dog") == [(1, *the, 2, *dog, 3)]
    assert prompts_of(begun, prompt="the", suffix="dog", add_special_tokens=False) == [(1, *the, 2, *dog, 3)]


def test_a_chat_begins_as_its_template_says(begun: Vocabulary) -> None:
    said = [{"role": "user", "content": "the"}]
    for more in ({}, {"add_special_tokens": True}, {"add_special_tokens": False}):
        assert prompts_of(begun, True, messages=said, **more) == [begun.encode("the")]


def test_the_server_tells_and_counts_it(server: Service, begun: Vocabulary) -> None:
    def ids(**fields: Any) -> list[int]:
        return list(server.post({"prompt": "the", **fields}, "/tokenize").json()["tokens"])

    assert ids() == [BEGIN, *ids(add_special_tokens=False)]
    answer = server.post({"prompt": "the", "max_tokens": 2, "echo": True, "temperature": 0}).json()
    assert answer["usage"]["prompt_tokens"] == len(ids())
    assert answer["choices"][0]["text"].startswith("the"), "a special token is not shown"


@pytest.mark.parametrize(
    ("settings", "begin"),
    [
        ({"add_bos_token": True, "bos_token": "<|begin|>"}, (BEGIN,)),
        ({"add_bos_token": True, "bos_token": {"content": "<|begin|>"}}, (BEGIN,)),
        ({"add_bos_token": False, "bos_token": "<|begin|>"}, ()),
        ({"bos_token": "<|begin|>"}, ()),
        ({"add_bos_token": True, "bos_token": "<|another|>"}, ()),
        ({"add_bos_token": True, "bos_token": None}, ()),
    ],
)
def test_the_settings_beside_a_tokenizer_say_whether(
    settings: dict[str, Any], begin: tuple[int, ...], tmp_path: Path
) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    found = Vocabulary(make_tokenizer(NAMES), 0, ChatTemplate.load(tmp_path).begin)
    assert found.begin == begin
