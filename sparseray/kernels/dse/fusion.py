"""DSE's context gate and short convolution, two launches each way (Triton); oracle: `reference.memory_output`.

The first reads each token's hidden state, key and value once and keeps two numbers: the gate and the
norm of the gated value. The second makes the convolution's inputs from them and the value as it goes,
so neither the gated nor the normed value is stored. Backward likewise: the first launch gives the gradient
of the convolution's output, the second goes over the tokens once and gives all others; what is summed over tokens
comes as a partial sum of each program, added up in order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparseray.kernels.dse.reference import Fusion
from sparseray.kernels.launch import launch_kernel

ROWS = 32
"""Tokens that one program of the backward pass goes over."""
BACKWARD_REGISTERS = 128
"""With more of them a multiprocessor would hold one program, which waits for its loads."""
LEARNT = ("query_norm_C", "key_norm_C", "value_norm_C", "conv_CK")


@triton.jit
def _gate_kernel(
    p_h,
    p_k,
    p_v,
    p_h_norm,
    p_k_norm,
    p_gate,
    p_scale,
    stride,
    eps,
    conv_eps,
    scale,
    C: tl.constexpr,
    BC: tl.constexpr,
):
    i_t = tl.program_id(0).to(tl.int64)
    o_c = tl.arange(0, BC)
    m = o_c < C
    h = tl.load(p_h + i_t * C + o_c, mask=m, other=0.0).to(tl.float32)
    k = tl.load(p_k + i_t * stride + o_c, mask=m, other=0.0).to(tl.float32)
    v = tl.load(p_v + i_t * stride + o_c, mask=m, other=0.0).to(tl.float32)
    h_norm = tl.load(p_h_norm + o_c, mask=m, other=0.0).to(tl.float32)
    k_norm = tl.load(p_k_norm + o_c, mask=m, other=0.0).to(tl.float32)
    dot = tl.sum(h * h_norm * k * k_norm, 0)
    norms = tl.sqrt(tl.sum(h * h, 0) / C + eps) * tl.sqrt(tl.sum(k * k, 0) / C + eps)
    x = dot / norms * scale
    root = tl.sqrt(tl.maximum(tl.abs(x), 1e-6))
    gate = 1.0 / (1.0 + tl.exp(-tl.where(x > 0, root, tl.where(x < 0, -root, 0.0))))
    tl.store(p_gate + i_t, gate)
    tl.store(p_scale + i_t, 1.0 / tl.sqrt(gate * gate * tl.sum(v * v, 0) / C + conv_eps))


@triton.jit
def _convolved(
    p_v, p_gate, p_scale, p_segment, p_weight, p_v_norm, first, o_t, o_c, T, stride,
    C: tl.constexpr, K: tl.constexpr, DILATION: tl.constexpr, SEGMENTS: tl.constexpr,
    BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """(the convolution of normed gated values, the gated values) of a tile of the sequence that begins at `first`."""
    m_t, m_c = o_t < T, o_c < C
    norm = tl.load(p_v_norm + o_c, mask=m_c, other=0.0).to(tl.float32)
    acc = tl.zeros([BT, BC], tl.float32)
    gated = tl.zeros([BT, BC], tl.float32)
    if SEGMENTS:
        segment = tl.load(p_segment + first + o_t, mask=m_t, other=0)
    for j in tl.static_range(K):
        o_p = o_t - j * DILATION
        m_p = m_t & (o_p >= 0)
        if SEGMENTS:
            m_p = m_p & (tl.load(p_segment + first + o_p, mask=m_p, other=-1) == segment)
        gate = tl.load(p_gate + first + o_p, mask=m_p, other=0.0)
        scale = tl.load(p_scale + first + o_p, mask=m_p, other=0.0)
        p = p_v + (first + o_p)[:, None] * stride + o_c[None, :]
        x = tl.load(p, mask=m_p[:, None] & m_c[None, :], other=0.0).to(tl.float32) * gate[:, None]
        if j == 0:
            gated = x
        weight = tl.load(p_weight + o_c * K + (K - 1 - j), mask=m_c, other=0.0).to(tl.float32)
        acc += x * scale[:, None] * (norm * weight)[None, :]
    return acc, gated


@triton.jit
def _conv_kernel(
    p_v,
    p_gate,
    p_scale,
    p_segment,
    p_weight,
    p_v_norm,
    p_out,
    T,
    stride,
    C: tl.constexpr,
    K: tl.constexpr,
    DILATION: tl.constexpr,
    SEGMENTS: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
):
    o_t = tl.program_id(0) * BT + tl.arange(0, BT)
    o_c = tl.program_id(1) * BC + tl.arange(0, BC)
    first = tl.program_id(2).to(tl.int64) * T
    acc, gated = _convolved(
        p_v, p_gate, p_scale, p_segment, p_weight, p_v_norm, first, o_t, o_c, T, stride,
        C, K, DILATION, SEGMENTS, BT, BC,
    )  # fmt: skip
    out = acc / (1.0 + tl.exp(-acc)) + gated
    p = p_out + (first + o_t)[:, None] * C + o_c[None, :]
    tl.store(p, out.to(p_out.dtype.element_ty), mask=(o_t < T)[:, None] & (o_c < C)[None, :])


@triton.jit
def _conv_backward_kernel(
    p_v,
    p_gate,
    p_scale,
    p_segment,
    p_weight,
    p_v_norm,
    p_dout,
    p_dy,
    T,
    stride,
    C: tl.constexpr,
    K: tl.constexpr,
    DILATION: tl.constexpr,
    SEGMENTS: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
):
    """The gradient of the convolution's output, which is computed again."""
    o_t = tl.program_id(0) * BT + tl.arange(0, BT)
    o_c = tl.program_id(1) * BC + tl.arange(0, BC)
    first = tl.program_id(2).to(tl.int64) * T
    acc, _ = _convolved(
        p_v, p_gate, p_scale, p_segment, p_weight, p_v_norm, first, o_t, o_c, T, stride,
        C, K, DILATION, SEGMENTS, BT, BC,
    )  # fmt: skip
    o = (first + o_t)[:, None] * C + o_c[None, :]
    m = (o_t < T)[:, None] & (o_c < C)[None, :]
    share = 1.0 / (1.0 + tl.exp(-acc))
    dy = tl.load(p_dout + o, mask=m, other=0.0).to(tl.float32) * share * (1.0 + acc * (1.0 - share))
    tl.store(p_dy + o, dy.to(p_dy.dtype.element_ty), mask=m)


