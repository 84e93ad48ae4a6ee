"""Drafts that the device judges change no greedy text, whatever is accepted; on a CPU by the plain operations."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from serving_parts import (
    MAX_MODEL_LEN,
    Parts,
    finish,
    make_parts,
    moved_after,
    request_of,
    run,
    run_failing,
    tokens_of,
)

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


KINDS: dict[str, dict[str, Any]] = {
    "full and nsa": {},
    "latent": {"attention": ("mla",), "mla": MLAConfig(q_lora_rank=24)},
    "latent, expanded": {
        "attention": ("mla",), "mla": MLAConfig(kv_lora_rank=24, qk_rope_head_dim=8), "ops": ExpandingOps()
    },
}  # fmt: skip


@pytest.fixture(scope="module", params=list(KINDS))
def parts(request: pytest.FixtureRequest) -> Parts:
    changes = {"ops": REFERENCE, "mtp": MTPConfig(depth=1), "dse": DSEConfig(), **KINDS[request.param]}
    return make_parts(**changes)


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
    engine = kind(parts.model, parts.experts, None, grammars=parts.grammars, **options)
    engine.truth = truth
    return engine


def requests() -> list[GenerationRequest]:
    """Greedy ones that end in every way, and others beside them that are never drafted for."""
    return [
        request_of("greedy", PROMPT, temperature=0.0, max_tokens=24),
        request_of("odd", PROMPT[3:], temperature=0.0, max_tokens=23),
        request_of("drawn", PROMPT[3:], temperature=1.0, seed=3, max_tokens=24),
        request_of("told", PROMPT[5:], temperature=0.0, logprobs=3, prompt_logprobs=1, max_tokens=24),
        request_of("biased", PROMPT[:20], temperature=0.0, repetition_penalty=1.3, max_tokens=24),
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


@pytest.mark.parametrize("kind", [ToldEngine, AheadEngine], ids=["in step", "one step ahead"])
def test_texts_of_every_kind_are_the_same_with_drafts_and_without(
    parts: Parts, expected: dict[str, list[TokenEvent]], kind: type[ToldEngine]
) -> None:
    engine = told(parts, whole(expected), kind)
    found = run(engine, requests())
    assert plain(found) == plain(expected)
    accepted = sum(e.accepted for events in found.values() for e in events)
    rejected = sum(e.rejected for events in found.values() for e in events)
    assert accepted > 15 and rejected > 5
    counts = engine.take_counts()
    assert counts.accepted[1] >= accepted and counts.drafted[1] >= accepted + rejected
    assert not any(e.accepted + e.rejected for name in ("drawn", "told", "biased") for e in found[name])
    assert engine.cache_usage == 0.0
    assert engine.stats.generated_tokens == sum(len(tokens_of(events)) for events in expected.values())


def test_every_accepted_draft_saves_a_step(parts: Parts, expected: dict[str, list[TokenEvent]]) -> None:
    steps = []
    for share in (1.0, 0.0):
        engine = told(parts, whole(expected))
        engine.paged.share = share
        run(engine, requests()[:1])
        steps.append(engine.stats.steps)
    # Three chunks of the prompt, whose last gives the first token; then two tokens a step, or one.
    assert steps[0] == 3 + 12 and 3 + 12 < steps[1] <= 3 + 23


def test_drafts_are_what_the_module_says_of_the_whole_text(
    parts: Parts, expected: dict[str, list[TokenEvent]]
) -> None:
    """Whatever was accepted and given up before: the module's caches hold what training would have computed."""
    truth = whole(expected)
    engine = told(parts, truth)
    engine.add(requests()[0])
    engine.step()
    slot = engine._running[0].lease.slot
    finish(engine)
    text, agreed = torch.tensor([truth["greedy"]]), []
    with torch.no_grad():
        main = parts.model(text, experts=parts.experts, memory=parts.memory).hidden_BTH
        further = next(iter(parts.model.predictions(text, main, parts.experts))).hidden_BTH
        best = parts.model.logits(further[0]).argmax(-1).tolist()
    for (at, place), draft in engine.paged.drafted.items():
        if at == slot and place - 2 < len(best):
            agreed.append(best[place - 2] == draft)
    assert len(agreed) > 10 and sum(agreed) >= len(agreed) - 1, "a tie within rounding is possible, no more"


def test_a_request_that_moves_goes_on_with_its_tokens(
    parts: Parts, expected: dict[str, list[TokenEvent]]
) -> None:
    for cut in (1, 2, 7):
        moved = moved_after(cut, requests(), expected)
        found = run(told(parts, whole(expected)), moved)
        for request in moved:
            name = request.request_id
            assert plain(found)[name] == plain(expected)[name][cut:]


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


def test_drafting_on_the_device_needs_modules_and_no_memory() -> None:
    for changes, said in (
        ({}, "model.mtp.depth=0"),
        ({"mtp": MTPConfig(depth=1)}, r"model.dse.layers=\[1\]"),
    ):
        other = make_parts(REFERENCE, **changes)
        with pytest.raises(ConfigError, match=said):
            DraftingEngine(other.model, other.experts, other.memory)
