"""The head with its cross-entropy: the logits of some rows at a time, and their gradients in the same pass.

The loss is a scalar whose derivative by each row's logits is known once the row's softmax is: so the forward pass
goes on to the gradients while a chunk's logits are at hand, and the backward pass only scales. The library's matrix
products make logits (bf16), gradient of the hidden states, and gradient of the weight (added up over the chunks in
fp32); one kernel in between turns a row of logits into its loss (statistics in fp32) and, in place, into its
gradient. Equations: docs/kernels_dense.md. Oracle: `reference.head_loss_reference`.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparseray.kernels.launch import launch_kernel

CHUNK_BYTES, MOST_ROWS, ROW_MULTIPLE = 1 << 30, 8192, 256
"""Memory for a chunk's logits, and its rows: every chunk reads and writes the fp32 gradient of the weight once."""
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _row_kernel(
    p_logits, p_targets, p_weights, p_losses, V: tl.constexpr, GRADIENT: tl.constexpr, BV: tl.constexpr
):
    """One row: its weighted loss, and its logits replaced by the loss's derivative."""
    i_r = tl.program_id(0).to(tl.int64)
    p_row = p_logits + i_r * V
    target = tl.load(p_targets + i_r)
    weight = tl.where(target >= 0, tl.load(p_weights + i_r), 0.0)
    own = tl.load(p_row + tl.maximum(target, 0)).to(tl.float32)
    o_v = tl.arange(0, BV)
    top = tl.full([], float("-inf"), tl.float32)
    total = tl.zeros([], tl.float32)
    for start in range(0, V, BV):
        m = start + o_v < V
        b = tl.load(p_row + start + o_v, mask=m, other=float("-inf")).to(tl.float32) * LOG2E
        new = tl.maximum(top, tl.max(b, 0))
        total = total * tl.exp2(top - new) + tl.sum(tl.exp2(b - new), 0)
        top = new
    lse = top + tl.log2(total)
    tl.store(p_losses + i_r, tl.where(target >= 0, (lse * LN2 - own) * weight, 0.0))
    if GRADIENT:
        # The other warps have read `own` by now: the sums above wait for all of them.
        for start in range(0, V, BV):
            m = start + o_v < V
            b = tl.load(p_row + start + o_v, mask=m, other=0.0).to(tl.float32) * LOG2E
            b = tl.exp2(b - lse) * weight
            b = tl.where(start + o_v == target, b - weight, b)
            tl.store(p_row + start + o_v, b.to(p_logits.dtype.element_ty), mask=m)


