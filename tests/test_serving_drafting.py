"""Drafts that the device judges change no text, whatever is accepted; on a CPU by the plain operations."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from serving_parts import (
    MAX_MODEL_LEN,
    Parts,
    make_parts,
    moved_after,
    request_of,
    run,
    run_failing,
    tokens_of,
)

from sparseray.actors.serving.device_sampler import numbers_of, sample_rows
from sparseray.actors.serving.drafting_engine import DraftingEngine
from sparseray.actors.serving.drafting_model import DraftingModel
from sparseray.actors.serving.paged_engine import Flight
from sparseray.actors.serving.text_request import GenerationRequest, TokenEvent
from sparseray.errors import ConfigError
from sparseray.kernels.ops import REFERENCE
from sparseray.kernels.paged_plain_ops import PagedPlainOps
from sparseray.model.config import DSEConfig, MLAConfig, MTPConfig

PROMPT = tuple(range(20, 57))


class ExpandingOps(PagedPlainOps):
    """As the kernels do: prompts' chunks attend to keys and values that are made of the latents again."""

    expands_latents = True


MEMORY = DSEConfig(layers=(1,), rows_per_head=512, num_buckets=4, document_end_id=0)
KINDS: dict[str, dict[str, Any]] = {
    "full and nsa": {},
    "memory": {"dse": MEMORY},
    "memory in the first layer": {"dse": replace(MEMORY, layers=(0, 1), document_end_id=7)},
    "latent": {"attention": ("mla",), "mla": MLAConfig(q_lora_rank=24)},
    "latent, expanded": {
        "attention": ("mla",), "mla": MLAConfig(kv_lora_rank=24, qk_rope_head_dim=8), "ops": ExpandingOps()
    },
}  # fmt: skip


LONG = ("memory in the first layer",)


@pytest.fixture(
    scope="module",
    params=[pytest.param(kind, marks=[pytest.mark.long] if kind in LONG else []) for kind in KINDS],
)
def parts(request: pytest.FixtureRequest) -> Parts:
    changes = {"ops": REFERENCE, "mtp": MTPConfig(depth=1), "dse": DSEConfig(), **KINDS[request.param]}
    return with_convolutions(make_parts(**changes))


def with_convolutions(parts: Parts) -> Parts:
    """They begin at zero, and would hide what they look back to."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in parts.model.named_parameters():
        if name.endswith("conv.weight"):
            parameter.data.normal_(generator=generator)
    return parts


class ToldModel(DraftingModel):
    """Drafts what the text will be, or something else, by the throw of a coin; `drafted` is what the module said."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.coin, self.share = random.Random(4), 0.7
        self.truth: dict[int, list[int]] = {}
        self.drafted: dict[tuple[int, int], int] = {}

    def _told(self, slot: int, draft: int) -> int:
        place = int(self.state_S.length_S[slot]) + 1
        self.drafted[slot, place] = draft
        whole = self.truth.get(slot, [])
        return whole[place] if place < len(whole) and self.coin.random() < self.share else draft

    def read(self, reads: Any, experts: Any) -> None:
        super().read(reads, experts)
        for slot in [r.lease.slot for r in reads if r.is_last]:
            self._tell(slot)

    def _tell(self, slot: int) -> None:
        drafts_S = self.state_S.draft_S
        drafts_S[slot] = self._told(slot, int(drafts_S[slot]))

    def _drafted_anew(self, slots_B: Any) -> None:
        for slot in slots_B.tolist():
            self._tell(slot)


class ToldEngine(DraftingEngine):
    """Knows the texts."""

    runs_on = ToldModel
    truth: dict[str, list[int]]

    def _admit(self) -> None:
        super()._admit()
        assert isinstance(self.paged, ToldModel)
        for sequence in self._running:
            assert sequence.lease is not None
            self.paged.truth[sequence.lease.slot] = self.truth.get(sequence.request.request_id, [])


class NoEvent:
    def synchronize(self) -> None: ...

    def record(self) -> None: ...


