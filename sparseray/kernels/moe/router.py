"""Fused router: scores, bias, group limit, top-k, weights, and the map of tokens sorted by expert.

One launch routes and ranks (`_router_kernel`), two more finish the map (plan.py); the backward is one
launch. Same rules as `reference.route`: fp32, the bias selects only, ties go to the lower id.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparseray.kernels.launch import launch_kernel
from sparseray.kernels.moe.expert_map import TILE_ROWS, ExpertPlan, block_tokens, finish_plan, rank_block
from sparseray.kernels.moe.reference import (
    NORMALIZE_EPS,
    RELEASED_GROUP_SCORES,
    check_route,
    scores_of_a_group,
    weighing,
)

FEW_TOKENS = 512


@triton.jit
def _score(p_logits, o_t, m_t, E: tl.constexpr, BE: tl.constexpr, SIGMOID: tl.constexpr):
    o_e = tl.arange(0, BE)
    m = m_t[:, None] & (o_e[None, :] < E)
    x = tl.load(p_logits + o_t[:, None].to(tl.int64) * E + o_e[None, :], mask=m, other=float("-inf"))
    x = x.to(tl.float32)  # [BT, BE]
    if SIGMOID:
        return 1.0 / (1.0 + tl.exp(-x))
    x = tl.exp(x - tl.where(m_t, tl.max(x, 1), 0.0)[:, None])
    return x / tl.where(m_t, tl.sum(x, 1), 1.0)[:, None]


@triton.jit
def _limit_groups(
    biased, E: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, TOPG: tl.constexpr, SUMMED: tl.constexpr
):
    """-inf outside each token's TOPG best groups."""
    o_e = tl.arange(0, biased.shape[1])
    o_g = tl.arange(0, GP)
    group = o_e // (E // G)
    scores = tl.full([biased.shape[0], GP], float("-inf"), tl.float32)
    for g in tl.static_range(G):
        inside = tl.where(group[None, :] == g, biased, float("-inf"))
        best = tl.max(inside, 1)
        for _ in tl.static_range(1, SUMMED):
            at = tl.argmax(inside, 1, tie_break_left=True)
            inside = tl.where(o_e[None, :] == at[:, None], float("-inf"), inside)
            best += tl.max(inside, 1)
        scores = tl.where(o_g[None, :] == g, best[:, None], scores)
    kept = tl.zeros([biased.shape[0], biased.shape[1]], tl.int32)
    for _ in tl.static_range(TOPG):
        at = tl.argmax(scores, 1, tie_break_left=True)
        kept += (group[None, :] == at[:, None]).to(tl.int32)
        scores = tl.where(o_g[None, :] == at[:, None], float("-inf"), scores)
    return tl.where(kept > 0, biased, float("-inf"))


@triton.jit
def _router_kernel(
    p_logits,
    p_bias,
    p_ids,
    p_weights,
    p_scores,
    p_ranks,
    p_counts,
    T,
    scaling,
    eps,
    E: tl.constexpr,
    BE: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,
    G: tl.constexpr,
    GP: tl.constexpr,
    TOPG: tl.constexpr,
    SUMMED: tl.constexpr,
    SIGMOID: tl.constexpr,
    BIAS: tl.constexpr,
    NORMALIZE: tl.constexpr,
    RANK: tl.constexpr,
    BT: tl.constexpr,
):
    i_b = tl.program_id(0)
    o_t = i_b * BT + tl.arange(0, BT)
    m_t = o_t < T
    o_e = tl.arange(0, BE)
    o_k = tl.arange(0, KP)
    score = _score(p_logits, o_t, m_t, E, BE, SIGMOID)
    m = m_t[:, None] & (o_e[None, :] < E)
    tl.store(p_scores + o_t[:, None].to(tl.int64) * E + o_e[None, :], score, mask=m)
    biased = score
    if BIAS:
        biased += tl.load(p_bias + o_e, mask=o_e < E, other=0.0)[None, :]
    biased = tl.where(o_e[None, :] < E, biased, float("-inf"))
    if TOPG < G:
        biased = _limit_groups(biased, E, G, GP, TOPG, SUMMED)
    chosen = tl.zeros([BT, BE], tl.int32)
    weights = tl.zeros([BT, KP], tl.float32)
    for k in tl.static_range(K):
        at = tl.argmax(biased, 1, tie_break_left=True)
        hot = o_e[None, :] == at[:, None]
        weights = tl.where(o_k[None, :] == k, tl.sum(tl.where(hot, score, 0.0), 1)[:, None], weights)
        biased = tl.where(hot, float("-inf"), biased)
        chosen += (hot & m_t[:, None]).to(tl.int32)
        tl.store(p_ids + o_t * K + k, at.to(tl.int64), mask=m_t)
    if NORMALIZE:
        weights = weights / (tl.sum(weights, 1) + eps)[:, None]
    m_k = m_t[:, None] & (o_k[None, :] < K)
    tl.store(p_weights + o_t[:, None] * K + o_k[None, :], weights * scaling, mask=m_k)
    if RANK:
        tl.debug_barrier()
        rank_block(p_ids, p_ranks, p_counts, i_b, o_t, m_t, chosen, E, K)


