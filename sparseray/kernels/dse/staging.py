"""Compiled loops of a host that stages rows for a device: which rows a step reads, and rows back into their table.

A step's addresses become rising distinct rows, the place of each address among them, and the order in which the
gradients of equal rows are added. `gather.py` reads the rows; `scatter_rows` writes them back.

Shapes: N addresses, U distinct rows, R table rows, D row width.
"""

from __future__ import annotations

from concurrent.futures import Executor
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from sparseray.kernels.dse.cpu import PREFETCH_DISTANCE, Floats, Ints, stable_order
from sparseray.kernels.dse.gather import prefetch

SCATTER_ROWS = 4096
"""Rows that a thread writes at a time."""


@numba.njit(cache=True, nogil=True)
def _distinct(rows):
    count = rows.shape[0]
    order, places = stable_order(rows), np.empty(count, dtype=np.int64)
    found, u = np.empty(count, dtype=np.int64), -1
    for i in range(count):
        row = rows[order[i]]
        if i == 0 or row != found[u]:
            u += 1
            found[u] = row
        places[order[i]] = u
    return found[: u + 1].copy(), places


def distinct(rows_N: Ints) -> tuple[Ints, Ints]:
    """(the distinct rows int64 [U], rising; each address's place among them int64 [N])."""
    rows_U, places_N = _distinct(np.ascontiguousarray(rows_N))
    return rows_U, places_N


@numba.njit(cache=True, nogil=True)
def _segments(places, num_rows):
    first, order = np.zeros(num_rows + 1, dtype=np.int64), np.empty(places.shape[0], dtype=np.int64)
    for place in places:
        first[place + 1] += 1
    for u in range(num_rows):
        first[u + 1] += first[u]
    ends = first[:-1].copy()
    for i in range(places.shape[0]):
        order[ends[places[i]]] = i
        ends[places[i]] += 1
    return order, first


def segments(places_N: Ints, num_rows: int) -> tuple[Ints, Ints]:
    """The order in which gradients of equal rows are added.

    Args:
        places_N: each gradient's row, below `num_rows`.
        num_rows: U; rows without a gradient have empty segments.

    Returns:
        (positions int64 [N], row after row and rising within one; where each row's begin int64 [U + 1]).
    """
    order_N, first_U1 = _segments(places_N, num_rows)
    return order_N, first_U1


@numba.njit(cache=True, nogil=True)
def _ordered_sums(grads, order, first, sums):
    for u in range(sums.shape[0]):
        for d in range(sums.shape[1]):
            sums[u, d] = grads[order[first[u]], d] if first[u] < first[u + 1] else 0
        for i in range(first[u] + 1, first[u + 1]):
            for d in range(sums.shape[1]):
                sums[u, d] += grads[order[i], d]


def sum_segments(grads_ND: Floats, order_N: Ints, first_U1: Ints) -> Floats:
    """Sum gradients by segment, each one's terms in order: fp32 [U, D], 0 for an empty segment.

    Args:
        grads_ND: fp32.
        order_N, first_U1: as `segments` gives them.
    """
    sums_UD = np.empty((first_U1.shape[0] - 1, grads_ND.shape[1]), dtype=np.float32)
    _ordered_sums(grads_ND, order_N, first_U1, sums_UD)
    return sums_UD


@numba.njit(cache=True, nogil=True)
def _scatter(table, rows, values, first, last):
    for u in range(first, last):
        if u + PREFETCH_DISTANCE < last:
            for offset in range(0, table.shape[1] * table.itemsize, 64):
                prefetch(table, rows[u + PREFETCH_DISTANCE], offset)
        for d in range(table.shape[1]):
            table[rows[u], d] = values[u, d]


def scatter_rows(table_RD: NDArray[Any], rows_U: Ints, values_UD: NDArray[Any], pool: Executor) -> None:
    """Write rows into a table, by the threads of a pool.

    Args:
        table_RD: of any dtype.
        rows_U: int64, distinct, below R.
        values_UD: of the table's dtype.
        pool: whose threads write.
    """
    count = rows_U.shape[0]
    starts = range(0, count, SCATTER_ROWS)
    ends = [min(start + SCATTER_ROWS, count) for start in starts]
    for _ in pool.map(lambda *part: _scatter(table_RD, rows_U, values_UD, *part), starts, ends):
        pass
