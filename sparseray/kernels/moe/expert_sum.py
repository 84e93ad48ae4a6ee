"""Experts of a layer on a CPU: grouped rows, one expert after another, with a backward by hand.

The plain twin of `ffn.moe_ffn` (all experts are here: `expert_sum`) and of `held.py` (some are: the functions it is made
of). The same slabs, the combination in slot order in fp32. DeepSeekMoE, arXiv 2401.06066.

Shapes: T tokens, K experts per token, E experts here, R rows here, H hidden, I inner.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparseray.kernels.moe.reference import group_by_expert, swiglu_backward, swiglu_forward


@dataclass(frozen=True, kw_only=True)
class HeldGradients:
    """What the backward pass of some experts' rows gives.

    Attributes:
        dx_RH: of each row's input, in the dtype of x.
        dweights_R: fp32, of its routing weight.
        dgate_up_GE2IH, ddown_GEHI: of the slabs, in their dtype, apart for every G-th group of rows; zeros for an expert
            without rows.
    """

    dx_RH: Tensor
    dweights_R: Tensor
    dgate_up_GE2IH: Tensor
    ddown_GEHI: Tensor


@dataclass(frozen=True, kw_only=True)
class _Saved:
    rows_RH: Tensor
    y_RH: Tensor
    activations: list[tuple[Tensor, Tensor]]


def _matrices(gate_up_E2IH: Tensor, down_EHI: Tensor, expert: int) -> tuple[Tensor, Tensor, Tensor]:
    inner = down_EHI.shape[2]
    return gate_up_E2IH[expert, :inner], gate_up_E2IH[expert, inner:], down_EHI[expert]


def _spans(counts: Sequence[int]) -> list[tuple[int, slice]]:
    """Each expert that has rows, and where they lie."""
    found, start = [], 0
    for expert, count in enumerate(counts):
        if count:
            found.append((expert, slice(start, start + count)))
        start += count
    return found


def held_forward(
    x_TH: Tensor, order_R: Tensor, counts: Sequence[int], top_k: int, gate_up_E2IH: Tensor, down_EHI: Tensor
) -> tuple[Tensor, Any]:
    """Outputs of rows by the experts that are here, [R, H], and what their backward pass needs.

    Args:
        x_TH: tokens.
        order_R: int64, t * K + k of every row, by expert.
        counts: rows of each expert; where there are more groups than experts, of each in the first set, in the second...
        top_k: K.
        gate_up_E2IH, down_EHI: slabs.
    """
    rows_RH = x_TH[order_R // top_k]
    y_RH, activations = torch.empty_like(rows_RH), []
    for group, rows in _spans(counts):
        matrices = _matrices(gate_up_E2IH, down_EHI, group % len(down_EHI))
        y_RH[rows], kept = swiglu_forward(rows_RH[rows], *matrices)
        activations.append(kept)
    return y_RH, _Saved(rows_RH=rows_RH, y_RH=y_RH, activations=activations)


def held_backward(
    dout_TH: Tensor,
    weights_TK: Tensor,
    order_R: Tensor,
    counts: Sequence[int],
    saved: Any,
    gate_up_E2IH: Tensor,
    down_EHI: Tensor,
    num_sets: int = 1,
) -> HeldGradients:
    """Backward of `held_forward` and of the weighted sum over k.

    Args:
        dout_TH: gradient of the layer's output.
        weights_TK: fp32.
        order_R, counts, saved, gate_up_E2IH, down_EHI: of the forward pass.
        num_sets: G.
    """
    tokens_R, rows_RH = order_R // weights_TK.shape[1], saved.rows_RH
    dout_RH = dout_TH[tokens_R]
    dweights_R = (saved.y_RH.float() * dout_RH.float()).sum(-1).to(weights_TK.dtype)
    dy_RH = (dout_RH * weights_TK.reshape(-1)[order_R][:, None]).to(rows_RH.dtype)
    dx_RH = torch.empty_like(rows_RH)
    E = len(down_EHI)
    dgate_up, ddown = (w.new_zeros(num_sets * E, *w.shape[1:]) for w in (gate_up_E2IH, down_EHI))
    for (group, rows), kept in zip(_spans(counts), saved.activations):
        matrices = _matrices(gate_up_E2IH, down_EHI, group % E)
        dx_RH[rows], *gradients = swiglu_backward(dy_RH[rows], rows_RH[rows], kept, *matrices)
        for into, gradient in zip(_matrices(dgate_up, ddown, group), gradients):
            into.copy_(gradient)
    return HeldGradients(
        dx_RH=dx_RH,
        dweights_R=dweights_R,
        dgate_up_GE2IH=dgate_up.view(num_sets, *gate_up_E2IH.shape),
        ddown_GEHI=ddown.view(num_sets, *down_EHI.shape),
    )


def combine_slots(rows_TKH: Tensor, weights_TK: Tensor | None) -> Tensor:
    """Sum over k, in k order, of the rows, [T, H]; times their weights where there are any."""
    if weights_TK is None:
        return rows_TKH.sum(1)
    out_TH = weights_TK[:, 0, None] * rows_TKH[:, 0]
    for k in range(1, weights_TK.shape[1]):
        out_TH = out_TH + weights_TK[:, k, None] * rows_TKH[:, k]
    return out_TH.to(rows_TKH.dtype)


def _placed(rows_R: Tensor, order_R: Tensor, like_TK: Tensor) -> Tensor:
    """Rows at their places, [T, K, ...]."""
    found = torch.empty_like(rows_R)
    found[order_R] = rows_R
    return found.view(*like_TK.shape, *rows_R.shape[1:])


class _ExpertSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor, gate_up_E2IH: Tensor, down_EHI: Tensor
    ) -> Tensor:
        order_R, counts_E = group_by_expert(ids_TK, down_EHI.shape[0])
        counts = counts_E.tolist()
        y_RH, saved = held_forward(x_TH, order_R, counts, ids_TK.shape[1], gate_up_E2IH, down_EHI)
        kept = [tensor for pair in saved.activations for tensor in pair]
        ctx.save_for_backward(order_R, weights_TK, saved.rows_RH, saved.y_RH, gate_up_E2IH, down_EHI, *kept)
        ctx.counts = counts
        return combine_slots(_placed(y_RH, order_R, weights_TK), weights_TK)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        order_R, weights_TK, rows_RH, y_RH, gate_up_E2IH, down_EHI, *kept = ctx.saved_tensors
        saved = _Saved(rows_RH=rows_RH, y_RH=y_RH, activations=list(zip(kept[::2], kept[1::2])))
        slabs = gate_up_E2IH, down_EHI
        found = held_backward(grads[0], weights_TK, order_R, ctx.counts, saved, *slabs)
        dx_TH = combine_slots(_placed(found.dx_RH, order_R, weights_TK), None)
        dweights_TK = _placed(found.dweights_R, order_R, weights_TK)
        return dx_TH, None, dweights_TK, found.dgate_up_GE2IH[0], found.ddown_GEHI[0]


def expert_sum(
    x_TH: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor, gate_up_E2IH: Tensor, down_EHI: Tensor
) -> Tensor:
    """Weighted sum over each token's experts, [T, H]; args and result as `Ops.experts`."""
    out: Tensor = _ExpertSum.apply(x_TH, topk_ids_TK, topk_weights_TK, gate_up_E2IH, down_EHI)
    return out
