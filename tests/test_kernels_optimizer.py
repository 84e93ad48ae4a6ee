"""Fused AdamW and the squared norm of slabs against their plain reference and torch's own."""

from __future__ import annotations

import math

import pytest
import torch
import triton_interpreter  # noqa: F401  (first: it sets the interpreter up where there is no GPU)
from torch import Tensor

from sparseray.kernels.dense import squared_norm as squared_norm_module
from sparseray.kernels.dense.adamw import adamw_step
from sparseray.kernels.dense.reference import adamw_reference, squared_norms_reference
from sparseray.kernels.dense.squared_norm import PIECE, clip_scale, squared_norm, squared_norms
from sparseray.kernels.ops import REFERENCE
from sparseray.kernels.triton_ops import TRITON

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPTIONS = {"lr": 3e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def rand(*shape: int) -> Tensor:
    return torch.randn(*shape).to(DEVICE)


@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gradients", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 5, 7), (2049,), (64, 96)])
def test_update_equals_the_reference(
    shape: tuple[int, ...], gradients: torch.dtype, moments: torch.dtype
) -> None:
    torch.manual_seed(0)
    master = rand(*shape)
    states = [
        [master.clone(), *(torch.zeros(shape, device=DEVICE, dtype=moments) for _ in range(2))]
        for _ in range(2)
    ]
    copy = torch.full(shape, math.nan, dtype=torch.bfloat16, device=DEVICE)
    scale = torch.tensor(0.37, device=DEVICE)
    for step in range(1, 5):
        gradient = rand(*shape).to(gradients)
        adamw_step(*states[0], gradient, copy=copy, scale=scale, step=step, **OPTIONS)
        adamw_reference(*states[1], gradient, scale=float(scale), step=step, **OPTIONS)
        torch.testing.assert_close(states[0][0], states[1][0], rtol=1e-5, atol=1e-6)
        # A value halfway between two of the moments' dtype may go either way.
        for found, wanted in zip(states[0][1:], states[1][1:]):
            torch.testing.assert_close(
                found, wanted, rtol=1e-5 if moments == torch.float32 else 2**-7, atol=1e-7
            )
            wanted.copy_(found)
        # The interpreter cuts bf16 off where the hardware rounds to nearest.
        rounding = 0.0 if DEVICE == "cuda" else 2**-7
        torch.testing.assert_close(copy, states[0][0].bfloat16(), rtol=rounding, atol=0.0)


def test_updates_equal_torchs_optimizer() -> None:
    torch.manual_seed(0)
    master = rand(40, 9)
    parameter = torch.nn.Parameter(master.clone())
    optimizer = torch.optim.AdamW([parameter], fused=True, **OPTIONS)
    first, second = torch.zeros_like(master), torch.zeros_like(master)
    for step in range(1, 7):
        parameter.grad = rand(40, 9)
        gradient = parameter.grad.clone()
        squared = squared_norm([gradient])
        torch.nn.utils.clip_grad_norm_([parameter], 1.0)
        optimizer.step()
        adamw_step(master, first, second, gradient, scale=clip_scale(squared, 1.0), step=step, **OPTIONS)
        torch.testing.assert_close(master, parameter.detach(), rtol=1e-5, atol=1e-6)


def test_moments_in_bf16_follow_gradients_that_fall() -> None:
    master = torch.zeros(16, device=DEVICE)
    first, second = (torch.zeros(16, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    for step in range(1, 200):
        gradient = torch.full((16,), 1.0 if step < 20 else 0.01, device=DEVICE)
        adamw_step(
            master, first, second, gradient, step=step, lr=0.0, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0
        )
    exact = (1 - 0.99**19) * 0.99**180 + 1e-4 * (1 - 0.99**180)
    assert 0.5 < float(second[0]) / exact < 2.0


def test_tensors_that_do_not_match_the_slab_are_refused() -> None:
    slab, moments = torch.zeros(4, 6), [torch.zeros(4, 6) for _ in range(2)]
    with pytest.raises(ValueError, match=r"gradient \(6, 4\)"):
        adamw_step(slab, *moments, torch.zeros(4, 6).T, step=1, **OPTIONS)
    with pytest.raises(ValueError, match=r"copy \(5,\)"):
        adamw_step(slab, *moments, slab, copy=torch.zeros(5), step=1, **OPTIONS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_squared_norm_of_tensors_large_and_small(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(squared_norm_module, "SMALL", PIECE)
    tensors = [rand(n).to(dtype) for n in (1, 0, PIECE, 2 * PIECE + 5, 4097)]
    wanted = sum(x.double().square().sum() for x in tensors)
    found = squared_norm(tensors)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=0.0)
    assert torch.equal(squared_norm(tensors), found)
    torch.testing.assert_close(clip_scale(found, 1.0), (1.0 / wanted.sqrt()).float(), rtol=1e-5, atol=0.0)
    assert float(clip_scale(found, 1e9)) == 1.0


def test_squared_norms_of_rows() -> None:
    tensors = [
        torch.randn(shape, device=DEVICE)
        for shape in ((3, PIECE + 5), (7,), (2, 4, 6), (1, 2 * PIECE), (5, 5))
    ]
    tensors.append(tensors[1].bfloat16())
    rows = [3, 1, 2, 1, 1, 1]
    found = squared_norms(tensors, rows)
    torch.testing.assert_close(found, squared_norms_reference(tensors, rows))
    assert torch.equal(squared_norms(tensors, rows), found)
    assert squared_norms(tensors[:2], [1, 1])[0] == squared_norm(tensors[:1])


def test_the_embeddings_gradient_is_torchs() -> None:
    tokens = torch.randint(0, 11, (200,), device=DEVICE)
    grads = []
    for ops in (REFERENCE, TRITON):
        weight = torch.ones(11, 24, device=DEVICE, requires_grad=True)
        (ops.embedding(tokens, weight) * torch.arange(200.0, device=DEVICE)[:, None]).sum().backward()
        grads.append(weight.grad)
    torch.testing.assert_close(*grads)


def test_a_product_is_added_to_what_is_given_away() -> None:
    y, x, weight = (rand(*shape).requires_grad_() for shape in ((7, 5), (7, 3), (5, 3)))
    wanted = REFERENCE.add_linear(y, x, weight, invariant=False)
    found = TRITON.add_linear(y.clone(), x, weight, invariant=False)
    torch.testing.assert_close(found, wanted)
    grads = [torch.autograd.grad(out.square().sum(), (y, x, weight)) for out in (found, wanted)]
    torch.testing.assert_close(*grads)
