"""DSE's context gate and short convolution, in one autograd node (Triton); oracle: `reference.memory_output`.

Forward, one warp a token finds the gate and the norms' factors, which are kept, five numbers a token; another launch
makes the convolution's inputs from them and the value as it goes, so neither the gated nor the normed value is
stored. Backward is three launches: the gradient of the convolution's output, with the sums over tokens that the taps and the last
norm need, held in registers while a program goes down a sequence; then all gradients of a token by one warp, which needs no
barrier for its two sums; then the programs' sums are added, in one order.

Shapes: B sequences, T tokens each, R = B * T, C channels, K taps.
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

TILE_ROWS, TILE_CHANNELS = 4, 256
"""Of the convolution: what one warp has, whose weights need no barrier to come to the lanes that multiply by them."""
WALK_ROWS = 64
"""Tokens that one program of its backward pass goes over: a warp, one after another."""
TOKEN_PROGRAMS = 132 * 12
"""Programs that share the tokens of the backward pass: what an H100 holds at a time."""
WARP_CHANNELS = 1024
"""Channels of a token that one warp holds."""
SUM_ROWS, SUM_CHANNELS = 512, 16
LEARNT = ("query_norm_C", "key_norm_C", "value_norm_C", "conv_CK")
GATE, BY_NORM, BY_H, BY_K, SCORE = (tl.constexpr(i) for i in range(5))
"""What is kept of a token: the gate, the factors of the three norms (gated value, hidden state, key), the gate's input."""


@triton.jit
def _gate_kernel(
    p_h, p_kv, p_h_norm, p_k_norm, p_kept, rows, eps, conv_eps, scale, C: tl.constexpr, BC: tl.constexpr
):  # fmt: skip
    i_t = tl.program_id(0).to(tl.int64)
    o_c = tl.arange(0, BC)
    m = o_c < C
    p_k = p_kv + i_t * 2 * C + o_c
    h = tl.load(p_h + i_t * C + o_c, mask=m, other=0.0).to(tl.float32)
    k = tl.load(p_k, mask=m, other=0.0).to(tl.float32)
    v = tl.load(p_k + C, mask=m, other=0.0).to(tl.float32)
    h_norm = tl.load(p_h_norm + o_c, mask=m, other=0.0).to(tl.float32)
    k_norm = tl.load(p_k_norm + o_c, mask=m, other=0.0).to(tl.float32)
    by_h = 1.0 / tl.sqrt(tl.sum(h * h, 0) / C + eps)
    by_k = 1.0 / tl.sqrt(tl.sum(k * k, 0) / C + eps)
    x = tl.sum(h * h_norm * k * k_norm, 0) * by_h * by_k * scale
    root = tl.sqrt(tl.maximum(tl.abs(x), 1e-6))
    gate = 1.0 / (1.0 + tl.exp(-tl.where(x > 0, root, tl.where(x < 0, -root, 0.0))))
    p = p_kept + i_t
    tl.store(p + GATE * rows, gate)
    tl.store(p + BY_NORM * rows, 1.0 / tl.sqrt(gate * gate * tl.sum(v * v, 0) / C + conv_eps))
    tl.store(p + BY_H * rows, by_h)
    tl.store(p + BY_K * rows, by_k)
    tl.store(p + SCORE * rows, x)


@triton.jit
def _earlier(
    p_v, p_kept, p_segment, segment, first, o_t, o_c, distance, T, rows, C: tl.constexpr, SEGMENTS: tl.constexpr
):  # fmt: skip
    """(values of the tokens so far back, their gates, what makes norms of gated values); 0 before the beginning."""
    o_p = o_t - distance
    m_p = (o_t < T) & (o_p >= 0)
    if SEGMENTS:
        m_p = m_p & (tl.load(p_segment + first + o_p, mask=m_p, other=-1) == segment)
    gate = tl.load(p_kept + GATE * rows + first + o_p, mask=m_p, other=0.0)
    by_norm = tl.load(p_kept + BY_NORM * rows + first + o_p, mask=m_p, other=0.0)
    p = p_v + (first + o_p)[:, None] * (2 * C) + o_c[None, :]
    x = tl.load(p, mask=m_p[:, None] & (o_c < C)[None, :], other=0.0)
    return x, gate[:, None], by_norm[:, None]


