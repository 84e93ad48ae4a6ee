"""Compiled routing and experts on a CPU, fp32, for serving; the plain reference (reference.py) is their oracle.

A row's bits depend on the row alone. The loops release the interpreter lock.

Shapes: T tokens, E experts, K experts per token, R rows sorted by expert, U inputs, H hidden, I inner.
"""

from __future__ import annotations

import math

import numpy as np

from sparseray.kernels.attention.cpu import LEAST, ZERO, compiled
from sparseray.kernels.dense.cpu import ONE, linear, swiglu


@compiled
def score_experts(logits_E, is_sigmoid, scores_E):
    """Sigmoid or softmax of one token's logits."""
    if is_sigmoid:
        for e in range(logits_E.shape[0]):
            scores_E[e] = ONE / (ONE + math.exp(-logits_E[e]))
        return
    top, total = LEAST, ZERO
    for e in range(logits_E.shape[0]):
        top = max(top, logits_E[e])
    for e in range(logits_E.shape[0]):
        scores_E[e] = math.exp(logits_E[e] - top)
    # A loop of its own, as all sums here: one that stores too is compiled twice, and where the arrays lie decides
    # which of the two runs; their orders of summation differ.
    for e in range(logits_E.shape[0]):
        total += scores_E[e]
    for e in range(logits_E.shape[0]):
        scores_E[e] /= total


@compiled
def best_of(values, count, is_taken, found):
    """Indices of the largest values that are not taken, largest first, the lower one of equals; they are then taken."""
    for n in range(count):
        best = -1
        for i in range(values.shape[0]):
            if not is_taken[i] and (best < 0 or values[i] > values[best]):
                best = i
        is_taken[best], found[n] = True, best


@compiled
def route(
    logits_TE,
    bias_E,
    is_sigmoid,
    num_groups,
    topk_groups,
    group_scores,
    norm_eps,
    scaling,
    ids_TK,
    weights_TK,
    scores_TE,
):
    """Choose the experts of every token and weigh them.

    Args:
        bias_E: for selection; may be empty.
        group_scores: largest scores that make a group's.
        norm_eps: added to the sum that weights are divided by; negative: they are not.
    """
    T, E, K = logits_TE.shape[0], logits_TE.shape[1], ids_TK.shape[1]
    size = E // num_groups
    group_scores = min(group_scores, size)
    biased_E, group_G = np.empty(E, np.float32), np.empty(num_groups, np.float32)
    is_barred, is_taken = np.empty(E, np.bool_), np.empty(size, np.bool_)
    best, chosen = np.empty(size, np.int64), np.empty(topk_groups, np.int64)
    for t in range(T):
        score_experts(logits_TE[t], is_sigmoid, scores_TE[t])
        for e in range(E):
            biased_E[e] = scores_TE[t, e] + bias_E[e] if bias_E.shape[0] else scores_TE[t, e]
        is_barred[:] = topk_groups < num_groups
        if topk_groups < num_groups:
            for g in range(num_groups):
                is_taken[:] = False
                best_of(biased_E[g * size : (g + 1) * size], group_scores, is_taken, best)
                group_G[g] = ZERO
                for n in range(group_scores):
                    group_G[g] += biased_E[g * size + best[n]]
            is_kept = np.zeros(num_groups, np.bool_)
            best_of(group_G, topk_groups, is_kept, chosen)
            for g in chosen:
                is_barred[g * size : (g + 1) * size] = False
        best_of(biased_E, K, is_barred, ids_TK[t])
        total = ZERO
        for k in range(K):
            weights_TK[t, k] = scores_TE[t, ids_TK[t, k]]
        for k in range(K):
            total += weights_TK[t, k]
        for k in range(K):
            if norm_eps >= ZERO:
                weights_TK[t, k] /= total + norm_eps
            weights_TK[t, k] *= scaling


@compiled
def expert_rows(x_UH, rows_R, asked_E2, gate_up_E2IH, down_EHI, y_RH):
    """down(silu(gate x) * (up x)) of every row.

    Args:
        rows_R: input of each row, sorted by expert.
        asked_E2: of each expert, its row of the slabs and how many inputs it has.
    """
    most = 0
    for e in range(asked_E2.shape[0]):
        most = max(most, asked_E2[e, 1])
    two, hidden = gate_up_E2IH.shape[1], x_UH.shape[1]
    x_NH, inner_NI = np.empty((most, hidden), np.float32), np.empty((most, two), np.float32)
    act_NI, none = np.empty((most, two // 2), np.float32), np.empty(0, np.float32)
    start = 0
    for e in range(asked_E2.shape[0]):
        place, num = asked_E2[e, 0], asked_E2[e, 1]
        for n in range(num):
            x_NH[n] = x_UH[rows_R[start + n]]
        linear(x_NH[:num], gate_up_E2IH[place], none, inner_NI[:num])
        swiglu(inner_NI[:num], act_NI[:num])
        linear(act_NI[:num], down_EHI[place], none, y_RH[start : start + num])
        start += num