@triton.jit
def _tokens_backward_kernel(
    p_h, p_k, p_v, p_h_norm, p_k_norm, p_v_norm, p_weight, p_gate, p_scale, p_segment, p_dout, p_dy,
    p_dh, p_dk, p_dv, p_sums, rows, T, stride, eps, scale,
    C: tl.constexpr, BC: tl.constexpr, K: tl.constexpr, BK: tl.constexpr,
    DILATION: tl.constexpr, SEGMENTS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Gradients of ROWS tokens' hidden states, keys and values, and their share of those of the weights."""
    o_c, o_j = tl.arange(0, BC), tl.arange(0, BK)
    m_c, m_j = o_c < C, o_j < K
    h_norm = tl.load(p_h_norm + o_c, mask=m_c, other=0.0).to(tl.float32)
    k_norm = tl.load(p_k_norm + o_c, mask=m_c, other=0.0).to(tl.float32)
    v_norm = tl.load(p_v_norm + o_c, mask=m_c, other=0.0).to(tl.float32)
    # [BK, BC]; tap j reads j * DILATION tokens back.
    m_w = m_j[:, None] & m_c[None, :]
    b_w = tl.load(p_weight + o_c[None, :] * K + (K - 1 - o_j)[:, None], mask=m_w, other=0.0).to(tl.float32)
    of_dot, of_norm = tl.zeros([BC], tl.float32), tl.zeros([BC], tl.float32)
    of_taps = tl.zeros([BK, BC], tl.float32)
    begin = tl.program_id(0).to(tl.int64) * ROWS
    for i_t in range(begin, tl.minimum(begin + ROWS, rows)):
        m_a = m_j & (i_t % T + o_j * DILATION < T)
        if SEGMENTS:
            after = tl.load(p_segment + i_t + o_j * DILATION, mask=m_a, other=-1)
            m_a = m_a & (after == tl.load(p_segment + i_t))
        p_after = p_dy + (i_t + o_j * DILATION)[:, None] * C + o_c[None, :]
        b_dy = tl.load(p_after, mask=m_a[:, None] & m_c[None, :], other=0.0).to(tl.float32)
        h = tl.load(p_h + i_t * C + o_c, mask=m_c, other=0.0).to(tl.float32)
        k = tl.load(p_k + i_t * stride + o_c, mask=m_c, other=0.0).to(tl.float32)
        v = tl.load(p_v + i_t * stride + o_c, mask=m_c, other=0.0).to(tl.float32)
        dout = tl.load(p_dout + i_t * C + o_c, mask=m_c, other=0.0).to(tl.float32)
        gate, by_norm = tl.load(p_gate + i_t), tl.load(p_scale + i_t)
        gated = gate * v
        dn = tl.sum(b_w * b_dy, 0)
        of_taps += b_dy * (gated * by_norm * v_norm)[None, :]
        of_norm += dn * gated * by_norm
        along = tl.sum(dn * gated * v_norm, 0)
        dg = dout + by_norm * (dn * v_norm - along * by_norm * by_norm * gated / C)
        tl.store(p_dv + i_t * C + o_c, (dg * gate).to(p_dv.dtype.element_ty), mask=m_c)
        by_h = 1.0 / tl.sqrt(tl.sum(h * h, 0) / C + eps)
        by_k = 1.0 / tl.sqrt(tl.sum(k * k, 0) / C + eps)
        x = tl.sum(h * h_norm * k * k_norm, 0) * by_h * by_k * scale
        # Of the signed square root; it is flat where it is cut off.
        slope = tl.where(tl.abs(x) > 1e-6, 0.5 / tl.sqrt(tl.maximum(tl.abs(x), 1e-6)), 0.0)
        dx = tl.sum(dg * v, 0) * gate * (1.0 - gate) * slope
        ddot = dx * by_h * by_k * scale
        of_dot += ddot * h * k
        both = ddot * h_norm * k_norm
        dh = both * k - dx * x * by_h * by_h / C * h
        dk = both * h - dx * x * by_k * by_k / C * k
        tl.store(p_dh + i_t * C + o_c, dh.to(p_dh.dtype.element_ty), mask=m_c)
        tl.store(p_dk + i_t * C + o_c, dk.to(p_dk.dtype.element_ty), mask=m_c)
    p = p_sums + tl.program_id(0).to(tl.int64) * (2 + K) * C + o_c
    tl.store(p, of_dot, mask=m_c)
    tl.store(p + C, of_norm, mask=m_c)
    tl.store(p[None, :] + (2 + o_j)[:, None] * C, of_taps, mask=m_w)


def _strided(x: Tensor) -> Tensor:
    """The tensor itself where its tokens lie at one distance from each other, as the halves of a projection do."""
    is_even = x.stride(-1) == 1 and x.stride(0) == x.shape[1] * x.stride(1)
    return x if is_even else x.contiguous()


def _segments(starts: Tensor | None) -> Tensor | None:
    return None if starts is None else starts.to(torch.int32).cumsum(1, dtype=torch.int32)


def _sizes(fusion: Fusion, C: int, *, has_segments: bool) -> dict[str, Any]:
    """Compile-time arguments of the kernels that convolve."""
    return {
        "C": C,
        "K": fusion.conv_CK.shape[1],
        "DILATION": fusion.dilation,
        "SEGMENTS": has_segments,
    }


def _forward(
    h: Tensor, k: Tensor, v: Tensor, fusion: Fusion, segment: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(output, and of each token fp32 the gate, and what its gated value is multiplied with as a norm)."""
    B, T, C = v.shape
    gate = torch.empty(B, T, dtype=torch.float32, device=v.device)
    scale, out = torch.empty_like(gate), torch.empty_like(h)
    bc = triton.next_power_of_2(C)
    launch_kernel(
        _gate_kernel,
        (B * T,),
        h,
        k,
        v,
        fusion.query_norm_C,
        fusion.key_norm_C,
        gate,
        scale,
        v.stride(1),
        fusion.gate_eps,
        fusion.conv_eps,
        C**-0.5,
        C=C,
        BC=bc,
        num_warps=4,
    )
    bc = min(128, bc)
    launch_kernel(
        _conv_kernel,
        (triton.cdiv(T, 32), triton.cdiv(C, bc), B),
        v,
        gate,
        scale,
        gate if segment is None else segment,
        fusion.conv_CK,
        fusion.value_norm_C,
        out,
        T,
        v.stride(1),
        **_sizes(fusion, C, has_segments=segment is not None),
        BT=32,
        BC=bc,
        num_warps=4,
    )
    return out, gate, scale


def _backward(
    dout: Tensor, h: Tensor, k: Tensor, v: Tensor, fusion: Fusion, kept: tuple[Tensor, Tensor, Tensor | None]
) -> tuple[Tensor, ...]:
    """Gradients of h, k, v and of the weights in the order of LEARNT; `kept` is gate, scale and segments."""
    (B, T, C), K, (gate, scale, segment) = v.shape, fusion.conv_CK.shape[1], kept
    sizes = _sizes(fusion, C, has_segments=segment is not None)
    dy, bc = torch.empty_like(dout), triton.next_power_of_2(C)
    places = gate if segment is None else segment
    launch_kernel(
        _conv_backward_kernel,
        (triton.cdiv(T, 32), triton.cdiv(C, min(128, bc)), B),
        v,
        gate,
        scale,
        places,
        fusion.conv_CK,
        fusion.value_norm_C,
        dout,
        dy,
        T,
        v.stride(1),
        **sizes,
        BT=32,
        BC=min(128, bc),
        num_warps=4,
    )
    dh, dk, dv = (torch.empty(B, T, C, dtype=x.dtype, device=x.device) for x in (h, k, v))
    programs = triton.cdiv(B * T, ROWS)
    sums = torch.empty(programs, 2 + K, C, dtype=torch.float32, device=v.device)
    norms = fusion.query_norm_C, fusion.key_norm_C
    launch_kernel(
        _tokens_backward_kernel,
        (programs,),
        h, k, v, *norms, fusion.value_norm_C, fusion.conv_CK, gate, scale, places, dout, dy,
        dh, dk, dv, sums, B * T, T, v.stride(1), fusion.gate_eps, C**-0.5,
        **sizes, BC=bc, BK=triton.next_power_of_2(K), ROWS=ROWS,
        num_warps=max(4, min(16, bc // 128)), maxnreg=BACKWARD_REGISTERS,
    )  # fmt: skip
    total = sums.sum(0)
    weights = (total[0] * norms[1], total[0] * norms[0], total[1], total[2:].flip(0).T.contiguous())
    return dh, dk, dv, *weights


def _fusion(constants: dict[str, Any], learnt: Sequence[Tensor]) -> Fusion:
    named: dict[str, Any] = dict(zip(LEARNT, learnt))
    return Fusion(**constants, **named)


class _MemoryOutput(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, constants: dict[str, Any], starts: Tensor | None, *tensors: Tensor) -> Tensor:
        h, k, v = tensors[:3]
        segment = _segments(starts)
        out, gate, scale = _forward(h, k, v, _fusion(constants, tensors[3:]), segment)
        ctx.save_for_backward(gate, scale, segment, *tensors)
        ctx.constants = constants
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        gate, scale, segment, h, k, v, *learnt = ctx.saved_tensors
        fusion = _fusion(ctx.constants, learnt)
        found = _backward(grad.contiguous(), h, k, v, fusion, (gate, scale, segment))
        return None, None, *(x.to(like.dtype) for x, like in zip(found, (h, k, v, *learnt)))


def memory_output(
    h_BTC: Tensor, k_BTC: Tensor, v_BTC: Tensor, fusion: Fusion, *, document_starts_BT: Tensor | None = None
) -> Tensor:
    """`reference.memory_output` in two launches, differentiable in every tensor.

    Args and result as there; the gated value stays in fp32 here, so bf16 results differ from the plain ops by a
    rounding.
    """
    constants = {name: x for name, x in vars(fusion).items() if name not in LEARNT}
    k, v = _strided(k_BTC), _strided(v_BTC)
    if k.stride() != v.stride():
        k, v = k.contiguous(), v.contiguous()
    learnt = (getattr(fusion, name).contiguous() for name in LEARNT)
    out: Tensor = _MemoryOutput.apply(constants, document_starts_BT, h_BTC.contiguous(), k, v, *learnt)
    return out
