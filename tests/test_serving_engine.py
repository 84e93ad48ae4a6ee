"""The engine: batches that change no token of a request."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from paged_runs import greedy
from serving_parts import TEXT, Parts, alone, finish, request_of, tokens_of

from sparseray.actors.serving.text_request import GenerationRequest, TokenEvent
from sparseray.errors import ConfigError

# Every rule of the sampler at once.
RULES: dict[str, Any] = {
    "top_k": 40,
    "min_p": 0.01,
    "repetition_penalty": 1.3,
    "presence_penalty": 0.2,
    "frequency_penalty": 0.3,
    "logit_bias": ((5, 1.5), (7, -2.0)),
    "bad_words": ((4,), (8, 9)),
    "min_tokens": 3,
    "stop_token_ids": (0,),
}


def test_greedy_engine_equals_the_full_forward(parts: Parts) -> None:
    prompt = tuple(parts.tokenizer.encode(TEXT[:90]).ids)
    events = alone(parts, request_of("a", prompt, temperature=0.0, max_tokens=20))
    assert [event.index for event in events] == list(range(20))
    assert [event.finish_reason for event in events] == [None] * 19 + ["length"]
    twin = greedy(parts.model, torch.tensor(prompt), 20, experts=parts.experts, memory=parts.memory)
    assert tokens_of(events) == twin.tolist()


def test_tokens_do_not_depend_on_the_company(parts: Parts) -> None:
    requests = [
        request_of(f"r{i}", tuple(range(1, 4 + 7 * i)), seed=i, max_tokens=5 + 3 * i, logprobs=2, **rules)
        for i, rules in enumerate([{}, RULES, {}, RULES, {"top_k": 3}, {"min_p": 0.2}])
    ]
    expected = {request.request_id: alone(parts, request) for request in requests}
    engine = parts.engine(max_batch=4)
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
    # What was emitted is read in chunks beside the prompt, not decoded again.
    engine = parts.engine()
    engine.add(replace(request, resume_tokens=tuple(tokens_of(whole)[:14])))
    assert finish(engine)["a"] == whole[14:]
    assert engine.stats.steps == -(-(29 + 14) // 16) + 1
    ruled = replace(request, **RULES)
    with_rules = alone(parts, ruled)
    assert tokens_of(with_rules) != tokens_of(whole)
    assert alone(parts, replace(ruled, resume_tokens=tuple(tokens_of(with_rules)[:2]))) == with_rules[2:]


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
        {"prompt_tokens": (1,), "logit_bias": ((10**6, 1.0),)},
        {"prompt_tokens": (1,), "bad_words": ((1, -1),)},
        {"prompt_tokens": (1,), "allowed_token_ids": (320,)},
    ],
)
def test_engine_refuses_what_it_cannot_compute(parts: Parts, options: dict[str, Any]) -> None:
    engine = parts.engine()
    with pytest.raises(ConfigError):
        engine.add(GenerationRequest(request_id="a", max_tokens=12, **options))
    assert not engine.has_work


def test_lower_priorities_enter_the_batch_first_and_equals_in_their_order(parts: Parts) -> None:
    engine = parts.engine(max_batch=1)
    for name, priority in (("a", 0), ("b", 5), ("c", -5), ("d", 0)):
        engine.add(request_of(name, (1, 2), max_tokens=1, priority=priority))
    assert list(finish(engine)) == ["c", "a", "d", "b"]


def test_who_had_begun_elsewhere_finds_a_place_in_a_full_batch_and_no_token_differs(parts: Parts) -> None:
    requests = [request_of(f"r{i}", (1 + i, 2, 3), seed=i, max_tokens=12) for i in range(4)]
    expected = {request.request_id: tokens_of(alone(parts, request)) for request in requests}
    engine = parts.engine(max_batch=2)
    for request in requests[:3]:
        engine.add(request)
    engine.step()
    assert engine.stats.running == 2
    begun = expected["r3"][:4]
    engine.add(replace(requests[3], resume_tokens=tuple(begun), priority=-1))
    first = {event.request_id for event in engine.step()}
    assert (engine.stats.running, engine.stats.waiting) == (3, 1) and "r3" in first
    found = finish(engine)
    assert begun + expected["r3"][4:5] + tokens_of(found["r3"]) == expected["r3"]
    assert tokens_of(found["r2"]) == expected["r2"]


@pytest.mark.parametrize("failed", [False, True])
def test_a_grammar_is_followed_to_its_end_alone_in_company_and_resumed(parts: Parts, failed: bool) -> None:
    from sparseray.actors.serving.grammar import choice_grammar

    words = ["the lazy dog", "the quick fox"]
    request = request_of(
        "a", (1, 2, 3), seed=2, grammar=choice_grammar(words), stop_token_ids=(0,), max_tokens=30
    )
    whole = alone(parts, request)
    assert whole[-1].finish_reason == "stop" and whole[-1].token_id == 0
    assert parts.tokenizer.decode(tokens_of(whole)) in words
    half = len(whole) // 2
    resumed = replace(request, resume_tokens=tuple(tokens_of(whole)[:half]))
    assert alone(parts, resumed) == whole[half:]
    engine = parts.engine()
    for other in range(3):
        engine.add(request_of(f"other {other}", (4, 5), seed=other))
    engine.add(request)
    found: list[TokenEvent] = []
    experts, calls = parts.experts, iter(range(1000))

    def flaky(*arguments: Any) -> torch.Tensor:
        if failed and next(calls) == 5:
            raise RuntimeError("the shard is gone")
        return experts(*arguments)

    engine.experts = flaky
    while engine.has_work:
        try:
            found += [event for event in engine.step() if event.request_id == "a"]
        except RuntimeError:
            continue
    assert found == whole


def test_a_text_ends_where_its_constraints_leave_nothing(parts: Parts) -> None:
    from sparseray.actors.serving.grammar import regex_grammar

    request = request_of(
        "a", (1, 2), grammar=regex_grammar("abc"), allowed_token_ids=(1, 2), stop_token_ids=(0,)
    )
    (event,) = alone(parts, request)
    assert (event.token_id, event.finish_reason) == (None, "stop")
