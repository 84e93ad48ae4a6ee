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

ROWS, TOKENS = 32, 2
"""Tokens that one program of the backward pass goes over, and how many of them at a time."""
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
def _earlier(
    p_v, p_gate, p_scale, p_segment, segment, first, o_t, o_c, distance, T, stride,
    C: tl.constexpr, SEGMENTS: tl.constexpr,
):  # fmt: skip
    """(gated values of the tokens so far back, 0 before the beginning; what makes norms of them)."""
    o_p = o_t - distance
    m_p = (o_t < T) & (o_p >= 0)
    if SEGMENTS:
        m_p = m_p & (tl.load(p_segment + first + o_p, mask=m_p, other=-1) == segment)
    gate = tl.load(p_gate + first + o_p, mask=m_p, other=0.0)
    by_norm = tl.load(p_scale + first + o_p, mask=m_p, other=0.0)
    p = p_v + (first + o_p)[:, None] * stride + o_c[None, :]
    x = tl.load(p, mask=m_p[:, None] & (o_c < C)[None, :], other=0.0).to(tl.float32)
    return x * gate[:, None], by_norm


@triton.jit
def _convolved(
    p_v, p_gate, p_scale, p_segment, p_weight, p_v_norm, first, o_t, o_c, T, stride,
    C: tl.constexpr, K: tl.constexpr, DILATION: tl.constexpr, SEGMENTS: tl.constexpr,
    BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """(the convolution of normed gated values, the gated values) of a tile of the sequence that begins at `first`."""
    m_c = o_c < C
    norm = tl.load(p_v_norm + o_c, mask=m_c, other=0.0).to(tl.float32)
    acc = tl.zeros([BT, BC], tl.float32)
    gated = tl.zeros([BT, BC], tl.float32)
    segment = o_t
    if SEGMENTS:
        segment = tl.load(p_segment + first + o_t, mask=o_t < T, other=0)
    for j in tl.static_range(K):
        x, by_norm = _earlier(
            p_v, p_gate, p_scale, p_segment, segment, first, o_t, o_c, j * DILATION, T, stride, C, SEGMENTS
        )
        if j == 0:
            gated = x
        weight = tl.load(p_weight + o_c * K + (K - 1 - j), mask=m_c, other=0.0).to(tl.float32)
        acc += x * by_norm[:, None] * (norm * weight)[None, :]
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
    p_taps,
    T,
    stride,
    C: tl.constexpr,
    K: tl.constexpr,
    DILATION: tl.constexpr,
    SEGMENTS: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
):
    """The gradient of the convolution's output, which is computed again, and this tile's share of those of the taps."""
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
    tile = tl.program_id(2).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    norm = tl.load(p_v_norm + o_c, mask=o_c < C, other=0.0).to(tl.float32)
    segment = o_t
    if SEGMENTS:
        segment = tl.load(p_segment + first + o_t, mask=o_t < T, other=0)
    for j in tl.static_range(K):
        x, by_norm = _earlier(
            p_v, p_gate, p_scale, p_segment, segment, first, o_t, o_c, j * DILATION, T, stride, C, SEGMENTS
        )
        of_tap = norm * tl.sum(dy * x * by_norm[:, None], 0)
        tl.store(p_taps + (tile * K + K - 1 - j) * C + o_c, of_tap, mask=o_c < C)


