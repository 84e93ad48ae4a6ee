"""Fields of a body: each is honoured as vLLM defines it, or refused by its name."""

from __future__ import annotations

from typing import Any

import pytest
from serving_parts import MAX_MODEL_LEN, Service, read_events, serving

from sparseray.jobs.http.text_stream import Vocabulary

CHAT = "/v1/chat/completions"
GREEDY = {"temperature": 0, "ignore_eos": True, "return_token_ids": True}


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"model": "other"}, 404, "model"),
        ({"model": None}, 400, "model"),
        ({"prompt": None}, 400, "prompt"),
        ({"prompt": []}, 400, "prompt"),
        ({"prompt": [[]]}, 400, "prompt"),
        ({"prompt": [1.5]}, 400, "prompt"),
        ({"prompt": [True]}, 400, "prompt"),
        ({"prompt": [10**9]}, 400, "prompt"),
        ({"prompt": {"a": 1}}, 400, "prompt"),
        ({"prompt": "\ud800"}, 400, "prompt"),
        ({"prompt": [1] * 193}, 400, "prompt"),
        ({"prompt": ["a"] * 33}, 400, "prompt"),
        ({"max_tokens": 500}, 400, "prompt"),
        ({"max_tokens": -1}, 400, "max_tokens"),
        ({"max_tokens": "8"}, 400, "max_tokens"),
        ({"temperature": 3}, 400, "temperature"),
        ({"temperature": "hot"}, 400, "temperature"),
        ({"top_p": 1.5}, 400, "top_p"),
        ({"n": 0}, 400, "n"),
        ({"n": 33}, 400, "n"),
        ({"seed": 1.5}, 400, "seed"),
        ({"seed": 2**70}, 400, "seed"),
        ({"stop": 5}, 400, "stop"),
        ({"stop": [""]}, 400, "stop"),
        ({"stop": ["a"] * 17}, 400, "stop"),
        ({"logprobs": 21}, 400, "logprobs"),
        ({"logprobs": True}, 400, "logprobs"),
        ({"stream": "yes"}, 400, "stream"),
        ({"stream": True, "stream_options": 3}, 400, "stream_options"),
        ({"echo": 1}, 400, "echo"),
        ({"frequency_penalty": 2.5}, 400, "frequency_penalty"),
        ({"presence_penalty": "x"}, 400, "presence_penalty"),
        ({"repetition_penalty": 0}, 400, "repetition_penalty"),
        ({"top_k": -2}, 400, "top_k"),
        ({"top_k": 1.5}, 400, "top_k"),
        ({"min_p": 1.1}, 400, "min_p"),
        ({"min_tokens": 9, "max_tokens": 8}, 400, "min_tokens"),
        ({"logit_bias": {"x": 1}}, 400, "logit_bias"),
        ({"logit_bias": {"1": 101}}, 400, "logit_bias"),
        ({"logit_bias": {"320": 1}}, 400, "logit_bias"),
        ({"logit_bias": [1]}, 400, "logit_bias"),
        ({"allowed_token_ids": []}, 400, "allowed_token_ids"),
        ({"allowed_token_ids": [True]}, 400, "allowed_token_ids"),
        ({"stop_token_ids": [-1]}, 400, "stop_token_ids"),
        ({"stop_token_ids": 5}, 400, "stop_token_ids"),
        ({"bad_words": [""]}, 400, "bad_words"),
        ({"bad_words": "x"}, 400, "bad_words"),
        ({"truncate_prompt_tokens": 0}, 400, "truncate_prompt_tokens"),
        ({"truncate_prompt_tokens": 193}, 400, "truncate_prompt_tokens"),
        ({"priority": 0.5}, 400, "priority"),
        ({"prompt_logprobs": 21}, 400, "prompt_logprobs"),
        ({"suffix": "x"}, 400, "suffix"),
        ({"use_beam_search": True}, 400, "use_beam_search"),
        ({"guided_whitespace_pattern": " "}, 400, "guided_whitespace_pattern"),
        ({"length_penalty": 2}, 400, "length_penalty"),
        ({"top_logprobs": 2}, 400, "top_logprobs"),
        ({"messages": []}, 400, "messages"),
        ({"temprature": 1}, 400, "temprature"),
        ({"best_of": 4}, 400, "best_of"),
    ],
)
def test_wrong_fields_are_refused_with_an_error_object(
    service: Service, fields: dict[str, Any], status: int, param: str
) -> None:
    for stream in (False, True):
        answer = service.post({"model": "tiny", "prompt": "a", "stream": stream, **fields})
        assert answer.status_code != 200
        error = answer.json()["error"]
        assert (answer.status_code, error["param"]) == (status, param)
        assert error["type"] == ("not_found_error" if status == 404 else "invalid_request_error")
        assert "Traceback" not in answer.text