class AheadEngine(ToldEngine):
    """Starts a step before it takes the one before, as on a GPU."""

    def _sample(self, *arguments: Any) -> Flight:
        return replace(super()._sample(*arguments), done=NoEvent())  # type: ignore[arg-type]


def told(
    parts: Parts, truth: dict[str, list[int]], kind: type[ToldEngine] = ToldEngine, **options: Any
) -> Any:
    options = {"max_batch": 8, "max_model_len": MAX_MODEL_LEN, "prefill_chunk": 16, **options}
    memory = parts.memory if parts.model.config.dse.layers else None
    engine = kind(parts.model, parts.experts, memory, grammars=parts.grammars, **options)
    engine.truth = truth
    return engine


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "drawn": {"temperature": 1.0, "seed": 3},
    "least": {"temperature": 0.6, "seed": 2**63 + 5, "min_p": 0.05},
    "cut": {"temperature": 0.9, "seed": -4, "top_p": 0.9, "top_k": 20, "min_p": 0.01},
    "penalised": {"temperature": 0.0, "repetition_penalty": 1.3},
    "counted": {"temperature": 0.8, "frequency_penalty": 0.4, "presence_penalty": 0.2, "repetition_penalty": 0.9},
    "biased": {"temperature": 0.7, "top_p": 0.8, "logit_bias": ((5, 2.0), (9, -3.0))},
    "later": {"temperature": 2.0, "seed": 8, "min_tokens": 9, "stop_token_ids": tuple(range(0, 300, 3))},
}  # fmt: skip
# Documents end in it, where a memory looks back no further.
WAYS["documents"] = {"temperature": 1.0, "seed": 2, "logit_bias": ((0, 4.0), (7, 4.0))}
UNDRAFTED = ("told", "allowed", "barred", "none")


def requests() -> list[GenerationRequest]:
    """Ones that draw in every way and end in every way, and others beside them that are never drafted for."""
    return [
        *(request_of(name, PROMPT[i:], **{"max_tokens": 24, **way}) for i, (name, way) in enumerate(WAYS.items())),
        request_of("odd", PROMPT[3:], temperature=0.0, max_tokens=23),
        request_of("told", PROMPT[5:], temperature=0.0, logprobs=3, prompt_logprobs=1, max_tokens=24),
        request_of("allowed", PROMPT[:20], allowed_token_ids=tuple(range(40, 90)), max_tokens=24),
        request_of("barred", PROMPT[:22], bad_words=((5,), (7, 8)), max_tokens=24),
        request_of("ends", PROMPT[:30], temperature=0.0, stop_token_ids=tuple(range(0, 300, 9)), max_tokens=60),
        request_of("one", PROMPT[:5], temperature=0.0, max_tokens=1),
        request_of("two", PROMPT[:6], temperature=0.0, max_tokens=2),
        request_of("none", PROMPT[:5], max_tokens=0, prompt_logprobs=2),
        request_of("token", (7,), temperature=0.0, max_tokens=9),
    ]  # fmt: skip


def plain(events: dict[str, list[TokenEvent]]) -> dict[str, list[tuple[Any, ...]]]:
    """What a client sees but for log probabilities, which hold their rounding."""
    return {
        name: [(e.index, e.token_id, e.finish_reason, e.error) for e in found]
        for name, found in events.items()
    }


@pytest.fixture(scope="module")
def expected(parts: Parts) -> dict[str, list[TokenEvent]]:
    return run(parts.engine(), requests())


def whole(expected: dict[str, list[TokenEvent]]) -> dict[str, list[int]]:
    return {r.request_id: [*r.prompt_tokens, *tokens_of(expected[r.request_id])] for r in requests()}


