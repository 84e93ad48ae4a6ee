"""Serving on a GPU: the paged engine against the full forward pass, graphs, a checkpoint of a CPU; skipped without one."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from paged_runs import greedy
from serving_parts import (
    MAX_MODEL_LEN,
    Parts,
    cached_logits,
    finish,
    make_parts,
    on_device,
    request_of,
    run,
    tokens_of,
    weights_on,
)
from test_serving_paged import REQUESTS, paged, prompt_of
from test_serving_recent_pages import poisoned
from torch import Tensor

from sparseray.actors.serving import decode_step
from sparseray.actors.serving.drafting_engine import DraftingEngine
from sparseray.actors.serving.paged_engine import PagedEngine
from sparseray.actors.serving.recording import captured, nothing, recorded
from sparseray.model.config import DSEConfig, MTPConfig, NSAConfig
from sparseray.model.moe import LocalExperts
from sparseray.model.transformer import Transformer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
GPU = torch.device("cuda")
DSE = DSEConfig(layers=(1,), rows_per_head=512, num_buckets=4, document_end_id=0)


@pytest.fixture(scope="module")
def parts() -> Parts:
    return make_parts()


@pytest.fixture(scope="module")
def on_gpu(parts: Parts) -> tuple[Transformer, LocalExperts]:
    return weights_on(parts, GPU)


def engine_of(parts: Parts, on_gpu: tuple[Transformer, LocalExperts], **options: Any) -> PagedEngine:
    options = {"max_batch": 16, "max_model_len": MAX_MODEL_LEN, "prefill_chunk": 64, "page": 64, **options}
    model, experts = on_gpu
    memory = on_device(parts, GPU) if parts.model.config.dse.layers else None
    return PagedEngine(model, experts, memory, grammars=parts.grammars, cache_bytes=64 << 20, **options)


def test_a_checkpoint_of_a_cpu_gives_its_tokens_on_the_gpu(
    parts: Parts, on_gpu: tuple[Transformer, LocalExperts]
) -> None:
    here, there = paged(parts), engine_of(parts, on_gpu)
    for request in REQUESTS:
        here.add(request)
        there.add(request)
    wanted, found = finish(here), finish(there)
    for name, events in wanted.items():
        assert tokens_of(found[name]) == tokens_of(events), name


def test_cached_decoding_equals_the_full_forward_pass(
    parts: Parts, on_gpu: tuple[Transformer, LocalExperts]
) -> None:
    engine = engine_of(parts, on_gpu)
    tokens = list(prompt_of(150, 3))
    assert engine.pool.recent is not None
    assert all(len(step.graphs) == 2 for step in engine.paged._decodes.values())
    found = cached_logits(engine, tokens, (64, 100))
    out = parts.model(torch.tensor([tokens]), experts=parts.experts, memory=parts.memory)
    wanted = parts.model.logits(out.hidden_BTH)[0]
    torch.testing.assert_close(found.cpu(), wanted, rtol=2e-3, atol=2e-3)


def test_long_texts_on_few_recent_pages_are_those_of_the_full_forward_pass() -> None:
    """All places decode at once on no more pages than they need; those that are nobody's are NaN."""
    plain = make_parts(dse=DSEConfig(), mtp=MTPConfig(depth=1), nsa=NSAConfig(window=21, num_selected=3))
    model, experts = weights_on(plain, GPU)
    prompts = [torch.tensor(prompt_of(3 + 37 * i, i)) for i in range(4)]
    asked = [
        request_of(str(i), tuple(p.tolist()), temperature=0.0, max_tokens=60) for i, p in enumerate(prompts)
    ]
    wanted = {
        str(i): greedy(plain.model, p, 60, experts=plain.experts, memory=None).tolist() for i, p in enumerate(prompts)
    }  # fmt: skip
    for kind in (PagedEngine, DraftingEngine):
        engine = kind(
            model, experts, None, max_batch=4, max_model_len=MAX_MODEL_LEN, prefill_chunk=64, page=16, cache_bytes=64 << 20
        )  # fmt: skip
        recent = poisoned(engine)
        for again in range(2):
            found = run(engine, asked)
            assert {name: tokens_of(events) for name, events in found.items()} == wanted, (kind, again)
        assert recent.num_held == 0 and engine.stats.failed_steps == 0


WAYS: dict[str, dict[str, Any]] = {
    "drawn": {"temperature": 1.0},
    "cut": {"temperature": 0.9, "top_p": 0.9, "top_k": 20, "min_p": 0.01},
    "penalised": {"temperature": 0.8, "repetition_penalty": 1.3, "frequency_penalty": 0.2, "presence_penalty": 0.1},
    "biased": {"temperature": 0.7, "logit_bias": ((5, 2.0), (9, -3.0)), "logprobs": 2},
}  # fmt: skip


def test_tokens_do_not_depend_on_the_company(parts: Parts, on_gpu: tuple[Transformer, LocalExperts]) -> None:
    engine, here = engine_of(parts, on_gpu), paged(parts)
    asked = [request_of(name, prompt_of(90, 11), seed=5, max_tokens=30, **way) for name, way in WAYS.items()]
    alone = {}
    for request in asked:
        engine.add(request)
        here.add(request)
        alone |= {name: tokens_of(events) for name, events in finish(engine).items()}
    on_cpu = finish(here)
    for company in (1, 6, 11):
        for index in range(company):
            engine.add(request_of(str(index), prompt_of(7 * index + 3, index), temperature=1.0, seed=index))
        for request in asked:
            engine.add(request)
        found = finish(engine)
        assert {name: tokens_of(found[name]) for name in WAYS} == alone
    assert {name: tokens_of(on_cpu[name]) for name in WAYS} == alone