@triton.jit
def _tokens_backward_kernel(
    p_h, p_k, p_v, p_h_norm, p_k_norm, p_v_norm, p_weight, p_gate, p_scale, p_segment, p_dout, p_dy,
    p_dh, p_dk, p_dv, p_sums, rows, T, stride, eps, scale,
    C: tl.constexpr, K: tl.constexpr, DILATION: tl.constexpr, SEGMENTS: tl.constexpr,
    BC: tl.constexpr, BT: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Gradients of ROWS tokens' hidden states, keys and values, and their share of those of the norms' weights."""
    o_c = tl.arange(0, BC)
    m_c = o_c < C
    h_norm = tl.load(p_h_norm + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
    k_norm = tl.load(p_k_norm + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
    v_norm = tl.load(p_v_norm + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
    of_dot, of_norm = tl.zeros([BT, BC], tl.float32), tl.zeros([BT, BC], tl.float32)
    for start in range(0, ROWS, BT):
        i_t = tl.program_id(0).to(tl.int64) * ROWS + start + tl.arange(0, BT)
        m_t = i_t < rows
        m = m_t[:, None] & m_c[None, :]
        o, o_kv = i_t[:, None] * C + o_c[None, :], i_t[:, None] * stride + o_c[None, :]
        dn = tl.zeros([BT, BC], tl.float32)
        for j in tl.static_range(K):
            m_a = m_t & (i_t % T + j * DILATION < T)
            if SEGMENTS:
                own = tl.load(p_segment + i_t, mask=m_t, other=0)
                m_a = m_a & (tl.load(p_segment + i_t + j * DILATION, mask=m_a, other=-1) == own)
            weight = tl.load(p_weight + o_c * K + (K - 1 - j), mask=m_c, other=0.0).to(tl.float32)
            dy = tl.load(p_dy + o + j * DILATION * C, mask=m_a[:, None] & m_c[None, :], other=0.0)
            dn += weight[None, :] * dy.to(tl.float32)
        h = tl.load(p_h + o, mask=m, other=0.0).to(tl.float32)
        k = tl.load(p_k + o_kv, mask=m, other=0.0).to(tl.float32)
        v = tl.load(p_v + o_kv, mask=m, other=0.0).to(tl.float32)
        gate = tl.load(p_gate + i_t, mask=m_t, other=0.0)[:, None]
        by_norm = tl.load(p_scale + i_t, mask=m_t, other=0.0)[:, None]
        of_norm += dn * v * (gate * by_norm)
        along = tl.sum(dn * v * v_norm, 1)[:, None] * gate
        dg = tl.load(p_dout + o, mask=m, other=0.0).to(tl.float32)
        dg += by_norm * (dn * v_norm - along * by_norm * by_norm / C * gate * v)
        tl.store(p_dv + o, (dg * gate).to(p_dv.dtype.element_ty), mask=m)
        by_h = 1.0 / tl.sqrt(tl.sum(h * h, 1)[:, None] / C + eps)
        by_k = 1.0 / tl.sqrt(tl.sum(k * k, 1)[:, None] / C + eps)
        x = tl.sum(h * h_norm * k * k_norm, 1)[:, None] * by_h * by_k * scale
        # Of the signed square root; it is flat where it is cut off.
        slope = tl.where(tl.abs(x) > 1e-6, 0.5 / tl.sqrt(tl.maximum(tl.abs(x), 1e-6)), 0.0)
        dx = tl.sum(dg * v, 1)[:, None] * gate * (1.0 - gate) * slope
        ddot = dx * by_h * by_k * scale
        of_dot += ddot * h * k
        both = ddot * (h_norm * k_norm)
        dh = both * k - dx * x * by_h * by_h / C * h
        dk = both * h - dx * x * by_k * by_k / C * k
        tl.store(p_dh + o, dh.to(p_dh.dtype.element_ty), mask=m)
        tl.store(p_dk + o, dk.to(p_dk.dtype.element_ty), mask=m)
    p = p_sums + tl.program_id(0).to(tl.int64) * 2 * C + o_c
    tl.store(p, tl.sum(of_dot, 0), mask=m_c)
    tl.store(p + C, tl.sum(of_norm, 0), mask=m_c)


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
    dy, bc, tiles = torch.empty_like(dout), triton.next_power_of_2(C), triton.cdiv(T, 32)
    places = gate if segment is None else segment
    taps = torch.empty(B * tiles, K, C, dtype=torch.float32, device=v.device)
    launch_kernel(
        _conv_backward_kernel,
        (tiles, triton.cdiv(C, min(128, bc)), B),
        v,
        gate,
        scale,
        places,
        fusion.conv_CK,
        fusion.value_norm_C,
        dout,
        dy,
        taps,
        T,
        v.stride(1),
        **sizes,
        BT=32,
        BC=min(128, bc),
        num_warps=8,
    )
    dh, dk, dv = (torch.empty(B, T, C, dtype=x.dtype, device=x.device) for x in (h, k, v))
    programs = triton.cdiv(B * T, ROWS)
    sums = torch.empty(programs, 2, C, dtype=torch.float32, device=v.device)
    norms = fusion.query_norm_C, fusion.key_norm_C
    launch_kernel(
        _tokens_backward_kernel,
        (programs,),
        h, k, v, *norms, fusion.value_norm_C, fusion.conv_CK, gate, scale, places, dout, dy,
        dh, dk, dv, sums, B * T, T, v.stride(1), fusion.gate_eps, C**-0.5,
        **sizes, BC=bc, BT=TOKENS, ROWS=ROWS, num_warps=max(4, min(16, bc // 128)), maxnreg=BACKWARD_REGISTERS,
    )  # fmt: skip
    of_dot, of_norm = sums.sum(0)
    return dh, dk, dv, of_dot * norms[1], of_dot * norms[0], of_norm, taps.sum(0).T.contiguous()


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
