"""Gradients of the experts' weights put straight into fp32 slabs, against those that autograd returns."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import triton_interpreter  # noqa: F401  (first: it sets the interpreter up where there is no GPU)
from test_kernels_moe import DEVICE, TINY, distinct_ids, layer
from torch import Tensor

from sparseray.kernels.moe import ffn


def slabs_of(tensors: list[Tensor], fill: float, accumulate: bool) -> ffn.GradientSlabs:
    up, down = (torch.full(t.shape, fill, device=DEVICE) for t in tensors[2:])
    return ffn.GradientSlabs(gate_up_E2IH=up, down_EHI=down, accumulate=accumulate)


def backward(
    tensors: list[Tensor],
    ids: Tensor,
    rows: slice,
    slabs: ffn.GradientSlabs | None,
    config: ffn.LayerConfig | None,
) -> list[Tensor | None]:
    """Gradients of a part of the tokens: x, routing weights, gate and up, down."""
    leaves = [t.clone().requires_grad_() for t in (tensors[0][rows], tensors[1][rows], *tensors[2:])]
    y = ffn.moe_ffn(leaves[0], ids[rows], *leaves[1:], config=config, slabs=slabs)
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(ids.shape[0], y.shape[1], generator=generator).to(DEVICE, y.dtype)
    y.backward(grad[rows])
    return [leaf.grad for leaf in leaves]


@pytest.mark.parametrize("tma", [True, False])
@pytest.mark.parametrize(("T", "E", "K", "H", "I"), [(23, 5, 2, 24, 20), (9, 4, 3, 19, 21)])
def test_parts_add_their_weight_gradients_to_slabs(T: int, E: int, K: int, H: int, I: int, tma: bool) -> None:
    torch.manual_seed(0)
    ids, tensors = distinct_ids(T, E - 1, K), layer(T, E, K, H, I)
    config = dataclasses.replace(TINY, tma=tma)
    wanted = backward(tensors, ids, slice(0, T), None, config)
    slabs = slabs_of(tensors, float("nan"), False)
    first = backward(tensors, ids, slice(0, 4), slabs, config)
    rest = backward(tensors, ids, slice(4, T), dataclasses.replace(slabs, accumulate=True), config)
    assert first[2:] == rest[2:] == [None, None]
    for part, more, want in zip(first[:2], rest[:2], wanted[:2]):
        torch.testing.assert_close(torch.cat([part, more]), want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(slabs.gate_up_E2IH, wanted[2], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(slabs.down_EHI, wanted[3], rtol=1e-4, atol=1e-4)


def test_slabs_are_filled_though_the_weights_are_frozen_copies() -> None:
    torch.manual_seed(0)
    ids, tensors = distinct_ids(9, 4, 2), layer(9, 4, 2, 16, 16)
    wanted = backward(tensors, ids, slice(0, 9), None, TINY)
    slabs = slabs_of(tensors, 1.0, True)
    y = ffn.moe_ffn(tensors[0].clone().requires_grad_(), ids, *tensors[1:], config=TINY, slabs=slabs)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE))
    torch.testing.assert_close(slabs.gate_up_E2IH - 1.0, wanted[2], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(slabs.down_EHI - 1.0, wanted[3], rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_slabs_of_a_bf16_layer_repeat_their_bits_and_are_close_to_fp32() -> None:
    torch.manual_seed(0)
    ids, exact = distinct_ids(600, 16, 4), layer(600, 16, 4, 1024, 512)
    wanted = backward(exact, ids, slice(0, 600), None, None)
    tensors = [t if i == 1 else t.bfloat16() for i, t in enumerate(exact)]
    runs = [slabs_of(tensors, 0.0, True) for _ in range(2)]
    for slabs in runs:
        for rows in (slice(0, 200), slice(200, 600)):
            backward(tensors, ids, rows, slabs, None)
    for name, want in (("gate_up_E2IH", wanted[2]), ("down_EHI", wanted[3])):
        found = [getattr(slabs, name) for slabs in runs]
        assert torch.equal(*found)
        assert float((found[0] - want).norm() / want.norm()) < 1e-2
