"""DSE's rows on the GPU: addresses from tokens, rows from host memory, sums of row gradients.

The table stays in pinned host memory. A few programs with many loads in flight copy rows over the
bus on a stream of their own, ahead of the layers that use them, since addresses follow from tokens.
Oracles: `reference.ngram_hash`, plain indexing, `reference.segment_sum_rows` (all bit for bit).
"""

from __future__ import annotations

import mmap
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from sparseray.kernels.dse import cpu

STAGES, STAGE_ROWS = 4, 16_384
"""A staged fetch copies one part to the GPU while the CPU gathers the next, if parts are large enough."""

MAX_REGISTERS = 32
WORDS_PER_UNIT = 2
"""Rows move as units of two 8-byte words: 16-byte loads."""


@triton.jit
def _hash_kernel(
    p_tokens,
    p_map,
    p_history,
    p_starts,
    p_multipliers,
    p_primes,
    p_offsets,
    p_rows,
    T,
    L,
    pad,
    FIRST: tl.constexpr,
    LONGEST: tl.constexpr,
    HEADS: tl.constexpr,
    N: tl.constexpr,
    MAP: tl.constexpr,
    STARTS: tl.constexpr,
    BT: tl.constexpr,
):
    i_b = tl.program_id(1).to(tl.int64)
    o_t = tl.program_id(0) * BT + tl.arange(0, BT)
    m_t = o_t < T
    x = tl.load(p_tokens + i_b * T + o_t, mask=m_t, other=0)
    if MAP:
        x = tl.load(p_map + x, mask=m_t, other=0)
    mix = x * tl.load(p_multipliers)
    blocked = o_t < 0
    for distance in tl.static_range(1, LONGEST):
        if STARTS:
            inside = m_t & (o_t >= distance - 1)
            start = tl.load(p_starts + i_b * T + o_t - (distance - 1), mask=inside, other=0)
            blocked = blocked | (start != 0)
        o_p = o_t - distance
        x = tl.load(p_tokens + i_b * T + o_p, mask=m_t & (o_p >= 0), other=0)
        if MAP:
            x = tl.load(p_map + x, mask=m_t & (o_p >= 0), other=0)
        earlier = tl.load(p_history + i_b * L + L + o_p, mask=o_p < 0, other=0)
        x = tl.where(blocked, pad, tl.where(o_p < 0, earlier, x))
        mix = mix ^ (x * tl.load(p_multipliers + distance))
        if distance + 1 >= FIRST:
            for head in tl.static_range(HEADS):
                n = (distance + 1 - FIRST) * HEADS + head
                row = mix % tl.load(p_primes + n) + tl.load(p_offsets + n)
                tl.store(p_rows + (i_b * T + o_t) * N + n, row, mask=m_t)


def ngram_hash(
    tokens_BT: Tensor,
    *,
    multipliers: Tensor,
    orders: tuple[int, ...],
    primes_OH: Tensor,
    offsets_OH: Tensor,
    pad: int,
    token_map_V: Tensor | None = None,
    history_BL: Tensor | None = None,
    document_starts_BT: Tensor | None = None,
) -> Tensor:
    """`reference.ngram_hash` in one launch, with the token map.

    Args:
        tokens_BT: int64 token ids; raw ones if token_map_V is given, else compressed.
        multipliers, primes_OH, offsets_OH: int64, on the tokens' device.
        orders: consecutive n-gram lengths, for instance (2, 3).
        pad: compressed pad id.
        token_map_V: int64, raw to compressed ids.
        history_BL: int64 compressed tokens before the chunk, at least max(orders) - 1 of them.
        document_starts_BT: bool; look-back stops there.

    Returns:
        int64 rows [B, T, N].
    """
    if list(orders) != list(range(orders[0], orders[-1] + 1)):
        raise ValueError(f"orders={orders} are not consecutive")
    (B, T), longest = tokens_BT.shape, max(orders)
    if history_BL is None:
        history_BL = tokens_BT.new_full((B, longest - 1), pad)
    rows_BTN = tokens_BT.new_empty(B, T, primes_OH.numel())
    has_starts = document_starts_BT is not None
    starts = document_starts_BT.to(torch.int8).contiguous() if document_starts_BT is not None else tokens_BT
    _hash_kernel[(triton.cdiv(T, 256), B)](
        tokens_BT.contiguous(),
        token_map_V if token_map_V is not None else tokens_BT,
        history_BL.contiguous(),
        starts,
        multipliers,
        primes_OH.contiguous(),
        offsets_OH.contiguous(),
        rows_BTN,
        T,
        history_BL.shape[1],
        pad,
        FIRST=orders[0],
        LONGEST=longest,
        HEADS=primes_OH.shape[1],
        N=primes_OH.numel(),
        MAP=token_map_V is not None,
        STARTS=has_starts,
        BT=256,
    )
    return rows_BTN