@pytest.mark.one_in(12)
@pytest.mark.parametrize("worth", [0.0, 0.9], ids=["always", "with rests"])
@pytest.mark.parametrize("kind", [ToldEngine, AheadEngine], ids=["in step", "one step ahead"])
def test_texts_of_every_kind_are_the_same_with_drafts_and_without(
    parts: Parts, expected: dict[str, list[TokenEvent]], kind: type[ToldEngine], worth: float
) -> None:
    engine = told(parts, whole(expected), kind)
    engine.worth = worth
    found = run(engine, requests())
    assert plain(found) == plain(expected)
    accepted = {name: sum(e.accepted for e in events) for name, events in found.items()}
    rejected = {name: sum(e.rejected for e in events) for name, events in found.items()}
    assert all(accepted[name] for name in WAYS) or worth, accepted
    assert sum(accepted.values()) > (15 if worth else 60) and sum(rejected.values()) > 5
    counts = engine.take_counts()
    assert counts.accepted[1] >= sum(accepted.values())
    assert counts.drafted[1] >= sum(accepted.values()) + sum(rejected.values())
    assert not any(accepted[name] + rejected[name] for name in UNDRAFTED)
    assert engine.cache_usage == 0.0
    assert engine.stats.generated_tokens == sum(len(tokens_of(events)) for events in expected.values())


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    "names", [("greedy", "drawn", "least", "cut", "odd"), ("drawn", "counted"), ("documents",)], ids=str
)
def test_steps_that_start_ahead_of_the_host_change_no_text(
    parts: Parts, expected: dict[str, list[TokenEvent]], names: tuple[str, ...]
) -> None:
    """Nothing in the company waits for the host's sampler."""
    engine = told(parts, whole(expected), AheadEngine)
    engine.worth = 0.0
    found = run(engine, [r for r in requests() if r.request_id in names])
    assert plain(found) == {name: plain(expected)[name] for name in names}
    assert sum(e.accepted for events in found.values() for e in events) > 4 * len(names)


@pytest.mark.long
@pytest.mark.parametrize("seed", [0, 1])
def test_texts_are_the_same_in_any_company(parts: Parts, seed: int) -> None:
    """Requests of random settings that come at random; few are accepted, so drafting pauses and begins again."""
    source = random.Random(seed)

    def asked(index: int) -> GenerationRequest:
        return request_of(
            str(index),
            tuple(source.choices(range(300), k=source.randrange(1, 60))),
            max_tokens=source.randrange(1, 60),
            temperature=source.choice([0.0, 0.2, 0.8, 1.5]),
            top_p=source.choice([1.0, 1.0, 0.7]),
            top_k=source.choice([0, 0, 1, 30]),
            min_p=source.choice([0.0, 0.1]),
            repetition_penalty=source.choice([1.0, 1.0, 1.0, 1.2]),
            presence_penalty=source.choice([0.0, 0.0, 0.0, 0.3]),
            logprobs=source.choice([None, None, None, None, 1]),
            stop_token_ids=tuple(source.choices(range(300), k=4)),
            min_tokens=source.choice([0, 0, 0, 5]),
            seed=source.randrange(1 << 64),
        )

    coming = [asked(index) for index in range(14)]
    wanted = plain(run(parts.engine(), coming))
    truth = {
        r.request_id: [*r.prompt_tokens, *(t for _, t, _, _ in wanted[r.request_id] if t is not None)] for r in coming
    }  # fmt: skip
    engine, found = told(parts, truth, source.choice([ToldEngine, AheadEngine])), []
    engine.paged.share, engine.worth, waiting = source.choice([0.2, 0.5]), 0.4, list(coming)
    while waiting or engine.has_work:
        if waiting and (source.random() < 0.2 or not engine.has_work):
            engine.add(waiting.pop(0))
        found += engine.step()
    for request in coming:
        name = request.request_id
        assert plain({name: [e for e in found if e.request_id == name]})[name] == wanted[name], request
    assert engine.cache_usage == 0.0


