"""Where the host waits for a GPU: in a training step for its norms alone, in a step of serving for its tokens; skipped without one."""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from local_cluster import train
from serving_parts import MAX_MODEL_LEN, make_parts, on_device, request_of
from test_gpu_training import run_on
from test_serving_paged import prompt_of

from sparseray.actors.roles import Roles
from sparseray.actors.serving.drafting_engine import DraftingEngine
from sparseray.actors.serving.paged_engine import PagedEngine
from sparseray.actors.training import worker
from sparseray.actors.training.worker import AttentionWorker
from sparseray.kernels.ops import ops_for
from sparseray.model.config import DSEConfig, MLAConfig, MTPConfig
from sparseray.model.moe import LocalExperts
from sparseray.model.transformer import Transformer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.timeout(300),
]
GPU = torch.device("cuda")
WAITING = "called a synchronizing CUDA operation"
KINDS: dict[str, dict[str, Any]] = {
    "full": {"attention": ("full",), "dse": DSEConfig()},
    "nsa": {"dse": DSEConfig()},
    "latent": {
        "attention": ("mla",),
        "mla": MLAConfig(q_lora_rank=24, kv_lora_rank=64, qk_rope_head_dim=16),
        "dse": DSEConfig(),
    },
    "memory": {},
    "drafts": {"attention": ("full",), "dse": DSEConfig(), "mtp": MTPConfig(depth=1)},
}


def waits_of(run: Callable[[], Any]) -> list[str]:
    """Files and lines at which this thread waits for the device: by torch's own accord, or because it was told to."""
    found: list[str] = []
    me = threading.get_ident()

    def shown(message: Any, category: Any, filename: str, lineno: int, *rest: Any) -> None:
        if threading.get_ident() == me and WAITING in str(message):
            found.append(f"{Path(filename).name}:{lineno}")

    def noted(wait: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            if threading.get_ident() == me:
                caller = sys._getframe(1)
                found.append(f"{Path(caller.f_code.co_filename).name}:{caller.f_lineno}")
            return wait(*arguments)

        return call

    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("always")
        warnings.showwarning = shown
        for owner in (torch.cuda.Event, torch.cuda.Stream, torch.cuda):
            patch.setattr(owner, "synchronize", noted(owner.synchronize))
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return found


def files_of(found: list[str]) -> list[str]:
    return [place.partition(":")[0] for place in found]


def test_waits_are_seen() -> None:
    x = torch.ones(3, device=GPU)
    here = Path(__file__).name
    assert files_of(waits_of(lambda: x.tolist())) == [here]
    assert files_of(waits_of(lambda: torch.cuda.current_stream().record_event().synchronize())) == [here]
    assert not waits_of(lambda: x.to("cpu", non_blocking=True))
    assert files_of(waits_of(lambda: torch.ones(3).to(GPU))) == [here]


@pytest.mark.parametrize("keys", [{}, {"logical_shards": 1}, {"recompute": True}], ids=str)
@pytest.mark.parametrize("is_graph", [True, False], ids=["replayed", "launched"])
def test_a_training_step_waits_for_its_norms_and_losses_alone(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keys: dict[str, Any], is_graph: bool
) -> None:
    """With memory rows; the first steps compile and record."""
    found: dict[str, list[list[str]]] = {"step": [], "update": []}

    def watched(kind: type, method: str, name: str) -> None:
        run = getattr(kind, method)
        monkeypatch.setattr(
            kind,
            method,
            lambda *arguments, **named: found[name].append(waits_of(lambda: run(*arguments, **named))),
        )

    if not is_graph:
        monkeypatch.setattr(worker, "graph_of", lambda *arguments: None)
    watched(AttentionWorker, "run_step", "step")
    watched(Roles, "_apply", "update")
    train(tmp_path, run_on("cuda", corpus, steps=6, **keys))
    for step in found["step"][2:]:
        assert files_of(step) == ["on_device.py"] * 3, step  # Losses and counts, then norms.
    assert len(found["step"]) == len(found["update"]) == 6
    assert not any(found["update"][2:]), found["update"]


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_step_of_serving_waits_for_the_tokens_of_one_step(kind: str) -> None:
    """Prompts beside decoding, requests that draw in every way, and some whose logits are changed."""
    plain, ops = make_parts(**KINDS[kind]), ops_for("auto", GPU)
    config = plain.model.config
    model, experts = Transformer(config, plain.model.layout, ops=ops).eval(), LocalExperts(config, ops=ops)
    model.load_state_dict(plain.model.state_dict())
    experts.load_state_dict(plain.experts.state_dict())
    memory = on_device(plain, GPU) if config.dse.layers else None
    engine_kind = DraftingEngine if config.mtp.depth else PagedEngine
    engine = engine_kind(
        model.to(GPU), experts.to(GPU), memory, grammars=plain.grammars, cache_bytes=64 << 20, page=64,
        max_batch=16, max_model_len=MAX_MODEL_LEN, prefill_chunk=64,
    )  # fmt: skip
    ways: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 0.8, "top_p": 0.9, "top_k": 20, "min_p": 0.01},
        {"temperature": 0.7, "repetition_penalty": 1.2, "frequency_penalty": 0.1},
        {"temperature": 0.0, "logit_bias": ((5, 2.0),)},
        {"temperature": 0.9, "logprobs": 2},
    ]
    found: list[list[str]] = []
    # The second time nothing is compiled any more; with the ways one after another, from none to all of them.
    for _ in range(2):
        found.clear()
        for count in range(1, len(ways) + 1):
            for index, way in enumerate(ways[:count]):
                asked = request_of(f"{count}-{index}", prompt_of(70 + 9 * index, count), seed=index, **way)
                engine.add(replace(asked, max_tokens=10))
            while engine.has_work:
                found.append(waits_of(engine.step))
    own = Path(sys.modules[engine_kind.__module__].__file__ or "").name
    for step in found:
        assert len(step) <= 1 and set(files_of(step)) <= {"paged_engine.py", own}, step
