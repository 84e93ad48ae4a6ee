"""Serving: the engine, its sampler, and the HTTP server as the `openai` client sees it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import httpx
import msgpack
import numpy as np
import openai
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from sparseray.actors.serving.engine import Engine
from sparseray.actors.serving.sampler import log_probabilities, sample, token_logprobs, uniform
from sparseray.actors.serving.text_request import GenerationRequest, TokenEvent, TokenLogprobs
from sparseray.errors import ConfigError
from sparseray.jobs.http.generation_client import LocalClient
from sparseray.jobs.http.openai_bodies import ApiLimits
from sparseray.jobs.http.server import HttpServer, create_app
from sparseray.jobs.http.text_stream import TextStream, Vocabulary
from sparseray.model.config import DSEConfig, ModelConfig
from sparseray.model.decode import greedy
from sparseray.model.dse import LocalMemory
from sparseray.model.dse_layout import DSELayout
from sparseray.model.moe import LocalExperts
from sparseray.model.transformer import Transformer

TEXT = "the quick brown fox jumps over the lazy dog; the dog sleeps. déjà vu, naïve café, 東京 und Köln. " * 8
MAX_MODEL_LEN = 192


def make_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return tokenizer


@dataclass
class Parts:
    tokenizer: Tokenizer
    model: Transformer
    experts: LocalExperts
    memory: LocalMemory

    def engine(self, **options: Any) -> Engine:
        options = {"max_batch": 8, "max_model_len": MAX_MODEL_LEN, "prefill_chunk": 16, **options}
        return Engine(self.model, self.experts, self.memory, **options)


@pytest.fixture(scope="module")
def parts() -> Parts:
    torch.set_num_threads(1)
    tokenizer = make_tokenizer()
    config = ModelConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden=64,
        num_layers=2,
        num_heads=4,
        ffn_dim=96,
        attention=("full", "nsa"),
        max_seq_len=256,
        init_std=0.1,
        dse=DSEConfig(layers=(1,), rows_per_head=512, num_buckets=4, document_end_id=0),
    )
    layout = DSELayout.build(config.dse, tokenizer, vocab_size=config.vocab_size)
    model = Transformer(config, layout, seed=3).eval()
    return Parts(tokenizer, model, LocalExperts(config, seed=3), LocalMemory(config, layout, seed=3))


def request_of(name: str, prompt: tuple[int, ...], **options: Any) -> GenerationRequest:
    return GenerationRequest(request_id=name, prompt_tokens=prompt, **{"max_tokens": 12, **options})


def finish(engine: Engine) -> dict[str, list[TokenEvent]]:
    events: dict[str, list[TokenEvent]] = {}
    while engine.has_work:
        for event in engine.step():
            events.setdefault(event.request_id, []).append(event)
    return events


def tokens_of(events: list[TokenEvent]) -> list[int]:
    return [event.token_id for event in events if event.token_id is not None]


def alone(parts: Parts, request: GenerationRequest) -> list[TokenEvent]:
    engine = parts.engine()
    engine.add(request)
    return finish(engine)[request.request_id]


# Sampler


def test_greedy_takes_the_lowest_id_on_ties() -> None:
    logprobs_V = log_probabilities(np.array([0.0, 2.0, 2.0, 1.0]))
    assert sample(logprobs_V, temperature=0.0, top_p=1.0, seed=1, position=0) == 1


def test_samples_follow_the_tempered_distribution_and_top_p_cuts_its_tail() -> None:
    p = np.array([0.1, 0.5, 0.15, 0.25])
    draws = [sample(np.log(p), temperature=1.0, top_p=1.0, seed=7, position=i) for i in range(4000)]
    shares = np.bincount(draws, minlength=4) / 4000
    np.testing.assert_allclose(shares, p, atol=0.03)
    cold = [sample(np.log(p), temperature=0.5, top_p=1.0, seed=7, position=i) for i in range(4000)]
    np.testing.assert_allclose(np.bincount(cold, minlength=4) / 4000, p**2 / (p**2).sum(), atol=0.03)
    kept = Counter(sample(np.log(p), temperature=1.0, top_p=0.7, seed=7, position=i) for i in range(500))
    assert set(kept) == {1, 3}


def test_random_numbers_depend_on_seed_and_position_only() -> None:
    assert uniform(5, 9) == uniform(5 + 2**64, 9)
    assert len({uniform(seed, position) for seed in range(20) for position in range(20)}) == 400


def test_damaged_logits_are_refused() -> None:
    with pytest.raises(FloatingPointError, match="not finite"):
        log_probabilities(np.array([0.0, np.nan]))


def test_top_logprobs_are_the_best_tokens_in_order() -> None:
    logprobs_V = log_probabilities(np.array([1.0, 3.0, 3.0, 2.0]))
    found = token_logprobs(logprobs_V, 0, 3)
    assert [token for token, _ in found.top] == [1, 2, 3]
    assert found.logprob == pytest.approx(1.0 - np.log(np.exp([1.0, 3.0, 3.0, 2.0]).sum()))


# Engine


def test_requests_and_events_survive_msgpack() -> None:
    request = request_of("a", (1, 2), seed=-1, logprobs=2, stop_token_ids=(0,), resume_tokens=(5,))
    packed = GenerationRequest.from_dict(msgpack.unpackb(msgpack.packb(request.to_dict())))
    assert packed == replace(request, seed=2**64 - 1)
    entry = TokenLogprobs(token_id=4, logprob=-0.5, top=((4, -0.5), (3, -1.0)))
    event = TokenEvent(request_id="a", index=0, token_id=4, logprobs=entry, prompt_logprobs=(entry,))
    assert TokenEvent.from_dict(msgpack.unpackb(msgpack.packb(event.to_dict()))) == event


def test_greedy_engine_equals_the_plain_decoding_and_the_full_forward(parts: Parts) -> None:
    prompt = tuple(parts.tokenizer.encode(TEXT[:90]).ids)
    events = alone(parts, request_of("a", prompt, temperature=0.0, max_tokens=20))
    assert [event.index for event in events] == list(range(20))
    assert [event.finish_reason for event in events] == [None] * 19 + ["length"]
    twin = greedy(parts.model, torch.tensor(prompt), 20, experts=parts.experts, memory=parts.memory)
    assert tokens_of(events) == twin.tolist()
    known = list(prompt)
    with torch.no_grad():
        for token in tokens_of(events):
            output = parts.model(torch.tensor([known]), experts=parts.experts, memory=parts.memory)
            assert int(parts.model.logits(output.hidden_BTH[0, -1:]).argmax()) == token
            known.append(token)


def test_tokens_do_not_depend_on_the_company(parts: Parts) -> None:
    requests = [
        request_of(f"r{i}", tuple(range(1, 4 + 7 * i)), seed=i, max_tokens=5 + 3 * i, logprobs=2)
        for i in range(6)
    ]
    expected = {request.request_id: alone(parts, request) for request in requests}
    engine = parts.engine(max_batch=4, prefills_per_step=1)
    found: dict[str, list[TokenEvent]] = {}
    for request in requests:
        engine.add(request)
        for event in engine.step():
            found.setdefault(event.request_id, []).append(event)
    for name, events in finish(engine).items():
        found.setdefault(name, []).extend(events)
    assert found == expected
    assert engine.stats.largest_batch == 4


def test_resumed_request_goes_on_with_the_tokens_it_would_have_had(parts: Parts) -> None:
    request = request_of("a", tuple(range(1, 30)), seed=11, max_tokens=16, logprobs=1)
    whole = alone(parts, request)
    resumed = alone(parts, replace(request, resume_tokens=tuple(tokens_of(whole)[:7])))
    assert resumed == whole[7:]


def test_failed_steps_lose_no_request_and_a_hopeless_one_ends_with_an_error(parts: Parts) -> None:
    requests = [request_of(f"r{i}", (1 + i, 2, 3), seed=i) for i in range(3)]
    expected = {request.request_id: alone(parts, request) for request in requests}
    engine = parts.engine()
    experts, fails = parts.experts, iter([False, False, False, True, False, False, True])

    def flaky(*arguments: Any) -> torch.Tensor:
        if next(fails, False):
            raise RuntimeError("the shard is gone")
        return experts(*arguments)

    engine.experts = flaky
    for request in requests:
        engine.add(request)
    found: dict[str, list[TokenEvent]] = {}
    while engine.has_work:
        try:
            for event in engine.step():
                found.setdefault(event.request_id, []).append(event)
        except RuntimeError:
            continue
    assert found == expected
    assert engine.stats.failed_steps == 2
    fails = iter([True] * 3)
    engine.add(requests[0])
    for _ in range(3):
        with pytest.raises(RuntimeError, match="shard is gone"):
            engine.step()
    (event,) = engine.step()
    assert event.finish_reason == "error"
    assert "shard is gone" in (event.error or "")
    assert not engine.has_work


def test_stop_token_ends_and_cancel_forgets(parts: Parts) -> None:
    request = request_of("a", (1, 2, 3), temperature=0.0)
    third = tokens_of(alone(parts, request))[2]
    events = alone(parts, replace(request, stop_token_ids=(third,)))
    assert events[-1].finish_reason == "stop"
    assert events[-1].token_id == third
    engine = parts.engine(max_batch=1)
    engine.add(request)
    engine.add(replace(request, request_id="b"))
    engine.step()
    assert engine.cancel("a")
    assert engine.cancel("b")
    assert not engine.cancel("c")
    assert not engine.has_work


def test_prompt_logprobs_are_those_of_the_full_forward(parts: Parts) -> None:
    prompt = tuple(range(1, 40))
    (event,) = alone(parts, request_of("a", prompt, max_tokens=0, prompt_logprobs=1))
    assert event.token_id is None
    assert event.prompt_logprobs is not None
    with torch.no_grad():
        output = parts.model(torch.tensor([prompt]), experts=parts.experts, memory=parts.memory)
        logprobs_TV = parts.model.logits(output.hidden_BTH[0]).log_softmax(-1)
    assert [entry.token_id for entry in event.prompt_logprobs] == list(prompt)
    assert event.prompt_logprobs[0].logprob is None
    for index in range(1, len(prompt)):
        expected = float(logprobs_TV[index - 1, prompt[index]])
        assert event.prompt_logprobs[index].logprob == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"prompt_tokens": ()},
        {"prompt_tokens": (1,) * 190},
        {"prompt_tokens": (-1,)},
        {"prompt_tokens": (10**6,)},
        {"prompt_tokens": (1,), "resume_tokens": (1,) * 12},
    ],
)
def test_engine_refuses_what_it_cannot_compute(parts: Parts, options: dict[str, Any]) -> None:
    engine = parts.engine()
    with pytest.raises(ConfigError):
        engine.add(GenerationRequest(request_id="a", max_tokens=12, **options))
    assert not engine.has_work


# Text


def pieces_of(
    vocabulary: Vocabulary, tokens: list[int], stops: tuple[str, ...] = ()
) -> tuple[list[str], str]:
    stream, pieces = TextStream(vocabulary, stops), []
    for index, token in enumerate(tokens):
        delta = stream.push(token, None, "length" if index == len(tokens) - 1 else None)
        pieces.append(delta.text)
        if delta.finish_reason:
            return pieces, delta.finish_reason
    raise AssertionError("unreachable")


def test_only_whole_characters_are_streamed() -> None:
    vocabulary = Vocabulary(make_tokenizer(), 0)
    text = "🦊 über 東京"
    tokens = list(vocabulary.encode(text))
    assert len(tokens) > len(text)
    pieces, reason = pieces_of(vocabulary, tokens)
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert reason == "length"
    broken, _ = pieces_of(vocabulary, tokens[:2])
    assert "".join(broken) == "\ufffd"


@pytest.mark.parametrize(
    ("text", "stops", "kept"),
    [
        ("one two three", ("two",), "one "),
        ("one tw", ("two",), "one tw"),
        ("aab aabaac rest", ("aabaac",), "aab "),
        ("x\n\nuser: y", ("\nuser:",), "x\n"),
        ("日本語 東京 end", ("京 e",), "日本語 東"),
        ("abcd", ("bcdX", "cd"), "ab"),
        ("stop", ("stop",), ""),
    ],
)
def test_stop_strings_are_found_across_tokens_and_never_shown(
    text: str, stops: tuple[str, ...], kept: str
) -> None:
    vocabulary = Vocabulary(make_tokenizer(), 0)
    single_bytes = [
        token
        for byte in text.encode()
        for token in range(1, 320)
        if vocabulary.label_bytes(token) == bytes([byte])
    ]
    for tokens in (single_bytes, list(vocabulary.encode(text))):
        pieces, reason = pieces_of(vocabulary, tokens, stops)
        assert "".join(pieces) == kept
        assert reason == ("length" if kept == text else "stop")


def test_tokenizer_that_is_not_byte_level_is_refused() -> None:
    with pytest.raises(ConfigError, match="not ByteLevel"):
        Vocabulary(Tokenizer(models.BPE()), 0)


def test_text_that_spells_a_special_token_stays_text() -> None:
    vocabulary = Vocabulary(make_tokenizer(), 0)
    tokens = vocabulary.encode("<|endoftext|>")
    assert 0 not in tokens
    assert b"".join(map(vocabulary.text_bytes, tokens)) == b"<|endoftext|>"


# HTTP


@dataclass
class Service:
    url: str
    client: LocalClient
    parts: Parts
    api: openai.OpenAI

    def post(self, body: Any, path: str = "/v1/completions", **options: Any) -> httpx.Response:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return httpx.post(self.url + path, content=data, timeout=20, **options)

    def complete(self, *, ignore_eos: bool = False, **fields: Any) -> Any:
        defaults = {"model": "tiny", "prompt": "the dog", "max_tokens": 8}
        extra = {"ignore_eos": ignore_eos, "field_of_another_server": {"a": 1}}
        return self.api.completions.create(**{**defaults, **fields}, extra_body=extra)

    def idle(self) -> None:
        deadline = time.monotonic() + 10
        while self.client.stats.running or self.client.stats.waiting:
            assert time.monotonic() < deadline, "requests are still computed"
            time.sleep(0.01)


@pytest.fixture(scope="module")
def service(parts: Parts) -> Iterator[Service]:
    limits = ApiLimits(
        max_model_len=MAX_MODEL_LEN,
        vocab_size=parts.model.config.vocab_size,
        max_body_bytes=20_000,
        max_requests=12,
        body_timeout_s=1.0,
    )
    with LocalClient(parts.engine(), max_waiting=40) as client:
        app = create_app(
            client,
            Vocabulary(parts.tokenizer, 0),
            model="tiny",
            limits=limits,
            metrics=lambda: b"sparseray_requests_running 0\n",
            health=lambda: client.is_healthy,
        )
        with HttpServer(app) as server:
            api = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=20)
            yield Service(server.url, client, parts, api)


def test_models_health_and_metrics(service: Service) -> None:
    assert [model.id for model in service.api.models.list()] == ["tiny"]
    assert service.api.models.retrieve("tiny").id == "tiny"
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
        ({"frequency_penalty": 0.5}, 400, "frequency_penalty"),
        ({"best_of": 4}, 400, "best_of"),
    ],
)
def test_wrong_fields_are_refused_with_an_error_object(
    service: Service, fields: dict[str, Any], status: int, param: str
) -> None:
    for stream in (False, True):
        answer = service.post({"model": "tiny", "prompt": "a", "stream": stream, **fields})
        error = answer.json()["error"]
        assert (answer.status_code, error["param"]) == (status, param)
        assert error["type"] == "invalid_request_error"
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
    ],
)
def test_malformed_bodies_are_refused(service: Service, body: bytes) -> None:
    answer = service.post(body)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"]


def test_server_refuses_large_and_slow_bodies_unknown_paths_and_methods_and_goes_on(service: Service) -> None:
    answer = service.post({"model": "tiny", "prompt": "a" * 30_000})
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")
    assert "error" in httpx.get(service.url + "/nothing").json()
    assert httpx.get(service.url + "/v1/completions").status_code == 405
    with socket.create_connection(("127.0.0.1", int(service.url.rsplit(":", 1)[1]))) as slow:
        slow.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n\r\n{")
        assert slow.recv(100).startswith(b"HTTP/1.1 408")
    with pytest.raises(openai.NotFoundError):
        service.complete(model="other")
    assert service.complete().choices


def test_more_requests_than_the_limit_get_429(service: Service) -> None:
    statuses: list[int] = []

    def ask() -> None:
        body = {"model": "tiny", "prompt": "a", "max_tokens": 150, "ignore_eos": True}
        statuses.append(service.post(body).status_code)

    threads = [threading.Thread(target=ask) for _ in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(statuses) == {200, 429}
    assert service.complete().choices


def test_engine_with_too_many_waiting_requests_answers_429(service: Service) -> None:
    fields = {"n": 32, "max_tokens": 150, "extra_body": {"ignore_eos": True}}
    with pytest.raises(openai.RateLimitError):
        asyncio.run(crowd(service, fields))
    service.idle()


async def crowd(service: Service, fields: dict[str, Any]) -> None:
    async with openai.AsyncOpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0) as api:
        await asyncio.gather(*(api.completions.create(model="tiny", prompt="a", **fields) for _ in range(3)))


@pytest.mark.parametrize("stream", [False, True])
def test_client_that_goes_away_cancels_its_request(service: Service, stream: bool) -> None:
    service.idle()
    before = service.client.stats.generated_tokens
    body = json.dumps(
        {"model": "tiny", "prompt": "a", "max_tokens": 190, "n": 8, "ignore_eos": True, "stream": stream}
    ).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with socket.create_connection(("127.0.0.1", int(service.url.rsplit(":", 1)[1]))) as connection:
        connection.sendall(head + body)
        deadline = time.monotonic() + 10
        while service.client.stats.generated_tokens == before and time.monotonic() < deadline:
            time.sleep(0.005)
    service.idle()
    assert 0 < service.client.stats.generated_tokens - before < 8 * 190


class _BreakingClient:
    """Gives one token, then fails."""

    async def generate(self, request: GenerationRequest) -> Any:
        if request.max_tokens > 1:
            yield TokenEvent(request_id=request.request_id, index=0, token_id=66)
        yield TokenEvent(request_id=request.request_id, index=1, finish_reason="error", error="secret detail")

    async def cancel(self, request_id: str) -> None:
        return None


def test_errors_before_the_first_byte_have_a_status_and_later_ones_are_sent_in_the_stream() -> None:
    limits = ApiLimits(max_model_len=64, vocab_size=320)
    app = create_app(_BreakingClient(), Vocabulary(make_tokenizer(), 0), model="tiny", limits=limits)
    with HttpServer(app) as server:
        body = {"model": "tiny", "prompt": "a", "stream": True}
        early = httpx.post(server.url + "/v1/completions", json={**body, "max_tokens": 1})
        assert early.status_code == 500
        assert early.json()["error"]["type"] == "server_error"
        late = httpx.post(server.url + "/v1/completions", json={**body, "max_tokens": 5})
        assert late.status_code == 200
        events = [line for line in late.text.split("\n\n") if line]
        assert json.loads(events[-1].removeprefix("data: "))["error"]["code"] == "engine_error"
        assert "secret" not in early.text + late.text


def test_port_in_use_is_a_plain_error(service: Service) -> None:
    with pytest.raises(ConfigError, match="choose another port"):
        HttpServer(
            create_app(
                service.client,
                Vocabulary(make_tokenizer(), 0),
                model="x",
                limits=ApiLimits(max_model_len=1, vocab_size=1),
            ),
            port=int(service.url.rsplit(":", 1)[1]),
        )


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("when", ["at its announcement", "while it serves"])
def test_a_signal_stops_the_server_cleanly_from_its_announcement_on(sent: int, when: str) -> None:
    limits = ApiLimits(max_model_len=64, vocab_size=320)
    server = HttpServer(
        create_app(_BreakingClient(), Vocabulary(make_tokenizer(), 0), model="x", limits=limits)
    )
    before = signal.getsignal(sent)

    def stop() -> None:
        while when == "while it serves" and httpx.get(f"{server.url}/health").status_code != 200:
            time.sleep(0.01)
        os.kill(os.getpid(), sent)

    if when == "at its announcement":
        server.run(stop)
    else:
        stopper = threading.Thread(target=stop)
        server.run(stopper.start)
        stopper.join()
    assert signal.getsignal(sent) is before
    with pytest.raises(httpx.ConnectError):
        httpx.get(server.url)
