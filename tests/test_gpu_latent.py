"""Latent attention on a GPU: training at 192/128, and caches of latents; skipped without one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from local_cluster import train
from serving_parts import MAX_MODEL_LEN, Parts, cached_logits, make_parts, weights_on
from test_gpu_training import GPU_MODEL, run_on
from test_serving_paged import prompt_of
from torch import Tensor

from sparseray.actors.serving.paged_engine import PagedEngine
from sparseray.kernels.ops import REFERENCE, Ops, ops_for
from sparseray.model.attention.mla import MLAttention
from sparseray.model.config import DSEConfig, MLAConfig, ModelConfig, MTPConfig
from sparseray.model.init import initial_dense
from sparseray.model.layers import Batch, Rope
from sparseray.model.moe import LocalExperts
from sparseray.model.transformer import Transformer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.timeout(600),
]
GPU = torch.device("cuda")
V3 = MLAConfig(q_lora_rank=128, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128)
KINDS: dict[str, dict[str, Any]] = {
    "full and nsa": {},
    "latent": {"attention": ("mla",), "mla": MLAConfig(q_lora_rank=24, kv_lora_rank=64, qk_rope_head_dim=16)},
}


def layer_gradients(ops: Ops, dtype: torch.dtype) -> list[Tensor]:
    """Output, and gradients of input and weights, of a layer with heads of 192 and 128."""
    config = ModelConfig(
        vocab_size=64, hidden=256, num_layers=1, num_heads=4, attention=("mla",), max_seq_len=512, mla=V3
    )
    layer, rope = MLAttention(config, 0, ops), Rope(config).to(GPU)
    for name, p in layer.named_parameters():
        # Drawn on the host.
        p.data = initial_dense(name, p.shape, seed=3, std=0.06).to(GPU, dtype)
    with torch.device(GPU):
        generator = torch.Generator(GPU).manual_seed(0)
        x_RH = torch.randn(600, 256, generator=generator).to(dtype).requires_grad_()
        positions_R = torch.arange(300).repeat(2)
        batch = Batch(shape=(2, 300), positions_R=positions_R, rows=600)
        out_RH = layer((x_RH, x_RH), batch, rope.at(positions_R))
        out_RH.backward(torch.randn(600, 256, generator=generator).to(dtype))
    gradients = [p.grad for p in layer.parameters()]
    return [found.detach().float() for found in (out_RH, x_RH.grad, *gradients) if found is not None]


def test_a_layer_of_heads_of_192_and_128_trains_in_bf16() -> None:
    ours, exact = (
        layer_gradients(ops_for("auto", GPU), torch.bfloat16),
        layer_gradients(REFERENCE, torch.float32),
    )
    assert len(ours) == len(exact) == 2 + 7
    for found, wanted in zip(ours, exact):
        assert float((found - wanted).norm() / wanted.norm()) < 2e-2


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-3), ("bfloat16", 1e-2)])
def test_the_curve_of_latent_attention_is_that_of_a_cpu(
    corpus: Path, tmp_path: Path, dtype: str, tolerance: float
) -> None:
    def run(device: str, dtype: str) -> Any:
        config = run_on(device, corpus, dtype=dtype)
        model = replace(GPU_MODEL, attention=("mla",), mla=V3, dse=DSEConfig())
        return train(tmp_path / device, replace(config, model=model))

    ours, theirs = run("cuda", dtype), run("cpu", "float32")
    for a, b in zip(ours.curve, theirs.curve, strict=True):
        assert a[0] == pytest.approx(b[0], rel=tolerance)


@pytest.fixture(scope="module", params=list(KINDS))
def parts(request: pytest.FixtureRequest) -> Parts:
    return make_parts(REFERENCE, mtp=MTPConfig(depth=1), dse=DSEConfig(), **KINDS[request.param])


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def on_gpu(parts: Parts, request: pytest.FixtureRequest) -> tuple[Transformer, LocalExperts]:
    """The same weights on the GPU."""
    return weights_on(parts, GPU, getattr(torch, request.param))


def engine_of(kind: type[PagedEngine], on_gpu: tuple[Transformer, LocalExperts], **options: Any) -> Any:
    options = {"max_batch": 8, "max_model_len": MAX_MODEL_LEN, "prefill_chunk": 64, "page": 64, **options}
    return kind(*on_gpu, None, cache_bytes=64 << 20, **options)


def test_cached_decoding_equals_the_full_forward_pass(
    parts: Parts, on_gpu: tuple[Transformer, LocalExperts]
) -> None:
    engine, tokens = engine_of(PagedEngine, on_gpu), list(prompt_of(150, 3))
    logits = cached_logits(engine, tokens, (64, 100))
    out = parts.model(torch.tensor([tokens]), experts=parts.experts, memory=None)
    found, wanted = logits.float().cpu(), parts.model.logits(out.hidden_BTH)[0]
    is_exact = on_gpu[0].embedding.dtype == torch.float32
    assert float((found - wanted).norm() / wanted.norm()) < (2e-3 if is_exact else 5e-2)