@pytest.mark.parametrize(
    "messages",
    [
        None,
        [],
        "hi",
        [1],
        [{"role": "x", "content": "a"}],
        [{"role": "user"}],
        [{"role": "user", "content": [{}]}],
        [{"role": "user", "content": None}],
        [{"role": "assistant", "content": None}],
        [{"role": "user", "content": "a", "tool_calls": [{"function": {"name": "f"}}]}],
        [{"role": "assistant", "content": None, "tool_calls": [{"function": {}}]}],
        [
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"function": {"name": "f", "arguments": "{"}}],
            }
        ],
        [{"role": "user", "content": "\ud800"}],
    ],
)
def test_wrong_messages_are_refused(service: Service, messages: Any) -> None:
    answer = service.post({"model": "tiny", "messages": messages}, "/v1/chat/completions")
    assert answer.status_code == 400
    assert answer.json()["error"]["param"].startswith("messages")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"a"',
        b"\xff\xfe",
        b'{"model": NaN}',
        b"[" * 15_000,
        b'{"seed": ' + b"9" * 9000 + b"}",
        b'{"prompt": "a", "metadata": ' + b'{"a":' * 900 + b"1" + b"}" * 900 + b"}garbage",
    ],
)
def test_malformed_bodies_are_refused(service: Service, body: bytes) -> None:
    answer = service.post(body)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"]


def test_an_unknown_field_is_refused_with_the_nearest_known_one(service: Service) -> None:
    error = service.post({"prompt": "a", "temprature": 1}).json()["error"]
    assert error["code"] == "unknown_field" and "did you mean 'temperature'?" in error["message"]
    assert service.post({"prompt": "a", "temprature": None}).status_code == 400
    assert (
        service.post({"messages": [{"role": "user", "content": "a"}], "prompt": "a"}, CHAT).status_code == 400
    )


def test_unknown_fields_can_be_left_out_and_unsupported_ones_never(service: Service) -> None:
    with serving(service.parts, ignore_unknown=True) as lenient:
        body = {"prompt": "a", "max_tokens": 1, "field_of_another_server": {"a": 1}}
        assert lenient.post(body).status_code == 200
        assert lenient.post({**body, "suffix": "x"}).json()["error"]["param"] == "suffix"


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        ({"messages": [{"role": "user", "content": "a", "foo": 1}]}, "messages[0].foo"),
        ({"messages": [{"role": "assistant", "content": "a", "refusal": "no"}]}, "messages[0].refusal"),
        ({"response_format": {"type": "text", "strict": True}}, "response_format.strict"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {}, "schemes": {}}}},
            "response_format.json_schema.schemes",
        ),
    ],
)
def test_unknown_members_of_a_field_are_refused_by_name_or_left_out(
    service: Service, extra: dict[str, Any], named: str
) -> None:
    given_back = {"role": "assistant", "content": "a", "refusal": None, "annotations": []}
    body = {"messages": [given_back, {"role": "user", "content": "b"}], "max_tokens": 1}
    assert service.post(body, CHAT).status_code == 200
    error = service.post({**body, **extra}, CHAT).json()["error"]
    assert error["code"] == "unknown_field" and named in error["message"]
    with serving(service.parts, ignore_unknown=True) as lenient:
        assert lenient.post({**body, **extra}, CHAT).status_code == 200


def test_null_stands_for_an_absent_field_and_a_byte_order_mark_is_no_part_of_a_body(service: Service) -> None:
    nulls = dict.fromkeys(
        ("seed", "stop", "logit_bias", "tools", "response_format", "top_k", "suffix", "user")
    )
    del nulls["tools"]
    assert service.post({"prompt": "a", "max_tokens": 1, **nulls}).status_code == 200
    assert service.post(b'\xef\xbb\xbf{"prompt": "a", "max_tokens": 1}').status_code == 200
    assert service.post(b'\xef\xbb\xbf\xef\xbb\xbf{"prompt": "a"}').status_code == 400


