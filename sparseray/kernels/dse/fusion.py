"""DSE's context gate and short convolution in two launches (Triton); oracle: `reference.memory_output`.

The first reads each token's hidden state, key and value once and keeps two numbers: the gate and the
norm of the gated value. The second makes the convolution's inputs from them and the value as it goes,
so neither the gated nor the normed value is stored. The backward recomputes through the plain ops.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparseray.kernels.dse import reference
from sparseray.kernels.dse.reference import Fusion
from sparseray.kernels.launch import launch_kernel

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
    k = tl.load(p_k + i_t * C + o_c, mask=m, other=0.0).to(tl.float32)
    v = tl.load(p_v + i_t * C + o_c, mask=m, other=0.0).to(tl.float32)
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
def _conv_kernel(
    p_v,
    p_gate,
    p_scale,
    p_segment,
    p_weight,
    p_v_norm,
    p_out,
    T,
    C: tl.constexpr,
    K: tl.constexpr,
    DILATION: tl.constexpr,
    SEGMENTS: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
):
    i_b = tl.program_id(2).to(tl.int64)
    o_t = tl.program_id(0) * BT + tl.arange(0, BT)
    o_c = tl.program_id(1) * BC + tl.arange(0, BC)
    m_t, m_c = o_t < T, o_c < C
    norm = tl.load(p_v_norm + o_c, mask=m_c, other=0.0).to(tl.float32)
    acc = tl.zeros([BT, BC], tl.float32)
    gated = tl.zeros([BT, BC], tl.float32)
    if SEGMENTS:
        segment = tl.load(p_segment + i_b * T + o_t, mask=m_t, other=0)
    for j in tl.static_range(K):
        o_p = o_t - j * DILATION
        m_p = m_t & (o_p >= 0)
        if SEGMENTS:
            m_p = m_p & (tl.load(p_segment + i_b * T + o_p, mask=m_p, other=-1) == segment)
        gate = tl.load(p_gate + i_b * T + o_p, mask=m_p, other=0.0)
        scale = tl.load(p_scale + i_b * T + o_p, mask=m_p, other=0.0)
        p = p_v + (i_b * T + o_p)[:, None] * C + o_c[None, :]
        x = tl.load(p, mask=m_p[:, None] & m_c[None, :], other=0.0).to(tl.float32) * gate[:, None]
        if j == 0:
            gated = x
        weight = tl.load(p_weight + o_c * K + (K - 1 - j), mask=m_c, other=0.0).to(tl.float32)
        acc += x * scale[:, None] * (norm * weight)[None, :]
    out = acc / (1.0 + tl.exp(-acc)) + gated
    p = p_out + (i_b * T + o_t)[:, None] * C + o_c[None, :]
    tl.store(p, out.to(p_out.dtype.element_ty), mask=m_t[:, None] & m_c[None, :])


def _forward(h: Tensor, k: Tensor, v: Tensor, fusion: Fusion, starts: Tensor | None) -> Tensor:
    B, T, C = v.shape
    gate = torch.empty(B, T, dtype=torch.float32, device=v.device)
    scale, out = torch.empty_like(gate), torch.empty_like(v)
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
        fusion.gate_eps,
        fusion.conv_eps,
        C**-0.5,
        C=C,
        BC=bc,
        num_warps=4,
    )
    segment = gate if starts is None else starts.to(torch.int32).cumsum(1, dtype=torch.int32)
    bc = min(128, bc)
    launch_kernel(
        _conv_kernel,
        (triton.cdiv(T, 32), triton.cdiv(C, bc), B),
        v,
        gate,
        scale,
        segment,
        fusion.conv_CK,
        fusion.value_norm_C,
        out,
        T,
        C=C,
        K=fusion.conv_CK.shape[1],
        DILATION=fusion.dilation,
        SEGMENTS=starts is not None,
        BT=32,
        BC=bc,
        num_warps=4,
    )
    return out


def _fusion(constants: dict[str, Any], learnt: Sequence[Tensor]) -> Fusion:
    named: dict[str, Any] = dict(zip(LEARNT, learnt))
    return Fusion(**constants, **named)


class _MemoryOutput(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, constants: dict[str, Any], starts: Tensor | None, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.constants, ctx.starts = constants, starts
        h, k, v = tensors[:3]
        return _forward(h, k, v, _fusion(constants, tensors[3:]), starts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        with torch.enable_grad():
            inputs = [t.detach().requires_grad_() for t in ctx.saved_tensors]
            h, k, v = inputs[:3]
            fusion = _fusion(ctx.constants, inputs[3:])
            out = reference.memory_output(h, k, v, fusion, document_starts_BT=ctx.starts)
        return None, None, *torch.autograd.grad(out, inputs, grad)


def memory_output(
    h_BTC: Tensor, k_BTC: Tensor, v_BTC: Tensor, fusion: Fusion, *, document_starts_BT: Tensor | None = None
) -> Tensor:
    """`reference.memory_output` in two launches, differentiable in every tensor.

    Args and result as there; the gated value stays in fp32 here, so bf16 results differ from the plain ops by a
    rounding.
    """
    constants = {name: x for name, x in vars(fusion).items() if name not in LEARNT}
    tensors = (h_BTC, k_BTC, v_BTC, *(getattr(fusion, name) for name in LEARNT))
    out: Tensor = _MemoryOutput.apply(constants, document_starts_BT, *(t.contiguous() for t in tensors))
    return out
