"""silu(gate) * up of a fused [R, 2I] projection: forward and backward in one pass over memory each.

Only the projection is kept for the backward pass. Oracle: `reference.swiglu_reference`.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparseray.kernels.launch import launch_kernel

TILE = 2048


@triton.jit
def _swiglu_kernel(
    p_gate_up, p_dout, p_out, R,
    I: tl.constexpr, BACKWARD: tl.constexpr, BR: tl.constexpr, BI: tl.constexpr,
):  # fmt: skip
    """out [R, I] from gate_up [R, 2I]; with BACKWARD the gradient [R, 2I] from gate_up and dout [R, I]."""
    o_r = tl.program_id(0) * BR + tl.arange(0, BR)
    o_i = tl.program_id(1) * BI + tl.arange(0, BI)
    m = (o_r < R)[:, None] & (o_i < I)[None, :]
    o_wide = o_r[:, None].to(tl.int64) * (2 * I) + o_i[None, :]
    o = o_r[:, None].to(tl.int64) * I + o_i[None, :]
    b_g = tl.load(p_gate_up + o_wide, mask=m, other=0.0).to(tl.float32)
    b_u = tl.load(p_gate_up + o_wide + I, mask=m, other=0.0).to(tl.float32)
    b_sig = 1.0 / (1.0 + tl.exp(-b_g))
    element = p_out.dtype.element_ty
    if BACKWARD:
        b_d = tl.load(p_dout + o, mask=m, other=0.0).to(tl.float32)
        b_dg = b_d * b_u * b_sig * (1.0 + b_g * (1.0 - b_sig))
        tl.store(p_out + o_wide, b_dg.to(element), mask=m)
        tl.store(p_out + o_wide + I, (b_d * b_g * b_sig).to(element), mask=m)
    else:
        tl.store(p_out + o, (b_g * b_sig * b_u).to(element), mask=m)


def _launch(gate_up: Tensor, dout: Tensor | None, out: Tensor) -> Tensor:
    I = gate_up.shape[-1] // 2
    R, columns = gate_up.numel() // (2 * I), min(1024, triton.next_power_of_2(I))
    rows = TILE // columns
    launch_kernel(
        _swiglu_kernel, (triton.cdiv(R, rows), triton.cdiv(I, columns)), gate_up, dout, out, R,
        I=I, BACKWARD=dout is not None, BR=rows, BI=columns, num_warps=4,
    )  # fmt: skip
    return out


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        return _launch(gate_up, None, gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2))

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        return _launch(gate_up, dout.contiguous(), torch.empty_like(gate_up))


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up, [..., 2I] with gate first -> [..., I], differentiable; computed in fp32."""
    out: Tensor = _SwiGLU.apply(gate_up.contiguous())
    return out
