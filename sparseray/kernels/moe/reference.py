"""Plain PyTorch routing and expert computation: the oracle of every fused MoE kernel.

Routing follows DeepSeek-V2 (softmax), DeepSeek-V3 section 2.1.2 (sigmoid with a selection-only
bias), GShard (top-2) and Switch (top-1); the expert is a SwiGLU feed-forward network. Every
function is deterministic: ties go to the lower id, sums run in a fixed order.

Shapes: T tokens, K experts per token, E experts, R = rows of one expert, H hidden, I inter.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from sparseray.errors import ConfigError
from sparseray.kernels.moe.count_sort import count_sort
from sparseray.kernels.settings import ROUTERS, ROW_BLOCK

ROW_MULTIPLE = 16
"""Fewest rows of an expert's matrix products; see `ROW_BLOCK`."""

NORMALIZE_EPS = 1e-20
RELEASED_GROUP_SCORES = 2
"""Scores that DeepSeek-V3's released gate adds up for a group, whatever top_k and topk_groups are."""


def stable_topk(scores_TE: Tensor, k: int) -> Tensor:
    """Return the ids of the k largest entries of each row, largest first, ties to the lower id.

    Args:
        scores_TE: any floating dtype; -inf marks what should come last.
        k: how many, 1 to E.

    Returns:
        int64 [T, k].
    """
    return torch.sort(scores_TE, dim=-1, descending=True, stable=True).indices[..., :k].contiguous()