def test_logit_bias_and_allowed_tokens_decide_what_is_drawn(service: Service) -> None:
    plain = service.choice(**GREEDY)["token_ids"]
    assert service.choice(**GREEDY, logit_bias={"77": 100})["token_ids"] == [77] * 8
    assert plain[0] not in service.choice(**GREEDY, logit_bias={str(plain[0]): -100})["token_ids"]
    assert set(service.choice(seed=1, return_token_ids=True, allowed_token_ids=[70, 80])["token_ids"]) <= {
        70,
        80,
    }
    assert service.choice(**GREEDY, allowed_token_ids=plain)["token_ids"] == plain


def test_bad_words_never_come_at_a_beginning_and_after_a_space(service: Service) -> None:
    vocabulary = Vocabulary(service.parts.tokenizer, 0)
    options = {"ignore_eos": True, "max_tokens": 120, "seed": 3, "allowed_token_ids": None}
    (plain,), (spaced,) = vocabulary.encode("the"), vocabulary.encode(" the")
    bias = {"logit_bias": {str(plain): 8, str(spaced): 8}, "return_token_ids": True}
    free = service.choice(**options, **bias)["token_ids"]
    assert {plain, spaced} & set(free)
    barred = service.choice(**options, **bias, bad_words=["the"])["token_ids"]
    assert not {plain, spaced} & set(barred)


def test_penalties_and_cuts_change_the_answer_as_they_should(service: Service) -> None:
    greedy = service.choice(**GREEDY, max_tokens=60)["token_ids"]
    assert len(set(greedy)) < 60
    assert (
        service.choice(**GREEDY, max_tokens=60, frequency_penalty=0, repetition_penalty=1)["token_ids"]
        == greedy
    )
    for fields in ({"frequency_penalty": 2.0}, {"presence_penalty": 2.0}, {"repetition_penalty": 50.0}):
        assert len(set(service.choice(**GREEDY, max_tokens=60, **fields)["token_ids"])) > len(set(greedy))
    hot = {"temperature": 1.5, "ignore_eos": True, "return_token_ids": True, "seed": 1, "max_tokens": 60}
    for fields in ({"top_k": 1}, {"min_p": 1.0}, {"top_p": 0}):
        assert service.choice(**hot, **fields)["token_ids"] == greedy
    assert service.choice(**hot, top_k=-1)["token_ids"] == service.choice(**hot)["token_ids"] != greedy


def test_stop_tokens_and_strings_are_left_out_unless_they_are_asked_for(service: Service) -> None:
    (the,) = Vocabulary(service.parts.tokenizer, 0).encode("the")
    options = {**GREEDY, "logit_bias": {str(the): 9}}
    whole = service.choice(**options)
    assert the in whole["token_ids"]
    ended = service.choice(**options, stop_token_ids=[the])
    assert (ended["finish_reason"], ended["stop_reason"]) == ("stop", the)
    assert ended["token_ids"] == whole["token_ids"][: whole["token_ids"].index(the) + 1]
    kept = service.choice(**options, stop_token_ids=[the], include_stop_str_in_output=True)
    assert kept["text"] == ended["text"] + "the"
    whole = service.choice(**GREEDY)
    text = whole["text"]
    stop = text[2:4]
    shown = service.choice(**GREEDY, stop=[stop], include_stop_str_in_output=True)
    assert shown["text"] == text[: text.find(stop) + len(stop)]
    assert shown["finish_reason"] == "stop" and shown["stop_reason"] == stop


def test_min_tokens_holds_stop_tokens_and_strings_back(service: Service) -> None:
    first = service.choice(**GREEDY)["token_ids"][0]
    ended = service.choice(**GREEDY, stop_token_ids=[first])
    assert len(ended["token_ids"]) == 1
    longer = service.choice(**GREEDY, stop_token_ids=[first], min_tokens=5)
    assert len(longer["token_ids"]) >= 5 and first not in longer["token_ids"][:5]
    text = service.choice(**GREEDY)["text"]
    assert service.choice(**GREEDY, stop=[text[0]])["text"] == ""
    assert len(service.choice(**GREEDY, stop=[text[0]], min_tokens=7)["text"]) > 2


