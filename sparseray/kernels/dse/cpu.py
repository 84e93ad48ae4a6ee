"""Compiled CPU path of DSE: hashing, row gather, segment sums and row-wise Adam on numpy arrays.

The distributed memory calls these on its table buckets. Every loop has one fixed order and no
fast-math, so the bits of a row depend on that row's own values only: not on which other rows are
in the call, nor on how a table is split. The loops release the interpreter lock.

Shapes: N gradients or looked-up rows (repeats allowed), U unique rows, R table rows, D row width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from sparseray.kernels.dse.gather import gather_rows, prefetch

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
Rows = tuple[Ints, Floats]

__all__ = ["gather_rows", "merge_rows", "ngram_hash", "rowwise_adam_", "segment_sum_rows", "widen"]

RADIX_BITS = 11
FLOAT_DIVISION_MINIMUM = 4096
"""From this prime on, a quotient estimated in float64 is off by at most one for any 63-bit number."""

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
"""The step of SplitMix64's counter."""

PREFETCH_DISTANCE = 8
"""How many random rows ahead a loop that changes rows asks for them: they miss every cache."""


@numba.njit(cache=True, nogil=True)
def _hash_tokens(tokens, history, starts, has_starts, multipliers, orders, primes, offsets, pad, rows):
    B, T = tokens.shape
    L = history.shape[1]
    H = primes.shape[1]
    inverses = 1.0 / primes
    exact = primes.min() < FLOAT_DIVISION_MINIMUM
    for b in range(B):
        since_start = 1 << 60
        for t in range(T):
            since_start = 0 if has_starts and starts[b, t] else since_start + 1
            mix = tokens[b, t] * multipliers[0]
            order_index = 0
            for distance in range(1, multipliers.shape[0]):
                position = t - distance
                previous = pad
                if distance <= since_start:
                    previous = tokens[b, position] if position >= 0 else history[b, L + position]
                mix ^= previous * multipliers[distance]
                if order_index < orders.shape[0] and orders[order_index] == distance + 1:
                    base = order_index * H
                    approximate = float(mix)
                    for h in range(H):
                        prime = primes[order_index, h]
                        if exact:
                            rest = mix % prime
                        else:
                            rest = mix - np.int64(approximate * inverses[order_index, h]) * prime
                            rest += prime if rest < 0 else 0
                            rest -= prime if rest >= prime else 0
                        rows[b, t, base + h] = rest + offsets[order_index, h]
                    order_index += 1


def ngram_hash(
    tokens_BT: Ints,
    *,
    multipliers: Sequence[int],
    orders: Sequence[int],
    primes: Sequence[Sequence[int]],
    offsets: Sequence[Sequence[int]],
    pad: int,
    history_BL: Ints | None = None,
    document_starts_BT: NDArray[np.bool_] | None = None,
) -> Ints:
    """Address the table rows of every token's n-grams; `reference.ngram_hash` on numpy arrays.

    Args and result as there, bit for bit; every order must have the same number of heads, and every
    token id times its multiplier must stay below 2^63, which the layout guarantees.
    """
    longest = max(orders)
    B, T = tokens_BT.shape
    if history_BL is None:
        history_BL = np.full((B, longest - 1), pad, dtype=np.int64)
    if history_BL.shape[1] < longest - 1:
        raise ValueError(f"history has {history_BL.shape[1]} tokens; order {longest} needs {longest - 1}")
    starts_BT = np.zeros((1, 1), dtype=np.bool_) if document_starts_BT is None else document_starts_BT
    primes_OH = np.asarray(primes, dtype=np.int64)
    rows_BTN = np.empty((B, T, primes_OH.size), dtype=np.int64)
    _hash_tokens(
        np.ascontiguousarray(tokens_BT, dtype=np.int64),
        np.ascontiguousarray(history_BL, dtype=np.int64),
        np.ascontiguousarray(starts_BT),
        document_starts_BT is not None,
        np.asarray(multipliers, dtype=np.int64)[:longest],
        np.asarray(orders, dtype=np.int64),
        primes_OH,
        np.asarray(offsets, dtype=np.int64),
        np.int64(pad),
        rows_BTN,
    )
    return rows_BTN


