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
def parts_kernel(p_starts, p_table, rows, programs, part, BR: tl.constexpr):
    """Cut a chunk's rows into parts of `part` entries and write a line of the table for each."""
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
    for j in range(0, tl.max(parts, 0)):
        m_j = m & (j < parts)
        p = p_line + j * 6
        first = low + j * part
        tl.store(p, o, mask=m_j)
        tl.store(p + 1, j, mask=m_j)
        tl.store(p + 2, parts, mask=m_j)
        tl.store(p + 3, slot, mask=m_j)
        tl.store(p + 4, first.to(tl.int32), mask=m_j)
        tl.store(p + 5, tl.minimum(stop, first + part).to(tl.int32), mask=m_j)


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
    tokens, num_kv, n = index.shape
    meta, device = geometry.meta, index.device
    chunk = max(1, min(chunk, tokens))
    chunks = -(-tokens // chunk)
    num_blocks = geometry.num_tiles(KEYS, select_block)
    rows = num_kv * num_blocks
    blocks = (meta[:, 7] + select_block - 1) // select_block
    first = (blocks.cumsum(0) - blocks)[query_sequences(geometry).long()]
    base = (torch.arange(tokens, device=device) // chunk * rows + first).int()[:, None, None]
    head = torch.arange(num_kv, device=device, dtype=torch.int32)[None, :, None] * num_blocks
    keys, order = torch.where(index < 0, chunks * rows, index + base + head).flatten().sort(stable=True)
    starts = torch.searchsorted(keys, torch.arange(chunks * rows + 1, device=device, dtype=torch.int32))
    entries = chunk * num_kv * n
    programs = min(rows, entries) + entries // part
    table = torch.full((chunks, programs, 6), -1, dtype=torch.int32, device=device)
    block = triton.next_power_of_2(rows)
    warps = min(16, max(1, block // 256))
    launch_kernel(parts_kernel, (chunks,), starts, table, rows, programs, part, BR=block, num_warps=warps)
    return Inverse(
        entries=order.int(), queries=(order // (num_kv * n)).int(), parts=table, chunk=chunk,
        num_slots=2 * (entries // part) + 1,
    )  # fmt: skip
