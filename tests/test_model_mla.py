"""Latent attention and YaRN against the papers' equations, and what a latent cache costs."""

import math
from dataclasses import replace

import pytest
import torch
from paged_runs import Served, greedy
from torch import Tensor

from sparseray.actors.serving.cache_sizes import page_bytes
from sparseray.errors import ConfigError
from sparseray.kernels.compiled_ops import COMPILED
from sparseray.kernels.ops import REFERENCE, Ops
from sparseray.model.attention.mla import LATENT_EPS, MLAttention
from sparseray.model.config import MLAConfig, ModelConfig, RopeConfig
from sparseray.model.counts import count_parameters, flops_per_token
from sparseray.model.init import initial_dense
from sparseray.model.layers import Batch, Rope, rope_tables
from sparseray.model.moe import LocalExperts
from sparseray.model.paged import PageCounts
from sparseray.model.transformer import Transformer, cross_entropy_sum
from sparseray.model.yarn import frequencies, rotary_scale, score_scale

SIZES = MLAConfig(q_lora_rank=20, kv_lora_rank=24, qk_nope_head_dim=6, qk_rope_head_dim=8, v_head_dim=10)
YARN = RopeConfig(scaling="yarn", factor=40.0, original_max_seq_len=32, mscale=1.0, mscale_all_dim=1.0)
CONFIG = ModelConfig(
    vocab_size=64, hidden=32, num_layers=2, num_heads=4, attention=("mla",), max_seq_len=128, mla=SIZES
)


def turn(x: Tensor, position: int, config: ModelConfig) -> Tensor:
    """Pairs (2i, 2i + 1), as the released code turns them."""
    out, speeds = x.clone(), frequencies(config.rope, config.rope_theta, x.shape[0])
    scale = rotary_scale(config.rope)
    for i, speed in enumerate(speeds.tolist()):
        c, s = math.cos(position * speed) * scale, math.sin(position * speed) * scale
        out[2 * i], out[2 * i + 1] = x[2 * i] * c - x[2 * i + 1] * s, x[2 * i + 1] * c + x[2 * i] * s
    return out


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / torch.sqrt((x * x).mean() + LATENT_EPS) * weight


def slow_mla(layer: MLAttention, config: ModelConfig, x_TH: Tensor) -> Tensor:
    """arXiv 2405.04434 eq. 9-19, head by head and token by token."""
    w, mla = dict(layer.named_parameters()), config.mla
    N, V = mla.qk_nope_head_dim, mla.v_head_dim
    latents, turned, out = [], [], []
    for t, x in enumerate(x_TH):
        down = w["kv_down.weight"] @ x
        latents.append(norm(down[: mla.kv_lora_rank], w["kv_norm.weight"]))
        turned.append(turn(down[mla.kv_lora_rank :], t, config))
        if mla.q_lora_rank is None:
            q = w["q.weight"] @ x
        else:
            q = w["q_up.weight"] @ norm(w["q_down.weight"] @ x, w["q_norm.weight"])
        heads = []
        for h, q_h in enumerate(q.unflatten(0, (config.num_heads, -1))):
            up = w["kv_up.weight"].unflatten(0, (config.num_heads, N + V))[h]
            q_turned = turn(q_h[N:], t, config)
            scores = torch.stack([q_h[:N] @ (up[:N] @ c) + q_turned @ k for c, k in zip(latents, turned)])
            weights = torch.softmax(scores * score_scale(config.rope) / math.sqrt(mla.qk_head_dim), 0)
            heads.append(sum(p * (up[N:] @ c) for p, c in zip(weights, latents)))
        out.append(w["out.weight"] @ torch.cat(heads))
    return torch.stack(out)


@pytest.mark.parametrize("rope", [RopeConfig(), YARN], ids=["plain", "yarn"])
@pytest.mark.parametrize("q_lora_rank", [20, None])
def test_the_layer_equals_the_papers_equations_at_every_token(
    q_lora_rank: int | None, rope: RopeConfig
) -> None:
    config = replace(CONFIG, mla=replace(SIZES, q_lora_rank=q_lora_rank), rope=rope)
    layer = MLAttention(config, 0)
    with torch.no_grad():
        for name, p in layer.named_parameters():
            p.copy_(initial_dense(name, p.shape, seed=3, std=0.4))
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
        x_TH = torch.randn(19, 32, generator=torch.Generator().manual_seed(0))
        batch = Batch(shape=(1, 19), positions_R=torch.arange(19), rows=19)
        fast = layer([x_TH] * layer.num_readers, batch, Rope(config).at(batch.positions_R))
        torch.testing.assert_close(fast, slow_mla(layer, config, x_TH), rtol=1e-4, atol=1e-5)