def test_every_accepted_draft_saves_a_step(parts: Parts, expected: dict[str, list[TokenEvent]]) -> None:
    steps = []
    for share in (1.0, 0.0):
        engine = told(parts, whole(expected))
        engine.paged.share = share
        run(engine, requests()[:1])
        steps.append(engine.stats.steps)
    # Three chunks of the prompt, whose last gives the first token; then two tokens a step, or one.
    assert steps[0] == 3 + 12 and 3 + 12 < steps[1] <= 3 + 23


@pytest.mark.one_in(5)
@pytest.mark.parametrize("worth", [0.0, 0.9], ids=["always", "with rests"])
@pytest.mark.parametrize(
    "way", [{}, {"temperature": 1.0, "seed": 3}, {"temperature": 0.9, "top_p": 0.9}], ids=str
)
def test_drafts_are_what_the_module_says_of_the_whole_text(
    parts: Parts, worth: float, way: dict[str, Any]
) -> None:
    """Drawn by the number of their place. The module's caches hold what training would have computed, whatever was
    accepted and given up before, and whatever was decoded without drafts in between."""
    request = request_of("one", PROMPT, **{"temperature": 0.0, "max_tokens": 70, **way})
    truth = [*PROMPT, *tokens_of(run(parts.engine(), [request])["one"])]
    engine = told(parts, {"one": truth}, AheadEngine)
    engine.worth = worth
    run(engine, [request])
    with torch.no_grad():
        text = torch.tensor([truth])
        main = parts.model(text, experts=parts.experts, memory=parts.memory).hidden_BTH
        further = next(iter(parts.model.predictions(text, main, parts.experts))).hidden_BTH
        logits_TV = parts.model.logits(further[0])
    # Where a tail is cut, the most probable token is drafted.
    rule, count = replace(request, temperature=0.0) if request.top_p < 1.0 else request, len(truth) - 1
    numbers_R = numbers_of([rule] * count, range(2, len(truth) + 1))
    said = sample_rows(logits_TV[:count], [rule] * count, [truth] * count, numbers_R).tolist()
    drafted = {place: draft for (_, place), draft in engine.paged.drafted.items() if place <= len(truth)}
    agreed = [said[place - 2] == draft for place, draft in drafted.items()]
    assert len(agreed) > (12 if worth else 30)
    assert sum(agreed) >= len(agreed) - 1, "a tie within rounding is possible, no more"


@pytest.mark.long
def test_a_request_that_moves_goes_on_with_its_tokens(
    parts: Parts, expected: dict[str, list[TokenEvent]]
) -> None:
    for cut in (1, 7):
        moved = moved_after(cut, requests(), expected)
        found = run(told(parts, whole(expected)), moved)
        for request in moved:
            name = request.request_id
            assert plain(found)[name] == plain(expected)[name][cut:]


@pytest.mark.long
@pytest.mark.parametrize("kind", [ToldEngine, AheadEngine], ids=["in step", "one step ahead"])
def test_a_step_that_fails_loses_no_token(
    parts: Parts, expected: dict[str, list[TokenEvent]], kind: type[ToldEngine]
) -> None:
    events = run_failing(told(parts, whole(expected), kind, max_failures=9), requests())
    for name, found in expected.items():
        assert tokens_of(events[name]) == tokens_of(found)


def test_a_shared_prefix_gives_the_same_text(parts: Parts) -> None:
    first = request_of("first", (*PROMPT, *PROMPT, 3, 4, 5), temperature=0.0, max_tokens=6)
    second = request_of("second", (*PROMPT, *PROMPT, 9, 8, 7), temperature=0.0, max_tokens=12)
    wanted = tokens_of(run(parts.engine(), [second])["second"])
    engine = told(parts, {"second": [*second.prompt_tokens, *wanted]})
    run(engine, [first])
    assert tokens_of(run(engine, [second])["second"]) == wanted and engine.pool.shared_tokens >= 16


def test_drafting_needs_modules() -> None:
    other = make_parts(REFERENCE)
    with pytest.raises(ConfigError, match=r"model\.mtp\.depth=0"):
        DraftingEngine(other.model, other.experts, other.memory)
