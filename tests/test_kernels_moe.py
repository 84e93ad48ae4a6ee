"""Fused MoE kernels against their plain reference: routing, maps, experts, gradients, decoding."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import triton_interpreter  # noqa: F401  (first: it sets the interpreter up where there is no GPU)

from sparseray.errors import ConfigError
from sparseray.kernels.moe import decode, ffn, reference
from sparseray.kernels.moe.expert_map import plan_experts
from sparseray.kernels.moe.router import route_and_plan

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TILE = ffn.TileConfig(n=16, k=16, group=2, warps=4, stages=2)
TINY = ffn.LayerConfig(
    m=16,
    up=TILE,
    down=TILE,
    act_grad=TILE,
    input_grad=TILE,
    up_weights=ffn.GradientTile(rows=32, n=16, k=16, group=2, warps=4, stages=2),
    down_weights=ffn.GradientTile(rows=16, n=16, k=16, group=2, warps=4, stages=2),
)
ROUTES = [
    ("v3", 3, {"num_groups": 4, "topk_groups": 2, "scaling": 2.5}),
    ("v3", 2, {"normalize": False}),
    ("v3", 6, {"num_groups": 4, "topk_groups": 2, "group_scores": 0}),
    ("v3", 2, {"num_groups": 4, "topk_groups": 2, "group_scores": 1}),
    ("v2", 4, {"num_groups": 4, "topk_groups": 2, "scaling": 16.0}),
    ("v2", 3, {"normalize": True}),
    ("gshard", 2, {}),
    ("switch", 1, {}),
]


def distinct_ids(T: int, E: int, K: int) -> torch.Tensor:
    return torch.stack([torch.randperm(E)[:K] for _ in range(T)]).to(DEVICE)


def layer(T: int, E: int, K: int, H: int, I: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    tensors = [
        torch.randn(T, H),
        torch.rand(T, K),
        torch.randn(E, 2 * I, H) * 0.2,
        torch.randn(E, H, I) * 0.2,
    ]
    return [t.to(DEVICE, torch.float32 if i == 1 else dtype) for i, t in enumerate(tensors)]


def python_v3(logits: list[float], bias: list[float], groups: int, kept: int, k: int) -> list[int]:
    """V3's selection for one token, as the report words it."""
    biased = [1 / (1 + torch.tensor(-x).exp().item()) + b for x, b in zip(logits, bias)]
    size = len(biased) // groups
    score = [sum(sorted(biased[g * size : (g + 1) * size])[-2:]) for g in range(groups)]
    best = sorted(range(groups), key=lambda g: (-score[g], g))[:kept]
    allowed = [e for e in range(len(biased)) if e // size in best]
    return sorted(allowed, key=lambda e: (-biased[e], e))[:k]


def test_reference_selects_as_the_v3_report_says() -> None:
    torch.manual_seed(0)
    logits, bias = torch.randn(20, 12), torch.randn(12) * 0.3
    ids, weights, scores = reference.route(
        logits, top_k=3, router="v3", bias_E=bias, num_groups=4, topk_groups=2, scaling=2.5
    )
    want = [python_v3(row, bias.tolist(), 4, 2, 3) for row in logits.tolist()]
    assert ids.tolist() == want
    torch.testing.assert_close(weights.sum(1), torch.full((20,), 2.5))
    torch.testing.assert_close(scores, torch.sigmoid(logits))


def test_ties_go_to_the_lower_id_and_the_bias_gets_no_gradient() -> None:
    logits = torch.zeros(2, 8, requires_grad=True)
    bias = torch.zeros(8, requires_grad=True)
    ids, weights, _ = reference.route(logits, top_k=3, bias_E=bias)
    assert ids.tolist() == [[0, 1, 2]] * 2
    weights[:, 0].sum().backward()
    assert bias.grad is None
    assert logits.grad is not None
    assert logits.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"router": "v4"}, "unknown"),
        ({"num_groups": 5}, "not divisible"),
        ({"num_groups": 4, "topk_groups": 5}, "outside"),
        ({"num_groups": 4, "topk_groups": 1}, "exceeds"),
        ({"router": "switch"}, "top_k=1"),
    ],
)
def test_settings_that_cannot_route_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        reference.route(torch.zeros(1, 8), top_k=3, **options)


