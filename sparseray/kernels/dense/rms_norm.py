"""RMSNorm with the residual addition before it: forward and backward in one pass over memory each.

Where several read the norm, it comes once for each, and the backward pass adds up their gradients as it reads them.
Statistics in fp32. A row's bits do not depend on the other rows. The gradient of the weight is added up by each
program over its own rows, then over the programs in their order. Oracle: `reference.rms_norm_reference`.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparseray.kernels.dense.sum_parts import sum_parts
from sparseray.kernels.launch import launch_kernel

FORWARD_TILE, BACKWARD_TILE, MOST_PROGRAMS, STAGES = 4096, 2048, 528, 2
"""Values that a program holds at a time; programs of the backward pass (four a multiprocessor of 132),
and how many of its tiles are on their way."""
MOST_READERS = 3


@triton.jit
def _forward_kernel(
    p_x, p_residual, p_weight, p_total, p_out, p_rstd, R, eps,
    H: tl.constexpr, ADD: tl.constexpr, BR: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    o_r = tl.program_id(0) * BR + tl.arange(0, BR)
    o_h = tl.arange(0, BH)
    m = (o_r < R)[:, None] & (o_h < H)[None, :]
    o = o_r[:, None].to(tl.int64) * H + o_h[None, :]
    b_x = tl.load(p_x + o, mask=m, other=0.0).to(tl.float32)  # [BR, BH]
    if ADD:
        b_total = (b_x + tl.load(p_residual + o, mask=m, other=0.0)).to(p_total.dtype.element_ty)
        tl.store(p_total + o, b_total, mask=m)
        # The sum as it is kept: the backward pass starts from it.
        b_x = b_total.to(tl.float32)
    b_rstd = tl.rsqrt(tl.sum(b_x * b_x, 1) / H + eps)
    tl.store(p_rstd + o_r, b_rstd, mask=o_r < R)
    b_w = tl.load(p_weight + o_h, mask=o_h < H, other=0.0).to(tl.float32)
    tl.store(p_out + o, (b_x * b_rstd[:, None] * b_w[None, :]).to(p_out.dtype.element_ty), mask=m)


@triton.jit
def _backward_kernel(
    p_dy, p_dy1, p_dy2, p_dtotal, p_x, p_weight, p_rstd, p_dx, p_partial, R, rows,
    H: tl.constexpr, ADD: tl.constexpr, BR: tl.constexpr, BH: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dx = rstd (w dy - n mean(w dy n)) + dtotal with n = rstd x, and this program's part of dw = sum of dy n.

    dy is the sum of up to three.
    """
    i_p = tl.program_id(0)
    end = tl.minimum((i_p + 1) * rows, R)
    o_h = tl.arange(0, BH)
    m_h = o_h < H
    b_w = tl.load(p_weight + o_h, mask=m_h, other=0.0).to(tl.float32)[None, :]
    b_dw = tl.zeros([BR, BH], tl.float32)
    for start in tl.range(i_p * rows, end, BR, num_stages=STAGES):
        o_r = start + tl.arange(0, BR)
        m = (o_r < end)[:, None] & m_h[None, :]
        o = o_r[:, None].to(tl.int64) * H + o_h[None, :]
        b_rstd = tl.load(p_rstd + o_r, mask=o_r < end, other=0.0)[:, None]
        b_n = tl.load(p_x + o, mask=m, other=0.0).to(tl.float32) * b_rstd  # [BR, BH]
        b_dy = tl.load(p_dy + o, mask=m, other=0.0).to(tl.float32)
        if p_dy1 is not None:
            b_dy += tl.load(p_dy1 + o, mask=m, other=0.0).to(tl.float32)
        if p_dy2 is not None:
            b_dy += tl.load(p_dy2 + o, mask=m, other=0.0).to(tl.float32)
        b_dw += b_dy * b_n
        b_dy *= b_w
        b_mean = tl.sum(b_dy * b_n, 1)[:, None] / H
        b_dx = (b_dy - b_n * b_mean) * b_rstd
        if ADD:
            b_dx += tl.load(p_dtotal + o, mask=m, other=0.0).to(tl.float32)
        tl.store(p_dx + o, b_dx.to(p_dx.dtype.element_ty), mask=m)
    tl.store(p_partial + i_p * H + o_h, tl.sum(b_dw, 0), mask=m_h)