def losses_and_gradients_(
    logits_RV: Tensor, targets_R: Tensor, weights_R: Tensor, losses_R: Tensor, *, gradient: bool
) -> None:
    """Write each row's weighted loss, and with `gradient` put the loss's derivative in the logits' place."""
    R, V = logits_RV.shape
    # A quarter of a long row at a time: the rows in flight then fit the L2 cache, where they are read again.
    padded = triton.next_power_of_2(V)
    block = max(16, min(padded, 32768, max(8192, padded // 4)))
    launch_kernel(
        _row_kernel, (R,), logits_RV, targets_R, weights_R, losses_R,
        V=V, GRADIENT=gradient, BV=block, num_warps=max(4, block // 1024),
    )  # fmt: skip


def chunk_rows(vocab: int, item_size: int) -> int:
    """Rows whose logits are at hand at a time."""
    rows = CHUNK_BYTES // (vocab * item_size) // ROW_MULTIPLE * ROW_MULTIPLE
    return max(ROW_MULTIPLE, min(MOST_ROWS, rows))


def add_product(out: Tensor, a: Tensor, b: Tensor, *, accumulate: bool) -> None:
    """out = a @ b, or added to it, the sum in fp32.

    Args:
        out: fp32 [M, N]; what is there does not matter without `accumulate`.
        a, b: [M, K] and [K, N], bf16, fp16 or fp32.
    """
    beta = 1.0 if accumulate else 0.0
    if a.is_cuda and a.dtype != torch.float32:
        torch.addmm(out, a, b, out_dtype=torch.float32, beta=beta, out=out)
    else:
        torch.addmm(out, a.float(), b.float(), beta=beta, out=out)


@torch.no_grad()
def head_loss_gradients(
    hidden_RH: Tensor,
    weight_VH: Tensor,
    targets_R: Tensor,
    weights_R: Tensor,
    *,
    hidden_grad_RH: Tensor | None = None,
    weight_grad_VH: Tensor | None = None,
    accumulate: bool = False,
    rows: int | None = None,
) -> Tensor:
    """Return the weighted sum of the rows' losses; write its gradients where there is room for them.

    Args:
        hidden_RH, weight_VH: bf16, fp16 or fp32, contiguous, one dtype.
        targets_R: int64 below V; a row whose target is negative does not count.
        weights_R: fp32, each row's share in the loss.
        hidden_grad_RH: like hidden_RH, written.
        weight_grad_VH: fp32, written, or added to with `accumulate`.
        rows: of a chunk; None chooses by the vocabulary.

    Returns:
        fp32 scalar; the same bits in every run.
    """
    R, V = hidden_RH.shape[0], weight_VH.shape[0]
    rows = min(rows or chunk_rows(V, hidden_RH.element_size()), max(R, 1))
    losses_R = torch.empty(R, dtype=torch.float32, device=hidden_RH.device)
    logits_CV = hidden_RH.new_empty(rows, V)
    for start in range(0, R, rows):
        part = slice(start, start + rows)
        logits_RV = logits_CV[: min(rows, R - start)]
        torch.mm(hidden_RH[part], weight_VH.T, out=logits_RV)
        is_trained = hidden_grad_RH is not None or weight_grad_VH is not None
        losses_and_gradients_(
            logits_RV, targets_R[part], weights_R[part], losses_R[part], gradient=is_trained
        )
        if hidden_grad_RH is not None:
            torch.mm(logits_RV, weight_VH, out=hidden_grad_RH[part])
        if weight_grad_VH is not None:
            add_product(weight_grad_VH, logits_RV.T, hidden_RH[part], accumulate=accumulate or start > 0)
    if R == 0 and weight_grad_VH is not None and not accumulate:
        weight_grad_VH.zero_()
    return losses_R.sum()


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_RH: Tensor, weight_VH: Tensor, targets_R: Tensor, weights_R: Tensor, slab_VH: Tensor | None
    ) -> Tensor:  # fmt: skip
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        dhidden_RH = torch.empty_like(hidden_RH) if need_hidden else None
        dweight_VH = (
            torch.empty_like(weight_VH, dtype=torch.float32) if need_weight and slab_VH is None else None
        )
        loss = head_loss_gradients(
            hidden_RH, weight_VH, targets_R, weights_R, hidden_grad_RH=dhidden_RH, accumulate=slab_VH is not None,
            weight_grad_VH=dweight_VH if slab_VH is None else slab_VH,
        )  # fmt: skip
        ctx.save_for_backward(dhidden_RH, dweight_VH)
        ctx.weight_dtype = weight_VH.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> Any:
        dhidden_RH, dweight_VH = ctx.saved_tensors
        dhidden = dhidden_RH * dloss.to(dhidden_RH.dtype) if dhidden_RH is not None else None
        dweight = None
        if dweight_VH is not None:
            dweight = torch.mul(dweight_VH, dloss, out=torch.empty_like(dweight_VH, dtype=ctx.weight_dtype))
        return dhidden, dweight, None, None, None


def head_loss(
    hidden_RH: Tensor,
    weight_VH: Tensor,
    targets_R: Tensor,
    weights_R: Tensor,
    *,
    weight_grad_VH: Tensor | None = None,
) -> Tensor:
    """Weighted sum of the rows' cross-entropies, differentiable by hidden_RH and weight_VH.

    Args:
        hidden_RH, weight_VH: bf16, fp16 or fp32, one dtype.
        targets_R: int64 below V; a row whose target is negative does not count.
        weights_R: fp32, each row's share in the loss.
        weight_grad_VH: fp32 slab to which the weight's gradient is added at once (and weight_VH gets none) if
            hidden_RH or weight_VH requires one. The loss must then be what is differentiated, not a multiple
            of it: whatever scales it belongs in weights_R.

    Returns:
        fp32 scalar.
    """
    inputs = [x.contiguous() for x in (hidden_RH, weight_VH, targets_R, weights_R)]
    if not (torch.is_grad_enabled() and (hidden_RH.requires_grad or weight_VH.requires_grad)):
        return head_loss_gradients(*inputs)
    loss: Tensor = _HeadLoss.apply(*inputs, weight_grad_VH)
    return loss
