"""A layer whose experts are held by several devices has the bits of one that holds them all, forward and backward."""

from __future__ import annotations

import pytest
import torch
import triton_interpreter  # noqa: F401  (first: it sets the interpreter up where there is no GPU)
from test_kernels_moe import DEVICE, distinct_ids, layer
from torch import Tensor

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
        rows = ops.group_held(places_E[ids].int(), len(experts), x)
        counts = rows.counts_E.tolist()[:-1]
        order_R = rows.order_R[: sum(counts)].long()
        y_RH[order_R], saved = ops.held_forward(x, rows, counts, *own)
        found: HeldGradients = ops.held_backward(dout, weights, rows, counts, saved, *own)
        dx_RH[order_R], dweights_R[order_R] = found.dx_RH, found.dweights_R
        gradients[0][experts], gradients[1][experts] = found.dgate_up_E2IH, found.ddown_EHI
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