@pytest.mark.parametrize(("router", "k", "options"), ROUTES)
def test_fused_router_equals_the_reference(router: str, k: int, options: dict) -> None:
    torch.manual_seed(0)
    T, E = 37, 12
    logits = torch.randn(T, E, device=DEVICE)
    logits[3], logits[4, ::2] = 1.0, 0.5
    bias = torch.randn(E, device=DEVICE) * 0.3 if router == "v3" else None
    plain, fused = (logits.clone().requires_grad_() for _ in range(2))
    ids, weights, scores = reference.route(plain, top_k=k, router=router, bias_E=bias, **options)
    got = route_and_plan(fused, top_k=k, router=router, bias_E=bias, tile_rows=16, **options)
    assert torch.equal(got[0], ids)
    torch.testing.assert_close(got[1], weights)
    torch.testing.assert_close(got[2], scores)
    grad_weights, grad_scores = torch.randn_like(weights), torch.randn_like(scores)
    ((weights * grad_weights).sum() + (scores * grad_scores).sum()).backward()
    ((got[1] * grad_weights).sum() + (got[2] * grad_scores).sum()).backward()
    torch.testing.assert_close(fused.grad, plain.grad)
    order, counts = reference.group_by_expert(ids, E)
    assert torch.equal(got[3].order_R.long(), order)
    assert torch.equal(got[3].counts_E.long(), counts)


@pytest.mark.parametrize(("T", "E", "K"), [(1, 4, 1), (37, 12, 3), (70, 5, 2)])
def test_map_of_sorted_tokens_and_its_tiles(T: int, E: int, K: int) -> None:
    torch.manual_seed(0)
    ids = distinct_ids(T, E, K)
    ids[ids == E - 1] = 0  # an empty expert, and a token that chooses one expert twice
    order, counts = reference.group_by_expert(ids, E)
    first = counts.cumsum(0) - counts
    want = [
        (e, int(first[e]) + start, int(first[e] + counts[e]))
        for e in range(E)
        for start in range(0, int(counts[e]), 16)
    ]
    for make_plan in (plan_experts, decode.plan_few_rows):
        plan = make_plan(ids, E, tile_rows=16)
        assert torch.equal(plan.order_R.long(), order)
        assert torch.equal(plan.inverse_R.long(), torch.argsort(order))
        assert torch.equal(plan.counts_E.long(), counts)
        assert torch.equal(plan.offsets_E.long(), first)
        tiles = zip(plan.tile_expert_M.tolist(), plan.tile_row_M.tolist(), plan.tile_end_M.tolist())
        assert [tile for tile in tiles if tile[0] >= 0] == want


@pytest.mark.parametrize("tma", [True, False])
@pytest.mark.parametrize(
    ("T", "E", "K", "H", "I", "routing"),
    [(23, 5, 2, 24, 20, "empty"), (9, 4, 3, 19, 21, "any"), (21, 3, 1, 16, 16, "one")],
)
def test_layer_and_its_gradients_equal_the_reference(
    T: int, E: int, K: int, H: int, I: int, routing: str, tma: bool
) -> None:
    torch.manual_seed(0)
    ids = distinct_ids(T, E - 1 if routing == "empty" else E, K)
    if routing == "one":
        ids = torch.full_like(ids, 1)
    tensors = layer(T, E, K, H, I)
    plain = [t.clone().requires_grad_() for t in tensors]
    fused = [t.clone().requires_grad_() for t in tensors]
    want = reference.moe_ffn_reference(plain[0], ids, *plain[1:])
    got = ffn.moe_ffn(fused[0], ids, *fused[1:], config=dataclasses.replace(TINY, tma=tma))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    grad = torch.randn_like(want)
    want.backward(grad)
    got.backward(grad)
    for mine, theirs in zip(fused, plain):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-4)


def test_layer_without_tokens_has_zero_weight_gradients() -> None:
    x, weights, w_up, w_down = (t.requires_grad_() for t in layer(0, 3, 2, 16, 16))
    ids = torch.empty(0, 2, dtype=torch.int64, device=DEVICE)
    y = ffn.moe_ffn(x, ids, weights, w_up, w_down, config=TINY)
    assert y.shape == (0, 16)
    y.sum().backward()
    assert not w_up.grad.any()
    assert not w_down.grad.any()


@pytest.mark.parametrize(("T", "E", "K", "H", "I"), [(1, 5, 2, 24, 20), (7, 9, 3, 19, 21)])
def test_both_decode_forms_equal_the_reference(T: int, E: int, K: int, H: int, I: int) -> None:
    torch.manual_seed(0)
    ids = distinct_ids(T, E, K)
    x, weights, w_up, w_down = layer(T, E, K, H, I)
    want = reference.moe_ffn_reference(x, ids, weights, w_up, w_down)
    paired = decode.decode_pairs(x, ids, weights, w_up, w_down)
    sorted_ = decode.moe_ffn_decode(x, ids, weights, w_up, w_down, config=TINY)
    torch.testing.assert_close(paired, want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sorted_, want, rtol=1e-4, atol=1e-5)


