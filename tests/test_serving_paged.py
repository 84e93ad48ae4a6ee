"""The paged engine on a CPU: pages are shared and freed, and change no token; the samplers of host and device agree."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from serving_parts import MAX_MODEL_LEN, Parts, alone, finish, make_parts, request_of, tokens_of

from sparseray.actors.serving import cache_pool, paged_engine
from sparseray.actors.serving.cache_pool import CachePool, Lease, page_keys
from sparseray.actors.serving.cache_sizes import CacheSizes, new_pool
from sparseray.actors.serving.device_sampler import numbers_of, sample_rows, uniforms
from sparseray.actors.serving.paged_engine import PagedEngine
from sparseray.actors.serving.sampler import adjusted, sample, uniform
from sparseray.actors.serving.text_request import GenerationRequest
from sparseray.errors import ConfigError
from sparseray.kernels.ops import REFERENCE
from sparseray.model.paged import PageCounts


@pytest.fixture(scope="module")
def parts() -> Parts:
    return make_parts()


def paged(parts: Parts, **options: Any) -> PagedEngine:
    options = {
        "max_batch": 8,
        "max_model_len": MAX_MODEL_LEN,
        "prefill_chunk": 64,
        "page": 64,
        "grammars": parts.grammars,
        **options,
    }
    return PagedEngine(parts.model, parts.experts, parts.memory, **options)


def prompt_of(length: int, seed: int = 0) -> tuple[int, ...]:
    source = random.Random(seed)
    return tuple(source.randrange(320) for _ in range(length))


REQUESTS = [
    request_of("short", prompt_of(5)),
    request_of("long", prompt_of(130, 1), max_tokens=40),
    request_of("drawn", prompt_of(70, 2), temperature=1.0, seed=7),
    request_of("cut", prompt_of(64, 3), temperature=0.8, top_p=0.9, top_k=20, seed=8),
    request_of("least", prompt_of(9, 4), temperature=1.2, min_p=0.1, seed=9),
    request_of(
        "penalised", prompt_of(33, 5), repetition_penalty=1.3, frequency_penalty=0.4, presence_penalty=0.2
    ),
    request_of("biased", prompt_of(12, 6), logit_bias=((5, 3.0), (6, -100.0)), temperature=0.7, seed=1),
    request_of("judged", prompt_of(20, 7), logprobs=2, prompt_logprobs=1, temperature=0.5, seed=2),
    request_of("barred", prompt_of(20, 8), allowed_token_ids=(3, 4, 5)),
    request_of("at least", prompt_of(20, 9), stop_token_ids=tuple(range(300)), min_tokens=6, seed=3),
]


@pytest.mark.parametrize("page", [16, 64])
def test_requests_get_the_events_that_they_get_alone_whatever_the_page(parts: Parts, page: int) -> None:
    engine = paged(parts, page=page)
    for request in REQUESTS:
        engine.add(request)
    found = finish(engine)
    for request in REQUESTS:
        assert found[request.request_id] == alone(parts, request), request.request_id
    assert engine.cache_usage == 0.0


def test_the_plain_operations_give_the_tokens_of_the_compiled_ones(parts: Parts) -> None:
    plain = make_parts(REFERENCE)
    for request in REQUESTS:
        wanted, found = alone(parts, request), alone(plain, request)
        assert tokens_of(found) == tokens_of(wanted), request.request_id
        for ours, theirs in zip(found[0].prompt_logprobs or (), wanted[0].prompt_logprobs or (), strict=True):
            assert ours.token_id == theirs.token_id
            assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-5)
    # What it decoded it decodes again: its bits depend on the chunk.
    request = replace(REQUESTS[2], resume_tokens=tuple(tokens_of(alone(plain, REQUESTS[2]))[:4]))
    assert tokens_of(alone(plain, request)) == tokens_of(alone(plain, REQUESTS[2]))[4:]


def test_a_prefix_is_computed_once_and_its_requests_keep_their_tokens(parts: Parts) -> None:
    engine, prefix = paged(parts), prompt_of(128)
    requests = [request_of(str(i), prefix + prompt_of(10, i + 1), seed=i, temperature=0.9) for i in range(3)]
    engine.add(requests[0])
    first = finish(engine)
    computed = engine.stats.prompt_tokens
    for request in requests[1:]:
        engine.add(request)
    found = first | finish(engine)
    # The last known page is computed again: blocks of the compression reach over its start.
    assert engine.stats.prompt_tokens == computed + 2 * (64 + 10)
    for request in requests:
        assert tokens_of(found[request.request_id]) == tokens_of(alone(parts, request))


def test_the_same_prompt_again_computes_less_than_two_pages_and_its_rest(parts: Parts) -> None:
    engine, request = paged(parts, page=16), request_of("a", prompt_of(150), seed=3, temperature=0.9)
    engine.add(request)
    first = finish(engine)["a"]
    assert engine.stats.prompt_tokens == 150
    engine.add(request)
    assert finish(engine)["a"] == first == alone(parts, request)
    # 9 whole pages, of which the last is computed again.
    assert engine.stats.prompt_tokens == 150 + 150 - 8 * 16


def test_a_request_waits_for_pages_and_a_cancelled_one_gives_its_own_back(parts: Parts) -> None:
    engine = paged(parts, cache_bytes=None)
    engine.pool = new_pool(parts.model.config, PageCounts(whole=4, recent=4), 64, 8)
    for name in "abc":
        engine.add(request_of(name, prompt_of(70, ord(name)), max_tokens=20))
    engine.step()
    assert (engine.stats.running, engine.stats.waiting) == (1, 2)
    assert engine.cancel("a") and engine.pool.usage == 0.0
    found = finish(engine)
    assert sorted(found) == ["b", "c"]
    for name in "bc":
        assert tokens_of(found[name]) == tokens_of(
            alone(parts, request_of(name, prompt_of(70, ord(name)), max_tokens=20))
        )
    engine.pool = CachePool(3, 64, 8)
    with pytest.raises(ConfigError, match="cache_gib"):
        engine.add(request_of("d", prompt_of(180), max_tokens=12))


def test_a_failed_step_loses_no_request_and_no_page(parts: Parts) -> None:
    calls = iter(range(1000))

    def flaky(*arguments: Any) -> torch.Tensor:
        if next(calls) in (3, 9):
            raise RuntimeError("the shard is gone")
        return parts.experts(*arguments)

    engine, found = paged(parts), []
    engine.experts = flaky
    for request in REQUESTS[:3]:
        engine.add(request)
    while engine.has_work:
        try:
            found += engine.step()
        except RuntimeError:
            continue
    for request in REQUESTS[:3]:
        events = [event for event in found if event.request_id == request.request_id]
        assert tokens_of(events) == tokens_of(alone(parts, request))
    assert engine.cache_usage == 0.0 and engine.stats.failed_steps > 0


def test_a_resumed_request_goes_on_with_the_tokens_that_it_would_have_had(parts: Parts) -> None:
    request = request_of("a", prompt_of(40), temperature=1.0, seed=4, max_tokens=10)
    whole = tokens_of(alone(parts, request))
    engine = paged(parts)
    engine.add(replace(request, resume_tokens=tuple(whole[:4])))
    assert tokens_of(finish(engine)["a"]) == whole[4:]


def test_random_numbers_are_those_of_the_sampler_on_the_host() -> None:
    seeds, positions = [0, 1, -5, 2**63 + 9, 2**70], [0, 3, 2**33, 17, 1]
    wanted = [uniform(seed, position) for seed, position in zip(seeds, positions)]
    assert uniforms(seeds, positions).tolist() == wanted


@pytest.mark.parametrize("seed", range(4))
def test_rows_are_sampled_as_on_the_host_whatever_their_company(seed: int) -> None:
    source, numbers = random.Random(seed), np.random.default_rng(seed)
    requests: list[GenerationRequest] = []
    for i in range(40):
        requests.append(
            request_of(
                str(i),
                prompt_of(6, i),
                temperature=source.choice([0.0, 0.3, 1.0, 5.0]),
                top_p=source.choice([1.0, 0.9, 0.1]),
                top_k=source.choice([0, 1, 5, 400]),
                min_p=source.choice([0.0, 0.05]),
                repetition_penalty=source.choice([1.0, 1.5]),
                frequency_penalty=source.choice([0.0, 0.5]),
                min_tokens=source.choice([0, 5]),
                stop_token_ids=(1, 2),
                logit_bias=source.choice([(), ((7, 2.0), (7, 1.0), (9, -3.0))]),
                seed=source.randrange(1 << 40),
            )
        )
    tokens = [[*request.prompt_tokens, 7, 7, 11] for request in requests]
    logits = numbers.normal(size=(40, 320)).astype(np.float32)
    wanted = [
        sample(adjusted(row, request, known, None), request, position=len(known))
        for row, request, known in zip(logits, requests, tokens)
    ]
    rows = torch.from_numpy(logits)
    numbers_R = numbers_of(requests, [9] * 40)
    assert sample_rows(rows, requests, tokens, numbers_R).tolist() == wanted
    apart = [
        sample_rows(rows[i : i + 1], requests[i : i + 1], tokens[i : i + 1], numbers_R[i : i + 1]).item()
        for i in range(40)
    ]
    assert apart == wanted


def test_damaged_logits_end_their_own_request_alone() -> None:
    logits = torch.randn(3, 8)
    logits[1, 3] = float("nan")
    for temperature in (0.0, 1.0):
        requests = [request_of(str(i), (1,), temperature=temperature) for i in range(3)]
        found = sample_rows(logits, requests, [[1]] * 3, numbers_of(requests, [1] * 3)).tolist()
        assert found[1] == -1 and -1 not in (found[0], found[2])


def test_a_request_that_waits_for_pages_is_hashed_once(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hashing 65,000 tokens takes milliseconds, which every step of the others paid."""
    hashed: list[int] = []

    def counted(tokens: Sequence[int], page: int) -> list[bytes]:
        hashed.append(len(tokens))
        return page_keys(tokens, page)

    for module in (paged_engine, cache_pool):
        monkeypatch.setattr(module, "page_keys", counted)
    config = parts.model.config
    sizes = CacheSizes.of(config, page=64, dtype=torch.float32, places=16, prompt_rows=64)
    engine = paged(parts, cache_bytes=sizes.bytes(4))
    for index in range(2):
        engine.add(request_of(str(index), prompt_of(100, index), max_tokens=8))
    for _ in range(4):
        engine.step()
    assert len(engine._running) == 1 and hashed == [100, 100]
    assert len(finish(engine)) == 2


