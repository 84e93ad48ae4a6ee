"""The paged engine with the kernels, interpreted without a GPU: the tokens are those of the plain operations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton_interpreter
from serving_parts import MAX_MODEL_LEN, alone, finish, make_parts, request_of, tokens_of
from test_serving_paged import prompt_of
from test_serving_recent_pages import poisoned

from sparseray.actors.serving.drafting_engine import DraftingEngine
from sparseray.actors.serving.paged_engine import PagedEngine
from sparseray.kernels.triton_ops import TRITON
from sparseray.model.config import DSEConfig, MLAConfig, MTPConfig, NSAConfig
from sparseray.model.moe import LocalExperts
from sparseray.model.transformer import Transformer

assert triton_interpreter.prepare  # Imported before anything that uses Triton.


LATENT: dict[str, Any] = {
    "attention": ("mla",),
    "mla": MLAConfig(q_lora_rank=24, kv_lora_rank=24, qk_rope_head_dim=8),
    "dse": DSEConfig(),
    "mtp": MTPConfig(depth=1),
}


@pytest.mark.long
@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/test_gpu_serving.py says the same of a GPU")
@pytest.mark.parametrize(
    ("changes", "kind", "page"),
    [
        ({"nsa": NSAConfig(window=21)}, PagedEngine, 16),
        (LATENT, PagedEngine, 64),
        (LATENT, DraftingEngine, 64),
        ({"dse": DSEConfig(), "mtp": MTPConfig(depth=1)}, DraftingEngine, 16),
        ({"attention": ("full",), "mtp": MTPConfig(depth=1)}, DraftingEngine, 16),
    ],
    ids=["nsa", "latent", "latent with drafts", "nsa with drafts", "memory with drafts"],
)
def test_the_kernels_give_the_tokens_of_the_plain_operations(
    changes: dict[str, Any], kind: type[PagedEngine], page: int
) -> None:
    parts = make_parts(**changes)
    config = parts.model.config
    model = Transformer(config, parts.model.layout, seed=3, ops=TRITON).eval()
    experts = LocalExperts(config, seed=3, ops=TRITON)
    engine = kind(
        model, experts, parts.memory, max_batch=4, max_model_len=MAX_MODEL_LEN, prefill_chunk=32, page=page
    )
    if engine.pool.recent is not None:
        # Of 62 tokens most have left the window.
        poisoned(engine)
    # Over the end of a page, of a chunk and of a compression block, alone and in company.
    requests = [request_of("short", prompt_of(5), max_tokens=4)]
    requests.append(request_of("long", prompt_of(62, 1), max_tokens=4, temperature=0.0))
    requests.append(request_of("cut", prompt_of(9, 2), max_tokens=4, top_p=0.8, presence_penalty=0.5))
    for request in requests:
        engine.add(request)
    found = finish(engine)
    for request in requests:
        assert tokens_of(found[request.request_id]) == tokens_of(alone(parts, request))
