"""The HTTP server as the `openai` client sees it."""

from __future__ import annotations

import threading
from typing import Any

import httpx
from serving_parts import MAX_MODEL_LEN, Service


def test_models_health_and_metrics(service: Service) -> None:
    assert [model.id for model in service.api.models.list()] == ["tiny"]
    card = service.api.models.retrieve("tiny")
    assert (card.id, card.root, card.parent, card.max_model_len) == ("tiny", "tiny", None, MAX_MODEL_LEN)
    assert card.permission[0]["allow_sampling"] is True
    assert httpx.get(service.url + "/health").json() == {"status": "ok"}
    answer = httpx.get(service.url + "/metrics")
    assert answer.content == b"sparseray_requests_running 0\n"
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")


def test_completion_equals_its_stream_and_counts_its_tokens(service: Service) -> None:
    whole = service.complete(seed=5, ignore_eos=True, echo=True, logprobs=2)
    assert whole.choices[0].finish_reason == "length"
    assert whole.choices[0].text.startswith("the dog")
    assert whole.usage.completion_tokens == 8
    logprobs = whole.choices[0].logprobs
    prompt_tokens = whole.usage.prompt_tokens
    assert len(logprobs.tokens) == prompt_tokens + 8
    assert logprobs.token_logprobs[0] is None
    assert all(value <= 0 for value in logprobs.token_logprobs[1:])
    assert logprobs.text_offset[0] == 0
    assert logprobs.text_offset == sorted(logprobs.text_offset)
    options = {"include_usage": True}
    chunks = list(
        service.complete(seed=5, ignore_eos=True, echo=True, logprobs=2, stream=True, stream_options=options)
    )
    assert "".join(c.choices[0].text for c in chunks if c.choices) == whole.choices[0].text
    streamed = [c.choices[0].logprobs for c in chunks if c.choices and c.choices[0].logprobs]
    assert [t for entry in streamed for t in entry.tokens] == logprobs.tokens
    assert [t for entry in streamed for t in entry.text_offset] == logprobs.text_offset
    assert chunks[-1].usage == whole.usage
    assert chunks[-1].choices == []
    assert chunks[-2].choices[0].finish_reason == "length"


def test_chat_streams_and_takes_parts(service: Service) -> None:
    messages: list[Any] = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "the "}, {"type": "text", "text": "fox"}]},
    ]
    fields: dict[str, Any] = {"model": "tiny", "messages": messages, "seed": 1, "max_completion_tokens": 9}
    whole = service.api.chat.completions.create(**fields, logprobs=True, top_logprobs=2)
    assert whole.choices[0].message.role == "assistant"
    content = whole.choices[0].logprobs.content
    assert content
    assert all(len(entry.top_logprobs) == 2 for entry in content)
    prompt = "system: be brief\nuser: the fox\nassistant:"
    plain = service.complete(prompt=prompt, seed=1, max_tokens=9, stop=["\nuser:"])
    assert whole.choices[0].message.content == plain.choices[0].text
    assert (
        bytes(b for entry in content for b in entry.bytes).decode("utf-8", "replace") == plain.choices[0].text
    )
    chunks = list(service.api.chat.completions.create(**fields, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == plain.choices[0].text
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason


def test_prompts_as_ids_and_lists_give_their_choices(service: Service) -> None:
    ids = service.parts.tokenizer.encode("the dog").ids
    text = service.complete(seed=2).choices[0].text
    assert service.complete(seed=2, prompt=ids).choices[0].text == text
    several = service.complete(seed=2, prompt=[ids, ids[:1]], n=2)
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    assert several.choices[0].text == text
    assert several.choices[1].text != text
    assert several.usage.prompt_tokens == len(ids) + 1
    assert service.complete(seed=2, prompt=["the dog", "x"]).choices[0].text == text
    assert service.complete(prompt="", max_tokens=1).usage.prompt_tokens == 1


def test_same_seed_gives_the_same_text_alone_and_under_load(service: Service) -> None:
    alone = service.complete(seed=9, max_tokens=24, ignore_eos=True, logprobs=1).choices[0]
    results: list[Any] = []

    def load(index: int) -> None:
        prompt = "the lazy dog " * (1 + index)
        results.append(service.complete(prompt=prompt, max_tokens=20 + index, ignore_eos=True))

    threads = [threading.Thread(target=load, args=(index,)) for index in range(6)]
    for thread in threads:
        thread.start()
    loaded = service.complete(seed=9, max_tokens=24, ignore_eos=True, logprobs=1).choices[0]
    for thread in threads:
        thread.join()
    assert loaded == alone
    assert len(results) == 6
    assert service.client.stats.largest_batch >= 3


def test_streams_never_hold_a_part_of_a_stop_string(service: Service) -> None:
    whole = service.complete(seed=4, max_tokens=40, ignore_eos=True).choices[0].text
    at = len(whole) // 2
    stop = whole[at : at + 3]
    kept = whole[: whole.find(stop)]
    chunks = list(service.complete(seed=4, max_tokens=40, ignore_eos=True, stop=stop, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == kept
    assert chunks[-1].choices[0].finish_reason == "stop"
    service.idle()
    assert service.choice(seed=4, max_tokens=40, ignore_eos=True, stop=stop)["stop_reason"] == stop
