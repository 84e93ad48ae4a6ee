"""Compiled stable sort of small numbers by counting them: rows by expert, on a CPU."""

from __future__ import annotations

import numba
import numpy as np


@numba.njit("UniTuple(int64[::1], 2)(int64[::1], int64)", cache=True, nogil=True)
def count_sort(values, num):
    """(positions in stable rising order, how many there are of each).

    Args:
        values: int64 in 0..num-1.
        num: how many different ones there may be.
    """
    counts = np.zeros(num, np.int64)
    for value in values:
        counts[value] += 1
    next_at, order = np.empty(num, np.int64), np.empty(values.shape[0], np.int64)
    total = 0
    for value in range(num):
        next_at[value] = total
        total += counts[value]
    for i in range(values.shape[0]):
        order[next_at[values[i]]] = i
        next_at[values[i]] += 1
    return order, counts