@triton.jit
def _fold_kernel(p_conv, p_v_norm, p_folded, C: tl.constexpr, K: tl.constexpr, BC: tl.constexpr):
    """The convolution's weights times the norm's, fp32, a tap's in a row."""
    o_c = tl.program_id(0) * BC + tl.arange(0, BC)
    m_c = o_c < C
    norm = tl.load(p_v_norm + o_c, mask=m_c, other=0.0).to(tl.float32)
    for tap in tl.static_range(K):
        weight = tl.load(p_conv + o_c * K + tap, mask=m_c, other=0.0).to(tl.float32)
        tl.store(p_folded + tap * C + o_c, weight * norm, mask=m_c)


@triton.jit
def _append(tensors, x):
    return tensors + (x,)  # noqa: RUF005  (Triton unpacks none)


@triton.jit
def _inputs(
    p_v, p_kept, p_segment, first, o_t, o_c, T, rows,
    C: tl.constexpr, K: tl.constexpr, DILATION: tl.constexpr, SEGMENTS: tl.constexpr,
):  # fmt: skip
    """By tap, all on their way before one is used: values, gates, and what makes the convolution's inputs of values."""
    segment = o_t
    if SEGMENTS:
        segment = tl.load(p_segment + first + o_t, mask=o_t < T, other=0)
    values, gates, factors = (), (), ()
    for j in tl.static_range(K):
        x, gate, by_norm = _earlier(
            p_v, p_kept, p_segment, segment, first, o_t, o_c, j * DILATION, T, rows, C, SEGMENTS
        )
        values, gates = _append(values, x), _append(gates, gate)
        factors = _append(factors, gate * by_norm)
    return values, gates, factors


