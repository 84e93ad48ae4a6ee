"""The inverse of the selection: for every block, the queries that selected it.

A stable sort makes it, so the queries of a block ascend and what is summed over them is bitwise repeatable.
Queries are taken a chunk at a time, because the kernels that walk the table write one partial row for every
query and selected block; the chunk bounds that buffer, not the length of the sequence. Block 0 is read by
every query: rows longer than `part` entries are cut, so that no program runs much longer than the others.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparseray.kernels.launch import launch_kernel
from sparseray.kernels.nsa.geometry import KEYS, Geometry, query_sequences

BY_BLOCK_BELOW = 16
"""Measured: 8 heads a group are faster by block, 16 by query (docs/kernels.md)."""
PARTIAL_BYTES = 3 << 28
"""Upper bound of the partial rows of one chunk."""
TILE, MOST_TOGETHER = 1024, 64
"""Entries of one program that makes the table; programs that cut the rows of a chunk."""
MOST_SHORT = (1 << 15) - 1
"""Rows up to which their numbers have 16 bits, which are sorted in half as many passes as 32."""


@dataclass(frozen=True, kw_only=True)
class Inverse:
    """Which queries selected each block, by chunk of queries, and the parts the rows are cut into.

    Attributes:
        entries: int32 [E], flat place in index [T, H, n], rows one after the other; a row is (key/value head,
            packed block).
        queries: int32 [E], packed query of every entry.
        parts: int32 [chunks, programs, 6]: row (-1: none), part inside the row, parts of the row, first partial
            slot, first entry, end of the entries.
        chunk: queries of a chunk.
        num_slots: upper bound of the parts of cut rows in one chunk.
    """

    entries: Tensor
    queries: Tensor
    parts: Tensor
    chunk: int
    num_slots: int


@triton.jit
def entry_rows_kernel(
    p_index, p_first, p_rows, entries, chunk, num_blocks, none, n, H: tl.constexpr, BE: tl.constexpr
):
    """Row of every entry of index [T, H, n] among those of all chunks; `none` where no block was selected."""
    o = tl.program_id(0) * BE + tl.arange(0, BE)
    m = o < entries
    b_block = tl.load(p_index + o, mask=m, other=-1)
    i_q = o // (n * H)
    b_first = tl.load(p_first + i_q, mask=m, other=0)
    b_row = (i_q // chunk * H + o // n % H) * num_blocks + b_first + b_block
    tl.store(p_rows + o, tl.where(b_block < 0, none, b_row).to(p_rows.dtype.element_ty), mask=m)


@triton.jit
def starts_kernel(p_rows, p_order, p_entries, p_queries, p_starts, entries, none, each, BE: tl.constexpr):
    """Of the sorted entries the places and queries, and where every row begins; `each` entries are of one query."""
    o = tl.program_id(0) * BE + tl.arange(0, BE)
    m = o < entries
    b_entry = tl.load(p_order + o, mask=m, other=0).to(tl.int32)
    tl.store(p_entries + o, b_entry, mask=m)
    tl.store(p_queries + o, b_entry // each, mask=m)
    b_row = tl.load(p_rows + o, mask=m, other=0).to(tl.int32)
    b_row = tl.where(m, b_row, none)
    b_last = tl.load(p_rows + o - 1, mask=(o > 0) & (o <= entries), other=-1).to(tl.int32)
    # Rows without entries begin where the next one does; behind the last entry all the others.
    b_count = tl.where(o <= entries, b_row - b_last, 0)
    for j in range(0, tl.max(b_count, 0)):
        tl.store(p_starts + b_last + 1 + j, o, mask=j < b_count)


@triton.jit
def parts_kernel(p_starts, p_table, rows, programs, part, BR: tl.constexpr):
    """Cut a chunk's rows into parts of `part` entries and write a line of the table for each.

    A program takes every so many parts of all rows: the longest, of a block that all queries read, has most of them.
    """
    i_c = tl.program_id(0).to(tl.int64)
    o = tl.arange(0, BR)
    m = o < rows
    p_start = p_starts + i_c * rows + o
    low = tl.load(p_start, mask=m, other=0)
    stop = tl.load(p_start + 1, mask=m, other=0)
    parts = ((stop - low + part - 1) // part).to(tl.int32)
    p_line = p_table + (i_c * programs + tl.cumsum(parts, 0) - parts) * 6
    shared = tl.where(parts > 1, parts, 0)
    slot = tl.cumsum(shared, 0) - shared
    for j in range(tl.program_id(1), tl.max(parts, 0), tl.num_programs(1)):
        m_j = m & (j < parts)
        p = p_line + j * 6
        first = low + j * part
        tl.store(p, o, mask=m_j)
        tl.store(p + 1, j, mask=m_j)
        tl.store(p + 2, parts, mask=m_j)
        tl.store(p + 3, slot, mask=m_j)
        tl.store(p + 4, first.to(tl.int32), mask=m_j)
        tl.store(p + 5, tl.minimum(stop, first + part).to(tl.int32), mask=m_j)
    for j in range(tl.sum(parts, 0) + tl.program_id(1) * BR, programs, tl.num_programs(1) * BR):
        tl.store(p_table + (i_c * programs + j + o) * 6, tl.full([BR], -1, tl.int32), mask=j + o < programs)


def _first_blocks(geometry: Geometry, select_block: int) -> Tensor:
    """int32 [T]: packed number of the first block of every query's sequence."""
    key = (KEYS, -select_block)
    if key not in geometry.cache:
        blocks = (geometry.meta[:, 7] + select_block - 1) // select_block
        first = blocks.cumsum(0) - blocks
        geometry.cache[key] = first[query_sequences(geometry).long()].int()
    return geometry.cache[key]