@numba.njit(cache=True, nogil=True)
def stable_order(rows):
    """Positions in stable rising order of row, by a least-significant-digit radix sort."""
    count = rows.shape[0]
    lowest, highest = rows[0], rows[0]
    for i in range(count):
        lowest, highest = min(lowest, rows[i]), max(highest, rows[i])
    keys, order = rows - lowest, np.arange(count)
    next_keys, next_order = np.empty_like(keys), np.empty_like(order)
    shift, span = 0, highest - lowest
    while span >> shift > 0:
        starts = np.zeros((1 << RADIX_BITS) + 1, dtype=np.int64)
        for i in range(count):
            starts[((keys[i] >> shift) & ((1 << RADIX_BITS) - 1)) + 1] += 1
        for digit in range(1 << RADIX_BITS):
            starts[digit + 1] += starts[digit]
        for i in range(count):
            digit = (keys[i] >> shift) & ((1 << RADIX_BITS) - 1)
            next_keys[starts[digit]] = keys[i]
            next_order[starts[digit]] = order[i]
            starts[digit] += 1
        keys, next_keys = next_keys, keys
        order, next_order = next_order, order
        shift += RADIX_BITS
    return order


@numba.njit(cache=True, nogil=True)
def _segment_sum(rows, grads):
    count, width = grads.shape
    order = stable_order(rows)
    num_unique = 1
    for i in range(1, count):
        num_unique += rows[order[i]] != rows[order[i - 1]]
    unique = np.empty(num_unique, dtype=np.int64)
    sums = np.empty((num_unique, width), dtype=np.float32)
    u = -1
    for i in range(count):
        position = order[i]
        if i == 0 or rows[position] != unique[u]:
            u += 1
            unique[u] = rows[position]
            for d in range(width):
                sums[u, d] = grads[position, d]
        else:
            for d in range(width):
                sums[u, d] += grads[position, d]
    return unique, sums


def segment_sum_rows(rows_N: Ints, grads_ND: Floats) -> Rows:
    """Sum the gradients of equal rows, each row's terms in order of position.

    Args:
        rows_N: int64, any order, with repeats.
        grads_ND: fp32.

    Returns:
        (unique rows int64, rising; sums fp32 [U, D]).
    """
    if rows_N.shape[0] != grads_ND.shape[0]:
        raise ValueError(f"{rows_N.shape[0]} rows but {grads_ND.shape[0]} gradients")
    if not rows_N.shape[0]:
        return np.empty(0, dtype=np.int64), np.empty((0, grads_ND.shape[1]), dtype=np.float32)
    unique_U, sums_UD = _segment_sum(rows_N, grads_ND)
    return unique_U, sums_UD


@numba.njit(cache=True, nogil=True)
def _merge(rows_a, sums_a, rows_b, sums_b, rows, sums):
    i, j, u = 0, 0, 0
    width = sums.shape[1]
    while i < rows_a.shape[0] or j < rows_b.shape[0]:
        take_a = j == rows_b.shape[0] or (i < rows_a.shape[0] and rows_a[i] <= rows_b[j])
        take_b = i == rows_a.shape[0] or (j < rows_b.shape[0] and rows_b[j] <= rows_a[i])
        rows[u] = rows_a[i] if take_a else rows_b[j]
        for d in range(width):
            if take_a and take_b:
                sums[u, d] = sums_a[i, d] + sums_b[j, d]
            elif take_a:
                sums[u, d] = sums_a[i, d]
            else:
                sums[u, d] = sums_b[j, d]
        i += take_a
        j += take_b
        u += 1
    return u