def test_hand_written_expert_gradients_equal_autograd() -> None:
    torch.manual_seed(0)
    x, gate, up, down = (torch.randn(*s) for s in ((5, 12), (7, 12), (7, 12), (12, 7)))
    leaves = [t.clone().requires_grad_() for t in (x, gate, up, down)]
    y = (torch.nn.functional.silu(leaves[0] @ leaves[1].T) * (leaves[0] @ leaves[2].T)) @ leaves[3].T
    mine, saved = reference.swiglu_forward(x, gate, up, down)
    torch.testing.assert_close(mine, y)
    dy = torch.randn_like(y)
    y.backward(dy)
    for got, leaf in zip(reference.swiglu_backward(dy, x, saved, gate, up, down), leaves):
        torch.testing.assert_close(got, leaf.grad)
    empty = reference.swiglu_backward(dy[:0], x[:0], (saved[0][:0], saved[1][:0]), gate, up, down)
    assert empty[0].shape == (0, 12)
    assert all(not g.any() for g in empty[1:])


@pytest.mark.parametrize("inner", [64, 1024])
def test_bits_of_a_row_do_not_depend_on_the_number_of_rows(inner: int) -> None:
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        x, dy = torch.randn(300, inner), torch.randn(300, inner)
        gate, up, down = torch.randn(40, inner), torch.randn(40, inner), torch.randn(inner, 40)
        y, saved = reference.swiglu_forward(x, gate, up, down)
        dx = reference.swiglu_backward(dy, x, saved, gate, up, down)[0]
        for count in (1, 7, 16, 17, 129, 299):
            part, part_saved = reference.swiglu_forward(x[5 : 5 + count], gate, up, down)
            part_dx = reference.swiglu_backward(
                dy[5 : 5 + count], x[5 : 5 + count], part_saved, gate, up, down
            )
            assert torch.equal(part, y[5 : 5 + count])
            assert torch.equal(part_dx[0], dx[5 : 5 + count])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    ("T", "E", "K", "H", "I"), [(1000, 16, 4, 256, 192), (777, 5, 3, 264, 200), (300, 8, 2, 250, 130)]
)
def test_bf16_layer_on_the_gpu_is_close_to_fp64_and_repeats_its_bits(
    T: int, E: int, K: int, H: int, I: int
) -> None:
    torch.manual_seed(0)
    ids = distinct_ids(T, E - 1, K)
    tensors = layer(T, E, K, H, I, torch.bfloat16)
    exact = [t.double().requires_grad_() for t in tensors]
    runs = [[t.clone().requires_grad_() for t in tensors] for _ in range(2)]
    grad = torch.randn(T, H, device=DEVICE).bfloat16()
    outs = []
    for run in runs:
        outs.append(ffn.moe_ffn(run[0], ids, *run[1:]))
        outs[-1].backward(grad)
    gate_up = [exact[2][ids[:, k]] @ exact[0][:, :, None] for k in range(K)]
    acts = [torch.nn.functional.silu(h[:, :I]) * h[:, I:] for h in gate_up]
    want = sum(exact[1][:, k, None] * (exact[3][ids[:, k]] @ acts[k]).squeeze(-1) for k in range(K))
    want.backward(grad.double())
    assert torch.equal(outs[0], outs[1])
    assert (outs[0].double() - want).norm() <= 1e-2 * want.norm()
    for first, second, leaf in zip(runs[0], runs[1], exact):
        assert torch.equal(first.grad, second.grad)
        assert (first.grad.double() - leaf.grad).norm() <= 1e-2 * leaf.grad.norm()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("T", [1, 8, 50, 100])
def test_decode_in_a_cuda_graph_equals_the_training_form(T: int) -> None:
    torch.manual_seed(0)
    ids = distinct_ids(T, 16, 4)
    tensors = layer(T, 16, 4, 256, 192, torch.bfloat16)
    want = ffn.moe_ffn(tensors[0], ids, *tensors[1:])
    decode.moe_ffn_decode(tensors[0], ids, *tensors[1:])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = decode.moe_ffn_decode(tensors[0], ids, *tensors[1:])
    got.fill_(float("nan"))
    graph.replay()
    assert (got.float() - want.float()).norm() <= 1e-2 * want.float().norm()