def _tile(width: int, most: int) -> dict[str, int]:
    """Rows and columns of a program, and its warps."""
    columns = triton.next_power_of_2(width)
    return {"BR": max(1, most // columns), "BH": columns, "num_warps": 4 if columns <= 4096 else 8}


def _forward(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return (normed like x, the rows that were normed, their 1 / rms)."""
    H, R = x.shape[-1], x.numel() // x.shape[-1]
    out, rstd_R = torch.empty_like(x), torch.empty(R, dtype=torch.float32, device=x.device)
    total = torch.empty_like(residual) if residual is not None else x
    tile = _tile(H, FORWARD_TILE)
    launch_kernel(
        _forward_kernel, (triton.cdiv(R, tile["BR"]),), x, residual, weight, total, out, rstd_R, R, eps,
        H=H, ADD=residual is not None, **tile,
    )  # fmt: skip
    return out, total, rstd_R


def _backward(
    dys: Sequence[Tensor], dtotal: Tensor | None, x: Tensor, weight: Tensor, rstd_R: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradients of the rows that were normed and of the weight; dys are one to three."""
    H, R = x.shape[-1], x.numel() // x.shape[-1]
    tile = _tile(H, BACKWARD_TILE)
    rows = max(1, triton.cdiv(triton.cdiv(R, MOST_PROGRAMS), tile["BR"])) * tile["BR"]
    programs = triton.cdiv(R, rows)
    dx, partial_PH = torch.empty_like(x), torch.empty(programs, H, dtype=torch.float32, device=x.device)
    launch_kernel(
        _backward_kernel, (programs,), *(dy.contiguous() for dy in dys), *(None,) * (MOST_READERS - len(dys)),
        None if dtotal is None else dtotal.contiguous(), x, weight, rstd_R, dx, partial_PH, R, rows, H=H, ADD=dtotal is not None, STAGES=STAGES, **tile,
    )  # fmt: skip
    return dx, sum_parts(partial_PH, weight.dtype)


class _AddRmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, readers: int
    ) -> Any:
        ctx.set_materialize_grads(False)
        out, total, rstd_R = _forward(x, residual, weight, eps)
        ctx.save_for_backward(total, weight, rstd_R)
        ctx.x_dtype, ctx.has_residual = x.dtype, residual is not None
        outs = out, *(out.view_as(out) for _ in range(1, readers))
        return (*outs, total) if residual is not None else out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        total, weight, rstd_R = ctx.saved_tensors
        *douts, dtotal = grads if ctx.has_residual else (*grads, None)
        dys = [dy for dy in douts if dy is not None]
        dx, dweight = _backward(dys, dtotal, total, weight, rstd_R) if dys else (dtotal, None)
        if dx is None:
            return (None,) * 5
        return dx.to(ctx.x_dtype), dx if ctx.has_residual else None, dweight, None, None


def rms_norm(x: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm of the last axis, differentiable.

    Args:
        x: [..., H], bf16, fp16 or fp32.
        weight_H: bf16, fp16 or fp32.
        eps: added to the mean square.
    """
    out: Tensor = _AddRmsNorm.apply(x.contiguous(), None, weight_H, eps, 1)
    return out


def add_rms_norm(
    x: Tensor, residual: Tensor, weight_H: Tensor, eps: float, readers: int = 1
) -> tuple[Tensor, ...]:
    """Return (norm of x + residual in x's dtype, x + residual in the residual's dtype), differentiable.

    Args:
        x, residual: [..., H], bf16, fp16 or fp32; the residual stream may be wider than x.
        weight_H: bf16, fp16 or fp32.
        eps: added to the mean square.
        readers: how often the norm comes, 1 to MOST_READERS; it is one tensor in memory.
    """
    assert 1 <= readers <= MOST_READERS
    out: tuple[Tensor, ...] = _AddRmsNorm.apply(x.contiguous(), residual.contiguous(), weight_H, eps, readers)
    return out
