"""Compiled native sparse attention over paged caches on a CPU: the three branches of a row, and compression.

As in attention/cpu.py each row is computed alone, so its bits depend on its own query and cache only. Follows arXiv
2502.11089 eq. 5 and 7 to 12; the plain reference (reference.py) is its oracle.

Shapes: R rows, B sequences, W pages of a sequence, P tokens of a page, Q query heads, G key/value heads, N heads of
one group, D and V head sizes, C compressed tokens, J selection blocks, F inner width of the compression.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import numpy as np

from sparseray.kernels.attention.cpu import LOG2_E, ZERO, attend_range, compiled, gather, pasted, score, weigh

ONE, HALF_ROOT, HALF = np.float32(1.0), np.float32(0.7071067811865476), np.float32(0.5)
NEVER, ALWAYS = np.float32(-1.0), np.float32(np.inf)


@compiled
def select(weights_NC, totals_N, num, num_blocks, sizes, scores_J, chosen_J):
    """Mark the blocks that a query selects: eq. 9 to 12.

    Args:
        weights_NC, totals_N: of the compressed branch; `num` of them count.
        num_blocks: that hold a position up to the query's.
        sizes: those of `NSASizes`, in their order.
        scores_J: scratch; chosen_J: written.
    """
    block, stride, select_block, num_selected, _, num_initial, num_local = sizes
    per_block, overlap = select_block // stride, block // stride
    for j in range(num_blocks):
        chosen_J[j] = num_blocks <= num_selected
        total = ZERO
        for m in range(per_block):
            for n in range(overlap):
                c = per_block * j + m - n
                if 0 <= c < num:
                    for h in range(totals_N.shape[0]):
                        total += weights_NC[h, c] / totals_N[h]
        scores_J[j] = ALWAYS if j < num_initial or j >= num_blocks - num_local else total
    if num_blocks > num_selected:
        for _ in range(num_selected):
            best = 0
            for j in range(1, num_blocks):
                if scores_J[j] > scores_J[best]:
                    best = j
            chosen_J[best] = True
            scores_J[best] = NEVER


@pasted
def add(heads, first_head, V, gates_Q3, branch, totals_N, sums_NV, out_QV):
    """Add a branch to the output, times its gate."""
    for n in range(heads):
        factor = gates_Q3[first_head + n, branch] / totals_N[n]
        for d in range(V):
            out_QV[first_head + n, d] += factor * sums_NV[n, d]
            sums_NV[n, d] = ZERO


@pasted
def attend_selected(
    q_QD, head, heads, keys, values, table_W, group, end, block, num_blocks, chosen_J, D, V, factor, scores_NS, powers_S,
    totals_N, sums_NV,
):  # fmt: skip
    """Softmax attention to the chosen blocks up to position `end`, as `attend_range`."""
    page, num = keys.shape[1], 0
    for j in range(num_blocks):
        if chosen_J[j]:
            first, last = j * block, min(end, (j + 1) * block)
            num = score(q_QD, head, heads, keys, table_W, page, group, first, last, num, D, factor, scores_NS)
    weigh(heads, num, scores_NS, powers_S, totals_N)
    num = 0
    for j in range(num_blocks):
        if chosen_J[j]:
            first, last = j * block, min(end, (j + 1) * block)
            num = gather(heads, values, table_W, page, group, first, last, num, V, scores_NS, sums_NV)


@compiled
def longest_of(context_B):
    """Tokens of the longest sequence."""
    longest = 0
    for b in range(context_B.shape[0]):
        longest = max(longest, context_B[b])
    return longest


@cache
def sparse_attention(D: int, V: int) -> Callable[..., None]:
    """The loop for one pair of head sizes: the gated sum of the three branches for every sequence's newest rows.

    Args:
        D, V: of keys and values.
    """

    @compiled
    def attend(
        q_RQD, gates_RQ3, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, recent_BW, table_BW, bounds_B,
        context_B, sizes, scale, out_RQV,
    ):  # fmt: skip
        block, stride, select_block, num_selected, window, _, _ = sizes
        heads, factor = q_RQD.shape[1] // k_slc.shape[2], np.float32(scale) * LOG2_E
        longest = longest_of(context_B)
        room = max(longest // stride + 1, max(window, num_selected * select_block))
        scores_NS, powers_S = np.empty((heads, room), np.float32), np.empty(room, np.int32)
        totals_N, sums_NV = np.empty(heads, np.float32), np.zeros((heads, V), np.float32)
        most = longest // select_block + 1
        scores_J, chosen_J = np.empty(most, np.float32), np.empty(most, np.bool_)
        for b in range(context_B.shape[0]):
            for r in range(bounds_B[b], bounds_B[b + 1]):
                q_QD, gates_Q3, out_QV, table_W = q_RQD[r], gates_RQ3[r], out_RQV[r], table_BW[b]
                end = context_B[b] - bounds_B[b + 1] + r + 1
                num_cmp = (end - block) // stride + 1 if end >= block else 0
                num_blocks = (end - 1) // select_block + 1
                out_QV[:] = ZERO
                for g in range(k_slc.shape[2]):
                    h = g * heads
                    if num_cmp > 0:
                        attend_range(
                            q_QD, h, heads, k_cmp, v_cmp, table_W, g, 0, num_cmp, D, V, factor,
                            scores_NS, powers_S, totals_N, sums_NV,
                        )  # fmt: skip
                        add(heads, h, V, gates_Q3, 0, totals_N, sums_NV, out_QV)
                    select(scores_NS, totals_N, num_cmp, num_blocks, sizes, scores_J, chosen_J)
                    attend_selected(
                        q_QD, h, heads, k_slc, v_slc, table_W, g, end, select_block, num_blocks, chosen_J, D, V,
                        factor, scores_NS, powers_S, totals_N, sums_NV,
                    )  # fmt: skip
                    add(heads, h, V, gates_Q3, 1, totals_N, sums_NV, out_QV)
                    attend_range(
                        q_QD, h, heads, k_win, v_win, recent_BW[b], g, max(0, end - window), end, D, V, factor,
                        scores_NS, powers_S, totals_N, sums_NV,
                    )  # fmt: skip
                    add(heads, h, V, gates_Q3, 2, totals_N, sums_NV, out_QV)

    found: Callable[..., None] = attend
    return found


@compiled
def compress(
    raw, compressed, w1_FE, b1_F, w2_DF, b2_D, pos_LD, recent_BW, table_BW, bounds_B, context_B, stride, angles, turns
):  # fmt: skip
    """Write the compressed tokens that the newest rows of every sequence complete: eq. 7, exact GELU.

    Args:
        raw: [recent pages, P, G, D], with its own table recent_BW; compressed: [pages, P / stride, G, D], written.
        angles: (cosines, sines) of all positions; read where `turns`.
        turns: rotate what was compressed at its block's first position.
    """
    block, D = pos_LD.shape
    page, page_cmp, groups = raw.shape[1], compressed.shape[1], raw.shape[2]
    tokens, inner = np.empty(block * D, np.float32), np.empty(w1_FE.shape[0], np.float32)
    found, half = np.empty(D, np.float32), D // 2
    for b in range(context_B.shape[0]):
        before = context_B[b] - (bounds_B[b + 1] - bounds_B[b])
        first = (before - block) // stride + 1 if before >= block else 0
        last = (context_B[b] - block) // stride + 1 if context_B[b] >= block else 0
        for c in range(first, last):
            for g in range(groups):
                for i in range(block):
                    at = c * stride + i
                    place = recent_BW[b, at // page]
                    for d in range(D):
                        tokens[i * D + d] = raw[place, at % page, g, d] + pos_LD[i, d]
                for f in range(inner.shape[0]):
                    x = ZERO
                    for e in range(tokens.shape[0]):
                        x += tokens[e] * w1_FE[f, e]
                    x += b1_F[f]
                    inner[f] = HALF * x * (ONE + np.float32(math.erf(x * HALF_ROOT)))
                for d in range(D):
                    x = ZERO
                    for f in range(inner.shape[0]):
                        x += inner[f] * w2_DF[d, f]
                    found[d] = x + b2_D[d]
                out = compressed[table_BW[b, c // page_cmp], c % page_cmp, g]
                if turns:
                    cos, sin = angles[0][c * stride], angles[1][c * stride]
                    for d in range(half):
                        out[d] = found[d] * cos[d] - found[half + d] * sin[d]
                        out[half + d] = found[half + d] * cos[d] + found[d] * sin[d]
                else:
                    out[:] = found