def merge_rows(a: Rows, b: Rows) -> Rows:
    """Unite two lists of row sums; a row in both becomes a + b, a row in one is copied.

    Args:
        a, b: (rising unique rows int64, sums fp32 [U, D]), as `segment_sum_rows` returns.

    Returns:
        The sorted union, in the same form.
    """
    (rows_a, sums_a), (rows_b, sums_b) = a, b
    rows = np.empty(rows_a.shape[0] + rows_b.shape[0], dtype=np.int64)
    sums = np.empty((rows.shape[0], sums_a.shape[1]), dtype=np.float32)
    count = _merge(rows_a, sums_a, rows_b, sums_b, rows, sums)
    return rows[:count].copy(), sums[:count].copy()


@numba.njit(cache=True, nogil=True)
def _mean_square(grads, u):
    """Mean of g^2 over a row: eight running sums in a fixed order, so that the loop is vectorised."""
    width = grads.shape[1]
    lanes = np.zeros(8, dtype=np.float32)
    whole = width - width % 8
    for start in range(0, whole, 8):
        for lane in range(8):
            lanes[lane] += grads[u, start + lane] * grads[u, start + lane]
    for d in range(whole, width):
        lanes[d - whole] += grads[u, d] * grads[u, d]
    total = np.float32(0)
    for lane in range(8):
        total += lanes[lane]
    return total / np.float32(width)


@numba.njit(cache=True, nogil=True)
def _ask_ahead(weight, m, rows, u):
    """Ask the caches for a row some steps ahead; they miss at random rows."""
    if u + PREFETCH_DISTANCE < rows.shape[0]:
        for offset in range(0, weight.shape[1] * 4, 64):
            if offset < weight.shape[1] * weight.itemsize:
                prefetch(weight, rows[u + PREFETCH_DISTANCE], offset)
            prefetch(m, rows[u + PREFETCH_DISTANCE], offset)


@numba.njit(cache=True, nogil=True)
def _next_rate(v, t, row, grads, u, lr, beta1, beta2, eps):
    """Count a row's update and its second moment; returns what the first moment is multiplied by."""
    step = t[row] + 1
    t[row] = step
    second = np.float32(beta2) * v[row] + np.float32(1 - beta2) * _mean_square(grads, u)
    v[row] = second
    root = np.sqrt(np.float64(second) / (1 - beta2**step)) + eps
    return np.float32(lr / (1 - beta1**step) / root)


@numba.njit(cache=True, nogil=True)
def _adam_rows(weight, m, v, t, rows, grads, lr, beta1, beta2, eps):
    keep1, new1 = np.float32(beta1), np.float32(1 - beta1)
    for u in range(rows.shape[0]):
        _ask_ahead(weight, m, rows, u)
        row = rows[u]
        if row < 0 or row >= weight.shape[0]:
            return u
        rate = _next_rate(v, t, row, grads, u, lr, beta1, beta2, eps)
        for d in range(weight.shape[1]):
            first = keep1 * m[row, d] + new1 * grads[u, d]
            m[row, d] = first
            weight[row, d] -= rate * first
    return -1


