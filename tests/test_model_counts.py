"""Configuration checks, presets, parameter counts and initial weights."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from sparseray.errors import ConfigError
from sparseray.model.config import DSEConfig, ModelConfig, MoEConfig, NSAConfig
from sparseray.model.counts import count_parameters, flops_per_token, keys_per_query
from sparseray.model.dse import LocalMemory
from sparseray.model.dse_layout import DSELayout
from sparseray.model.init import initial_tensor
from sparseray.model.moe import LocalExperts
from sparseray.model.presets import preset
from sparseray.model.transformer import Transformer

TINY = preset("tiny")


def size(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    "config",
    [
        TINY,
        replace(TINY, tie_embeddings=False, v_head_dim=24, nsa=NSAConfig(shared_kv=True, compress_hidden=20)),
        replace(TINY, moe=MoEConfig(router="dense"), attention=("full",)),
        replace(TINY, dse=DSEConfig(), moe=MoEConfig(num_shared=0, leading_dense=0)),
    ],
)
def test_counts_equal_what_the_modules_hold(config: ModelConfig) -> None:
    layout = DSELayout.from_token_map(config.dse, np.arange(2048) % 1500)
    counts = count_parameters(config)
    assert counts["dense"] == size(Transformer(config, layout))
    assert counts["experts"] == size(LocalExperts(config))
    assert counts["memory"] == size(LocalMemory(config, layout))
    assert counts["total"] == counts["dense"] + counts["experts"] + counts["memory"]


def test_active_parameters_are_those_of_one_token() -> None:
    counts = count_parameters(TINY)
    expected = counts["dense"] + 3 * 4 * 3 * 128 * 64 + 2 * 8 * 16
    assert counts["active"] == expected


def test_presets_have_the_sizes_they_promise() -> None:
    big = count_parameters(preset("1b"))
    assert 0.9e9 < big["dense"] + big["experts"] < 1.7e9
    assert count_parameters(preset("small"))["total"] > 10 * count_parameters(TINY)["total"]
    with pytest.raises(ConfigError, match="tiny, small, 1b"):
        preset("huge")


def test_keys_per_query_are_the_mean_over_positions() -> None:
    keys = keys_per_query(TINY, 1, 100)
    compressed = [max(0, (t + 1 - 16) // 8 + 1) for t in range(100)]
    window = [min(t + 1, 32) for t in range(100)]
    selected = [min(t + 1, t % 16 + 1 + 16 * min(t // 16, 3)) for t in range(100)]
    assert keys["compressed"] == pytest.approx(sum(compressed) / 100)
    assert keys["window"] == pytest.approx(sum(window) / 100)
    assert keys["selected"] == pytest.approx(sum(selected) / 100)
    assert keys_per_query(TINY, 0, 100)["full"] == pytest.approx(50.5)


def test_flops_count_a_small_dense_model_by_hand() -> None:
    config = ModelConfig(
        vocab_size=10, hidden=8, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=4, ffn_dim=6
    )
    linear = 8 * (8 + 4 + 4) + 8 * 8 + 3 * 8 * 6 + 10 * 8  # matrices alone: the norms are left out
    attention = 2 * 3.0 * 2 * (4 + 4)
    flops = flops_per_token(config, 5)
    assert flops["active"] == 2 * linear + attention
    assert flops["total"] == flops["active"]
    assert flops["training"] == 3 * flops["active"]
    sparse = flops_per_token(TINY, 512)
    assert sparse["total"] > sparse["active"]


def test_flops_of_a_sparse_model_are_its_matrix_products_by_hand() -> None:
    """One layer of each part; norms, biases and positions cost a token no product."""
    config = ModelConfig(
        vocab_size=10, hidden=8, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=4, attention=("nsa",),
        nsa=NSAConfig(block=4, stride=2, select_block=4, num_selected=3, window=3, compress_hidden=5),
        moe=MoEConfig(num_experts=4, top_k=2, num_shared=1, expert_dim=6, leading_dense=0),
        dse=DSEConfig(layers=(0,), heads=2, head_dim=3, kernel_size=4),
    )  # fmt: skip
    projections = 8 * (2 * 4 + 3 * (4 + 4)) + 8 * 3 * 2 + 2 * 4 * 8
    compressors = 2 * (4 * 4 * 5 + 5 * 4) * 3 / 8  # Three blocks in a sequence of eight.
    memory = 8 * (2 * 12 + 4)
    feed_forward = 8 * 4 + 3 * 8 * 6
    flops = flops_per_token(config, 8)
    assert flops["linear"] == pytest.approx(2 * (10 * 8 + projections + compressors + memory + feed_forward))
    assert flops["experts"] == 2 * 2 * 3 * 8 * 6


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: ModelConfig(num_heads=3), "num_kv_heads"),
        (lambda: ModelConfig(attention=("full", "nsa")), "attention"),
        (lambda: ModelConfig(attention=("fancy",)), "fancy"),
        (lambda: ModelConfig(head_dim=15), "even"),
        (lambda: ModelConfig(dse=DSEConfig(layers=(7,))), "num_layers"),
        (lambda: NSAConfig(stride=5), "stride"),
        (lambda: NSAConfig(num_selected=2), "num_selected"),
        (lambda: MoEConfig(router="switch"), "top_k=1"),
        (lambda: MoEConfig(num_groups=3), "num_groups"),
        (lambda: MoEConfig(top_k=17), "top_k"),
        (lambda: DSEConfig(layers=(2, 1)), "rising"),
        (lambda: DSEConfig(orders=(1, 2)), "orders"),
    ],
)
def test_bad_settings_are_refused_with_their_name(make: object, word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        make()  # type: ignore[operator]


def test_initial_tensors_depend_on_name_and_seed_alone() -> None:
    a = initial_tensor("layers.1.moe.experts.3.gate", (64, 128), seed=1, std=0.02)
    assert torch.equal(a, initial_tensor("layers.1.moe.experts.3.gate", (64, 128), seed=1, std=0.02))
    assert not torch.equal(a, initial_tensor("layers.1.moe.experts.4.gate", (64, 128), seed=1, std=0.02))
    assert not torch.equal(a, initial_tensor("layers.1.moe.experts.3.gate", (64, 128), seed=2, std=0.02))
    assert a.std().item() == pytest.approx(0.02, rel=0.05)
    experts = LocalExperts(TINY, seed=1)
    assert torch.equal(experts.tensors()["layers.1.moe.experts.3.gate"], a)