@triton.jit
def _router_backward_kernel(
    p_scores,
    p_ids,
    p_dweights,
    p_dscores,
    p_dlogits,
    T,
    scaling,
    eps,
    E: tl.constexpr,
    BE: tl.constexpr,
    K: tl.constexpr,
    SIGMOID: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BT: tl.constexpr,
):
    o_t = tl.program_id(0) * BT + tl.arange(0, BT)
    m_t = o_t < T
    o_e = tl.arange(0, BE)
    m = m_t[:, None] & (o_e[None, :] < E)
    o_te = o_t[:, None].to(tl.int64) * E + o_e[None, :]
    score = tl.load(p_scores + o_te, mask=m, other=0.0)  # [BT, BE]
    total = tl.zeros([BT], tl.float32)
    product = tl.zeros([BT], tl.float32)
    grad = tl.zeros([BT, BE], tl.float32)
    chosen = tl.zeros([BT, BE], tl.float32)
    for k in tl.static_range(K):
        at = tl.load(p_ids + o_t * K + k, mask=m_t, other=-1).to(tl.int32)
        dw = tl.load(p_dweights + o_t * K + k, mask=m_t, other=0.0) * scaling
        hot = (o_e[None, :] == at[:, None]).to(tl.float32)
        own = tl.sum(hot * score, 1)
        total += own
        product += own * dw
        grad += hot * dw[:, None]
        chosen += hot
    if NORMALIZE:
        total += eps
        grad = grad / total[:, None] - chosen * (product / (total * total))[:, None]
        grad = tl.where(m_t[:, None], grad, 0.0)
    if p_dscores is not None:
        grad += tl.load(p_dscores + o_te, mask=m, other=0.0)
    if SIGMOID:
        grad = grad * score * (1.0 - score)
    else:
        grad = score * (grad - tl.sum(grad * score, 1)[:, None])
    tl.store(p_dlogits + o_te, grad, mask=m)


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_TE: Tensor, bias_E: Tensor | None, options: dict[str, Any]) -> Any:
        T, E = logits_TE.shape
        K, device = options["top_k"], logits_TE.device
        bt, warps = options["block"]
        num_blocks = max(1, triton.cdiv(T, bt))
        ids = torch.empty(T, K, dtype=torch.int64, device=device)
        weights = torch.empty(T, K, dtype=torch.float32, device=device)
        scores = torch.empty(T, E, dtype=torch.float32, device=device)
        ranked = num_blocks if options["rank"] else 0
        ranks = torch.empty(T if ranked else 0, K, dtype=torch.int32, device=device)
        counts = torch.empty(ranked, E, dtype=torch.int32, device=device)
        sizes = {"E": E, "BE": triton.next_power_of_2(E), "K": K, "BT": bt}
        launch_kernel(
            _router_kernel,
            (num_blocks,),
            logits_TE,
            bias_E if bias_E is not None else scores,
            ids,
            weights,
            scores,
            ranks,
            counts,
            T,
            options["scaling"],
            NORMALIZE_EPS,
            KP=triton.next_power_of_2(K),
            G=options["num_groups"],
            GP=triton.next_power_of_2(options["num_groups"]),
            TOPG=options["topk_groups"],
            SUMMED=options["summed"],
            SIGMOID=options["sigmoid"],
            BIAS=bias_E is not None,
            NORMALIZE=options["normalize"],
            RANK=options["rank"],
            num_warps=warps,
            **sizes,
        )
        ctx.save_for_backward(scores, ids)
        ctx.options, ctx.sizes, ctx.dtype = options, sizes, logits_TE.dtype
        ctx.mark_non_differentiable(ids, ranks, counts)
        ctx.set_materialize_grads(False)
        return ids, weights, scores, ranks, counts

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        scores, ids = ctx.saved_tensors
        dweights, dscores = grads[1], grads[2]
        if dweights is None:
            dweights = scores.new_zeros(ids.shape)
        dlogits = torch.empty_like(scores)
        launch_kernel(
            _router_backward_kernel,
            (max(1, triton.cdiv(scores.shape[0], ctx.sizes["BT"])),),
            scores,
            ids,
            dweights.contiguous(),
            None if dscores is None else dscores.contiguous(),
            dlogits,
            scores.shape[0],
            ctx.options["scaling"],
            NORMALIZE_EPS,
            SIGMOID=ctx.options["sigmoid"],
            NORMALIZE=ctx.options["normalize"],
            **ctx.sizes,
        )
        return dlogits.to(ctx.dtype), None, None