@triton.jit
def _conv_kernel(
    p_v, p_kept, p_segment, p_folded, p_out, T, rows,
    C: tl.constexpr, K: tl.constexpr, DILATION: tl.constexpr, SEGMENTS: tl.constexpr,
    BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    o_t = tl.program_id(0) * BT + tl.arange(0, BT)
    o_c = tl.program_id(1) * BC + tl.arange(0, BC)
    first = tl.program_id(2).to(tl.int64) * T
    m_c = o_c < C
    values, gates, factors = _inputs(
        p_v, p_kept, p_segment, first, o_t, o_c, T, rows, C, K, DILATION, SEGMENTS
    )
    acc = tl.zeros([BT, BC], tl.float32)
    for j in tl.static_range(K):
        weight = tl.load(p_folded + (K - 1 - j) * C + o_c, mask=m_c, other=0.0)
        acc += values[j].to(tl.float32) * factors[j] * weight[None, :]
    out = acc / (1.0 + tl.exp(-acc)) + values[0].to(tl.float32) * gates[0]
    p = p_out + (first + o_t)[:, None] * C + o_c[None, :]
    tl.store(p, out.to(p_out.dtype.element_ty), mask=(o_t < T)[:, None] & m_c[None, :])


@triton.jit
def _conv_backward_kernel(
    p_v, p_kept, p_segment, p_folded, p_dout, p_dy, p_sums, T, rows,
    C: tl.constexpr, K: tl.constexpr, DILATION: tl.constexpr, SEGMENTS: tl.constexpr,
    BT: tl.constexpr, BC: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The gradient of the convolution's output, which is computed again, and by tap its sums with the normed values."""
    o_c = tl.program_id(1) * BC + tl.arange(0, BC)
    first = tl.program_id(2).to(tl.int64) * T
    m_c = o_c < C
    sums = ()
    for _ in tl.static_range(K):
        sums = _append(sums, tl.zeros([BT, BC], tl.float32))
    for start in range(0, ROWS, BT):
        o_t = tl.program_id(0) * ROWS + start + tl.arange(0, BT)
        o = (first + o_t)[:, None] * C + o_c[None, :]
        m = (o_t < T)[:, None] & m_c[None, :]
        dout = tl.load(p_dout + o, mask=m, other=0.0)
        values, _gates, factors = _inputs(
            p_v, p_kept, p_segment, first, o_t, o_c, T, rows, C, K, DILATION, SEGMENTS
        )
        acc, normed = tl.zeros([BT, BC], tl.float32), ()
        for j in tl.static_range(K):
            weight = tl.load(p_folded + (K - 1 - j) * C + o_c, mask=m_c, other=0.0)
            normed = _append(normed, values[j].to(tl.float32) * factors[j])
            acc += normed[j] * weight[None, :]
        share = 1.0 / (1.0 + tl.exp(-acc))
        dy = dout.to(tl.float32) * share * (1.0 + acc * (1.0 - share))
        tl.store(p_dy + o, dy.to(p_dy.dtype.element_ty), mask=m)
        added = ()
        for j in tl.static_range(K):
            added = _append(added, sums[j] + dy * normed[j])
        sums = added
    p = p_sums + (tl.program_id(2).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * K * C + o_c
    for j in tl.static_range(K):
        tl.store(p + (K - 1 - j) * C, tl.sum(sums[j], 0), mask=m_c)


@triton.jit
def _later(
    p_dy, p_segment, i_t, o_c, m_c, T,
    C: tl.constexpr, K: tl.constexpr, DILATION: tl.constexpr, SEGMENTS: tl.constexpr,
):  # fmt: skip
    """By tap, the gradients of the convolution's outputs that a token is an input of."""
    place, found = i_t.to(tl.int32) % T, ()
    for j in tl.static_range(K):
        is_there = place + j * DILATION < T
        if SEGMENTS:
            own = tl.load(p_segment + i_t)
            is_there = is_there & (tl.load(p_segment + i_t + j * DILATION, mask=is_there, other=-1) == own)
        p = p_dy + (i_t + j * DILATION) * C + o_c
        found = _append(found, tl.load(p, mask=m_c & is_there, other=0.0))
    return found


@triton.jit
def _tokens_backward_kernel(
    p_h, p_kv, p_h_norm, p_k_norm, p_folded, p_kept, p_segment, p_dout, p_dy, p_dh, p_dkv, p_sums,
    T, rows, conv_eps, scale,
    C: tl.constexpr, K: tl.constexpr, DILATION: tl.constexpr, SEGMENTS: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Gradients of the hidden states, keys and values of the tokens of a program, and what those of the norms are made of."""
    o_c = tl.arange(0, BC)
    m_c = o_c < C
    of_dot = tl.zeros([BC], tl.float32)
    i_t = tl.program_id(0).to(tl.int64)
    while i_t < rows:
        p_k = p_kv + i_t * 2 * C + o_c
        v = tl.load(p_k + C, mask=m_c, other=0.0)
        dout = tl.load(p_dout + i_t * C + o_c, mask=m_c, other=0.0)
        gate, by_norm = tl.load(p_kept + GATE * rows + i_t), tl.load(p_kept + BY_NORM * rows + i_t)
        later = _later(p_dy, p_segment, i_t, o_c, m_c, T, C, K, DILATION, SEGMENTS)
        dn = tl.zeros([BC], tl.float32)
        for j in tl.static_range(K):
            weight = tl.load(p_folded + (K - 1 - j) * C + o_c, mask=m_c, other=0.0)
            dn += weight * later[j].to(tl.float32)
        # On their way while sums are made.
        h = tl.load(p_h + i_t * C + o_c, mask=m_c, other=0.0)
        k = tl.load(p_k, mask=m_c, other=0.0)
        by_h, by_k = tl.load(p_kept + BY_H * rows + i_t), tl.load(p_kept + BY_K * rows + i_t)
        x = tl.load(p_kept + SCORE * rows + i_t)
        v, dout = v.to(tl.float32), dout.to(tl.float32)
        along = tl.sum(dn * v, 0)
        # What the norm passes on to its input's length is the share that eps has in it.
        dgate = tl.sum(dout * v, 0) + along * conv_eps * by_norm * by_norm * by_norm
        dgated = dout + by_norm * (dn - along * gate * gate * by_norm * by_norm / C * v)
        p_dk = p_dkv + i_t * 2 * C + o_c
        tl.store(p_dk + C, (dgated * gate).to(p_dkv.dtype.element_ty), mask=m_c)
        h, k = h.to(tl.float32), k.to(tl.float32)
        # Of the signed square root; it is flat where it is cut off.
        slope = tl.where(tl.abs(x) > 1e-6, 0.5 / tl.sqrt(tl.maximum(tl.abs(x), 1e-6)), 0.0)
        dx = dgate * gate * (1.0 - gate) * slope
        ddot = dx * by_h * by_k * scale
        of_dot += ddot * h * k
        norms = tl.load(p_h_norm + o_c, mask=m_c, other=0.0).to(tl.float32)
        norms *= tl.load(p_k_norm + o_c, mask=m_c, other=0.0).to(tl.float32)
        dh = ddot * norms * k - dx * x * by_h * by_h / C * h
        dk = ddot * norms * h - dx * x * by_k * by_k / C * k
        tl.store(p_dh + i_t * C + o_c, dh.to(p_dh.dtype.element_ty), mask=m_c)
        tl.store(p_dk, dk.to(p_dkv.dtype.element_ty), mask=m_c)
        i_t += tl.num_programs(0)
    tl.store(p_sums + tl.program_id(0).to(tl.int64) * C + o_c, of_dot, mask=m_c)


@triton.jit
def _column_sums(p_x, count, stride, o_c, m_c, ROWS: tl.constexpr, BC: tl.constexpr):
    """Sums over the rows of a tall matrix, in one order."""
    acc = tl.zeros([ROWS, BC], tl.float32)
    for start in range(0, count, ROWS):
        o_r = start + tl.arange(0, ROWS)
        p = p_x + o_r.to(tl.int64)[:, None] * stride + o_c[None, :]
        acc += tl.load(p, mask=(o_r < count)[:, None] & m_c[None, :], other=0.0)
    return tl.sum(acc, 0)


@triton.jit
def _weights_backward_kernel(
    p_of_dot, p_of_taps, p_h_norm, p_k_norm, p_v_norm, p_conv, p_dh_norm, p_dk_norm, p_dv_norm, p_dconv,
    programs, walks, C: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Gradients of what is learnt, from the sums of the programs before."""
    o_c = tl.program_id(0) * BC + tl.arange(0, BC)
    m_c = o_c < C
    of_dot = _column_sums(p_of_dot, programs, C, o_c, m_c, ROWS, BC)
    h_norm = tl.load(p_h_norm + o_c, mask=m_c, other=0.0).to(tl.float32)
    k_norm = tl.load(p_k_norm + o_c, mask=m_c, other=0.0).to(tl.float32)
    v_norm = tl.load(p_v_norm + o_c, mask=m_c, other=0.0).to(tl.float32)
    tl.store(p_dh_norm + o_c, (of_dot * k_norm).to(p_dh_norm.dtype.element_ty), mask=m_c)
    tl.store(p_dk_norm + o_c, (of_dot * h_norm).to(p_dk_norm.dtype.element_ty), mask=m_c)
    of_norm = tl.zeros([BC], tl.float32)
    for tap in tl.static_range(K):
        of_tap = _column_sums(p_of_taps + tap * C, walks, K * C, o_c, m_c, ROWS, BC)
        of_norm += of_tap * tl.load(p_conv + o_c * K + tap, mask=m_c, other=0.0).to(tl.float32)
        tl.store(p_dconv + o_c * K + tap, (of_tap * v_norm).to(p_dconv.dtype.element_ty), mask=m_c)
    tl.store(p_dv_norm + o_c, of_norm.to(p_dv_norm.dtype.element_ty), mask=m_c)


def _segments(starts: Tensor | None) -> Tensor | None:
    return None if starts is None else starts.cumsum(1, dtype=torch.int32)


def _sizes(fusion: Fusion, segment: Tensor | None) -> dict[str, Any]:
    """Compile-time arguments of the kernels that convolve."""
    C, K = fusion.conv_CK.shape
    return {"C": C, "K": K, "DILATION": fusion.dilation, "SEGMENTS": segment is not None}


def _warps(C: int) -> int:
    return max(1, triton.next_power_of_2(C) // WARP_CHANNELS)


def _forward(h: Tensor, kv: Tensor, fusion: Fusion, segment: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """(output, what is kept of each token: fp32 [5, R], the folded weights: fp32 [K, C])."""
    (B, T, C), K = h.shape, fusion.conv_CK.shape[1]
    kept, out = torch.empty(5, B * T, dtype=torch.float32, device=h.device), torch.empty_like(h)
    launch_kernel(
        _gate_kernel,
        (B * T,),
        h, kv, fusion.query_norm_C, fusion.key_norm_C, kept, B * T, fusion.gate_eps, fusion.conv_eps, C**-0.5,
        C=C, BC=triton.next_power_of_2(C), num_warps=_warps(C),
    )  # fmt: skip
    bc = min(TILE_CHANNELS, triton.next_power_of_2(C))
    folded = torch.empty(K, C, dtype=torch.float32, device=h.device)
    launch_kernel(
        _fold_kernel,
        (triton.cdiv(C, bc),),
        fusion.conv_CK, fusion.value_norm_C, folded, C=C, K=K, BC=bc, num_warps=1,
    )  # fmt: skip
    launch_kernel(
        _conv_kernel,
        (triton.cdiv(T, TILE_ROWS), triton.cdiv(C, bc), B),
        kv[..., C:], kept, kept if segment is None else segment, folded, out, T, B * T,
        **_sizes(fusion, segment), BT=TILE_ROWS, BC=bc, num_warps=1,
    )  # fmt: skip
    return out, kept, folded


def _backward(
    dout: Tensor, h: Tensor, kv: Tensor, fusion: Fusion, kept: Tensor, folded: Tensor, segment: Tensor | None
) -> tuple[Tensor, ...]:
    """Gradients of h, kv and of the weights in the order of LEARNT."""
    (B, T, C), K, sizes = h.shape, folded.shape[0], _sizes(fusion, segment)
    dy, bc, walks = torch.empty_like(dout), triton.next_power_of_2(C), triton.cdiv(T, WALK_ROWS)
    places = kept if segment is None else segment
    of_taps = torch.empty(B * walks, K, C, dtype=torch.float32, device=h.device)
    launch_kernel(
        _conv_backward_kernel,
        (walks, triton.cdiv(C, min(TILE_CHANNELS, bc)), B),
        kv[..., C:], kept, places, folded, dout, dy, of_taps, T, B * T,
        **sizes, BT=1, BC=min(TILE_CHANNELS, bc), ROWS=WALK_ROWS, num_warps=1,
    )  # fmt: skip
    dh, dkv, programs = torch.empty_like(h), torch.empty_like(kv), min(TOKEN_PROGRAMS, B * T)
    of_dot = torch.empty(programs, C, dtype=torch.float32, device=h.device)
    norms = fusion.query_norm_C, fusion.key_norm_C, fusion.value_norm_C
    launch_kernel(
        _tokens_backward_kernel,
        (programs,),
        h, kv, *norms[:2], folded, kept, places, dout, dy, dh, dkv, of_dot, T, B * T, fusion.conv_eps, C**-0.5,
        **sizes, BC=bc, num_warps=_warps(C),
    )  # fmt: skip
    learnt = [torch.empty_like(x) for x in (*norms, fusion.conv_CK)]
    launch_kernel(
        _weights_backward_kernel,
        (triton.cdiv(C, SUM_CHANNELS),),
        of_dot, of_taps, *norms, fusion.conv_CK, *learnt, programs, B * walks,
        C=C, K=K, ROWS=SUM_ROWS, BC=SUM_CHANNELS, num_warps=4,
    )  # fmt: skip
    return dh, dkv, *learnt


def _fusion(constants: dict[str, Any], learnt: Sequence[Tensor]) -> Fusion:
    named: dict[str, Any] = dict(zip(LEARNT, learnt))
    return Fusion(**constants, **named)


class _MemoryOutput(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, constants: dict[str, Any], starts: Tensor | None, *tensors: Tensor) -> Tensor:
        h, kv, *learnt = tensors
        segment = _segments(starts)
        out, kept, folded = _forward(h, kv, _fusion(constants, learnt), segment)
        ctx.save_for_backward(kept, folded, segment, *tensors)
        ctx.constants = constants
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        kept, folded, segment, h, kv, *learnt = ctx.saved_tensors
        fusion = _fusion(ctx.constants, learnt)
        return None, None, *_backward(grad.contiguous(), h, kv, fusion, kept, folded, segment)


def memory_output(
    h_BTC: Tensor, key_value: Tensor, fusion: Fusion, *, document_starts_BT: Tensor | None = None
) -> Tensor:
    """`reference.memory_output`, differentiable in every tensor.

    Args:
        h_BTC: hidden states before the layer.
        key_value: [B, T, 2 * C], keys, then values.
        fusion: weights and constants.
        document_starts_BT: bool; the convolution does not reach before a document's first token. None: it does.

    Returns:
        As there; the gated value stays in fp32 here, so bf16 results differ from the plain ops by a rounding.
    """
    constants = {name: x for name, x in vars(fusion).items() if name not in LEARNT}
    learnt = (getattr(fusion, name).contiguous() for name in LEARNT)
    out: Tensor = _MemoryOutput.apply(
        constants, document_starts_BT, h_BTC.contiguous(), key_value.contiguous(), *learnt
    )
    return out
