"""Full causal attention whose gradients come in one order, by the kernels of ranges (nsa/): for `determinism: bitwise` on a GPU.

cuDNN's backward pass adds up in the order in which its blocks end. FlashAttention has an order if it is told to, and then takes
longer than these kernels, which give one program all of a sum (benchmarks/results/ordered_attention_h200_2026-11-29.md).
FlashAttention-2, arXiv 2307.08691.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparseray.kernels.nsa.gates import row_dots
from sparseray.kernels.nsa.geometry import KEYS, uniform
from sparseray.kernels.nsa.range_backward import range_backward
from sparseray.kernels.nsa.range_forward import range_forward

EVERY_KEY: dict[str, Any] = {"kind": KEYS, "block": 1, "stride": 1, "window": 0}


def ordered_attention(q_BTQD: Tensor, k_BSGD: Tensor, v_BSGV: Tensor) -> Tensor:
    """As `Ops.attend`, [B, T, Q, V]; the same gradients, to the bit, whenever it is asked.

    Args:
        q_BTQD, k_BSGD, v_BSGV: there; the queries are the last T of S positions.
    """
    found: Tensor = _Ordered.apply(q_BTQD, k_BSGD, v_BSGV)
    return found


class _Ordered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *qkv: Tensor) -> Tensor:
        (B, T, _, D), S = qkv[0].shape, qkv[1].shape[1]
        ctx.shapes, ctx.scale = [x.shape for x in qkv], D**-0.5
        ctx.geometry = uniform(B, T, 0, S, 0, S - T, 0, qkv[0].device)
        q_RQD, k_RGD, v_RGV = (x.flatten(0, 1).contiguous() for x in qkv)
        out_RQV, lse_RQ = range_forward(q_RQD, k_RGD, v_RGV, ctx.geometry, scale=ctx.scale, **EVERY_KEY)
        ctx.save_for_backward(q_RQD, k_RGD, v_RGV, out_RQV, lse_RQ)
        return out_RQV.view(B, T, *out_RQV.shape[1:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        q_RQD, k_RGD, v_RGV, out_RQV, lse_RQ = ctx.saved_tensors
        dout_RQV, dq_RQD = grads[0].flatten(0, 1).contiguous(), torch.empty_like(q_RQD)
        dk_RGD, dv_RGV = range_backward(
            q_RQD, k_RGD, v_RGV, dout_RQV, lse_RQ, row_dots(dout_RQV, out_RQV), dq_RQD, ctx.geometry,
            scale=ctx.scale, add=False, **EVERY_KEY,
        )  # fmt: skip
        return tuple(x.view(shape) for x, shape in zip((dq_RQD, dk_RGD, dv_RGV), ctx.shapes))