def _routed(
    logits_TE: Tensor, bias_E: Tensor | None, block: tuple[int, int], *, top_k: int, router: str, num_groups: int, topk_groups: int,
    group_scores: int, normalize: bool | None, scaling: float, rank: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(ids, weights, scores, ranks, counts): what `reference.route` gives, and with `rank` what `finish_plan` needs.

    `block` is the tokens of a program and its warps.
    """
    E = logits_TE.shape[1]
    check_route(E, top_k=top_k, router=router, num_groups=num_groups, topk_groups=topk_groups)
    summed = scores_of_a_group(router, top_k=top_k, topk_groups=topk_groups, group_scores=group_scores)
    is_divided, factor = weighing(router, normalize=normalize, scaling=scaling)
    options = {
        "top_k": top_k,
        "block": block,
        "sigmoid": router == "v3",
        "num_groups": num_groups,
        "topk_groups": topk_groups,
        "summed": min(summed, E // num_groups),
        "normalize": is_divided,
        "rank": rank,
        "scaling": factor,
    }
    found: tuple[Tensor, ...] = _Route.apply(logits_TE.contiguous(), bias_E, options)
    ids, weights, scores, ranks, counts = found
    return ids, weights, scores, ranks, counts


def route(
    logits_TE: Tensor, *, top_k: int, router: str = "v3", bias_E: Tensor | None = None, num_groups: int = 1,
    topk_groups: int = 1, group_scores: int = RELEASED_GROUP_SCORES, normalize: bool | None = None,
    scaling: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`reference.route` in one launch; args and result as there."""
    # Of few tokens a warp takes some alone: it finds a largest score without waiting for other warps.
    block = (8, 1) if logits_TE.shape[0] <= FEW_TOKENS else (block_tokens(logits_TE.shape[1]), 4)
    return _routed(
        logits_TE, bias_E, block, top_k=top_k, router=router, num_groups=num_groups, topk_groups=topk_groups,
        group_scores=group_scores, normalize=normalize, scaling=scaling, rank=False,
    )[:3]  # fmt: skip


def route_and_plan(
    logits_TE: Tensor,
    *,
    top_k: int,
    router: str = "v3",
    bias_E: Tensor | None = None,
    num_groups: int = 1,
    topk_groups: int = 1,
    group_scores: int = RELEASED_GROUP_SCORES,
    normalize: bool | None = None,
    scaling: float = 1.0,
    tile_rows: int = TILE_ROWS,
) -> tuple[Tensor, Tensor, Tensor, ExpertPlan]:
    """`reference.route` in one launch, with the expert map of the result in two more.

    Args:
        logits_TE: fp32 (bf16 is read as fp32), contiguous, on the GPU.
        top_k, router, bias_E, num_groups, topk_groups, group_scores, normalize, scaling: as in `reference.route`.
        tile_rows: rows of a tile of the grouped products.

    Returns:
        (topk_ids_TK int64, topk_weights_TK fp32, scores_TE fp32, plan).

    Raises:
        ConfigError: settings that cannot select top_k experts.
    """
    ids, weights, scores, ranks, counts = _routed(
        logits_TE, bias_E, (block_tokens(logits_TE.shape[1]), 4), top_k=top_k, router=router, num_groups=num_groups, topk_groups=topk_groups,
        group_scores=group_scores, normalize=normalize, scaling=scaling, rank=True,
    )  # fmt: skip
    plan = finish_plan(ids, ranks, counts, num_experts=logits_TE.shape[1], tile_rows=tile_rows)
    return ids, weights, scores, plan
