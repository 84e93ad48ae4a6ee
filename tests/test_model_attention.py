"""Attention layers against slow oracles written from the papers' equations, token by token."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sparseray.kernels.nsa.masked import nsa_attention_masked
from sparseray.kernels.nsa.reference import BranchKeys, nsa_attention_reference, select_reference
from sparseray.kernels.ops import REFERENCE
from sparseray.model.attention import ATTENTIONS
from sparseray.model.attention.full import FullAttention
from sparseray.model.attention.nsa import NSAttention
from sparseray.model.config import ATTENTIONS as KINDS
from sparseray.model.config import ModelConfig, NSAConfig
from sparseray.model.init import initial_dense
from sparseray.model.layers import Batch, Rope, rope_tables

NSA = NSAConfig(block=8, stride=4, select_block=16, num_selected=4, num_initial=1, num_local=2, window=12)
CONFIG = ModelConfig(
    hidden=32,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    v_head_dim=12,
    attention=("nsa",),
    max_seq_len=128,
    nsa=NSA,
)


def fill(module: torch.nn.Module, std: float = 0.3) -> None:
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.copy_(initial_dense(name, p.shape, seed=3, std=std))


def batch_of(B: int, T: int) -> Batch:
    return Batch(shape=(B, T), positions_R=torch.arange(T).repeat(B), rows=B * T)


def attend_one(q: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
    if not keys:
        return torch.zeros(values[0].shape[0] if values else 0)
    weights = torch.softmax(torch.stack(keys) @ q / math.sqrt(q.shape[0]), 0)
    return weights @ torch.stack(values)


def rope_one(x: Tensor, position: int, theta: float) -> Tensor:
    half = x.shape[0] // 2
    out = x.clone()
    for i in range(half):
        angle = position * theta ** (-2 * i / x.shape[0])
        c, s = math.cos(angle), math.sin(angle)
        out[i], out[i + half] = x[i] * c - x[i + half] * s, x[i + half] * c + x[i] * s
    return out


def slow_selection(p_cmp: list[list[float]], t: int, config: NSAConfig) -> list[int]:
    """Eq. 9 (0-based), summed over the heads of a group, then the forced blocks and the best others."""
    ratio, overlap = config.select_block // config.stride, config.block // config.stride
    visible = t // config.select_block + 1
    scores = []
    for j in range(visible):
        total = 0.0
        for head in p_cmp:
            for m in range(ratio):
                for n in range(overlap):
                    i = ratio * j + m - n
                    if 0 <= i < len(head):
                        total += head[i]
        scores.append(total)
    forced = {j for j in range(visible) if j < config.num_initial or j > visible - 1 - config.num_local}
    free = sorted((j for j in range(visible) if j not in forced), key=lambda j: (-scores[j], j))
    return sorted(forced | set(free[: config.num_selected - len(forced)]))


def phi(module: torch.nn.Module, block: Tensor) -> Tensor:
    w = dict(module.named_parameters())
    inner = F.gelu(w["up.weight"] @ (block + w["pos"]).flatten() + w["up.bias"])
    return w["down.weight"] @ inner + w["down.bias"]


def slow_nsa(layer: NSAttention, config: ModelConfig, x_TH: Tensor) -> Tensor:
    nsa, heads, kv = config.nsa, config.num_heads, config.num_kv_heads
    D, V, theta = config.head_dim, config.value_dim, config.rope_theta
    branches = 1 if nsa.shared_kv else 3
    qkv = layer.qkv.weight @ x_TH.T
    qk = qkv[: (heads + branches * kv) * D].T.reshape(-1, heads + branches * kv, D)
    v = qkv[(heads + branches * kv) * D :].T.reshape(-1, branches * kv, V)
    gates = torch.sigmoid(layer.gate.weight @ x_TH.T).T.reshape(-1, heads, 3)
    T, out = x_TH.shape[0], []
    for t in range(T):
        per_head = []
        for g in range(kv):
            ks = [qk[:, heads + (b % branches) * kv + g] for b in range(3)]
            vs = [v[:, (b % branches) * kv + g] for b in range(3)]
            starts = [i * nsa.stride for i in range(T) if i * nsa.stride + nsa.block - 1 <= t]
            k_cmp = [rope_one(phi(layer.compress_k, ks[2][s : s + nsa.block]), s, theta) for s in starts]
            v_cmp = [phi(layer.compress_v, vs[2][s : s + nsa.block]) for s in starts]
            members = range(g * heads // kv, (g + 1) * heads // kv)
            qs = {h: rope_one(qk[t, h], t, theta) for h in members}
            probs = [
                torch.softmax(torch.stack(k_cmp) @ qs[h] / math.sqrt(D), 0).tolist() if k_cmp else []
                for h in members
            ]
            chosen = slow_selection(probs, t, nsa)
            seen = [s for s in range(t + 1) if s // nsa.select_block in chosen]
            near = range(max(0, t - nsa.window + 1), t + 1)
            for h in members:
                o = gates[t, h, 1] * attend_one(
                    qs[h], [rope_one(ks[0][s], s, theta) for s in seen], [vs[0][s] for s in seen]
                )
                o = o + gates[t, h, 2] * attend_one(
                    qs[h], [rope_one(ks[1][s], s, theta) for s in near], [vs[1][s] for s in near]
                )
                if k_cmp:
                    o = o + gates[t, h, 0] * attend_one(qs[h], k_cmp, v_cmp)
                per_head.append(o)
        out.append(layer.out.weight @ torch.cat(per_head))
    return torch.stack(out)


@pytest.mark.one_in(4)
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("T", [1, 7, 8, 75])
def test_nsa_layer_equals_the_papers_equations_at_every_token(T: int, shared: bool) -> None:
    config = replace(CONFIG, nsa=replace(NSA, shared_kv=shared))
    layer, rope = NSAttention(config, 0), Rope(config)
    fill(layer)
    x_TH = torch.randn(T, 32, generator=torch.Generator().manual_seed(T))
    with torch.no_grad():
        fast = layer([x_TH] * layer.num_readers, batch_of(1, T), rope.at(torch.arange(T)))
        slow = slow_nsa(layer, config, x_TH)
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-5)


def test_nsa_selection_equals_the_slow_form_of_equation_9() -> None:
    g = torch.Generator().manual_seed(0)
    T, T_cmp = 90, (90 - 8) // 4 + 1
    q, k, v = (torch.randn(1, n, h, 8, generator=g) for n, h in ((T, 4), (T_cmp, 2), (T_cmp, 2)))
    _, indices = select_reference(q, k, v, T, NSA.sizes)
    for t in range(T):
        count = max(0, (t + 1 - 8) // 4 + 1)
        for group in range(2):
            probs = [
                torch.softmax(k[0, :count, group] @ q[0, t, 2 * group + h] / math.sqrt(8), 0).tolist()
                for h in range(2)
            ]
            got = [i for i in indices[0, t, group].tolist() if i >= 0]
            assert got == slow_selection(probs, t, NSA)


@pytest.mark.parametrize(("T", "q_start"), [(5, 0), (64, 0), (3, 50)])
def test_masked_branches_equal_the_reference_in_outputs_and_gradients(T: int, q_start: int) -> None:
    g = torch.Generator().manual_seed(1)
    S = q_start + T
    count = max(0, (S - 8) // 4 + 1)
    win_start = max(0, q_start - 11)
    shapes = [(T, 4, 8), *[(n, 2, d) for n in (count, S, S - win_start) for d in (8, 12)]]
    inputs = [torch.randn(2, *s, generator=g, requires_grad=True) for s in shapes]
    gates = torch.rand(2, T, 4, 3, generator=g).requires_grad_()
    expected = nsa_attention_reference(*inputs, gates, NSA.sizes, q_start=q_start, win_start=win_start)
    names = ("k_cmp", "v_cmp", "k_slc", "v_slc", "k_win", "v_win")
    keys = BranchKeys(**dict(zip(names, inputs[1:])))
    got = nsa_attention_masked(inputs[0], keys, gates, NSA.sizes, q_start=q_start, win_start=win_start)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    up = torch.randn(expected.shape, generator=g)
    leaves = [x for x in [*inputs, gates] if x.numel()]
    for a, b in zip(
        torch.autograd.grad(got, leaves, up), torch.autograd.grad(expected, leaves, up), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_every_nsa_parameter_gets_a_gradient() -> None:
    layer, rope = NSAttention(CONFIG, 0), Rope(CONFIG)
    fill(layer)
    x = torch.randn(80, 32, generator=torch.Generator().manual_seed(0))
    layer(
        [x] * layer.num_readers, batch_of(2, 40), rope.at(torch.arange(40).repeat(2))
    ).square().sum().backward()
    for name, p in layer.named_parameters():
        assert p.grad is not None, name
        assert p.grad.abs().max() > 0, name


def test_full_attention_equals_causal_softmax_and_sequences_do_not_mix() -> None:
    config = replace(CONFIG, attention=("full",))
    layer, rope = FullAttention(config, 0), Rope(config)
    fill(layer)
    x = torch.randn(2 * 9, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        got = layer([x], batch_of(2, 9), rope.at(torch.arange(9).repeat(2))).unflatten(0, (2, 9))
        qkv = (x @ layer.qkv.weight.T).unflatten(0, (2, 9))
        for b in range(2):
            qk, v = qkv[b, :, :48].unflatten(-1, (6, 8)), qkv[b, :, 48:].unflatten(-1, (2, 12))
            for t in range(9):
                heads = []
                for h in range(4):
                    keys = [rope_one(qk[s, 4 + h // 2], s, 10000.0) for s in range(t + 1)]
                    values = [v[s, h // 2] for s in range(t + 1)]
                    heads.append(attend_one(rope_one(qk[t, h], t, 10000.0), keys, values))
                expected = layer.out.weight @ torch.cat(heads)
                torch.testing.assert_close(got[b, t], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_later_tokens_do_not_change_earlier_ones(kind: str) -> None:
    config = replace(CONFIG, attention=(kind,))
    rope = Rope(config)
    layer = ATTENTIONS[kind](config, 0, REFERENCE)
    fill(layer)
    x = torch.randn(60, 32, generator=torch.Generator().manual_seed(0))
    y = x.clone()
    y[41:] += 1.0
    with torch.no_grad():
        a, b = (layer([z] * layer.num_readers, batch_of(1, 60), rope.at(torch.arange(60))) for z in (x, y))
    torch.testing.assert_close(a[:41], b[:41], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(a[41:], b[41:], atol=1e-3)


def test_every_kind_of_the_configuration_has_a_class_that_counts_what_it_holds() -> None:
    assert tuple(ATTENTIONS) == KINDS
    for kind, attention in ATTENTIONS.items():
        layer = attention(replace(CONFIG, attention=(kind,)), 0, REFERENCE)
        assert attention.num_parameters(CONFIG) == sum(p.numel() for p in layer.parameters())


def test_rotation_depends_on_the_distance_alone() -> None:
    cos, sin = rope_tables(50, 8, 10000.0)
    q, k = torch.randn(2, 1, 8, generator=torch.Generator().manual_seed(0)).unbind(0)

    def score(i: int, j: int) -> Tensor:
        a = REFERENCE.rotary(q[:, None], cos[i : i + 1], sin[i : i + 1])
        return (a * REFERENCE.rotary(k[:, None], cos[j : j + 1], sin[j : j + 1])).sum()

    torch.testing.assert_close(score(10, 3), score(47, 40), rtol=1e-4, atol=1e-5)
    assert not torch.isclose(score(10, 3), score(10, 9), atol=1e-3)