def limit_groups(biased_TE: Tensor, *, num_groups: int, topk_groups: int, group_scores: int) -> Tensor:
    """Set the scores outside each token's best groups to -inf.

    Args:
        biased_TE: selection scores; groups are contiguous ranges of E / num_groups experts.
        num_groups: number of groups.
        topk_groups: how many groups a token keeps; ties go to the lower group.
        group_scores: a group's score is the sum of so many of its largest (`scores_of_a_group`).

    Returns:
        The masked scores [T, E].

    Source: DeepSeek-V2 section 2.2.2 and its released gate; DeepSeek-V3 section 2.1.2.
    """
    if topk_groups >= num_groups:
        return biased_TE
    T, E = biased_TE.shape
    grouped_TGS = biased_TE.reshape(T, num_groups, E // num_groups)
    group_TG = grouped_TGS.sort(dim=-1, descending=True).values[..., :group_scores].sum(-1)
    kept_TG = torch.zeros_like(group_TG, dtype=torch.bool)
    kept_TG.scatter_(1, stable_topk(group_TG, topk_groups), True)
    return grouped_TGS.masked_fill(~kept_TG[..., None], float("-inf")).reshape(T, E)


def shares_and_means(scores_TE: Tensor, topk_ids_TK: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Of each expert the share of choices that fell on it, times E, and its mean score, both [groups, E].

    Args:
        scores_TE: fp32; only the mean has a gradient.
        topk_ids_TK: each token's choices, all different.
        groups: sequences of equal length, one after another.
    """
    (T, E), k = scores_TE.shape, topk_ids_TK.shape[1]
    tokens = T // groups
    chosen_TE = torch.zeros_like(scores_TE).scatter_(1, topk_ids_TK, 1.0)
    shares_BE = chosen_TE.reshape(groups, tokens, E).sum(1) * (E / (k * tokens))
    return shares_BE, scores_TE.reshape(groups, tokens, E).mean(1)


def scores_of_a_group(router: str, *, top_k: int, topk_groups: int, group_scores: int) -> int:
    """How many of its largest scores make a group's score.

    Args:
        router: only "v3" adds up several; the others take the largest.
        top_k, topk_groups: K_r and M of the paper.
        group_scores: so many, or 0 for the paper's K_r / M.

    Source: DeepSeek-V2 section 2.2.2; DeepSeek-V3 section 2.1.2 (K_r / M) and its released gate (2).
    """
    if router != "v3":
        return 1
    return group_scores or max(1, top_k // topk_groups)


def weighing(router: str, *, normalize: bool | None, scaling: float) -> tuple[bool, float]:
    """Whether the chosen weights are divided by their sum, and the factor on them after that.

    Args:
        router, normalize, scaling: as in `route`.
    """
    if router not in ("v3", "v2"):
        return router == "gshard", 1.0
    return router == "v3" if normalize is None else normalize, float(scaling)


def check_route(E: int, *, top_k: int, router: str, num_groups: int, topk_groups: int) -> None:
    """Raise ConfigError when these routing settings cannot choose top_k experts."""
    if router not in ROUTERS:
        raise ConfigError(f"router={router!r} is unknown; use one of {', '.join(ROUTERS)}")
    if E % num_groups:
        raise ConfigError(f"num_experts={E} is not divisible by num_groups={num_groups}")
    if not 1 <= topk_groups <= num_groups:
        raise ConfigError(f"topk_groups={topk_groups} is outside 1..num_groups={num_groups}")
    if not 1 <= top_k <= topk_groups * (E // num_groups):
        usable = topk_groups * (E // num_groups)
        raise ConfigError(f"top_k={top_k} exceeds the {usable} experts of topk_groups={topk_groups}")
    if (router == "gshard" and top_k != 2) or (router == "switch" and top_k != 1):
        raise ConfigError(
            f"router={router!r} needs top_k={2 if router == 'gshard' else 1}, got top_k={top_k}"
        )


def route(
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
) -> tuple[Tensor, Tensor, Tensor]:
    """Choose top_k experts for each token and weigh them, in fp32.

    Args:
        logits_TE: router logits; converted to fp32.
        top_k: experts per token (2 for "gshard", 1 for "switch").
        router: "v3" sigmoid scores; "v2" softmax scores; "gshard" softmax, the two weights
            normalised; "switch" softmax, weight = probability.
        bias_E: fp32, added for selection only (v3); it gets no gradient.
        num_groups: contiguous expert groups; a property of the model, never of the cluster.
        topk_groups: groups that a token may use. V2 scores a group by its maximum, V3 by the sum of its
            largest biased scores.
        group_scores: how many V3 adds up; 0 for top_k / topk_groups.
        normalize: divide the weights by their sum + 1e-20; None means True for v3, False for v2.
            Ignored by gshard (always) and switch (never).
        scaling: factor on the weights, after normalisation (v2, v3).

    Returns:
        (topk_ids_TK int64, by falling selection score with ties to the lower id;
        topk_weights_TK fp32, differentiable in the logits; scores_TE fp32, unbiased).

    Raises:
        ConfigError: settings that cannot select top_k experts.

    Source: DeepSeek-V2 eq. 20-22; DeepSeek-V3 eq. 12-16; GShard section 2.2; Switch eq. 1-2.
    """
    check_route(
        logits_TE.shape[-1], top_k=top_k, router=router, num_groups=num_groups, topk_groups=topk_groups
    )
    logits_TE = logits_TE.float()
    scores_TE = torch.sigmoid(logits_TE) if router == "v3" else torch.softmax(logits_TE, dim=-1)
    with torch.no_grad():
        biased_TE = scores_TE if bias_E is None else scores_TE + bias_E.float()
        count = scores_of_a_group(router, top_k=top_k, topk_groups=topk_groups, group_scores=group_scores)
        biased_TE = limit_groups(
            biased_TE, num_groups=num_groups, topk_groups=topk_groups, group_scores=count
        )
        topk_ids_TK = stable_topk(biased_TE, top_k)
    weights_TK = scores_TE.gather(1, topk_ids_TK)
    is_divided, factor = weighing(router, normalize=normalize, scaling=scaling)
    if is_divided:
        weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + NORMALIZE_EPS)
    return topk_ids_TK, weights_TK * factor, scores_TE


def group_by_expert(topk_ids_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Sort the (token, slot) pairs by expert, stably.

    Args:
        topk_ids_TK: int64 expert ids in 0..num_experts-1.
        num_experts: E.

    Returns:
        (order_R int64: flat index t*K+k of each row, by expert then by flat index;
        counts_E int64: rows of each expert).
    """
    flat_R = topk_ids_TK.reshape(-1)
    if flat_R.device.type == "cpu":
        order, counts = count_sort(flat_R.numpy(), num_experts)
        return torch.from_numpy(order), torch.from_numpy(counts)
    return torch.sort(flat_R, stable=True).indices, torch.bincount(flat_R, minlength=num_experts)


def _pad_rows(x_RH: Tensor) -> Tensor:
    missing = -x_RH.shape[0] % ROW_MULTIPLE
    return F.pad(x_RH, (0, 0, 0, missing)) if missing else x_RH


def _product(x_RK: Tensor, w_KN: Tensor) -> Tensor:
    """x @ w, in blocks of rows whose bits are those of any other number of rows."""
    if x_RK.shape[0] <= ROW_BLOCK or x_RK.is_cuda:
        return x_RK @ w_KN
    return torch.cat([block_BK @ w_KN for block_BK in x_RK.split(ROW_BLOCK)])


def swiglu_forward(
    x_RH: Tensor, gate_IH: Tensor, up_IH: Tensor, down_HI: Tensor
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Run one expert on its rows: down(silu(gate x) * (up x)).

    Args:
        x_RH: the expert's rows, R >= 0.
        gate_IH: gate projection.
        up_IH: up projection.
        down_HI: down projection.

    Returns:
        (y_RH, (g_RI, u_RI)): the output and the two pre-activations that backward needs.
    """
    rows = x_RH.shape[0]
    x_PH = _pad_rows(x_RH)
    g_PI, u_PI = _product(x_PH, gate_IH.T), _product(x_PH, up_IH.T)
    y_PH = _product(F.silu(g_PI) * u_PI, down_HI.T)
    return y_PH[:rows], (g_PI[:rows], u_PI[:rows])


def expert_rows(
    x_UH: Tensor,
    rows_R: Tensor,
    asked: Sequence[tuple[int, int]],
    gate_up_E2IH: Tensor,
    down_EHI: Tensor,
) -> Tensor:
    """Run rows through their experts, one expert after another; args and result as `Ops.expert_rows`."""
    inner, start = down_EHI.shape[2], 0
    y_RH = torch.empty(len(rows_R), x_UH.shape[1], device=x_UH.device)
    for place, count in asked:
        gate_up, x = gate_up_E2IH[place], x_UH[rows_R[start : start + count]].to(down_EHI.dtype)
        y_RH[start : start + count] = swiglu_forward(x, gate_up[:inner], gate_up[inner:], down_EHI[place])[0]
        start += count
    return y_RH


def swiglu_backward(
    dy_RH: Tensor,
    x_RH: Tensor,
    saved: tuple[Tensor, Tensor],
    gate_IH: Tensor,
    up_IH: Tensor,
    down_HI: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `swiglu_forward`; the activation is recomputed from the saved pre-activations.

    Args:
        dy_RH: gradient of the output.
        x_RH: the input rows.
        saved: (g_RI, u_RI) of the forward.
        gate_IH, up_IH, down_HI: the projections.

    Returns:
        (dx_RH, dgate_IH, dup_IH, ddown_HI); zero weight gradients for an expert without rows.
    """
    rows = x_RH.shape[0]
    dy_PH, x_PH = _pad_rows(dy_RH), _pad_rows(x_RH)
    g_PI, u_PI = _pad_rows(saved[0]), _pad_rows(saved[1])
    sig_PI = torch.sigmoid(g_PI)
    silu_PI = g_PI * sig_PI
    da_PI = _product(dy_PH, down_HI)
    du_PI = da_PI * silu_PI
    dg_PI = da_PI * u_PI * (sig_PI * (1 + g_PI * (1 - sig_PI)))
    dx_PH = _product(dg_PI, gate_IH) + _product(du_PI, up_IH)
    return dx_PH[:rows], dg_PI.T @ x_PH, du_PI.T @ x_PH, dy_PH.T @ (silu_PI * u_PI)


def moe_ffn_reference(
    x_TH: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor, w_gate_up_E2IH: Tensor, w_down_EHI: Tensor
) -> Tensor:
    """Weighted sum over each token's experts, in slot order, with fp32 accumulation.

    Args:
        x_TH: tokens.
        topk_ids_TK: int64.
        topk_weights_TK: fp32.
        w_gate_up_E2IH: gate rows first, then up rows.
        w_down_EHI: down projections.

    Returns:
        y_TH in x's dtype; differentiable by autograd in x, the weights and the routing weights.
    """
    T, K = topk_ids_TK.shape
    order_R, counts_E = group_by_expert(topk_ids_TK, w_down_EHI.shape[0])
    parts, start = [], 0
    for expert, count in enumerate(counts_E.tolist()):
        tokens_R = order_R[start : start + count] // K
        gate_IH, up_IH = w_gate_up_E2IH[expert].chunk(2, dim=0)
        parts.append(swiglu_forward(x_TH[tokens_R], gate_IH, up_IH, w_down_EHI[expert])[0])
        start += count
    y_TKH = torch.cat(parts)[torch.argsort(order_R)].reshape(T, K, -1)
    y_TH = torch.zeros_like(x_TH, dtype=torch.float32)
    for k in range(K):
        y_TH = y_TH + topk_weights_TK[:, k, None].float() * y_TKH[:, k].float()
    return y_TH.to(x_TH.dtype)
