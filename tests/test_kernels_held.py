"""A layer whose experts are held by several devices has the bits of one that holds them all, forward and backward."""

from __future__ import annotations

import pytest
import torch
import triton_interpreter  # noqa: F401  (first: it sets the interpreter up where there is no GPU)
from test_kernels_moe import DEVICE, distinct_ids, layer
from torch import Tensor
from used_memory import hand_out_used_memory

from sparseray.kernels.ops import REFERENCE, HeldGradients, Ops
from sparseray.kernels.triton_ops import TRITON

HOLDERS = [[0, 3, 4], [1], [], [2, 5, 6]]


def whole(
    ops: Ops, x: Tensor, ids: Tensor, weights: Tensor, slabs: list[Tensor], dout: Tensor
) -> list[Tensor]:
    leaves = [t.clone().requires_grad_() for t in (x, weights, *slabs)]
    y = ops.experts(leaves[0], ids, leaves[1], *leaves[2:])
    y.backward(dout)
    return [y.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def spread(
    ops: Ops, x: Tensor, ids: Tensor, weights: Tensor, slabs: list[Tensor], dout: Tensor
) -> list[Tensor]:
    """The same with the experts in HOLDERS' hands."""
    (T, K), E = ids.shape, slabs[0].shape[0]
    y_RH, dx_RH = (x.new_full((T * K, x.shape[1]), torch.nan) for _ in range(2))
    dweights_R = weights.new_full((T * K,), torch.nan)
    gradients = [torch.full_like(slab, torch.nan) for slab in slabs]
    for experts in HOLDERS:
        places_E = torch.full((E,), len(experts), device=ids.device)
        places_E[experts] = torch.arange(len(experts), device=ids.device)
        own = [slab[experts].contiguous() for slab in slabs]
        rows = ops.group_held(places_E[ids].int(), 1, len(experts), x)
        counts = rows.counts_E.tolist()[:-1]
        order_R = rows.order_R[: sum(counts)].long()
        y_RH[order_R], saved = ops.held_forward(x, rows, counts, *own)
        found: HeldGradients = ops.held_backward(dout, weights, rows, counts, saved, *own)
        dx_RH[order_R], dweights_R[order_R] = found.dx_RH, found.dweights_R
        gradients[0][experts], gradients[1][experts] = found.dgate_up_GE2IH[0], found.ddown_GEHI[0]
    y = ops.combine_slots(y_RH.view(T, K, -1), weights)
    dx = ops.combine_slots(dx_RH.view(T, K, -1), None)
    return [y, dx, dweights_R.view(T, K), *gradients]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ops", [REFERENCE, TRITON], ids=["reference", "triton"])
@pytest.mark.parametrize(("T", "K", "H", "I"), [(37, 3, 32, 16), (1, 2, 24, 20)])
def test_experts_of_several_holders_have_the_bits_of_one(
    ops: Ops, dtype: torch.dtype, T: int, K: int, H: int, I: int
) -> None:
    torch.manual_seed(0)
    # The last expert gets no token.
    ids, (x, weights, *slabs) = distinct_ids(T, 6, K), layer(T, 7, K, H, I, dtype)
    dout = torch.randn(T, H).to(DEVICE, dtype)
    for found, wanted in zip(
        spread(ops, x, ids, weights, slabs, dout), whole(ops, x, ids, weights, slabs, dout), strict=True
    ):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("ops", [REFERENCE, TRITON], ids=["reference", "triton"])
@pytest.mark.parametrize("is_counted", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_several_sources_at_once_have_the_bits_of_one_after_the_other(
    ops: Ops, is_counted: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever lay in the memory of rows that nobody computes; in the interpreter a product of bf16 hides it."""
    torch.manual_seed(0)
    hand_out_used_memory(monkeypatch)
    S, T, K, E, held = 3, 19, 2, 7, [1, 4, 6]
    ids, (x, weights, *slabs) = distinct_ids(S * T, E, K), layer(S * T, E, K, 32, 16, dtype)
    dout, own = torch.randn(S * T, 32).to(DEVICE, dtype), [slab[held].contiguous() for slab in slabs]
    places_E = torch.full((E,), S * len(held), device=ids.device)

    def run(of: slice, sets: int) -> tuple[Tensor, HeldGradients, Tensor]:
        places_E[:] = sets * len(held)
        places_E[held] = torch.arange(len(held), device=ids.device)
        groups = places_E[ids[of]].view(sets, -1)
        groups += (groups < len(held)) * torch.arange(sets, device=ids.device)[:, None] * len(held)
        rows = ops.group_held(groups.view(-1, K).int(), sets, len(held), x)
        counts = rows.counts_E.tolist()[:-1]
        y_RH, saved = ops.held_forward(x[of], rows, counts if is_counted else None, *own)
        found = ops.held_backward(dout[of], weights[of], rows, counts if is_counted else None, saved, *own)
        num = sum(counts)
        assert int(rows.held) == num and torch.equal(
            rows.inverse_R[rows.order_R.long()].cpu(), torch.arange(len(rows.order_R)).int()
        )
        return torch.cat([y_RH[:num], found.dx_RH[:num]], 1), found, rows.order_R[:num]

    together, gradients, order = run(slice(0, S * T), S)
    start = 0
    for source in range(S):
        alone, found, own_order = run(slice(source * T, source * T + T), 1)
        assert torch.equal(together[start : start + len(alone)], alone)
        assert torch.equal(order[start : start + len(alone)] - source * T * K, own_order)
        assert torch.equal(gradients.dgate_up_GE2IH[source], found.dgate_up_GE2IH[0])
        assert torch.equal(gradients.ddown_GEHI[source], found.ddown_GEHI[0])
        assert torch.equal(gradients.dweights_R[start : start + len(alone)], found.dweights_R[: len(alone)])
        start += len(alone)
