"""Gather of random table rows on the CPU: compiled loops that threads share chunk by chunk.

Used by the memory shards (rows out of shared memory) and by the staged fetch to the GPU, which copies
each part while the next is gathered. Threads take chunks of rows in rising order from one counter, so
a thread that loses its core costs a chunk and not a share; the result does not depend on it.

Shapes: N looked-up rows (repeats allowed), R table rows, D row width.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from typing import Any

import numba
import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.extending import intrinsic
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Copy = tuple[int, bool, int, int]

FAR_ROWS, NEAR_ROWS = 32, 4
"""The gather asks the second-level cache for rows far ahead, and the first for wide ones that are near."""

WIDE_ROW_BYTES = 256
"""Rows of 512 B come 19 % faster with the second request, rows of 160 B slower."""

FIRST_LEVEL, SECOND_LEVEL = 3, 2
"""Which cache a prefetch fills, in llvm.prefetch's numbers."""

BLOCK_BYTES = 32
"""A row moves in blocks of one vector register, and what is left of it element by element."""

STREAM_ALIGNMENT, STREAM_BYTES = 16, 4 << 20
"""Streaming stores need that alignment; a result of that size is on its way out of a core's cache anyway."""

CHUNK_ROWS = 256
"""Rows that a thread takes at a time."""

LINE = 8
"""Words of a cache line: each counter that threads share has its own."""


def _address(context: Any, builder: Any, array_type: Any, array: Any, row: Any, offset: Any) -> Any:
    """Pointer to byte `offset` of array[row], whose rows are contiguous."""
    data = context.make_array(array_type)(context, builder, array)
    start = builder.bitcast(data.data, ir.IntType(8).as_pointer())
    return builder.gep(start, [builder.add(builder.mul(row, builder.extract_value(data.strides, 0)), offset)])


def prefetch_into(level: int) -> Any:
    """An intrinsic (array, row, offset): ask for the cache line at byte `offset` of array[row]; never faults."""

    @intrinsic
    def prefetch(typingctx, array, row, offset):
        def codegen(context, builder, signature, args):
            byte_pointer, int32 = ir.IntType(8).as_pointer(), ir.IntType(32)
            function_type = ir.FunctionType(ir.VoidType(), [byte_pointer, int32, int32, int32])
            function = builder.module.declare_intrinsic("llvm.prefetch", [byte_pointer], function_type)
            read, keep, data_cache = (ir.Constant(int32, value) for value in (0, level, 1))
            address = _address(context, builder, signature.args[0], *args)
            builder.call(function, [address, read, keep, data_cache])
            return context.get_dummy_value()

        return types.void(array, types.int64, types.int64), codegen

    return prefetch


prefetch = prefetch_into(FIRST_LEVEL)
_prefetch_far = prefetch_into(SECOND_LEVEL)


