"""A completion with a suffix: the prompt is built from the tokenizer's sentinels, or refused with the reason."""

import pytest
from serving_parts import Parts, Service, make_tokenizer, served_by, serving

from sparseray.jobs.http.api_error import ApiError
from sparseray.jobs.http.openai_bodies import parse_request
from sparseray.jobs.http.text_stream import Vocabulary
from sparseray.jobs.tokens.infilling import FAMILIES, with_sentinels

CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def filling() -> Vocabulary:
    return Vocabulary(make_tokenizer(("<|endoftext|>", *FAMILIES[0])), 0)


def prompts_of(vocabulary: Vocabulary, **fields: object) -> list[tuple[int, ...]]:
    served = served_by(vocabulary=vocabulary)
    found = parse_request(fields, is_chat=False, served=served, request_id="r")
    return [request.prompt_tokens for request in found.requests]


def test_a_suffix_makes_a_prompt_of_prefix_suffix_and_gap(filling: Vocabulary) -> None:
    sentinels, fox, dog = filling.infilling, filling.encode("the quick "), filling.encode(" the lazy dog")
    assert sentinels is not None and (sentinels.prefix, sentinels.suffix, sentinels.middle) == (1, 2, 3)
    wanted = (1, *fox, 2, *dog, 3)
    assert prompts_of(filling, prompt="the quick ", suffix=" the lazy dog") == [wanted]
    assert prompts_of(filling, prompt=list(fox), suffix=" the lazy dog") == [wanted]
    assert prompts_of(filling, prompt=["", "the quick "], suffix=" the lazy dog") == [(1, 2, *dog, 3), wanted]
    assert prompts_of(filling, prompt="the quick ", suffix="") == [fox]
    assert prompts_of(filling, prompt="the quick ", suffix=None) == [fox]


def test_deepseeks_sentinels_are_found_though_they_are_no_special_tokens(filling: Vocabulary) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(list(FAMILIES[1]))
    assert Vocabulary(tokenizer, 0).infilling == with_sentinels(tokenizer)


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"echo": True}, "echo", "leave echo out"),
        ({"truncate_prompt_tokens": 4}, "truncate_prompt_tokens", "shorten the prompt"),
        ({"suffix": "\ud800"}, "suffix", "lone surrogate"),
        ({"suffix": 5}, "suffix", "must be a JSON string"),
        ({"suffix": "x" * 5000}, "suffix", "maximum context length"),
        ({"suffix": "0123456789" * 25}, "prompt", "maximum context length"),
        ({"prompt": []}, "prompt", "a text, token ids"),
    ],
)
def test_what_does_not_go_with_a_suffix_is_refused(
    filling: Vocabulary, fields: dict[str, object], param: str, says: str
) -> None:
    with pytest.raises(ApiError, match=says) as refused:
        prompts_of(filling, **{"prompt": "the ", "suffix": " dog", **fields})
    assert (refused.value.status, refused.value.param) == (400, param)


def test_a_server_answers_it_with_the_text_between_and_counts_the_prompt(
    parts: Parts, filling: Vocabulary
) -> None:
    with serving(parts, vocabulary=filling) as service:
        body = {
            "prompt": "the ",
            "suffix": " dog",
            "max_tokens": 5,
            "temperature": 0,
            "return_token_ids": True,
        }
        answer = service.post(body).json()
        prompt = prompts_of(filling, prompt="the ", suffix=" dog")[0]
        assert answer["usage"]["prompt_tokens"] == len(prompt)
        written = service.choice(prompt=list(prompt), max_tokens=5, temperature=0, return_token_ids=True)
        assert answer["choices"][0]["token_ids"] == written["token_ids"]
        told = service.api.completions.create(
            model="tiny", prompt="the ", suffix=" dog", max_tokens=5, temperature=0
        )
        assert told.choices[0].text == answer["choices"][0]["text"]


def test_a_tokenizer_without_sentinels_and_a_chat_are_told_why(service: Service) -> None:
    error = service.post({"prompt": "the ", "suffix": "x"}).json()["error"]
    assert "no fill-in-the-middle tokens" in error["message"] and error["message"].endswith(
        "leave suffix out"
    )
    assert (error["param"], error["code"]) == ("suffix", "unsupported")
    chat = {"messages": [{"role": "user", "content": "a"}], "suffix": "x"}
    assert service.post(chat, CHAT).json()["error"]["code"] == "unsupported"
