"""Drafts on a GPU: texts with drafts and without, however they are drawn, with memory layers too; skipped without one."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from serving_parts import (
    MAX_MODEL_LEN,
    Parts,
    finish,
    make_parts,
    on_device,
    request_of,
    tokens_of,
    weights_on,
)
from test_serving_drafting import MEMORY, WAYS, with_convolutions
from test_serving_paged import prompt_of
from torch import Tensor

from sparseray.actors.serving.drafting_engine import DraftingEngine
from sparseray.actors.serving.drafting_model import DraftingModel
from sparseray.actors.serving.paged_engine import PagedEngine
from sparseray.actors.serving.text_request import GenerationRequest
from sparseray.kernels.ops import REFERENCE
from sparseray.kernels.paged import Draws
from sparseray.kernels.triton_ops import TRITON
from sparseray.model.config import DSEConfig, MLAConfig, MTPConfig
from sparseray.model.moe import LocalExperts
from sparseray.model.transformer import Transformer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.timeout(600),
]
GPU = torch.device("cuda")
KINDS: dict[str, dict[str, Any]] = {
    "full and nsa": {},
    "latent": {"attention": ("mla",), "mla": MLAConfig(q_lora_rank=24, kv_lora_rank=64, qk_rope_head_dim=16)},
    "memory": {"attention": ("full",), "dse": MEMORY},
}
OnGpu = tuple[Transformer, LocalExperts]


@pytest.fixture(scope="module", params=list(KINDS))
def parts(request: pytest.FixtureRequest) -> Parts:
    changes = {"mtp": MTPConfig(depth=1), "dse": DSEConfig(), **KINDS[request.param]}
    return with_convolutions(make_parts(REFERENCE, **changes))


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def on_gpu(parts: Parts, request: pytest.FixtureRequest) -> OnGpu:
    """The same weights on the GPU."""
    return weights_on(parts, GPU, getattr(torch, request.param))


class ToldModel(DraftingModel):
    """Drafts by a table of what stands where; -1 is what the module says."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.table_SL = torch.full((len(self.latest_S), MAX_MODEL_LEN + 2), -1, device=self.device)

    def _drafted_anew(self, slots_B: Tensor) -> None:
        drafts_S = self.state_S.draft_S
        told_B = self.table_SL[slots_B, self.state_S.length_S[slots_B] + 1]
        drafts_S.index_copy_(0, slots_B.long(), torch.where(told_B < 0, drafts_S[slots_B], told_B).int())


class ToldEngine(DraftingEngine):
    runs_on = ToldModel
    truth: dict[str, list[int]]
    wrong = 0

    def _admit(self) -> None:
        super()._admit()
        assert isinstance(self.paged, ToldModel)
        for sequence in self._running:
            text = self.truth.get(sequence.request.request_id, [])
            told = [(token + self.wrong) % 300 if i % 5 else 7 for i, token in enumerate(text)]
            assert sequence.lease is not None
            self.paged.table_SL[sequence.lease.slot, : len(told)] = torch.tensor(told, device=GPU)


def engine_of(kind: type[PagedEngine], parts: Parts, on_gpu: OnGpu, **options: Any) -> Any:
    options = {"max_batch": 8, "max_model_len": MAX_MODEL_LEN, "prefill_chunk": 64, "page": 64, **options}
    memory = on_device(parts, GPU) if parts.model.config.dse.layers else None
    return kind(*on_gpu, memory, cache_bytes=64 << 20, **options)


def asked() -> list[GenerationRequest]:
    return [
        request_of(name, prompt_of(60 + 9 * i, i), **{"max_tokens": 30 + i, **way})
        for i, (name, way) in enumerate(WAYS.items())
    ]


@pytest.mark.parametrize(
    ("wrong", "worth"),
    [(0, 0.0), (1, 0.0), (0, 0.9)],
    ids=["most are accepted", "none is accepted", "with rests"],
)
def test_texts_are_the_same_with_drafts_and_without(
    parts: Parts, on_gpu: OnGpu, wrong: int, worth: float
) -> None:
    """In fp32 to the token; in bf16 what is most probable: rows in other company are rounded otherwise, and a draw tells."""
    plain = engine_of(PagedEngine, parts, on_gpu)
    for request in asked():
        plain.add(request)
    expected = finish(plain)
    engine = engine_of(ToldEngine, parts, on_gpu)
    engine.wrong, engine.worth = wrong, worth
    engine.truth = {r.request_id: [*r.prompt_tokens, *tokens_of(expected[r.request_id])] for r in asked()}
    for request in asked():
        engine.add(request)
    found = finish(engine)
    for name, events in expected.items():
        if on_gpu[0].embedding.dtype == torch.float32 or not WAYS[name]["temperature"]:
            assert tokens_of(found[name]) == tokens_of(events), name
    accepted = sum(e.accepted for events in found.values() for e in events)
    if worth == 0.0:
        assert accepted > 50 if not wrong else accepted < 20
    assert engine.cache_usage == 0.0


def test_steps_with_drafts_start_before_the_tokens_of_those_before_them_are_taken(
    parts: Parts, on_gpu: OnGpu
) -> None:
    engine = engine_of(DraftingEngine, parts, on_gpu)
    engine.worth = 0.0
    for i, way in enumerate(("greedy", "drawn", "cut")):
        engine.add(request_of(way, prompt_of(20, i), **{"max_tokens": 30, **WAYS[way]}))
    for _ in range(5):
        engine.step()
        assert engine._flight is not None and engine._may_overtake(engine._flight)
    finish(engine)


def test_a_replayed_step_gives_the_bits_of_the_step_that_it_holds(parts: Parts, on_gpu: OnGpu) -> None:
    texts, num_graphs = [], 3 if parts.model.config.dse.layers else 2
    for is_graph in (True, False):
        engine = engine_of(DraftingEngine, parts, copy.copy(on_gpu))
        for step in engine.paged._drafted.values():
            assert len(step.graphs) == num_graphs
            if not is_graph:
                step.graphs.clear()
        for request in asked()[:4]:
            engine.add(request)
        texts.append({name: tokens_of(events) for name, events in finish(engine).items()})
    assert texts[0] == texts[1]


@pytest.mark.parametrize("vocab", [300, 32000, 129280])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_kernel_draws_what_sorting_nothing_draws(vocab: int, dtype: torch.dtype) -> None:
    torch.manual_seed(vocab)
    logits_RV = (2 * torch.randn(64, vocab, device=GPU)).to(dtype)
    one_R = torch.ones(64, dtype=torch.float64, device=GPU)
    number_R = torch.rand(64, dtype=torch.float64, device=GPU)
    for temperature, min_p in ((0.0, 0.0), (0.8, 0.0), (1.5, 0.02)):
        draws = Draws(temperature_R=temperature * one_R, min_p_R=min_p * one_R, number_R=number_R)
        assert torch.equal(TRITON.draw(logits_RV, draws), REFERENCE.draw(logits_RV, draws))