def test_a_token_costs_a_latent_and_a_rotary_key_a_layer() -> None:
    pool = MLAttention.new_pool(CONFIG, PageCounts(whole=3), 16, torch.float32, torch.device("cpu"))
    assert [tuple(t.shape) for t in pool.tensors()] == [(3, 16, 1, 24 + 8)]
    assert page_bytes(CONFIG, 16, torch.bfloat16) == (2 * 16 * (24 + 8) * 2, 0)
    v3 = MLAConfig(
        q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128
    )
    assert v3.cache_width == 576


def test_counts_are_those_of_deepseek_v3() -> None:
    """Its paper: 671 B parameters, 37 B of them active (with the head, without the embedding: 36.6 + 0.93)."""
    from sparseray.model.config import MoEConfig

    config = ModelConfig(
        vocab_size=129280, hidden=7168, num_layers=61, num_heads=128, num_kv_heads=128, ffn_dim=18432,
        attention=("mla",), max_seq_len=4096, tie_embeddings=False,
        mla=MLAConfig(
            q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128
        ),
        moe=MoEConfig(
            num_experts=256, num_shared=1, top_k=8, expert_dim=2048, leading_dense=3, num_groups=8, topk_groups=4,
            scaling=2.5,
        ),
    )  # fmt: skip
    counts = count_parameters(config)
    assert counts["total"] == 671_026_404_352
    assert round(counts["active"] / 1e9, 1) == 37.6
    flops = flops_per_token(config, 4096)
    assert flops["attention"] == 61 * 128 * (192 + 128) * 4097


def test_every_parameter_gets_a_gradient_and_a_step_lowers_the_loss() -> None:
    config = replace(CONFIG, attention=("mla", "full"), rope=YARN)
    model, experts = Transformer(config, None), LocalExperts(config)
    tokens = torch.randint(0, 64, (2, 24), generator=torch.Generator().manual_seed(0))

    def loss() -> Tensor:
        hidden = model(tokens, experts=experts, memory=None).hidden_BTH
        return cross_entropy_sum(model, hidden[:, :-1], tokens[:, 1:])

    before = loss()
    before.backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.abs().max() > 0, name
        with torch.no_grad():
            p.sub_(p.grad, alpha=1e-2 / float(p.grad.norm()))
    assert loss() < before


@pytest.mark.parametrize("ops", [COMPILED, REFERENCE], ids=["compiled", "plain"])
def test_text_decoded_from_latents_is_that_of_whole_passes(ops: Ops) -> None:
    config = replace(CONFIG, rope=YARN, init_std=0.3)
    model, experts = Transformer(config, None, ops=ops), LocalExperts(config)
    prompt = torch.randint(0, 64, (9,), generator=torch.Generator().manual_seed(0))
    served = Served(model, experts, None, page=16)
    with torch.no_grad():
        tokens = [model.logits(served.text(prompt, [4, 4, 1])[-1:]).argmax(-1)]
    for _ in range(39):
        tokens.append(served.decode([(1, tokens[-1])]).argmax(-1))
    assert torch.cat(tokens).tolist() == greedy(model, prompt, 40, experts=experts, memory=None).tolist()


def test_yarn_keeps_fast_channels_and_slows_slow_ones_down_by_the_factor() -> None:
    rope = RopeConfig(scaling="yarn", factor=40.0, original_max_seq_len=4096)
    plain, scaled = frequencies(RopeConfig(), 10000.0, 64), frequencies(rope, 10000.0, 64)
    ratio = (plain / scaled).tolist()
    # Released: low = floor(10.5), high = ceil(22.5).
    assert ratio[:11] == [1.0] * 11
    assert all(abs(r - 40.0) < 1e-9 for r in ratio[23:])
    assert sorted(set(ratio[10:24])) == ratio[10:24]


def test_yarn_scales_whole_heads_in_their_tables() -> None:
    """0.1 ln(40) + 1 on queries and keys where no second magnitude is given (arXiv 2309.00071 eq. 22)."""
    rope = replace(YARN, mscale_all_dim=0.0)
    config = replace(CONFIG, attention=("full",), rope=rope)
    cos, sin = rope_tables(128, config.head_dim, config.rope_theta, rope)
    whole = Rope(config)
    factor = 0.1 * math.log(40.0) + 1.0
    torch.testing.assert_close(whole.cos, cos * factor)
    torch.testing.assert_close(whole.sin, sin * factor)
    # V3's 1 and 1: the same scores, by a factor on them instead of on cosines and sines.
    assert rotary_scale(YARN) == 1.0
    torch.testing.assert_close(Rope(replace(config, rope=YARN)).cos, whole.cos)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: MLAConfig(qk_rope_head_dim=7), "must be even"),
        (lambda: MLAConfig(kv_lora_rank=0), "model.mla.kv_lora_rank=0"),
        (lambda: RopeConfig(scaling="linear"), "must be none or yarn"),
        (lambda: RopeConfig(factor=0.5), "at least 1"),
        (lambda: RopeConfig(beta_slow=32.0), "must be below beta_fast"),
    ],
)
def test_sizes_that_cannot_be_are_refused(make: object, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        make()  # type: ignore[operator]
