"""All experts of a layer on a CPU: grouped rows, one expert after another, with a backward by hand.

The plain twin of `ffn.moe_ffn`: the same slabs, the combination in slot order in fp32. It keeps two
pre-activations a row, and an expert without rows costs nothing. DeepSeekMoE, arXiv 2401.06066.

Shapes: T tokens, K experts per token, E experts, R rows, H hidden, I inner.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparseray.kernels.moe.reference import group_by_expert, swiglu_backward, swiglu_forward


def _matrices(gate_up_E2IH: Tensor, down_EHI: Tensor, expert: int) -> tuple[Tensor, Tensor, Tensor]:
    inner = down_EHI.shape[2]
    return gate_up_E2IH[expert, :inner], gate_up_E2IH[expert, inner:], down_EHI[expert]


class _ExpertSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor, gate_up_E2IH: Tensor, down_EHI: Tensor
    ) -> Tensor:
        T, K = ids_TK.shape
        order_R, counts_E = group_by_expert(ids_TK, down_EHI.shape[0])
        rows_RH = x_TH[order_R // K]
        saved: list[Tensor] = []
        y_RH, start = torch.empty_like(rows_RH), 0
        counts = counts_E.tolist()
        for expert, count in enumerate(counts):
            if count:
                rows = slice(start, start + count)
                y_RH[rows], kept = swiglu_forward(rows_RH[rows], *_matrices(gate_up_E2IH, down_EHI, expert))
                saved += kept
            start += count
        y_TKH = torch.empty_like(y_RH)
        y_TKH[order_R] = y_RH
        y_TKH = y_TKH.view(T, K, -1)
        out_TH = weights_TK[:, 0, None] * y_TKH[:, 0]
        for k in range(1, K):
            out_TH = out_TH + weights_TK[:, k, None] * y_TKH[:, k]
        ctx.save_for_backward(order_R, weights_TK, y_TKH, rows_RH, gate_up_E2IH, down_EHI, *saved)
        ctx.counts = counts
        return out_TH.to(x_TH.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        order_R, weights_TK, y_TKH, rows_RH, gate_up_E2IH, down_EHI, *saved = ctx.saved_tensors
        (T, K), (dout_TH,) = weights_TK.shape, grads
        dweights_TK = (y_TKH.float() * dout_TH[:, None, :].float()).sum(-1).to(weights_TK.dtype)
        dy_RH = (dout_TH[:, None, :] * weights_TK[..., None]).reshape(T * K, -1)[order_R].to(rows_RH.dtype)
        dx_RH, start, used = torch.empty_like(rows_RH), 0, 0
        dgate_up_E2IH, ddown_EHI = torch.zeros_like(gate_up_E2IH), torch.zeros_like(down_EHI)
        for expert, count in enumerate(ctx.counts):
            if not count:
                continue
            rows, kept = slice(start, start + count), (saved[used], saved[used + 1])
            matrices = _matrices(gate_up_E2IH, down_EHI, expert)
            dx_RH[rows], *gradients = swiglu_backward(dy_RH[rows], rows_RH[rows], kept, *matrices)
            for into, gradient in zip(_matrices(dgate_up_E2IH, ddown_EHI, expert), gradients):
                into.copy_(gradient)
            start, used = start + count, used + 2
        dx_TKH = torch.empty_like(dx_RH)
        dx_TKH[order_R] = dx_RH
        return dx_TKH.view(T, K, -1).sum(1), None, dweights_TK, dgate_up_E2IH, ddown_EHI


def expert_sum(
    x_TH: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor, gate_up_E2IH: Tensor, down_EHI: Tensor
) -> Tensor:
    """Weighted sum over each token's experts, [T, H]; args and result as `Ops.experts`."""
    out: Tensor = _ExpertSum.apply(x_TH, topk_ids_TK, topk_weights_TK, gate_up_E2IH, down_EHI)
    return out