def test_pages_are_shared_by_the_hash_of_their_tokens_and_reused_oldest_first() -> None:
    pool = CachePool(6, 4, 4)
    first = pool.acquire(range(10), 12)
    assert first is not None and first.length == 0 and pool.usage == pytest.approx(0.6)
    first.length = 10
    pool.publish(first)
    second = pool.acquire([*range(8), 99], 12)
    assert second is not None and second.length == 8 and second.pages[:2] == first.pages[:2]
    assert pool.acquire([5], 9) is None
    pool.release(first)
    third = pool.acquire([5], 5)
    assert third is not None and not set(third.pages) & set(second.pages)
    pool.release(second)
    pool.release(third)
    assert pool.usage == 0.0
    # All of a prompt is never taken from the cache: its last token gives the first logits.
    again = pool.acquire(range(8), 9)
    assert again is not None and again.length == 4


def test_sampled_tokens_are_kept_for_the_slots_of_their_step(parts: Parts) -> None:
    model = paged(parts).paged
    for slots, tokens in (((3, 1), (7, 8)), ((3, 1), (9, -1)), ((1, 3), (5, 6)), ((2,), (4,))):
        leases = [Lease(pages=[], length=0, max_len=1, slot=slot) for slot in slots]
        model.keep(torch.tensor(tokens), leases)
        # A token that could not be chosen is never looked up.
        assert model.latest_S[list(slots)].tolist() == [max(0, token) for token in tokens]
    assert model.latest_S[:4].tolist() == [0, 5, 4, 6]