def test_truncated_prompts_keep_their_last_tokens(service: Service) -> None:
    ids = list(Vocabulary(service.parts.tokenizer, 0).encode("the lazy dog sleeps " * 30))
    whole = service.choice(**GREEDY, prompt=ids[-20:])
    text = "the lazy dog sleeps " * 30
    for prompt in (ids, text):
        cut = service.choice(**GREEDY, prompt=prompt, truncate_prompt_tokens=20)
        assert (cut["prompt_token_ids"], cut["token_ids"]) == (ids[-20:], whole["token_ids"])
    longest = service.choice(prompt=ids, truncate_prompt_tokens=-1, max_tokens=0, return_token_ids=True)
    assert longest["prompt_token_ids"] == ids[-MAX_MODEL_LEN:]
    for asked, left in (
        ({"max_tokens": 5}, 5),
        ({}, 16),
        ({"max_tokens": MAX_MODEL_LEN - 1}, MAX_MODEL_LEN - 1),
    ):
        body = {"prompt": ids * 9, "truncate_prompt_tokens": -1, "return_token_ids": True, "ignore_eos": True}
        (fitting,) = service.post({**body, **asked}).json()["choices"]
        assert fitting["prompt_token_ids"] == (ids * 9)[left - MAX_MODEL_LEN :]
        assert len(fitting["token_ids"]) == left
    assert service.post({"prompt": ids * 2}).json()["error"]["code"] == "context_length_exceeded"
    messages = [{"role": "user", "content": text}]
    chat = service.post({"messages": messages, "truncate_prompt_tokens": 12, "max_tokens": 1}, CHAT).json()
    assert chat["usage"]["prompt_tokens"] == 12
    body = {
        "messages": [{"role": "user", "content": text * 9}],
        "truncate_prompt_tokens": -1,
        "ignore_eos": True,
    }
    usage = service.post(body, CHAT).json()["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (MAX_MODEL_LEN - 16, 16)


def test_prompt_logprobs_are_given_by_token_id_with_their_ranks(service: Service) -> None:
    choice = service.choice(prompt="the dog", prompt_logprobs=2, max_tokens=1, echo=True, logprobs=1)
    first, *others = choice["prompt_logprobs"]
    ids = service.parts.tokenizer.encode("the dog").ids
    assert first is None and len(others) == len(ids) - 1
    for token, entry, alternatives in zip(
        ids[1:], others, choice["logprobs"]["top_logprobs"][1:], strict=False
    ):
        assert len(entry) in (2, 3) and len(alternatives) == 1
        ranks = sorted(value["rank"] for value in entry.values())
        assert ranks[:2] == [1, 2] and entry[str(token)]["logprob"] <= 0
    refused = service.post({"prompt": "a", "prompt_logprobs": 1, "stream": True}).json()["error"]
    assert refused["param"] == "prompt_logprobs"
    messages = [{"role": "user", "content": "the dog"}]
    chat = service.post({"messages": messages, "prompt_logprobs": 0, "max_tokens": 1}, CHAT).json()
    assert len(chat["prompt_logprobs"]) == chat["usage"]["prompt_tokens"]


def test_token_ids_and_usage_come_with_every_chunk_that_was_asked_to_have_them(service: Service) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {"prompt": "the dog", "max_tokens": 6, "ignore_eos": True, "seed": 2, "stream": True, "n": 2}
    answer = service.post({**body, "stream_options": options, "return_token_ids": True})
    chunks = read_events(answer.text)
    assert all(chunk["usage"]["prompt_tokens"] == 2 for chunk in chunks)
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts) and counts[-1] == 12
    for index in (0, 1):
        own = [c["choices"][0] for c in chunks if c["choices"] and c["choices"][0]["index"] == index]
        assert own[0]["prompt_token_ids"] == service.parts.tokenizer.encode("the dog").ids
        assert sum(len(choice["token_ids"]) for choice in own) == 6
    whole = service.choice(**{**body, "stream": False, "return_token_ids": True})
    first = [c["choices"][0] for c in chunks if c["choices"] and c["choices"][0]["index"] == 0]
    assert [token for choice in first for token in choice["token_ids"]] == whole["token_ids"]


def test_special_tokens_can_be_shown(service: Service) -> None:
    fields = {"logit_bias": {"0": 100}, "max_tokens": 3, "ignore_eos": True}
    assert service.choice(**fields)["text"] == ""
    assert service.choice(**fields, skip_special_tokens=False)["text"] == "<|endoftext|>" * 3
