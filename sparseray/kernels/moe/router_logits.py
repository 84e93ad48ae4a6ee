"""Logits of the router to the precision of fp32 from bf16 rows and fp32 weights, by tensor cores.

An fp32 number is the sum of three bf16 numbers to its last bit, and products of bf16 numbers are exact in fp32. So the
weights are split as they are loaded, and x @ w.T is three products of bf16 tiles that add up in fp32: what a product
in fp32 gives, without a copy of the rows in fp32 and without fp32's arithmetic units. In the backward pass the
gradient of the logits is split likewise. No atomics: the same inputs give the same bits.

Shapes: R rows, H hidden, E experts, S parts of the rows.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparseray.kernels.dense.sum_parts import sum_parts
from sparseray.kernels.launch import launch_kernel
from sparseray.kernels.takes import is_interpreted

MOST_PARTS, FEW_ROWS = 32, 64
"""Parts of the rows whose weight gradients are added in order; rows up to which each is multiplied by itself."""


@triton.jit
def _thirds(b, FACTOR: tl.constexpr):
    """Three bf16 tiles whose sum is the fp32 tile, as numbers of FACTOR."""
    b_1 = b.to(tl.bfloat16)
    b = b - b_1.to(tl.float32)
    b_2 = b.to(tl.bfloat16)
    b_3 = (b - b_2.to(tl.float32)).to(tl.bfloat16)
    return b_1.to(FACTOR), b_2.to(FACTOR), b_3.to(FACTOR)


@triton.jit
def logits_kernel(
    p_x, p_w, p_out, R,
    H: tl.constexpr, E: tl.constexpr, BR: tl.constexpr, BE: tl.constexpr, BH: tl.constexpr, STAGES: tl.constexpr,
    FACTOR: tl.constexpr,
):  # fmt: skip
    """BR rows by BE experts of x [R, H] @ w [E, H].T."""
    o_r = tl.program_id(0) * BR + tl.arange(0, BR)
    o_e = tl.program_id(1) * BE + tl.arange(0, BE)
    m_r, m_e = (o_r < R)[:, None], (o_e < E)[:, None]
    p_xr = p_x + o_r[:, None].to(tl.int64) * H
    acc = tl.zeros([BR, BE], tl.float32)
    for h in tl.range(0, H, BH, num_stages=STAGES):
        o_h = (h + tl.arange(0, BH))[None, :]
        b_x = tl.load(p_xr + o_h, mask=m_r & (o_h < H), other=0.0).to(FACTOR)
        b_w = tl.load(p_w + o_e[:, None] * H + o_h, mask=m_e & (o_h < H), other=0.0)
        b_1, b_2, b_3 = _thirds(b_w, FACTOR)
        acc = tl.dot(b_x, tl.trans(b_3), acc)
        acc = tl.dot(b_x, tl.trans(b_2), acc)
        acc = tl.dot(b_x, tl.trans(b_1), acc)
    tl.store(p_out + o_r[:, None].to(tl.int64) * E + o_e[None, :], acc, mask=m_r & (o_e[None, :] < E))


@triton.jit
def few_logits_kernel(
    p_x, p_w, p_out, H: tl.constexpr, E: tl.constexpr, BE: tl.constexpr, BH: tl.constexpr
):  # fmt: skip
    """One row by BE experts, in fp32: with few rows a loop of products waits longer than it computes."""
    i_r = tl.program_id(0)
    o_e = (tl.program_id(1) * BE + tl.arange(0, BE))[:, None]
    acc = tl.zeros([BE, BH], tl.float32)
    for h in tl.static_range(0, H, BH):
        o_h = h + tl.arange(0, BH)
        b_x = tl.load(p_x + i_r * H + o_h, mask=o_h < H, other=0.0).to(tl.float32)[None, :]
        acc += b_x * tl.load(p_w + o_e * H + o_h[None, :], mask=(o_e < E) & (o_h < H)[None, :], other=0.0)
    o_out = tl.program_id(1) * BE + tl.arange(0, BE)
    tl.store(p_out + i_r * E + o_out, tl.sum(acc, 1), mask=o_out < E)


@triton.jit
def row_gradient_kernel(
    p_d, p_w, p_dx, R,
    H: tl.constexpr, E: tl.constexpr, BR: tl.constexpr, BE: tl.constexpr, BH: tl.constexpr,
    FACTOR: tl.constexpr,
):  # fmt: skip
    """BR rows by BH columns of d [R, E] @ w [E, H]; it is rounded to bf16, so products of second parts are left out."""
    o_r = tl.program_id(0) * BR + tl.arange(0, BR)
    o_h = tl.program_id(1) * BH + tl.arange(0, BH)
    m_r, m_h = (o_r < R)[:, None], (o_h < H)[None, :]
    acc = tl.zeros([BR, BH], tl.float32)
    for e in range(0, E, BE):
        o_e = e + tl.arange(0, BE)
        o_d = o_r[:, None].to(tl.int64) * E + o_e[None, :]
        b_d = tl.load(p_d + o_d, mask=m_r & (o_e[None, :] < E), other=0.0)
        b_d1, b_d2, _ = _thirds(b_d, FACTOR)
        b_w = tl.load(p_w + o_e[:, None] * H + o_h[None, :], mask=(o_e[:, None] < E) & m_h, other=0.0)
        b_w1, b_w2, _ = _thirds(b_w, FACTOR)
        acc = tl.dot(b_d2, b_w1, acc)
        acc = tl.dot(b_d1, b_w2, acc)
        acc = tl.dot(b_d1, b_w1, acc)
    o = o_r[:, None].to(tl.int64) * H + o_h[None, :]
    tl.store(p_dx + o, acc.to(p_dx.dtype.element_ty), mask=m_r & m_h)


@triton.jit
def weight_gradient_kernel(
    p_d, p_x, p_dw, R, span,
    H: tl.constexpr, E: tl.constexpr, BR: tl.constexpr, BE: tl.constexpr, BH: tl.constexpr, STAGES: tl.constexpr,
    FACTOR: tl.constexpr,
):  # fmt: skip
    """BE experts by BH columns of d [R, E].T @ x [R, H] over one part of the rows."""
    o_e = tl.program_id(0) * BE + tl.arange(0, BE)
    o_h = tl.program_id(1) * BH + tl.arange(0, BH)
    i_s = tl.program_id(2)
    m_e, m_h = (o_e < E)[None, :], (o_h < H)[None, :]
    end = tl.minimum((i_s + 1) * span, R)
    acc = tl.zeros([BE, BH], tl.float32)
    for r in tl.range(i_s * span, end, BR, num_stages=STAGES):
        o_r = (r + tl.arange(0, BR))[:, None]
        o_row = o_r.to(tl.int64)
        b_d = tl.load(p_d + o_row * E + o_e[None, :], mask=(o_r < end) & m_e, other=0.0)
        b_x = tl.load(p_x + o_row * H + o_h[None, :], mask=(o_r < end) & m_h, other=0.0).to(FACTOR)
        b_1, b_2, b_3 = _thirds(b_d, FACTOR)
        acc = tl.dot(tl.trans(b_3), b_x, acc)
        acc = tl.dot(tl.trans(b_2), b_x, acc)
        acc = tl.dot(tl.trans(b_1), b_x, acc)
    o = (i_s * E + o_e[:, None]) * H + o_h[None, :]
    tl.store(p_dw + o, acc, mask=(o_e[:, None] < E) & m_h)


def _factor() -> tl.dtype:
    """Type of the products' factors: Triton's interpreter does not multiply bf16."""
    return tl.float32 if is_interpreted() else tl.bfloat16


def _columns(experts: int) -> int:
    return min(64, max(16, triton.next_power_of_2(experts)))


class _RouterLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_RH: Tensor, weight_EH: Tensor) -> Tensor:
        (R, H), E = x_RH.shape, weight_EH.shape[0]
        out_RE = torch.empty(R, E, dtype=torch.float32, device=x_RH.device)
        if R <= FEW_ROWS:
            launch_kernel(
                few_logits_kernel, (R, triton.cdiv(E, 4)), x_RH, weight_EH, out_RE,
                H=H, E=E, BE=4, BH=min(1024, triton.next_power_of_2(H)), num_warps=4,
            )  # fmt: skip
        else:
            be = _columns(E)
            launch_kernel(
                logits_kernel, (triton.cdiv(R, 64), triton.cdiv(E, be)), x_RH, weight_EH, out_RE, R,
                H=H, E=E, BR=64, BE=be, BH=64, STAGES=3, FACTOR=_factor(), num_warps=4,
            )  # fmt: skip
        ctx.save_for_backward(x_RH, weight_EH)
        return out_RE

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x_RH, weight_EH = ctx.saved_tensors
        (R, H), E = x_RH.shape, weight_EH.shape[0]
        d_RE, be = grads[0].contiguous(), _columns(E)
        dx_RH = dw_EH = None
        if ctx.needs_input_grad[0]:
            dx_RH = torch.empty_like(x_RH)
            launch_kernel(
                row_gradient_kernel, (triton.cdiv(R, 64), triton.cdiv(H, 128)), d_RE, weight_EH, dx_RH, R,
                H=H, E=E, BR=64, BE=be, BH=128, FACTOR=_factor(), num_warps=4,
            )  # fmt: skip
        if ctx.needs_input_grad[1]:
            span = triton.cdiv(triton.cdiv(R, MOST_PARTS), 64) * 64
            parts = triton.cdiv(R, span)
            dw_SEH = torch.empty(parts, E, H, dtype=torch.float32, device=x_RH.device)
            launch_kernel(
                weight_gradient_kernel, (triton.cdiv(E, be), triton.cdiv(H, 128), parts),
                d_RE, x_RH, dw_SEH, R, span, H=H, E=E, BR=64, BE=be, BH=128, STAGES=3, FACTOR=_factor(),
                num_warps=4,
            )  # fmt: skip
            dw_EH = sum_parts(dw_SEH, torch.float32)
        return dx_RH, dw_EH


def router_logits(x_RH: Tensor, weight_EH: Tensor) -> Tensor:
    """x @ weight.T in fp32, [R, E], differentiable; gradients in the inputs' dtypes.

    Args:
        x_RH: bf16, at least one row.
        weight_EH: fp32.
    """
    out_RE: Tensor = _RouterLogits.apply(x_RH.contiguous(), weight_EH.contiguous())
    return out_RE