@numba.njit(cache=True, nogil=True)
def _mixed(x):
    """The output function of SplitMix64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@numba.njit(cache=True, nogil=True)
def _round_row(bits, key, weight, row):
    """Write the bits of fp32 numbers as bfloat16: up with the probability of the part that is cut off."""
    low, high = np.uint32(key & np.uint64(0xFFFFFFFF)), np.uint32(key >> np.uint64(32))
    for d in range(bits.shape[0]):
        # 32 bits a step, so that the loop is vectorised; both halves of the key and the column go in.
        x = np.uint32(low + np.uint32(d) * np.uint32(0x9E3779B9))
        x = np.uint32((x ^ (x >> np.uint32(16))) * np.uint32(0x21F0AAAD))
        x = np.uint32(x ^ high)
        x = np.uint32((x ^ (x >> np.uint32(15))) * np.uint32(0x735A2D97))
        x = np.uint32(x ^ (x >> np.uint32(15)))
        magnitude = bits[d] & np.uint32(0x7FFFFFFF)
        noise = x >> np.uint32(16) if magnitude < np.uint32(0x7F800000) else np.uint32(0)
        not_a_number = np.uint32(0x40) if magnitude > np.uint32(0x7F800000) else np.uint32(0)
        weight[row, d] = np.uint16((np.uint32(bits[d] + noise) >> np.uint32(16)) | not_a_number)


@numba.njit(cache=True, nogil=True)
def _adam_rows_bfloat16(weight, m, v, t, rows, ids, grads, lr, beta1, beta2, eps, seed):
    """As `_adam_rows`, on rows that are stored as bfloat16 and computed in fp32."""
    keep1, new1 = np.float32(beta1), np.float32(1 - beta1)
    width = weight.shape[1]
    exact = np.empty(width, dtype=np.float32)
    bits = exact.view(np.uint32)
    for u in range(rows.shape[0]):
        _ask_ahead(weight, m, rows, u)
        row = rows[u]
        if row < 0 or row >= weight.shape[0]:
            return u
        rate = _next_rate(v, t, row, grads, u, lr, beta1, beta2, eps)
        for d in range(width):
            bits[d] = np.uint32(weight[row, d]) << np.uint32(16)
        for d in range(width):
            first = keep1 * m[row, d] + new1 * grads[u, d]
            m[row, d] = first
            exact[d] -= rate * first
        key = _mixed(_mixed(seed + np.uint64(ids[u]) * GOLDEN) + np.uint64(t[row]) * GOLDEN)
        _round_row(bits, key, weight, row)
    return -1


def widen(rows_ND: NDArray[Any]) -> Floats:
    """Rows as fp32: float32 ones as they are, bfloat16 ones (held as uint16) copied."""
    if rows_ND.dtype == np.float32:
        return rows_ND
    return (rows_ND.astype(np.uint32) << np.uint32(16)).view(np.float32)


def rowwise_adam_(
    weight_RD: NDArray[Any],
    m_RD: Floats,
    v_R: Floats,
    t_R: NDArray[Any],
    rows_U: Ints,
    grads_UD: Floats,
    *,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.95,
    eps: float = 1e-8,
    seed: int = 0,
    ids_U: Ints | None = None,
) -> None:
    """Apply row-wise Adam in place to the given rows; see `reference.rowwise_adam_`.

    bfloat16 rows are widened, updated in fp32 and rounded stochastically: to one of the two neighbours, in the mean
    to the exact value, so updates far below a row's resolution add up. The random bits are a hash of (seed, row,
    updates of the row, column) and nothing else.

    Args:
        weight_RD: table, fp32, or bfloat16 held as uint16. m_RD: fp32, first moment.
        v_R: fp32 second moment, one per row. t_R: int32 or int64 updates seen by each row.
        rows_U: int64 unique rows; grads_UD: fp32, their summed gradients.
        lr, beta1, beta2, eps: as in Adam; no weight decay.
        seed: of the rounding of bfloat16 rows, below 2^63.
        ids_U: int64, what the rounding takes for the rows' numbers; None for rows_U.

    Raises:
        IndexError: a row lies outside the table (rows before it have been updated).
    """
    numbers = (float(lr), float(beta1), float(beta2), float(eps))
    if weight_RD.dtype == np.uint16:
        ids_U = rows_U if ids_U is None else ids_U
        bad = _adam_rows_bfloat16(
            weight_RD, m_RD, v_R, t_R, rows_U, ids_U, grads_UD, *numbers, np.uint64(seed)
        )
    else:
        bad = _adam_rows(weight_RD, m_RD, v_R, t_R, rows_U, grads_UD, *numbers)
    if bad >= 0:
        raise IndexError(f"rows[{bad}]={rows_U[bad]} is outside the table's {weight_RD.shape[0]} rows")