@triton.jit
def _gather_kernel(
    p_table, p_rows, p_out, units, UNITS_PER_ROW: tl.constexpr, WORDS: tl.constexpr, BLOCK: tl.constexpr
):
    o_w = tl.arange(0, WORDS)
    step = tl.num_programs(0) * BLOCK
    for start in range(tl.program_id(0) * BLOCK, units, step):
        o_u = start + tl.arange(0, BLOCK)
        m = (o_u < units)[:, None]
        row = tl.load(p_rows + o_u // UNITS_PER_ROW, mask=o_u < units, other=0)
        p = p_table + (row * (UNITS_PER_ROW * WORDS) + (o_u % UNITS_PER_ROW) * WORDS)[:, None] + o_w[None, :]
        x = tl.load(p, mask=m, other=0, cache_modifier=".cg")  # [BLOCK, WORDS]
        tl.store(p_out + o_u.to(tl.int64)[:, None] * WORDS + o_w[None, :], x, mask=m)


def gather_rows(
    table_RD: Tensor,
    rows_N: Tensor,
    out_ND: Tensor | None = None,
    *,
    programs: int = 16,
    block: int = 128,
    warps: int = 1,
) -> Tensor:
    """Copy rows of a table in pinned (or registered) host memory, or on the GPU, to the GPU.

    Args:
        table_RD: contiguous; the row width must be a multiple of 16 bytes.
        rows_N: int64 on the GPU, 0 <= row < R (unchecked).
        out_ND: [N, D] buffer on the GPU to reuse.
        programs: how many programs copy; each keeps a large matrix product's tile off its multiprocessor
            while it runs, so no more than the bus needs.
        block, warps: 16-byte units that a program has in flight, and its warps.

    Returns:
        out_ND on the rows' device.

    Raises:
        ValueError: the row width is no multiple of 16 bytes, or the host table is not pinned.
    """
    row_bytes = table_RD.shape[1] * table_RD.element_size()
    if row_bytes % 16 or not table_RD.is_contiguous():
        raise ValueError(f"rows of {row_bytes} bytes; gather_rows needs contiguous multiples of 16 bytes")
    if rows_N.is_cuda and not table_RD.is_cuda and not table_RD.is_pinned():
        raise ValueError("the host table is not pinned; pass it through register_host first")
    if out_ND is None:
        shape = (rows_N.numel(), table_RD.shape[1])
        out_ND = torch.empty(shape, dtype=table_RD.dtype, device=rows_N.device)
    units = rows_N.numel() * row_bytes // 16
    grid = (max(1, min(programs, triton.cdiv(units, block))),)
    _gather_kernel[grid](
        table_RD.view(torch.int64),
        rows_N,
        out_ND.view(torch.int64),
        units,
        UNITS_PER_ROW=row_bytes // 16,
        WORDS=WORDS_PER_UNIT,
        BLOCK=block,
        num_warps=warps,
        maxnreg=MAX_REGISTERS,
    )
    return out_ND


def host_table(num_rows: int, width: int, dtype: torch.dtype) -> Tensor:
    """An uninitialised table in registered host memory that asks for huge pages.

    They save the CPU's address translations; the bus still reads some 40 million random rows a second.
    """
    size = num_rows * width * dtype.itemsize
    memory = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    flat = torch.frombuffer(memory, dtype=torch.uint8, count=size)
    flat[::4096] = 0
    table = flat.view(dtype).view(num_rows, width)
    return register_host(table) if torch.cuda.is_available() else table


def register_host(table: Tensor) -> Tensor:
    """Pin a host tensor's memory where it lies (a shared-memory mapping, say), so that the GPU reads it.

    Raises:
        RuntimeError: the driver refuses to register the range.
    """
    size = table.numel() * table.element_size()
    status = torch.cuda.cudart().cudaHostRegister(table.data_ptr(), size, 0)
    if int(status) != 0:
        raise RuntimeError(f"cudaHostRegister of {size} bytes failed with {status}")
    return table


@dataclass(frozen=True, kw_only=True)
class Fetch:
    """Rows on their way; `wait` orders the current stream behind them."""

    rows_ND: Tensor
    done: torch.cuda.Event

    def wait(self) -> Tensor:
        """Return the rows for use on the current stream."""
        stream = torch.cuda.current_stream()
        stream.wait_event(self.done)
        self.rows_ND.record_stream(stream)
        return self.rows_ND


class RowFetcher:
    """Fetches rows of one host table on a stream of its own, ahead of their use.

    The tables of several layers may lie behind one another in `table_RD`: one call fetches the rows of
    all of them. Allocations are made on the fetching stream.
    """

    def __init__(self, table_RD: Tensor, *, programs: int = 16, block: int = 128, warps: int = 1) -> None:
        self.table_RD = table_RD
        self.programs, self.block, self.warps = programs, block, warps
        self.stream = torch.cuda.Stream(priority=-1)

    def fetch(self, rows_N: Tensor) -> Fetch:
        """Start copying; `rows_N` (int64, on the GPU) must be complete on the current stream."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            rows_ND = gather_rows(
                self.table_RD,
                rows_N.flatten(),
                programs=self.programs,
                block=self.block,
                warps=self.warps,
            )
            rows_N.record_stream(self.stream)
            done = torch.cuda.Event()
            done.record(self.stream)
        return Fetch(rows_ND=rows_ND, done=done)


class StagedRowFetcher:
    """Fetches rows without any multiprocessor: CPU threads gather into pinned memory, DMA copies it.

    For addresses that are known on the CPU (the data loader hashes there). `fetch` returns at once; two
    staging buffers take turns.
    """

    def __init__(self, table_RD: Tensor, *, max_rows: int, threads: int, device: torch.device) -> None:
        width = table_RD.shape[1] * table_RD.element_size()
        self.table = table_RD.view(torch.uint8).view(-1, width).numpy()
        self.dtype, self.threads, self.device = table_RD.dtype, threads, device
        self.staging = [torch.empty(max_rows, width, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        self.copied: list[torch.cuda.Event | None] = [None, None]
        self.stream = torch.cuda.Stream(device)
        self.worker, self.pool = ThreadPoolExecutor(1), ThreadPoolExecutor(threads)
        self.turn = 0

    def fetch(self, rows_N: NDArray[np.int64]) -> Future[Fetch]:
        """Start gathering and copying `rows_N`; the future holds the rows on their way."""
        self.turn ^= 1
        return self.worker.submit(self._fetch, rows_N, self.turn)

    def _fetch(self, rows_N: NDArray[np.int64], turn: int) -> Fetch:
        busy = self.copied[turn]
        if busy is not None:
            busy.synchronize()
        staged = self.staging[turn][: rows_N.shape[0]]
        edges = range(0, rows_N.shape[0], max(STAGE_ROWS, -(-rows_N.shape[0] // STAGES)))
        with torch.cuda.stream(self.stream):
            rows_ND = torch.empty_like(staged, device=self.device)
            for first, last in zip(edges, [*edges[1:], rows_N.shape[0]]):
                part = staged[first:last]
                cpu.gather_rows(
                    self.table, rows_N[first:last], part.numpy(), threads=self.threads, pool=self.pool
                )
                rows_ND[first:last].copy_(part, non_blocking=True)
            rows_ND = rows_ND.view(self.dtype)
            done = torch.cuda.Event()
            done.record(self.stream)
        self.copied[turn] = done
        return Fetch(rows_ND=rows_ND, done=done)


@triton.jit
def _segment_kernel(
    p_grads, p_order, p_first, p_out, D: tl.constexpr, BD: tl.constexpr, UNROLL: tl.constexpr
):
    i_u = tl.program_id(0)
    o_d = tl.program_id(1) * BD + tl.arange(0, BD)
    m_d = o_d < D
    first = tl.load(p_first + i_u)
    last = tl.load(p_first + i_u + 1)
    position = tl.load(p_order + first)
    acc = tl.load(p_grads + position * D + o_d, mask=m_d, other=0.0).to(tl.float32)
    for start in range(first + 1, last, UNROLL):
        for i in tl.static_range(UNROLL):
            m = start + i < last
            position = tl.load(p_order + start + i, mask=m, other=0)
            x = tl.load(p_grads + position * D + o_d, mask=m_d & m, other=0.0).to(tl.float32)
            acc = tl.where(m, acc + x, acc)
    tl.store(p_out + i_u.to(tl.int64) * D + o_d, acc, mask=m_d)


def segment_sum_rows(rows_N: Tensor, grads_ND: Tensor) -> tuple[Tensor, Tensor]:
    """`reference.segment_sum_rows` on the GPU, bit for bit: a stable sort, then sums in order.

    Args:
        rows_N: int64. grads_ND: fp32 or bf16 (converted to fp32), contiguous.

    Returns:
        (unique rows int64, rising; sums fp32). The number of rows is copied to the host.
    """
    ordered_N, order_N = torch.sort(rows_N, stable=True)
    unique_U, counts_U = torch.unique_consecutive(ordered_N, return_counts=True)
    U, D = unique_U.numel(), grads_ND.shape[1]
    sums_UD = torch.empty(U, D, dtype=torch.float32, device=grads_ND.device)
    first_U1 = torch.nn.functional.pad(counts_U.cumsum(0), (1, 0))
    bd = min(256, triton.next_power_of_2(D))
    if U:
        _segment_kernel[(U, triton.cdiv(D, bd))](
            grads_ND.contiguous(), order_N, first_U1, sums_UD, D=D, BD=bd, UNROLL=8, num_warps=1
        )
    return unique_U, sums_UD
