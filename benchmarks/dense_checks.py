"""Relative errors of the dense kernels in bf16 against fp64, at sizes that no tile divides."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sparseray.kernels.dense import reference
from sparseray.kernels.dense.embedding import embedding_grad_
from sparseray.kernels.dense.head_loss import head_loss
from sparseray.kernels.dense.rms_norm import add_rms_norm
from sparseray.kernels.dense.rope import rope
from sparseray.kernels.dense.squared_norm import squared_norm
from sparseray.kernels.dense.swiglu import swiglu
from sparseray.model.layers import rope_tables

ROWS = 1003


def rand(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def _as_tuple(x: Any) -> tuple[Tensor, ...]:
    return x if isinstance(x, tuple) else (x,)


def error(found: Tensor, wanted: Tensor) -> float:
    return float(
        (found.detach().double() - wanted.detach().double()).norm() / wanted.detach().double().norm()
    )


def check(name: str, fused: Callable[..., Any], plain: Callable[..., Any], inputs: Sequence[Tensor]) -> str:
    """A row: worst errors of outputs and gradients, and whether a second run gives the same bits."""
    exact = [x.double().requires_grad_() for x in inputs]
    wanted = _as_tuple(plain(*exact))
    grads = [torch.randn_like(x) for x in wanted]
    want_grads = torch.autograd.grad(wanted, exact, grads)
    runs = []
    for _ in range(2):
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        outs = _as_tuple(fused(*leaves))
        found = torch.autograd.grad(outs, leaves, [g.to(o.dtype) for g, o in zip(grads, outs)])
        runs.append([*outs, *found])
    same = all(torch.equal(a, b) for a, b in zip(*runs))
    errors = [error(a, b) for a, b in zip(runs[0], [*wanted, *want_grads])]
    count = len(wanted)
    return f"| {name} | {max(errors[:count]):.1e} | {max(errors[count:]):.1e} | {'yes' if same else 'NO'} |"


def check_rows() -> list[str]:
    """The table, line by line."""
    torch.manual_seed(0)
    rows = ["| bf16 against fp64 | outputs | gradients | same bits twice |", "|---|---|---|---|"]
    targets = torch.randint(-1, 5003, (ROWS,), device="cuda")
    weights = torch.rand(ROWS, device="cuda")
    rows.append(
        check(
            "head with loss, hidden 264, vocabulary 5003", lambda h, w: head_loss(h, w, targets, weights),
            lambda h, w: reference.head_loss_reference(h, w, targets, weights.double()), [rand(ROWS, 264), rand(5003, 264) * 0.1],
        )
    )  # fmt: skip

    def norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return reference.rms_norm_reference(x + residual, weight, 1e-6), x + residual

    for H in (64, 1000, 7168):
        inputs = [rand(ROWS, H), rand(ROWS, H), rand(H)]
        rows.append(
            check(f"residual + RMSNorm {H}", lambda x, r, w: add_rms_norm(x, r, w, 1e-6), norm, inputs)
        )
    cos, sin = (t.cuda() for t in rope_tables(ROWS, 64, 10000.0))
    positions = torch.randperm(ROWS, device="cuda")
    for is_interleaved in (False, True):

        def turned(x: Tensor, is_interleaved: bool = is_interleaved) -> tuple[Tensor, ...]:
            part = reference.rope_reference(
                x[:, :7], cos[positions], sin[positions], is_interleaved=is_interleaved
            )
            return part[:, :5], part[:, 5:], x[:, 7:]

        def ours(x: Tensor, is_interleaved: bool = is_interleaved) -> tuple[Tensor, ...]:
            return rope(x, positions, cos, sin, heads=(5, 2, 2), is_interleaved=is_interleaved)

        rows.append(check(f"rotary, interleaved: {is_interleaved}", ours, turned, [rand(ROWS, 9, 64)]))
    rows.append(check("SwiGLU 1001", swiglu, reference.swiglu_reference, [rand(ROWS, 2002)]))
    ids, grads = torch.randint(0, 50, (ROWS,)), rand(ROWS, 136)
    wanted = reference.embedding_grad_reference(ids, grads.double().cpu(), 50).cuda()
    found = [embedding_grad_(torch.empty(50, 136, device="cuda"), ids.cuda(), grads) for _ in range(2)]
    rows.append(f"| embedding | | {error(found[0], wanted):.1e} | {'yes' if torch.equal(*found) else 'NO'} |")
    x = rand(1 << 22)
    rows.append(f"| squared norm | {error(squared_norm([x]), x.double().square().sum()):.1e} | | |")
    return rows
