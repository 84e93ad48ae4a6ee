"""DSE's rows on the GPU: addresses from tokens, rows from host memory, sums of row gradients.

The table stays in pinned host memory; a few programs with many loads in flight read rows over the bus
(`fetch.py` starts them ahead of the layers that use the rows).
Oracles: `reference.ngram_hash`, plain indexing, `reference.segment_sum_rows` (all bit for bit).
"""

from __future__ import annotations

import mmap

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparseray.kernels.launch import launch_kernel

SEGMENTS, SEGMENT_COLUMNS, SHORT_SEGMENT = 8, 64, 16
"""A warp adds up that many short segments side by side."""
SEARCHED = 256
"""Segments of which one program adds up the longer ones."""

SEGMENT_LOADS = 32
"""Rows of a long segment whose loads are in flight at once: its sum is a chain of dependent additions."""

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
    launch_kernel(
        _hash_kernel,
        (triton.cdiv(T, 256), B),
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
    p_table,
    p_rows,
    p_order,
    p_out,
    units,
    UNITS_PER_ROW: tl.constexpr,
    WORDS: tl.constexpr,
    ORDERED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    o_w = tl.arange(0, WORDS)
    step = tl.num_programs(0) * BLOCK
    for start in range(tl.program_id(0) * BLOCK, units, step):
        o_u = start + tl.arange(0, BLOCK)
        m = (o_u < units)[:, None]
        row = tl.load(p_rows + o_u // UNITS_PER_ROW, mask=o_u < units, other=0)
        p = p_table + (row * (UNITS_PER_ROW * WORDS) + (o_u % UNITS_PER_ROW) * WORDS)[:, None] + o_w[None, :]
        x = tl.load(p, mask=m, other=0, cache_modifier=".cg")  # [BLOCK, WORDS]
        o_out = o_u.to(tl.int64)
        if ORDERED:
            position = tl.load(p_order + o_u // UNITS_PER_ROW, mask=o_u < units, other=0)
            o_out = position * UNITS_PER_ROW + o_u % UNITS_PER_ROW
        tl.store(p_out + o_out[:, None] * WORDS + o_w[None, :], x, mask=m)


def gather_rows(
    table_RD: Tensor,
    rows_N: Tensor,
    out_ND: Tensor | None = None,
    *,
    order_N: Tensor | None = None,
    programs: int = 16,
    block: int = 128,
    warps: int = 1,
) -> Tensor:
    """Copy rows of a table in pinned (or registered) host memory, or on the GPU, to the GPU.

    Args:
        table_RD: contiguous; the row width must be a multiple of 16 bytes.
        rows_N: int64 on the GPU, 0 <= row < R (unchecked).
        out_ND: [N, D] buffer on the GPU to reuse.
        order_N: int64 permutation; row i then goes to out[order[i]], so that rows may come sorted.
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
    launch_kernel(
        _gather_kernel,
        grid,
        table_RD.view(torch.int64),
        rows_N,
        order_N if order_N is not None else rows_N,
        out_ND.view(torch.int64),
        units,
        UNITS_PER_ROW=row_bytes // 16,
        WORDS=WORDS_PER_UNIT,
        ORDERED=order_N is not None,
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


@triton.jit
def _append(tensors, x):
    return tensors + (x,)  # noqa: RUF005  (Triton unpacks none)


@triton.jit
def _positions(p_order, start, last, COUNT: tl.constexpr):
    found = ()
    for i in tl.static_range(COUNT):
        found = _append(found, tl.load(p_order + start + i, mask=start + i < last, other=0).to(tl.int64))
    return found


@triton.jit
def _terms(p_grads, places, start, last, o_d, m_d, D: tl.constexpr, COUNT: tl.constexpr):
    found = ()
    for i in tl.static_range(COUNT):
        m = (start + i < last)[:, None] & m_d
        found = _append(found, tl.load(p_grads + places[i][:, None] * D + o_d, mask=m, other=0.0))
    return found


@triton.jit
def _ordered_terms(acc, m_acc, p_grads, p_order, start, last, o_d, m_d, D: tl.constexpr, COUNT: tl.constexpr):
    """Add COUNT terms to sums, in order; `m_acc` says which sums have one yet.

    All positions are asked for before the first term, and all terms before the first sum: a compiler that sees one
    after another leaves few of them in flight.
    """
    places = _positions(p_order, start, last, COUNT)
    terms = _terms(p_grads, places, start, last, o_d, m_d, D, COUNT)
    for i in tl.static_range(COUNT):
        m, x = start + i < last, terms[i].to(tl.float32)
        acc = tl.where(m[:, None], tl.where(m_acc[:, None], acc + x, x), acc)
        m_acc = m_acc | m
    return acc, m_acc


@triton.jit
def _long_segments(
    p_grads, p_order, p_first, p_out, U, u, o_d, m_d,
    D: tl.constexpr, BD: tl.constexpr, MANY: tl.constexpr, LIMIT: tl.constexpr, SEARCHED: tl.constexpr,
):  # fmt: skip
    """Sums of those of SEARCHED segments that have more than LIMIT terms, the longest first."""
    o_s = tl.arange(0, SEARCHED)
    m_s = u + o_s < U
    count = tl.load(p_first + u + o_s + 1, mask=m_s, other=0) - tl.load(p_first + u + o_s, mask=m_s, other=0)
    count = tl.where(count > LIMIT, count, 0)
    rest = tl.max(count, 0)
    while rest > 0:
        s = tl.argmax(count, 0)
        count = tl.where(o_s == s, 0, count)
        o_u = u + s + tl.arange(0, 1)
        start, last = tl.load(p_first + o_u), tl.load(p_first + o_u + 1)
        acc, m_acc = tl.zeros([1, BD], tl.float32), o_u < 0
        while rest > 0:
            acc, m_acc = _ordered_terms(acc, m_acc, p_grads, p_order, start, last, o_d, m_d, D, MANY)
            start += MANY
            rest -= MANY
        tl.store(p_out + o_u.to(tl.int64)[:, None] * D + o_d, acc, mask=m_d)
        rest = tl.max(count, 0)


@triton.jit
def _short_segments(
    p_grads, p_order, p_first, p_out, U, u, o_d, m_d,
    D: tl.constexpr, BU: tl.constexpr, BD: tl.constexpr, FEW: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    """Sums of those of BU segments that have at most LIMIT terms, side by side; none give 0."""
    o_u = u + tl.arange(0, BU)
    m_u = o_u < U
    first = tl.load(p_first + o_u, mask=m_u, other=0)
    last = tl.load(p_first + o_u + 1, mask=m_u, other=0)
    is_short = last - first <= LIMIT
    last = tl.where(is_short, last, first)
    acc, m_acc = tl.zeros([BU, BD], tl.float32), o_u < 0
    longest = tl.max(last - first, 0)
    done = longest * 0
    while done < longest:
        acc, m_acc = _ordered_terms(acc, m_acc, p_grads, p_order, first + done, last, o_d, m_d, D, FEW)
        done += FEW
    p = p_out + o_u.to(tl.int64)[:, None] * D + o_d
    tl.store(p, acc, mask=(m_u & is_short)[:, None] & m_d)


@triton.jit(do_not_specialize=["U", "searches"])
def _segment_kernel(
    p_grads, p_order, p_first, p_out, U, searches,
    D: tl.constexpr, BU: tl.constexpr, BD: tl.constexpr, FEW: tl.constexpr, MANY: tl.constexpr,
    LIMIT: tl.constexpr, SEARCHED: tl.constexpr,
):  # fmt: skip
    """Sums of the terms of all segments, in order: long ones first, which take longest, by the first programs."""
    o_d = tl.program_id(1) * BD + tl.arange(0, BD)[None, :]
    m_d = o_d < D
    i = tl.program_id(0)
    if i < searches:
        u = i * SEARCHED
        _long_segments(p_grads, p_order, p_first, p_out, U, u, o_d, m_d, D, BD, MANY, LIMIT, SEARCHED)
    else:
        u = (i - searches) * BU
        _short_segments(p_grads, p_order, p_first, p_out, U, u, o_d, m_d, D, BU, BD, FEW, LIMIT)


def segment_sum_rows(rows_N: Tensor, grads_ND: Tensor) -> tuple[Tensor, Tensor]:
    """`reference.segment_sum_rows` on the GPU, bit for bit: a stable sort, then sums in order.

    Args:
        rows_N: int64. grads_ND: fp32 or bf16 (converted to fp32), contiguous.

    Returns:
        (unique rows int64, rising; sums fp32). The number of rows is copied to the host.
    """
    ordered_N, order_N = torch.sort(rows_N, stable=True)
    unique_U, counts_U = torch.unique_consecutive(ordered_N, return_counts=True)
    return unique_U, sum_segments(grads_ND, order_N, torch.nn.functional.pad(counts_U.cumsum(0), (1, 0)))


def sum_segments(grads_ND: Tensor, order_N: Tensor, first_U1: Tensor) -> Tensor:
    """Sum gradients by segment, each one's terms in order: fp32 [U, D], 0 for an empty segment.

    Args:
        grads_ND: fp32 or bf16, contiguous.
        order_N: int32 or int64, positions of the gradients, segment after segment.
        first_U1: of the same dtype, where in it each segment begins, and where the last one ends.
    """
    U, D = first_U1.numel() - 1, grads_ND.shape[1]
    sums_UD = torch.empty(U, D, dtype=torch.float32, device=grads_ND.device)
    columns, searches = min(SEGMENT_COLUMNS, triton.next_power_of_2(D)), triton.cdiv(U, SEARCHED)
    if U:
        launch_kernel(
            _segment_kernel,
            (searches + triton.cdiv(U, SEGMENTS), triton.cdiv(D, columns)),
            grads_ND,
            order_N,
            first_U1,
            sums_UD,
            U,
            searches,
            D=D,
            BU=SEGMENTS,
            BD=columns,
            FEW=4,
            MANY=SEGMENT_LOADS,
            LIMIT=SHORT_SEGMENT,
            SEARCHED=SEARCHED,
            num_warps=1,
        )
    return sums_UD