def pays_by_block(group: int) -> bool:
    """Whether the selected branch runs block by block, forward and backward, for this many heads a group."""
    return group < BY_BLOCK_BELOW


def queries_per_chunk(heads: int, n: int, width: int, item_size: int) -> int:
    """Queries whose partial rows [heads, n, width] stay within PARTIAL_BYTES."""
    fit = PARTIAL_BYTES // (heads * n * width * item_size)
    return max(1, fit // 64 * 64 if fit > 64 else fit)


def invert_selection(
    index: Tensor, geometry: Geometry, *, select_block: int, chunk: int, part: int
) -> Inverse:
    """Build the table without a host synchronisation.

    Args:
        index: int32 [T, H, n], ascending, padded with -1 (`select_blocks`).
        chunk: queries of a chunk; part: entries after which a row is cut.
    """
    (tokens, num_kv, n), integers = index.shape, {"dtype": torch.int32, "device": index.device}
    chunk = max(1, min(chunk, tokens))
    chunks = -(-tokens // chunk)
    num_blocks = geometry.num_tiles(KEYS, select_block)
    rows = num_kv * num_blocks
    none, count = chunks * rows, index.numel()
    keys = torch.empty(count, dtype=torch.int16 if none <= MOST_SHORT else torch.int32, device=index.device)
    launch_kernel(
        entry_rows_kernel, (triton.cdiv(count, TILE),), index.contiguous(), _first_blocks(geometry, select_block), keys, count,
        chunk, num_blocks, none, n, H=num_kv, BE=TILE, num_warps=4,
    )  # fmt: skip
    keys, order = keys.sort(stable=True)
    places, queries = torch.empty(2, count, **integers)
    starts = torch.empty(none + 1, **integers)
    launch_kernel(
        starts_kernel, (triton.cdiv(count + 1, TILE),), keys, order, places, queries, starts, count, none, num_kv * n,
        BE=TILE, num_warps=4,
    )  # fmt: skip
    entries = chunk * num_kv * n
    programs = min(rows, entries) + entries // part
    table = torch.empty(chunks, programs, 6, **integers)
    block = triton.next_power_of_2(rows)
    warps = min(16, max(1, block // 256))
    together = min(MOST_TOGETHER, triton.cdiv(chunk, part))
    launch_kernel(
        parts_kernel, (chunks, together), starts, table, rows, programs, part, BR=block, num_warps=warps
    )
    return Inverse(
        entries=places, queries=queries, parts=table, chunk=chunk, num_slots=2 * (entries // part) + 1
    )
