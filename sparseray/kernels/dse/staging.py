"""Compiled loops of a host that stages rows for a device: which rows a step reads, its rows out of the tables and back.

A step's addresses become rising distinct rows, the place of each address among them, and the order in which the
gradients of equal rows are added. A bit for each row of the table finds all of it without sorting: the bits that are set,
read in order, are the distinct rows, and the bits before a row's are its place. Rows move with all their fields at once,
by threads that share the work through a counter: each enters compiled code once and needs the interpreter for nothing between.

Shapes: N addresses, U distinct rows, R table rows, D row width, W words of 64 bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor
from typing import Any

import numba
import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.extending import intrinsic
from numpy.typing import NDArray

from sparseray.kernels.dse.cpu import PREFETCH_DISTANCE, Floats, Ints
from sparseray.kernels.dse.gather import (
    BLOCK_BYTES,
    CHUNK_ROWS,
    check_rows,
    copy_rows,
    fetch_add,
    move_block,
    plan_copy,
    prefetch,
)

WORD_BITS, WORD_MASK = 6, 63

Array = NDArray[Any]


@intrinsic
def _ones(typingctx, word):
    """How many bits of a word are set."""

    def codegen(context, builder, signature, args):
        return builder.ctpop(args[0])

    return types.uint64(types.uint64), codegen


@intrinsic
def _lowest(typingctx, word):
    """Which is the lowest bit that is set; one must be."""

    def codegen(context, builder, signature, args):
        return builder.cttz(args[0], ir.Constant(ir.IntType(1), 1))

    return types.uint64(types.uint64), codegen


@numba.njit(cache=True, nogil=True)
def _mark(rows, num_rows, words, groups):
    """Set the bits of rows, and of words that have any; returns the position of a row outside the table, or -1."""
    one = np.uint64(1)
    for i in range(rows.shape[0]):
        row = rows[i]
        if row < 0 or row >= num_rows:
            return i
        word = row >> WORD_BITS
        words[word] |= one << np.uint64(row & WORD_MASK)
        groups[word >> WORD_BITS] |= one << np.uint64(word & WORD_MASK)
    return -1


@numba.njit(cache=True, nogil=True)
def _count(words, groups, before):
    """How many bits are set, and into `before` how many are before each word that has any."""
    total, one = np.int64(0), np.uint64(1)
    for group in range(groups.shape[0]):
        left = groups[group]
        while left:
            word = (group << WORD_BITS) + np.int64(_lowest(left))
            left &= left - one
            before[word] = total
            total += np.int64(_ones(words[word]))
    return total


@numba.njit(cache=True, nogil=True)
def _list(words, groups, found):
    """Write the rows whose bits are set, rising."""
    u, one = 0, np.uint64(1)
    for group in range(groups.shape[0]):
        left = groups[group]
        while left:
            word = (group << WORD_BITS) + np.int64(_lowest(left))
            left &= left - one
            bits = words[word]
            while bits:
                found[u] = (word << WORD_BITS) + np.int64(_lowest(bits))
                bits &= bits - one
                u += 1


@numba.njit(cache=True, nogil=True)
def _clear(words, groups):
    one = np.uint64(1)
    for group in range(groups.shape[0]):
        left = groups[group]
        while left:
            words[(group << WORD_BITS) + np.int64(_lowest(left))] = np.uint64(0)
            left &= left - one
        groups[group] = np.uint64(0)


@numba.njit(cache=True, nogil=True)
def _segments(rows, words, before, places, order, first):
    """The place of each address among the distinct rows, and their positions, row after row."""
    one = np.uint64(1)
    first[:] = 0
    for i in range(rows.shape[0]):
        word = rows[i] >> WORD_BITS
        lower = (one << np.uint64(rows[i] & WORD_MASK)) - one
        place = before[word] + np.int64(_ones(words[word] & lower))
        places[i] = place
        first[place + 1] += 1
    # Where a row's positions begin, one place early: filling moves it to where it belongs.
    start = 0
    for u in range(1, first.shape[0]):
        count = first[u]
        first[u] = start
        start += count
    for i in range(rows.shape[0]):
        at = places[i] + 1
        order[first[at]] = i
        first[at] += 1


class RowSet:
    """Finds the distinct rows of a step, for one table; its memory, a quarter of a byte a row, is used again.

    Args:
        num_rows: R.
    """

    def __init__(self, num_rows: int) -> None:
        count = (num_rows >> WORD_BITS) + 1
        self.num_rows = num_rows
        self._words, self._before = np.zeros(count, np.uint64), np.empty(count, np.int32)
        self._groups = np.zeros((count >> WORD_BITS) + 1, np.uint64)

    def open(self, parts: Sequence[Ints]) -> int:
        """Take the addresses of a step's parts; returns how many distinct rows they have.

        Args:
            parts: int64 [N] of each.

        Raises:
            IndexError: a row lies outside the table.
        """
        for rows_N in parts:
            bad = _mark(rows_N, self.num_rows, self._words, self._groups)
            if bad >= 0:
                self.close()
                check_rows(bad, rows_N, self.num_rows)
        return int(_count(self._words, self._groups, self._before))

    def list(self, rows_U: Ints) -> None:
        """Write the distinct rows, int64, rising."""
        _list(self._words, self._groups, rows_U)

    def segments(self, rows_N: Ints, places_N: Array, order_N: Array, first_U1: Array) -> None:
        """Find a part's places among the distinct rows, and the order in which gradients of equal rows are added.

        Args:
            rows_N: a part's addresses.
            places_N: int32, filled with the place of each.
            order_N: int32, filled with positions, row after row and rising within one.
            first_U1: int32, filled with where in it each row's begin; rows without an address have none.
        """
        _segments(rows_N, self._words, self._before, places_N, order_N, first_U1)

    def close(self) -> None:
        """Forget the rows."""
        _clear(self._words, self._groups)


@numba.njit(cache=True, nogil=True)
def _ordered_sums(grads, order, first, sums):
    for u in range(sums.shape[0]):
        for d in range(sums.shape[1]):
            sums[u, d] = grads[order[first[u]], d] if first[u] < first[u + 1] else 0
        for i in range(first[u] + 1, first[u + 1]):
            for d in range(sums.shape[1]):
                sums[u, d] += grads[order[i], d]


def sum_segments(grads_ND: Floats, order_N: Array, first_U1: Array) -> Floats:
    """Sum gradients by segment, each one's terms in order: fp32 [U, D], 0 for an empty segment.

    Args:
        grads_ND: fp32.
        order_N, first_U1: as `RowSet.segments` gives them.
    """
    sums_UD = np.empty((first_U1.shape[0] - 1, grads_ND.shape[1]), dtype=np.float32)
    _ordered_sums(grads_ND, order_N, first_U1, sums_UD)
    return sums_UD


@numba.njit(cache=True, nogil=True)
def _gather(rows, w, w_out, w_how, m, m_out, m_how, v, v_out, v_how, t, t_out, t_how, counter):
    """Copy chunks of rows with all their fields until none are left."""
    while True:
        first = fetch_add(counter, 0, CHUNK_ROWS)
        if first >= rows.shape[0]:
            return
        last = min(first + CHUNK_ROWS, rows.shape[0])
        copy_rows(w, rows, w_out, first, last, w_how)
        copy_rows(m, rows, m_out, first, last, m_how)
        copy_rows(v, rows, v_out, first, last, v_how)
        copy_rows(t, rows, t_out, first, last, t_how)


@numba.njit(cache=True, nogil=True)
def _write(values, table, how, rows, first, last):
    """Write rows [first, last), block after block; element by element it takes twice as long."""
    blocks, row_bytes = how[0], table.shape[1] * table.itemsize
    rest = blocks * BLOCK_BYTES // table.itemsize
    for u in range(first, last):
        if u + PREFETCH_DISTANCE < last:
            for offset in range(0, row_bytes, 64):
                prefetch(table, rows[u + PREFETCH_DISTANCE], offset)
        for block in range(blocks):
            move_block(values, u, table, rows[u], block * BLOCK_BYTES)
        for d in range(rest, table.shape[1]):
            table[rows[u], d] = values[u, d]


@numba.njit(cache=True, nogil=True)
def _scatter(rows, w_in, w, w_how, m_in, m, m_how, v_in, v, v_how, t_in, t, t_how, counter):
    """Write chunks of rows with all their fields until none are left."""
    while True:
        first = fetch_add(counter, 0, CHUNK_ROWS)
        if first >= rows.shape[0]:
            return
        last = min(first + CHUNK_ROWS, rows.shape[0])
        _write(w_in, w, w_how, rows, first, last)
        _write(m_in, m, m_how, rows, first, last)
        _write(v_in, v, v_how, rows, first, last)
        _write(t_in, t, t_how, rows, first, last)


Move = tuple[Ints, Sequence[Array], Sequence[Array]]
"""(rows int64 [U], a table's fields [R, D] or [R, 1], the same of the rows [U, D]); fields are weight, m, v, t."""


def gather_fields(moves: Sequence[Move], *, threads: int, pool: Executor) -> None:
    """Copy rows out of tables with all their fields.

    Args:
        moves: what to copy, into arrays that are filled; rows lie in their tables (unchecked).
        threads: copying threads, the caller's among them; they do not change the result.
        pool: where the others run.
    """
    calls = []
    for rows_U, table, out in moves:
        plans = [plan for pair in zip(table, out) for plan in plan_copy(*pair)]
        calls.append((_gather, (rows_U, *plans, np.zeros(1, np.int64))))
    _share_out(calls, threads, pool)


def scatter_fields(moves: Sequence[Move], *, threads: int, pool: Executor) -> None:
    """Write rows into tables with all their fields.

    Args:
        moves: what to write; rows are distinct and lie in their tables.
        threads, pool: as in `gather_fields`.
    """
    calls = []
    for rows_U, table, values in moves:
        plans = [plan for pair in zip(values, table) for plan in plan_copy(*pair)]
        calls.append((_scatter, (rows_U, *plans, np.zeros(1, np.int64))))
    _share_out(calls, threads, pool)


def _share_out(calls: Sequence[tuple[Any, tuple[Any, ...]]], threads: int, pool: Executor) -> None:
    """Make every thread take part in every call, one after another."""

    def take_part() -> None:
        for function, arguments in calls:
            function(*arguments)

    helpers = [pool.submit(take_part) for _ in range(threads - 1)]
    take_part()
    for helper in helpers:
        helper.result()
