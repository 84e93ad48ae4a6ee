"""An engine compiles nothing once it serves: whatever a request may need was launched before (GPU)."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from serving_parts import Parts, finish, make_parts, on_device, request_of, weights_on
from test_serving_paged import prompt_of
from test_serving_paged_kernels import LATENT

from sparseray.actors.serving.drafting_engine import DraftingEngine
from sparseray.actors.serving.paged_engine import PagedEngine
from sparseray.model.config import DSEConfig, MTPConfig, NSAConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.timeout(300),
]
GPU = torch.device("cuda")
LONGEST, CHUNK, BATCH = 4096, 700, 24
NSA = NSAConfig(block=16, stride=8, select_block=16, num_selected=4, num_initial=1, num_local=1, window=32)
MODELS: dict[str, dict[str, Any]] = {
    "nsa": {"attention": ("full", "nsa"), "nsa": NSA, "dse": DSEConfig()},
    "memory": {"nsa": NSA},
    "full": {"attention": ("full",), "dse": DSEConfig()},
    "latent": {**LATENT, "mtp": MTPConfig()},
    "nsa with drafts": {"nsa": NSA, "dse": DSEConfig(), "mtp": MTPConfig(depth=1)},
    "latent with drafts": LATENT,
}
WAYS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {"temperature": 0.8},
    {"top_p": 0.9, "top_k": 20, "min_p": 0.01},
    {"repetition_penalty": 1.2, "logit_bias": ((5, 2.0),)},
    {"logprobs": 2},
)


@pytest.fixture
def compiled() -> Iterator[list[str]]:
    """What Triton has compiled, or loaded compiled, so far; what tests before this one needed is forgotten."""
    from triton import knobs
    from triton.runtime.jit import JITFunction

    from sparseray.kernels import launch

    launch._compiled.clear()
    for kernel in gc.get_objects():
        if isinstance(kernel, JITFunction):
            kernel.device_caches.clear()
    found: list[str] = []

    def noted(**about: Any) -> None:
        found.append(about["repr"])

    before = knobs.runtime.jit_post_compile_hook
    knobs.runtime.jit_post_compile_hook = noted
    yield found
    knobs.runtime.jit_post_compile_hook = before


def serving(parts: Parts, dtype: torch.dtype) -> PagedEngine:
    model, experts = weights_on(parts, GPU, dtype)
    kind = DraftingEngine if parts.model.config.mtp.depth else PagedEngine
    memory = on_device(parts, GPU) if parts.model.config.dse.layers else None
    return kind(
        model, experts, memory, max_batch=BATCH, max_model_len=LONGEST, prefill_chunk=CHUNK, cache_bytes=256 << 20
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("model", MODELS)
def test_nothing_is_compiled_for_a_request(model: str, dtype: torch.dtype, compiled: list[str]) -> None:
    engine = serving(make_parts(max_seq_len=LONGEST, **MODELS[model]), dtype)
    assert compiled
    count, later = 0, dict[str, str]()

    def ask(what: str, *lengths: int, **way: Any) -> None:
        nonlocal count
        compiled.clear()
        for length in lengths:
            prompt = prompt_of(length, count)
            engine.add(request_of(f"{count}", prompt, **{"temperature": 0.0, "max_tokens": 3, **way}))
            count += 1
        finish(engine)
        later.update(dict.fromkeys(compiled, what))

    for length in (1, 2, 3, 5, 16, 17, 33, 64, 65, 100, 129, 257, 300, 699, 1100, 2500, LONGEST - 5):
        ask(f"a prompt of {length}", length)
    for company in (2, 3, 5, 8, 17, BATCH):
        ask(f"{company} prompts", *(3 + 7 * index for index in range(company)))
    ask("company of all lengths", 600, 1, 90, 1000, 33, 2100)
    for way in WAYS:
        ask(f"{way}", 20, 7, max_tokens=8, **way)
    assert not later, "\n".join(f"{what}: {text}" for text, what in later.items())
