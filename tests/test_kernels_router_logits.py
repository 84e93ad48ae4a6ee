"""Logits of the router from bf16 rows, its balance and counts, the cut of a fused projection into NSA's parts, and angles of some positions."""

import pytest
import torch
import triton_interpreter  # noqa: F401  (first: it sets the interpreter up where there is no GPU)
from torch import Tensor

from sparseray.kernels.moe.expert_map import plan_experts
from sparseray.kernels.moe.router_logits import router_logits
from sparseray.kernels.ops import REFERENCE
from sparseray.kernels.triton_ops import TRITON

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROUNDED = {"rtol": 2**-8, "atol": 2e-5} if DEVICE == "cuda" else {"rtol": 2**-7, "atol": 2e-4}


@pytest.mark.parametrize(("R", "H", "E"), [(1, 40, 5), (70, 136, 19), (1100, 72, 64), (33, 96, 130)])
def test_router_logits_are_those_of_fp32_and_gradients_of_their_dtypes(R: int, H: int, E: int) -> None:
    torch.manual_seed(R)
    x = torch.randn(R, H, device=DEVICE).bfloat16().requires_grad_()
    weight = (torch.randn(E, H, device=DEVICE) * 0.1).requires_grad_()
    grad = torch.randn(R, E, device=DEVICE)
    found = router_logits(x, weight)
    found.backward(grad)
    exact = x.detach().double() @ weight.detach().double().T
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=2e-6)
    # A gradient of bf16 rows is the exact one rounded to eight bits, which the interpreter does by cutting them off.
    wanted = grad.double() @ weight.detach().double()
    torch.testing.assert_close(x.grad.double(), wanted, **ROUNDED)
    wanted = grad.double().T @ x.detach().double()
    torch.testing.assert_close(weight.grad.double(), wanted, rtol=1e-5, atol=1e-5 * R**0.5)


def test_router_logits_repeat_their_bits_and_a_bf16_product_would_not_do() -> None:
    torch.manual_seed(0)
    x = torch.randn(50, 80, device=DEVICE).bfloat16()
    weight = torch.randn(9, 80, device=DEVICE)
    found = router_logits(x, weight)
    assert torch.equal(found, router_logits(x, weight))
    exact = x.double() @ weight.double().T
    rough = x.float() @ weight.bfloat16().float().T
    assert (found - exact).abs().max() < 1e-3 * (rough - exact).abs().max()


def test_rows_of_other_dtypes_take_the_plain_product() -> None:
    x, weight = torch.randn(5, 24, device=DEVICE), torch.randn(3, 24, device=DEVICE)
    assert torch.equal(TRITON.router_logits(x, weight, invariant=False), x @ weight.T)


@pytest.mark.parametrize(("tokens", "groups", "E", "k"), [(1, 1, 3, 3), (37, 3, 10, 4), (300, 2, 130, 6)])
def test_what_the_balance_loss_is_made_of_equals_the_plain_one(
    tokens: int, groups: int, E: int, k: int
) -> None:
    torch.manual_seed(tokens)
    scores = torch.randint(1, 7, (tokens * groups, E), device=DEVICE).float()  # with ties
    weights = torch.randn(groups, E, device=DEVICE)
    found = []
    for ops in (REFERENCE, TRITON):
        leaf = scores.clone().requires_grad_()
        shares, means = ops.balance(leaf, k, groups)
        (means * weights).sum().backward()
        found.append((shares, means.detach(), leaf.grad))
    for wanted, part in zip(*found, strict=True):
        torch.testing.assert_close(part, wanted, rtol=1e-5, atol=1e-7)
    repeated = TRITON.balance(scores, k, groups)
    assert torch.equal(repeated[0], found[1][0])
    assert torch.equal(repeated[1], found[1][1])


@pytest.mark.parametrize(("T", "E", "K"), [(1, 4, 1), (37, 12, 3), (70, 5, 2)])
def test_experts_are_counted(T: int, E: int, K: int) -> None:
    torch.manual_seed(T)
    ids = torch.randint(0, E - 1, (T, K), device=DEVICE)
    found = TRITON.expert_counts(ids, E)
    assert found.dtype == torch.int64
    assert torch.equal(found, torch.bincount(ids.reshape(-1), minlength=E))
    # Ids that a plan was made of are not counted again, but for another number of experts.
    plan_experts(ids, E + 3)
    for num_experts in (E + 3, E):
        again = TRITON.expert_counts(ids, num_experts)
        assert again.dtype == torch.int64
        assert torch.equal(again, torch.bincount(ids.reshape(-1), minlength=num_experts))


@pytest.mark.parametrize(("queries", "group", "turned", "rest"), [(6, 2, 2, 4), (3, 1, 1, 1), (4, 2, 1, 1)])
def test_parts_of_a_fused_projection_and_their_gradient(
    queries: int, group: int, turned: int, rest: int
) -> None:
    torch.manual_seed(queries)
    R, D = 13, 8
    fused = torch.randn(R, (queries + group * (turned + rest)) * D, device=DEVICE)
    angles = torch.rand(R, D // 2, device=DEVICE) * 6
    found: list[list[Tensor]] = []
    weights: list[Tensor] = []
    for ops in (REFERENCE, TRITON):
        x = fused.clone().requires_grad_()
        sizes = ((queries, group), D, turned, [D] * rest)
        parts = ops.rotary_split(x, *sizes, angles.cos(), angles.sin())
        weights = weights or [torch.randn_like(part) for part in parts]
        sum((part * weight).sum() for part, weight in zip(parts, weights, strict=True)).backward()
        found.append([*parts, x.grad])
    for wanted, part in zip(*found, strict=True):
        torch.testing.assert_close(part, wanted, rtol=1e-6, atol=1e-6)
    assert all(part.is_contiguous() for part in found[1])


@pytest.mark.parametrize("step", [1, 3])
@pytest.mark.parametrize("count", [0, 1, 5])
def test_angles_of_every_so_many_positions_are_read_where_they_lie(count: int, step: int) -> None:
    torch.manual_seed(count)
    table = torch.rand(16, 4, device=DEVICE) * 6
    at = slice(0, max(0, count - 1) * step + min(1, count), step)
    angles = (table.cos()[at], table.sin()[at])
    x = torch.randn(2, count, 3, 8, device=DEVICE)
    found = TRITON.rotary(x, *angles)
    torch.testing.assert_close(found, REFERENCE.rotary(x, *angles), rtol=1e-6, atol=1e-6)
    assert torch.equal(found, TRITON.rotary(x, *(angle.clone() for angle in angles)))
    assert torch.equal(found[:1], TRITON.rotary(x[:1], *angles))
