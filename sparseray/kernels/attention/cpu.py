"""Compiled attention over paged caches on a CPU: full attention, and the passes over pages that NSA's branches share.

Each row is computed alone, in loops of one order, so its bits depend on its own query and cache only: not on the
other rows of a call, nor on where a prompt was cut into chunks. Weights are powers of two, 2^(score - largest).
The loops release the interpreter lock.

Shapes: R rows, B sequences, W pages of a sequence, P tokens of a page, Q query heads, G key/value heads, N heads of
one group, D and V head sizes, S keys.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import numba
import numpy as np

FAST = {"reassoc", "contract", "nsz", "arcp"}
"""Sums may run in lanes and multiply-adds be fused; NaN and infinity stay what they are, so damage is seen."""

compiled = partial(numba.njit, cache=True, nogil=True, fastmath=FAST, error_model="numpy")
pasted = partial(numba.njit, inline="always", fastmath=FAST, error_model="numpy")
"""For parts of compiled functions: head sizes are constants there, and loops over them whole vectors."""

LOG2_E = np.float32(1.4426950408889634)
LOWEST = np.float32(-126.0)
HALF, ZERO, LEAST = np.float32(0.5), np.float32(0.0), np.float32(-np.inf)
# (ln 2)^n / n!
C1, C2, C3, C4 = (
    np.float32(c) for c in (0.6931471805599453, 0.2402265069591007, 0.05550410866482158, 0.009618129107628477)
)
C5, C6, C7 = (np.float32(c) for c in (0.0013333558146428443, 0.00015403530393381608, 1.5252733804059841e-05))
C0 = np.float32(1.0)
BIAS, SHIFT = np.int32(127), np.int32(23)


@compiled
def exponentials(scores_S, num, top, powers_S):
    """Replace the first `num` scores by 2^(score - top) and return their sum; `powers_S` is int32 scratch."""
    for i in range(num):
        x = scores_S[i] - top
        x = LOWEST if x < LOWEST else x
        whole = np.floor(x + HALF)
        f = x - whole
        p = C6 + f * C7
        p = C5 + f * p
        p = C4 + f * p
        p = C3 + f * p
        p = C2 + f * p
        p = C1 + f * p
        scores_S[i] = C0 + f * p
        powers_S[i] = (np.int32(whole) + BIAS) << SHIFT
    factors_S = powers_S.view(np.float32)
    total = ZERO
    for i in range(num):
        scores_S[i] *= factors_S[i]
    # A loop of its own: one that stores too has two orders of summation, by where the arrays lie.
    for i in range(num):
        total += scores_S[i]
    return total


_ROWS, _POOL = numba.types.Array(numba.float32, 3, "A"), numba.types.Array(numba.float32, 4, "C")
_WRITES = [
    numba.void(_ROWS, _ROWS, numba.types.Array(i, 1, "C"), _POOL, _POOL) for i in (numba.int32, numba.int64)
]


@numba.njit(_WRITES, cache=True, nogil=True)
def write_rows(k_RGD, v_RGV, places_R, keys, values):
    """Put the rows' keys and values where they belong: page * P + position in the page."""
    page = keys.shape[1]
    for r in range(places_R.shape[0]):
        place, at = places_R[r] // page, places_R[r] % page
        for g in range(k_RGD.shape[1]):
            for d in range(k_RGD.shape[2]):
                keys[place, at, g, d] = k_RGD[r, g, d]
            for d in range(v_RGV.shape[2]):
                values[place, at, g, d] = v_RGV[r, g, d]


@pasted
def score(q_QD, head, heads, keys, table_W, page, group, first, last, at, D, factor, scores_NS):
    """Scores of the keys [first, last) of one sequence for `heads` heads from `head` on, written from `at` on."""
    position = first
    while position < last:
        number = position // page
        start = number * page
        stop = min(last, start + page)
        place = table_W[number]
        for i in range(position - start, stop - start):
            for n in range(heads):
                dot = ZERO
                for d in range(D):
                    dot += q_QD[head + n, d] * keys[place, i, group, d]
                scores_NS[n, at] = dot * factor
            at += 1
        position = stop
    return at


@pasted
def weigh(heads, num, scores_NS, powers_S, totals_N):
    """Turn scores into weights, and note the sum of each head's."""
    for n in range(heads):
        top = LEAST
        for i in range(num):
            if scores_NS[n, i] > top:
                top = scores_NS[n, i]
        totals_N[n] = exponentials(scores_NS[n], num, top, powers_S)


@pasted
def gather(heads, values, table_W, page, group, first, last, at, V, scores_NS, sums_NV):
    """Add the weighted values of positions [first, last), whose weights lie from `at` on."""
    position = first
    while position < last:
        number = position // page
        start = number * page
        stop = min(last, start + page)
        place = table_W[number]
        for i in range(position - start, stop - start):
            for n in range(heads):
                weight = scores_NS[n, at]
                for d in range(V):
                    sums_NV[n, d] += weight * values[place, i, group, d]
            at += 1
        position = stop
    return at


@pasted
def attend_range(
    q_QD,
    head,
    heads,
    keys,
    values,
    table_W,
    group,
    first,
    last,
    D,
    V,
    factor,
    scores_NS,
    powers_S,
    totals_N,
    sums_NV,
):
    """Softmax attention to positions [first, last): weighted sums of values, to be divided by `totals_N`."""
    page = keys.shape[1]
    score(q_QD, head, heads, keys, table_W, page, group, first, last, 0, D, factor, scores_NS)
    weigh(heads, last - first, scores_NS, powers_S, totals_N)
    gather(heads, values, table_W, page, group, first, last, 0, V, scores_NS, sums_NV)


@cache
def full_attention(D: int, V: int) -> Callable[..., None]:
    """The loop for one pair of head sizes: causal softmax attention of every sequence's newest rows.

    Args:
        D, V: of keys and values.
    """

    @compiled
    def attend(q_RQD, keys, values, table_BW, bounds_B, context_B, scale, out_RQV):
        groups = keys.shape[2]
        heads = q_RQD.shape[1] // groups
        factor = np.float32(scale) * LOG2_E
        longest = 0
        for b in range(context_B.shape[0]):
            longest = max(longest, context_B[b])
        scores_NS = np.empty((heads, longest), np.float32)
        powers_S, totals_N = np.empty(longest, np.int32), np.empty(heads, np.float32)
        sums_NV = np.empty((heads, V), np.float32)
        for b in range(context_B.shape[0]):
            before = context_B[b] - bounds_B[b + 1]
            for r in range(bounds_B[b], bounds_B[b + 1]):
                num = before + r + 1
                for g in range(groups):
                    sums_NV[:] = ZERO
                    attend_range(
                        q_RQD[r], g * heads, heads, keys, values, table_BW[b], g, 0, num, D, V, factor,
                        scores_NS, powers_S, totals_N, sums_NV,
                    )  # fmt: skip
                    for n in range(heads):
                        for d in range(V):
                            out_RQV[r, g * heads + n, d] = sums_NV[n, d] / totals_N[n]

    found: Callable[..., None] = attend
    return found