def test_prompts_that_graphs_read_give_the_texts_of_prompts_read_without() -> None:
    plain, texts = make_parts(attention=("full",), dse=DSEConfig()), []
    weights = weights_on(plain, GPU)
    for is_graph in (True, False):
        engine = engine_of(plain, weights, prefill_chunk=96)
        assert [graph.rows for graph in engine.paged._prompts._made] == [96]
        if not is_graph:
            engine.paged._prompts._made.clear()
        for index, count in enumerate((150, 3, 40, 96, 5, 64)):
            engine.add(request_of(str(index), prompt_of(count, index), temperature=0.0, max_tokens=9))
        texts.append({name: tokens_of(events) for name, events in finish(engine).items()})
        # The first page of the first prompt is known by now.
        engine.add(request_of("again", prompt_of(150, 0), temperature=0.0, max_tokens=9))
        assert tokens_of(finish(engine)["again"]) == texts[-1]["0"]
    assert texts[0] == texts[1]


def whole(run: Callable[[Callable[[], None]], Tensor], pool: Any) -> Any:
    """A recording without cuts."""
    return recorded(lambda _: run(nothing), pool)


@pytest.mark.parametrize(("layers", "num_parts"), [((1,), 2), ((0, 1), 1), ((), 1)], ids=str)
def test_the_graphs_of_a_step_give_the_bits_of_one_graph_and_of_the_step_that_they_hold(
    layers: tuple[int, ...], num_parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts, found = make_parts(dse=replace(DSE, layers=layers)), {}
    weights = weights_on(parts, GPU)
    for way in ("cut", "whole", "launched"):
        with monkeypatch.context() as patch:
            if way == "whole":
                patch.setattr(decode_step, "recorded", whole)
            engine, rows = engine_of(parts, weights), []
        for step in engine.paged._decodes.values():
            assert len(step.graphs) == (1 if way == "whole" else num_parts)
            if way == "launched":
                step.graphs.clear()
        run = engine.paged.decode

        def noted(*arguments: Any, run: Any = run, rows: list[Tensor] = rows) -> Tensor:
            logits: Tensor = run(*arguments)
            rows.append(logits.clone())
            return logits

        engine.paged.decode = noted  # type: ignore[method-assign]
        for index in range(3):
            engine.add(request_of(str(index), prompt_of(60 + index, index), max_tokens=25 - index))
        finish(engine)
        found[way] = rows
    assert len(found["cut"]) == 24
    for way in ("whole", "launched"):
        assert all(torch.equal(a, b) for a, b in zip(found["cut"], found[way], strict=True)), way


@pytest.mark.parametrize("layers", [(1,), (0,)], ids=str)
def test_a_step_that_begins_before_its_rows_are_known_writes_the_text_of_the_full_forward_pass(
    layers: tuple[int, ...],
) -> None:
    """Steps overtake those before them, beside prompts and requests that end by a token of theirs."""
    parts = make_parts(dse=replace(DSE, layers=layers))
    engine = engine_of(parts, weights_on(parts, GPU))
    prompts = {str(i): torch.tensor(prompt_of(3 + 30 * i, i)) for i in range(4)}
    wanted = {
        name: greedy(parts.model, prompt_T, 20, experts=parts.experts, memory=parts.memory).tolist()
        for name, prompt_T in prompts.items()
    }
    found: dict[str, list[int]] = {}
    for index, (name, prompt_T) in enumerate(prompts.items()):
        stops = (wanted[name][9],) if index == 1 else ()
        if stops:
            wanted[name] = wanted[name][: wanted[name].index(stops[0]) + 1]
        asked = request_of(
            name, tuple(prompt_T.tolist()), temperature=0.0, max_tokens=20, stop_token_ids=stops
        )
        engine.add(asked)
        for event in (event for _ in range(3) for event in engine.step()):
            found.setdefault(event.request_id, []).append(event.token_id)
        assert engine._flight is not None and engine._flight.may_be_overtaken
    for name, events in finish(engine).items():
        found.setdefault(name, []).extend(tokens_of(events))
    assert found == wanted


def test_bf16_serves_with_the_same_kernels(parts: Parts, on_gpu: tuple[Transformer, LocalExperts]) -> None:
    import copy

    from sparseray.actors.state.dense_slab import computes_in_fp32

    model, experts = copy.deepcopy(on_gpu[0]), copy.deepcopy(on_gpu[1])
    for module in (model, experts):
        for name, parameter in module.named_parameters():
            if not computes_in_fp32(name):
                parameter.data = parameter.data.bfloat16()
    engine = engine_of(parts, (model, experts))
    for request in REQUESTS:
        engine.add(request)
    found = finish(engine)
    assert all(events[-1].finish_reason in ("length", "stop") for events in found.values())
    assert engine.cache_usage == 0.0


def test_graphs_among_garbage_wait_while_another_one_is_recorded() -> None:
    """As of an engine that stood in a cycle; each allocation of the recording looks for garbage."""
    x_R, pool = torch.ones(64, device=GPU), torch.cuda.graph_pool_handle()
    cycle: list[Any] = [
        captured(lambda: x_R * 2, pool),
        captured(lambda: x_R * 3, torch.cuda.graph_pool_handle()),
    ]
    cycle.append(cycle)
    del cycle
    before = gc.get_threshold()
    gc.set_threshold(1)
    try:
        graph, found = captured(lambda: sum((x_R * i for i in range(50)), x_R), pool)
    finally:
        gc.set_threshold(*before)
    assert gc.isenabled()
    graph.replay()
    assert torch.equal(found, x_R * 1226)