def _block_mover(streaming: bool) -> Any:
    """An intrinsic (table, row, out, i, offset): copy one block; streaming stores leave the caches alone."""

    @intrinsic
    def move(typingctx, table, row, out, i, offset):
        def codegen(context, builder, signature, args):
            source = _address(context, builder, signature.args[0], args[0], args[1], args[4])
            target = _address(context, builder, signature.args[2], args[2], args[3], args[4])
            size = STREAM_ALIGNMENT if streaming else BLOCK_BYTES
            vector, int64 = ir.VectorType(ir.IntType(64), size // 8).as_pointer(), ir.IntType(64)
            for start in range(0, BLOCK_BYTES, size):
                here, there = (builder.gep(p, [ir.Constant(int64, start)]) for p in (source, target))
                block = builder.load(builder.bitcast(here, vector), align=1)
                store = builder.store(block, builder.bitcast(there, vector), align=size if streaming else 1)
                if streaming:
                    one = ir.Constant(ir.IntType(32), 1)
                    store.set_metadata("nontemporal", builder.module.add_metadata([one]))
            return context.get_dummy_value()

        return types.void(table, types.int64, out, types.int64, types.int64), codegen

    return move


move_block = _block_mover(streaming=False)
_stream = _block_mover(streaming=True)


@intrinsic
def _fence(typingctx):
    def codegen(context, builder, signature, args):
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def fetch_add(typingctx, counters, index, amount):
    def codegen(context, builder, signature, args):
        data = context.make_array(signature.args[0])(context, builder, args[0])
        return builder.atomic_rmw("add", builder.gep(data.data, [args[1]]), args[2], "seq_cst")

    return types.int64(counters, types.int64, types.int64), codegen


@intrinsic
def _atomic_load(typingctx, counters, index):
    def codegen(context, builder, signature, args):
        data = context.make_array(signature.args[0])(context, builder, args[0])
        return builder.load_atomic(builder.gep(data.data, [args[1]]), "seq_cst", 8)

    return types.int64(counters, types.int64), codegen


@intrinsic
def _atomic_store(typingctx, counters, index, value):
    def codegen(context, builder, signature, args):
        data = context.make_array(signature.args[0])(context, builder, args[0])
        builder.store_atomic(args[2], builder.gep(data.data, [args[1]]), "seq_cst", 8)
        return context.get_dummy_value()

    return types.void(counters, types.int64, types.int64), codegen


@numba.njit(cache=True, nogil=True)
def read_word(words, index):
    """An int64 that another process may write; what was read before stays before it, and the same after."""
    _fence()
    value = _atomic_load(words, index)
    _fence()
    return value


@numba.njit(cache=True, nogil=True)
def write_word(words, index, value):
    """Write an int64 that other processes read; what was written before is seen before it, and the same after."""
    _fence()
    _atomic_store(words, index, value)
    _fence()


@numba.njit(cache=True, nogil=True)
def copy_rows(table, rows, out, first, last, how):
    """Copy rows [first, last) as `how` says; returns the position of a row outside the table, or -1."""
    bad = -1
    blocks, streaming, far, near = how
    count, (num_rows, width) = rows.shape[0], table.shape
    row_bytes = width * table.itemsize
    rest = blocks * BLOCK_BYTES // table.itemsize
    for i in range(first, last):
        if far > 0 and i + far < count:
            for offset in range(0, row_bytes, 64):
                _prefetch_far(table, rows[i + far], offset)
        if near > 0 and i + near < count:
            for offset in range(0, row_bytes, 64):
                prefetch(table, rows[i + near], offset)
        row = rows[i]
        if row < 0 or row >= num_rows:
            bad = i
            continue
        if streaming:
            for block in range(blocks):
                _stream(table, row, out, i, block * BLOCK_BYTES)
        else:
            for block in range(blocks):
                move_block(table, row, out, i, block * BLOCK_BYTES)
        for d in range(rest, width):
            out[i, d] = table[row, d]
    if streaming:
        _fence()  # streamed stores are ordered by nothing else
    return bad


@numba.njit(cache=True, nogil=True)
def _copy_chunks(table, rows, out, how, counters, part_rows, part):
    """Take chunks of rows until none are left, or until part `part` >= 0 is complete.

    counters[0] is the next row to take, counters[LINE * (p + 1)] how many rows of part p are done.
    """
    bad = -1
    count = rows.shape[0]
    wanted = min(count - part * part_rows, part_rows)
    while part < 0 or _atomic_load(counters, LINE * (part + 1)) < wanted:
        first = count
        if _atomic_load(counters, 0) < count:
            first = fetch_add(counters, 0, CHUNK_ROWS)
        if first >= count:
            if part < 0:
                break
            continue
        last = min(first + CHUNK_ROWS, count)
        bad = max(bad, copy_rows(table, rows, out, first, last, how))
        fetch_add(counters, LINE * (first // part_rows + 1), last - first)
    return bad


def _as_words(array: NDArray[Any]) -> NDArray[Any]:
    """View a row-contiguous array as 8-byte words where its row width allows."""
    if array.shape[1] * array.itemsize % 8 or not array.flags.c_contiguous or not array.shape[1]:
        return array
    return array.view(np.uint64)


def plan_copy(
    table_RD: NDArray[Any],
    out_ND: NDArray[Any],
    *,
    streaming: bool | None = None,
    far: int | None = None,
    near: int | None = None,
) -> tuple[NDArray[Any], NDArray[Any], Copy]:
    """Both arrays as words where that works, and how to copy between them.

    Args:
        table_RD, out_ND: as for `gather_rows`.
        streaming: write around the caches; None does so for results that would not stay in them.
        far, near: rows ahead that are asked for, 0 for no request; None chooses by the row's width.

    Returns:
        (table, out, (blocks of a row, streaming, far, near)).
    """
    source, target = _as_words(table_RD), _as_words(out_ND)
    if source.dtype != target.dtype:
        source, target = table_RD, out_ND
    inner = source.strides[1] == target.strides[1] == source.itemsize
    row_bytes = source.shape[1] * source.itemsize
    aligned = target.ctypes.data % STREAM_ALIGNMENT == 0 and target.strides[0] % STREAM_ALIGNMENT == 0
    if streaming is None:
        streaming = out_ND.nbytes >= STREAM_BYTES
    far = FAR_ROWS if far is None else far
    near = (NEAR_ROWS if row_bytes > WIDE_ROW_BYTES else 0) if near is None else near
    return source, target, (row_bytes // BLOCK_BYTES if inner else 0, streaming and aligned, far, near)


def check_rows(bad: int, rows_N: Ints, num_rows: int) -> None:
    if bad >= 0:
        raise IndexError(f"rows[{bad}]={rows_N[bad]} is outside the table's {num_rows} rows")


def gather_parts(
    table_RD: NDArray[Any],
    rows_N: Ints,
    out_ND: NDArray[Any],
    *,
    part_rows: int,
    threads: int,
    pool: Executor,
    streaming: bool | None = None,
) -> Iterator[slice]:
    """Gather rows into a buffer and hand over each part of it as soon as it is complete, in order.

    Between two parts the caller's thread gathers too; the others go on while it handles a part.

    Args:
        table_RD, rows_N, out_ND: as for `gather_rows`.
        part_rows: rows of a part, rounded up to a multiple of CHUNK_ROWS.
        threads: gathering threads, the caller's among them. pool: where the others run.
        streaming: as for `plan_copy`.

    Yields:
        The slice of the buffer that holds the next part.

    Raises:
        IndexError: a row lies outside the table (after the last part).
    """
    count, num_rows = rows_N.shape[0], table_RD.shape[0]
    part_rows = -(-max(part_rows, 1) // CHUNK_ROWS) * CHUNK_ROWS
    parts = -(-count // part_rows)
    counters = np.zeros((parts + 1) * LINE, dtype=np.int64)
    source, target, how = plan_copy(table_RD, out_ND, streaming=streaming)
    arguments = (source, rows_N, target, how, counters, part_rows)
    helpers = min(threads, -(-count // CHUNK_ROWS)) - 1
    jobs: list[Future[int]] = [pool.submit(partial(_copy_chunks, *arguments, -1)) for _ in range(helpers)]
    bad = -1
    try:
        for part in range(parts):
            bad = max(bad, _copy_chunks(*arguments, part))
            yield slice(part * part_rows, min((part + 1) * part_rows, count))
    finally:
        bad = max([bad, *(job.result() for job in jobs)])
    check_rows(bad, rows_N, num_rows)


def gather_rows(
    table_RD: NDArray[Any],
    rows_N: Ints,
    out: NDArray[Any] | None = None,
    *,
    threads: int = 1,
    pool: Executor | None = None,
    streaming: bool | None = None,
) -> NDArray[Any]:
    """Copy table rows into a buffer.

    Args:
        table_RD: any numpy dtype, for instance float32 or bfloat16 held as uint16; may be a memory map.
        rows_N: int64, 0 <= row < R, repeats allowed.
        out: [N, D] buffer of the table's dtype to reuse (page faults cost more than the copy).
        threads: copying threads, the caller's among them; they do not change the result.
        pool: where the others run, at least threads - 1 wide; None starts them for this call.
        streaming: as for `plan_copy`.

    Returns:
        out (or a new array) with out[i] = table[rows[i]].

    Raises:
        IndexError: a row lies outside the table.
    """
    wanted = (rows_N.shape[0], table_RD.shape[1])
    if out is None:
        out = np.empty(wanted, dtype=table_RD.dtype)
    if out.shape != wanted or out.dtype != table_RD.dtype:
        raise ValueError(f"out is {out.dtype} {out.shape}; gather_rows needs {table_RD.dtype} {wanted}")
    if threads == 1:
        source, target, how = plan_copy(table_RD, out, streaming=streaming)
        bad = copy_rows(source, rows_N, target, 0, wanted[0], how)
        check_rows(bad, rows_N, table_RD.shape[0])
    else:
        with nullcontext(pool) if pool is not None else ThreadPoolExecutor(threads - 1) as workers:
            parts = gather_parts(
                table_RD,
                rows_N,
                out,
                part_rows=wanted[0],
                threads=threads,
                pool=workers,
                streaming=streaming,
            )
            for _ in parts:
                pass
    return out
