"""Routing, balance and experts of the MoE layer against slow oracles."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sparseray.kernels.ops import REFERENCE
from sparseray.model.config import DSEConfig, ModelConfig, MoEConfig
from sparseray.model.init import expert_views, initial_dense
from sparseray.model.layers import Batch
from sparseray.model.moe import LocalExperts, MoE, balance_loss
from sparseray.model.presets import preset
from sparseray.model.transformer import Transformer, cross_entropy_sum

V3 = MoEConfig(
    num_experts=8, top_k=3, expert_dim=6, num_groups=4, topk_groups=2, scaling=2.5, leading_dense=0
)
V2 = replace(V3, router="v2", normalize=False, scaling=1.0)
SETTINGS = {
    "v3": V3,
    "v3 groups by K_r / M": replace(V3, num_experts=12, top_k=6, topk_groups=2, group_scores=0),
    "v2": V2,
    "gshard": replace(V2, router="gshard", top_k=2, num_groups=1, topk_groups=1),
    "switch": replace(V2, router="switch", top_k=1, num_groups=1, topk_groups=1),
}


def config_of(moe: MoEConfig) -> ModelConfig:
    return ModelConfig(
        vocab_size=50, hidden=10, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=4, moe=moe
    )


def slow_route(logits: list[float], bias: list[float], moe: MoEConfig) -> dict[int, float]:
    E, per = len(logits), len(logits) // moe.num_groups
    if moe.router == "v3":
        scores = [1 / (1 + math.exp(-x)) for x in logits]
    else:
        total = sum(math.exp(x) for x in logits)
        scores = [math.exp(x) / total for x in logits]
    biased = [s + (b if moe.router == "v3" else 0.0) for s, b in zip(scores, bias, strict=True)]
    value = []
    for g in range(moe.num_groups):
        best = sorted(biased[g * per : (g + 1) * per], reverse=True)
        count = moe.group_scores or moe.top_k // moe.topk_groups
        value.append(sum(best[:count]) if moe.router == "v3" else best[0])
    groups = sorted(range(moe.num_groups), key=lambda g: (-value[g], g))[: moe.topk_groups]
    allowed = [e for e in range(E) if e // per in groups]
    chosen = sorted(allowed, key=lambda e: (-biased[e], e))[: moe.top_k]
    weights = {e: scores[e] for e in chosen}
    if moe.router == "gshard" or (moe.router == "v3" and moe.normalize is not False):
        weights = {e: w / sum(weights.values()) for e, w in weights.items()}
    factor = moe.scaling if moe.router in ("v3", "v2") else 1.0
    return {e: w * factor for e, w in weights.items()}


@pytest.mark.parametrize("setting", list(SETTINGS))
def test_layer_equals_the_weighted_sum_of_its_experts(setting: str) -> None:
    moe = SETTINGS[setting]
    config = config_of(moe)
    layer, experts = MoE(config, 0), LocalExperts(config, seed=2)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in [*layer.named_parameters(), *experts.tensors().items()]:
            p.copy_(initial_dense(name, p.shape, seed=1, std=0.5))
        layer.router_bias.copy_(torch.randn(moe.num_experts, generator=g) * 0.3)
    x = torch.randn(20, 10, generator=g)
    batch = Batch(shape=(2, 10), positions_R=torch.arange(20), rows=20)
    y, loss, counts = layer([x] * layer.num_readers, batch, experts)
    weights = experts.tensors()
    assert layer.shared is not None
    gate, up = layer.shared.gate_up.weight.detach().chunk(2)
    expected_counts = [0] * moe.num_experts
    for t in range(20):
        logits = (layer.router.weight.detach() @ x[t]).tolist()
        want = layer.shared.down.weight.detach() @ (F.silu(gate @ x[t]) * (up @ x[t]))
        for e, w in slow_route(logits, layer.router_bias.tolist(), moe).items():
            prefix = f"layers.0.moe.experts.{e}."
            inner = F.silu(weights[prefix + "gate"] @ x[t]) * (weights[prefix + "up"] @ x[t])
            want = want + w * (weights[prefix + "down"] @ inner)
            expected_counts[e] += 1
        torch.testing.assert_close(y[t].detach(), want, rtol=1e-4, atol=1e-5)
    assert counts.tolist() == expected_counts
    assert loss is not None
    assert loss.item() > 0


def test_expert_gradients_equal_autograd_of_the_plain_sum() -> None:
    config = config_of(V3)
    experts = LocalExperts(config, seed=2)
    with torch.no_grad():
        for p in experts.parameters():
            p.mul_(20)
    g = torch.Generator().manual_seed(0)
    x = torch.randn(9, 10, generator=g, requires_grad=True)
    ids = torch.stack([torch.randperm(6, generator=g)[:3] for _ in range(9)])
    w = torch.rand(9, 3, generator=g).requires_grad_()
    up = torch.randn(9, 10, generator=g)
    leaves = [x, w, *experts.parameters()]
    got = torch.autograd.grad(experts(0, x, ids, w), leaves, up)
    slabs = (experts.gate_up_E2IH["0"], experts.down_EHI["0"])
    named = expert_views(0, *slabs)

    def plain(t: int, k: int) -> Tensor:
        gate, upper, down = (named[f"layers.0.moe.experts.{ids[t, k]}.{p}"] for p in ("gate", "up", "down"))
        return w[t, k] * (down @ (F.silu(gate @ x[t]) * (upper @ x[t])))

    out = torch.stack([sum((plain(t, k) for k in range(3)), torch.zeros(10)) for t in range(9)])
    want = torch.autograd.grad(out, leaves, up, allow_unused=True)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b, rtol=1e-4, atol=1e-5)


def slow_balance(moe: MoEConfig, scores: Tensor, ids: Tensor) -> float:
    T, E = scores.shape
    total = 0.0
    for e in range(E):
        f = sum(int(e in ids[t].tolist()) for t in range(T)) * E / (ids.shape[1] * T)
        total += f * scores[:, e].mean().item()
    return moe.balance_loss * total


def test_balance_losses_equal_their_equations() -> None:
    g = torch.Generator().manual_seed(0)
    scores = torch.rand(12, 8, generator=g)
    ids = torch.stack([torch.randperm(8, generator=g)[:3] for _ in range(12)])
    each = (slice(0, 4), slice(4, 8), slice(8, 12))
    want = sum(slow_balance(V2, scores[s], ids[s]) for s in each) / 3
    assert balance_loss(V2, scores, ids, (3, 4)).item() == pytest.approx(want, rel=1e-5)
    normed = scores / scores.sum(-1, keepdim=True)
    best = scores.argsort(-1, descending=True)[:, :3]
    want = sum(slow_balance(V3, normed[s], best[s]) for s in each) / 3
    assert balance_loss(V3, scores, ids, (3, 4)).item() == pytest.approx(want, rel=1e-5)
    switch = SETTINGS["switch"]
    got = balance_loss(switch, scores, ids[:, :1], (3, 4)).item()
    assert got == pytest.approx(slow_balance(switch, scores, ids[:, :1]), rel=1e-5)


def test_v2_balances_each_sequence_and_not_the_call() -> None:
    scores = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.1, 0.9], [0.1, 0.9]])
    moe = MoEConfig(num_experts=2, top_k=1, router="v2", balance_loss=1.0)
    loss = balance_loss(moe, scores, torch.tensor([[0], [0], [1], [1]]), (2, 2))
    assert loss.item() == pytest.approx(1.8)


def test_gshard_loss_is_the_mean_over_experts_of_share_times_score() -> None:
    g = torch.Generator().manual_seed(0)
    scores = torch.softmax(torch.randn(12, 8, generator=g), -1)
    ids = torch.stack([torch.randperm(8, generator=g)[:2] for _ in range(12)])
    share = torch.bincount(ids[:, 0], minlength=8) / 12
    gshard = replace(SETTINGS["gshard"], balance_loss=1.0)
    assert balance_loss(gshard, scores, ids, (3, 4)).item() == pytest.approx(
        (share * scores.mean(0)).mean().item(), rel=1e-5
    )
    # The same choices and scores under Switch's equation: E^2 = 64 times as much.
    switch = replace(SETTINGS["switch"], balance_loss=1.0)
    assert balance_loss(switch, scores, ids[:, :1], (3, 4)).item() == pytest.approx(
        64 * balance_loss(gshard, scores, ids, (3, 4)).item(), rel=1e-5
    )


@pytest.mark.parametrize(("normalize", "total"), [(None, 0.2), (True, 1.0), (False, 0.2)])
def test_v2_weights_are_divided_by_their_sum_only_where_asked(normalize: bool | None, total: float) -> None:
    moe = replace(MoEConfig(router="v2", num_experts=10, top_k=2), normalize=normalize)
    layer = MoE(config_of(moe), 0)
    with torch.no_grad():
        layer.router.weight.zero_()
    found = []

    def experts(_layer: int, x_TH: Tensor, _ids: Tensor, weights_TK: Tensor) -> Tensor:
        found.append(weights_TK.sum(-1))
        return x_TH

    layer(
        [torch.ones(5, 10)] * layer.num_readers,
        Batch(shape=(1, 5), positions_R=torch.arange(5), rows=5),
        experts,
    )
    torch.testing.assert_close(found[0], torch.full((5,), total))


def test_ties_go_to_the_lower_expert() -> None:
    config = config_of(replace(V3, num_groups=1, topk_groups=1))
    layer, experts = MoE(config, 0), LocalExperts(config)
    with torch.no_grad():
        for p in layer.parameters():
            p.zero_()
    batch = Batch(shape=(1, 5), positions_R=torch.arange(5), rows=5)
    counts = layer([torch.ones(5, 10)] * layer.num_readers, batch, experts)[2]
    assert counts.tolist() == [5, 5, 5, 0, 0, 0, 0, 0]


def tiny_without_memory(**changes: object) -> ModelConfig:
    return replace(preset("tiny"), dse=DSEConfig(), attention=("full",), **changes)  # type: ignore[arg-type]


def test_router_bias_moves_against_the_load_and_only_changes_the_selection() -> None:
    config = tiny_without_memory()
    gamma = config.moe.bias_update
    model, experts = Transformer(config, None), LocalExperts(config)
    counts = torch.tensor([[4] * 16, [0, 8] + [4] * 14, [7] + [4] * 15])
    model.update_router_bias(counts)
    bias = [model.get_buffer(f"layers.{layer}.moe.router_bias") for layer in (1, 2, 3)]
    assert bias[0].tolist() == [0.0] * 16
    assert bias[1][:3].tolist() == pytest.approx([gamma, -gamma, 0.0])
    assert bias[2][0].item() == pytest.approx(-gamma)
    assert bias[2][1].item() == pytest.approx(gamma)
    for b in bias:
        b.zero_()
    tokens = torch.arange(40).reshape(2, 20)
    before = model(tokens, experts=experts, memory=None)
    for b in bias:
        b.fill_(-0.25)  # exact in fp32, so no score is rounded into a tie
    after = model(tokens, experts=experts, memory=None)
    assert torch.equal(before.expert_counts_LE, after.expert_counts_LE)
    torch.testing.assert_close(before.hidden_BTH, after.hidden_BTH, rtol=1e-6, atol=1e-7)


def test_expert_counts_are_all_choices_and_aux_loss_is_in_the_graph() -> None:
    config = tiny_without_memory(moe=MoEConfig(balance_loss=0.1))
    model, experts = Transformer(config, None), LocalExperts(config)
    out = model(torch.arange(60).reshape(3, 20), experts=experts, memory=None)
    assert out.expert_counts_LE.shape == (3, 16)
    assert out.expert_counts_LE.sum(1).tolist() == [3 * 20 * 4] * 3
    out.aux_loss.backward()
    gradient = model.get_parameter("layers.3.moe.router.weight").grad
    assert gradient is not None
    assert gradient.abs().max() > 0


def test_dense_setting_has_no_experts_and_the_width_of_the_used_ones() -> None:
    config = tiny_without_memory(moe=MoEConfig(router="dense"))
    model = Transformer(config, None)
    assert config.moe_layers == ()
    assert model.get_parameter("layers.3.ffn.down.weight").shape == (128, 5 * 64)
    out = model(torch.arange(20)[None], experts=LocalExperts(config), memory=None)
    assert out.expert_counts_LE.shape == (0, 16)
    assert out.aux_loss.item() == 0


@pytest.mark.parametrize("tied", [True, False])
def test_cross_entropy_sums_in_fp32_and_ignores_minus_one(tied: bool) -> None:
    config = tiny_without_memory(tie_embeddings=tied)
    model = Transformer(config, None)
    hidden = torch.randn(2, 5, 128, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([[1, 2, -1, 4, 5], [-1, 0, 2047, 8, 9]])
    weight = (model.embedding if model.head is None else model.head).detach().double()
    logs = torch.log_softmax(hidden.double() @ weight.T, -1)
    want = -sum(logs[b, t, y] for b in range(2) for t, y in enumerate(targets[b].tolist()) if y >= 0)
    got = cross_entropy_sum(model, hidden, targets)
    assert got.dtype == torch.float32
    assert got.item() == pytest.approx(float(want), rel=1e-5)


def test_a_recomputed_layer_routes_once(monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(config_of(V3), num_layers=2)
    tokens_BT = torch.randint(0, config.vocab_size, (2, 16))
    grads, routed = [], []
    route = type(REFERENCE).route
    monkeypatch.setattr(type(REFERENCE), "route", lambda *a, **k: (routed.append(1), route(*a, **k))[1])
    for recompute in (False, True):
        routed.clear()
        model, experts = Transformer(config, None, seed=1, recompute=recompute), LocalExperts(config, seed=1)
        out = model(tokens_BT, experts=experts, memory=None)
        cross_entropy_sum(model, out.hidden_BTH, tokens_BT).backward()
        assert len(routed) == len(config.moe_layers)
        grads.append([p.grad for p in [*model.parameters(), *experts.parameters()]])
    assert all(torch.equal(a, b) for a, b in zip(*grads))
