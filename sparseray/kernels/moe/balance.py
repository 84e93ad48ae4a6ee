"""What a router's balance loss is made of (Triton): how often each expert is among a token's best, and its mean score.

One launch reads the scores once, chooses, counts and adds up spans of tokens; the spans are added in their order. The
backward pass is one launch. Oracle: `PlainOps.balance`. Source: arXiv 2412.19437 eq. 17-20.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparseray.kernels.launch import launch_kernel
from sparseray.kernels.moe.expert_map import block_tokens

SPAN_BLOCKS = 4


@triton.jit
def _sums_kernel(
    p_scores, p_counts, p_sums, tokens, E: tl.constexpr, BE: tl.constexpr, K: tl.constexpr, BT: tl.constexpr,
    BLOCKS: tl.constexpr,
):  # fmt: skip
    """A span of one sequence: tokens that have each expert among their K best, and the sum of scores by each token's own
    sum."""
    i_s, i_b, num_spans = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
    o_e = tl.arange(0, BE)
    m_e = o_e < E
    b_counts = tl.zeros([BE], tl.float32)
    b_sums = tl.zeros([BE], tl.float32)
    for i in range(BLOCKS):
        o_t = (i_s * BLOCKS + i) * BT + tl.arange(0, BT)
        m = (o_t < tokens)[:, None] & m_e[None, :]
        o = (i_b * tokens + o_t)[:, None].to(tl.int64) * E + o_e[None, :]
        b = tl.load(p_scores + o, mask=m, other=0.0)  # [BT, BE]
        b_total = tl.where(o_t < tokens, tl.sum(b, 1), 1.0)
        b_sums += tl.sum(b / b_total[:, None], 0)
        b = tl.where(m_e[None, :], b, float("-inf"))
        for _ in tl.static_range(K):
            at = tl.argmax(b, 1, tie_break_left=True)
            hot = o_e[None, :] == at[:, None]
            b = tl.where(hot, float("-inf"), b)
            b_counts += tl.sum((hot & m).to(tl.float32), 0)
    o = (i_b * num_spans + i_s) * E + o_e
    tl.store(p_counts + o, b_counts, mask=m_e)
    tl.store(p_sums + o, b_sums, mask=m_e)


@triton.jit
def _gradient_kernel(
    p_scores, p_dmeans, p_dscores, tokens, E: tl.constexpr, BE: tl.constexpr, BT: tl.constexpr
):
    """ds = (d - sum of d s / S) / S, with d the gradient of the sequence's sums and S a token's sum of scores.

    p_dmeans has the gradient of the means, which are the sums by the number of tokens.
    """
    i_b = tl.program_id(1)
    o_t = tl.program_id(0) * BT + tl.arange(0, BT)
    o_e = tl.arange(0, BE)
    m = (o_t < tokens)[:, None] & (o_e < E)[None, :]
    o = (i_b * tokens + o_t)[:, None].to(tl.int64) * E + o_e[None, :]
    b = tl.load(p_scores + o, mask=m, other=0.0)
    b_d = tl.load(p_dmeans + i_b * E + o_e, mask=o_e < E, other=0.0)
    b_d = tl.div_rn(b_d, tokens * 1.0)[None, :]
    b_total = tl.where(o_t < tokens, tl.sum(b, 1), 1.0)[:, None]
    b_mean = tl.sum(b * b_d, 1)[:, None] / b_total
    tl.store(p_dscores + o, (b_d - b_mean) / b_total, mask=m)


class _Balance(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores_TE: Tensor, top_k: int, groups: int) -> Any:
        (T, E), bt = scores_TE.shape, block_tokens(scores_TE.shape[1])
        tokens = T // groups
        spans = triton.cdiv(tokens, bt * SPAN_BLOCKS)
        parts = torch.empty(2, groups, spans, E, dtype=torch.float32, device=scores_TE.device)
        sizes = {"E": E, "BE": triton.next_power_of_2(E), "BT": bt}
        launch_kernel(
            _sums_kernel, (spans, groups), scores_TE, parts[0], parts[1], tokens, K=top_k, BLOCKS=SPAN_BLOCKS, **sizes
        )  # fmt: skip
        counts_BE, sums_BE = parts.sum(2).unbind(0)
        shares_BE, means_BE = counts_BE * (E / (top_k * tokens)), sums_BE / tokens
        ctx.save_for_backward(scores_TE)
        ctx.groups, ctx.sizes = groups, sizes
        ctx.mark_non_differentiable(shares_BE)
        ctx.set_materialize_grads(False)
        return shares_BE, means_BE

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        (scores_TE,) = ctx.saved_tensors
        if grads[1] is None:
            return None, None, None
        tokens = scores_TE.shape[0] // ctx.groups
        dscores_TE = torch.empty_like(scores_TE)
        launch_kernel(
            _gradient_kernel, (triton.cdiv(tokens, ctx.sizes["BT"]), ctx.groups),
            scores_TE, grads[1].contiguous(), dscores_TE, tokens, **ctx.sizes,
        )  # fmt: skip
        return dscores_TE, None, None


def balance_of_best(scores_TE: Tensor, top_k: int, groups: int) -> tuple[Tensor, Tensor]:
    """`Ops.balance` of the best: share of the choices of each token's best, times E, and mean score by the token's sum, [groups, E].

    Args:
        scores_TE: fp32, positive.
        top_k: at most E; ties go to the lower id.
        groups: sequences of equal length, one after another; it divides T.
    """
    found: tuple[Tensor, Tensor] = _Balance.apply(scores_TE.contiguous(), top_k, groups)
    return found
