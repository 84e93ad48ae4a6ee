"""Writing to another GPU's memory, saying so, and waiting for what others say: no group, no host.

`put_rows` stores rows at their places over NVLink; `signal` then stores a word there with release order for the whole
system, and `wait` reads the own words with acquire order until they have come so far. A wait has a bound and an end
that the host can bring about: it leaves a status instead of trapping, after which nothing more is put or said, so a
slot that was given up writes to nobody's memory. What goes on in a CUDA graph again and again takes its words from a
count on the device.

Names: p_ pointers, i_ program ids, o_ offsets, m_ masks; R rows, N numbers of a row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import globaltimer
from triton.runtime.jit import JITFunction

from sparseray.kernels.launch import launch_kernel

WIDTH = 1024
"""Numbers of a row that one program moves at once."""
FLAT = 4096
MOST_PROGRAMS = 528
"""Of one that stores in several places: four for each multiprocessor, each with many numbers."""
BESIDE_PROGRAMS = 32
"""As many multiprocessors at most then store, and the others compute."""
LOOK_EVERY = 32
"""Polls between two looks at the host's word and at the clock, which take longer than one."""
POLL_S = 1.5e-6
"""What a poll counts for under the interpreter, which has no clock."""
OK, LATE, ENDED = 0, 1, 2
"""Statuses: everything came; a source did not in time; a later generation, or the host, ended the wait."""


@triton.jit
def _put_kernel(
    p_rows, p_into, p_order, p_state, R, N, ORDERED: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr
):
    """Rows i_r * BR and on, columns i_n * BN and on; without an order one row, however long."""
    if ORDERED:
        i_r, i_n = tl.program_id(0), tl.program_id(1)
    else:
        i_r, i_n = 0, tl.program_id(0)
    if tl.load(p_state) == 0:
        o_r = i_r * BR + tl.arange(0, BR).to(tl.int64)
        o_n = i_n * BN + tl.arange(0, BN)
        m_r = o_r < R
        m = m_r[:, None] & (o_n < N)[None, :]
        b = tl.load(p_rows + o_r[:, None] * N + o_n[None, :], mask=m)
        if ORDERED:
            o_r = tl.load(p_order + o_r, mask=m_r, other=0).to(tl.int64)
        tl.store(p_into + o_r[:, None] * N + o_n[None, :], b, mask=m)


@triton.jit
def of_table(p_table, o, p_like):
    """Pointers that lie in a table as numbers; every region begins at a multiple of 16 bytes."""
    return tl.multiple_of(tl.load(p_table + o).to(p_like.dtype), 16)


@triton.jit(do_not_specialize=["COUNT"])
def _put_all_kernel(p_from, p_table, p_state, N, COUNT, BN: tl.constexpr):
    """Numbers i * BN and on, and those as many programs further, to each of COUNT places."""
    if tl.load(p_state) == 0:
        for first in range(tl.program_id(0) * BN, N, tl.num_programs(0) * BN):
            o_n = first + tl.arange(0, BN)
            b = tl.load(p_from + o_n, mask=o_n < N)
            for i in range(COUNT):
                tl.store(of_table(p_table, i, p_from) + o_n, b, mask=o_n < N)


@triton.jit(do_not_specialize=["rank", "word"])
def _signal_kernel(p_flags, p_state, rank, word):
    if tl.load(p_state) == 0:
        tl.atomic_xchg(p_flags + rank, word + tl.load(p_state + 1), sem="release", scope="sys")


@triton.jit(do_not_specialize=["rank", "word"])
def _signal_all_kernel(p_table, p_state, rank, word):
    if tl.load(p_state) == 0:
        p_flags = tl.load(p_table + tl.program_id(0)).to(p_table.dtype)
        tl.atomic_xchg(p_flags + rank, word + tl.load(p_state + 1), sem="release", scope="sys")


@triton.jit
def end_of(limit, IS_TIMED: tl.constexpr):
    """When a wait that begins now is over: by the clock, in nanoseconds, or in polls where there is none."""
    if IS_TIMED:
        end = globaltimer() + limit
    else:
        end = limit.to(tl.int64)
    return end


@triton.jit
def await_word(p_flag, p_end, status, word, later, until, LOOK: tl.constexpr, IS_TIMED: tl.constexpr):
    """Wait for a word as long as the status is 0, and return the status; a word from `later` on ends it."""
    seen = tl.atomic_add(p_flag, tl.zeros([], tl.int64), sem="acquire", scope="sys")
    polls = tl.zeros([], tl.int64)
    while (seen < word) & (status == 0):
        if polls % LOOK == 0:
            status = tl.load(p_end, volatile=True).to(tl.int64)
            if IS_TIMED:
                status = tl.where((status == 0) & (globaltimer() > until), 1, status)
        polls += 1
        if not IS_TIMED:
            status = tl.where((status == 0) & (polls >= until), 1, status)
        seen = tl.atomic_add(p_flag, tl.zeros([], tl.int64), sem="acquire", scope="sys")
    if seen >= later:
        status = tl.where(status == 0, 2, status)
    return status


@triton.jit(do_not_specialize=["ranks", "word", "later", "limit"])
def _wait_kernel(
    p_flags, p_state, p_end, ranks, word, later, limit, S, LOOK: tl.constexpr, IS_TIMED: tl.constexpr
):
    """Wait for the word of each source whose bit is set in `ranks`; a word from `later` on ends it."""
    until = end_of(limit, IS_TIMED)
    status, word = tl.load(p_state), word + tl.load(p_state + 1)
    for rank in range(S):
        if (ranks >> rank) & 1:
            status = await_word(p_flags + rank, p_end, status, word, later, until, LOOK, IS_TIMED)
    tl.store(p_state, status)
    if IS_TIMED:
        tl.store(p_state + 2, tl.load(p_state + 2) + globaltimer() - until + limit)


def put_rows(rows_RN: Tensor, into_XN: Tensor, order_R: Tensor | None, state: Tensor) -> None:
    """Store rows in another GPU's memory, or the own.

    Args:
        rows_RN: contiguous; numbers of one dimension are one row.
        into_XN: contiguous, of the same dtype and row length.
        order_R: integers, the place of each row in `into`; None for one after another.
        state: of `new_state`; where it is not OK nothing is stored.
    """
    if not rows_RN.numel():
        return
    if order_R is None:
        # One long run: rows do not matter.
        rows, width, block = 1, rows_RN.numel(), (1, FLAT)
        grid: tuple[int, ...] = (triton.cdiv(width, FLAT),)
    else:
        rows, width = order_R.shape[0], rows_RN.numel() // order_R.shape[0]
        columns = min(WIDTH, triton.next_power_of_2(width))
        block = (max(1, WIDTH // columns), columns)
        grid = (triton.cdiv(rows, block[0]), triton.cdiv(width, columns))
    launch_kernel(
        _put_kernel,
        grid,
        rows_RN,
        into_XN,
        order_R if order_R is not None else state,
        state,
        rows,
        width,
        ORDERED=order_R is not None,
        BN=block[1],
        BR=block[0],
        num_warps=4,
    )


def table_of(places: Sequence[Tensor], device: torch.device) -> Tensor:
    """Where some tensors lie, as numbers on a device: int64, one for each.

    Args:
        places: of any device whose memory the other one may write to; each begins at a multiple of 16 bytes.
        device: of the kernels that are given the table.
    """
    addresses = [place.data_ptr() for place in places]
    assert not any(address % 16 for address in addresses)
    return torch.tensor(addresses, dtype=torch.int64).to(device)


def of_stores(beside: bool) -> tuple[int, int, int]:
    """Programs that store in several places, numbers of each at once, and its warps; few programs where others compute."""
    return (BESIDE_PROGRAMS, 4 * FLAT, 16) if beside else (MOST_PROGRAMS, FLAT, 4)


def put_all(numbers: Tensor, table: Tensor, state: Tensor, *, beside: bool = False) -> None:
    """Store the same numbers in several places; they are read once.

    Args:
        numbers: contiguous.
        table: of `table_of`; contiguous places of the same dtype and size.
        state: of `new_state`; where it is not OK nothing is stored.
        beside: something else computes meanwhile; then few programs store, many numbers at once each.
    """
    count = numbers.numel()
    programs, block, warps = of_stores(beside)
    launch_kernel(
        _put_all_kernel,
        (min(programs, triton.cdiv(count, block)),),
        numbers,
        table,
        state,
        count,
        len(table),
        BN=block,
        num_warps=warps,
    )


def signal_all(table: Tensor, rank: int, word: int, state: Tensor) -> None:
    """Store a word of several other GPUs', after all that was launched before.

    Args:
        table: of `table_of`; their words.
        rank: which of the words.
        word: to store.
        state: of `new_state`; where it is not OK nothing is stored.
    """
    launch_kernel(_signal_all_kernel, (len(table),), table, state, rank, word, num_warps=1)


def signal(flags_S: Tensor, rank: int, word: int, state: Tensor) -> None:
    """Store a word of another GPU's, after all that was launched before.

    Args:
        flags_S: int64, of the other.
        rank: which of its words.
        word: to store.
        state: of `new_state`; where it is not OK nothing is stored.
    """
    launch_kernel(_signal_kernel, (1,), flags_S, state, rank, word, num_warps=1)


def wait(
    flags_S: Tensor, ranks: int, word: int, later: int, state: Tensor, end: Tensor, seconds: float
) -> None:
    """Let nothing that is launched after this begin before some words have come so far.

    Args:
        flags_S: int64, own.
        ranks: bit r is set where word r is waited for.
        word: that each must have reached.
        later: words from here on are of another generation.
        state: of `new_state`, set to LATE or ENDED where they do not.
        end: int32 scalar in pinned host memory; the host ends the wait by setting it to a status.
        seconds: after which it is LATE.
    """
    launch_kernel(
        _wait_kernel,
        (1,),
        flags_S,
        state,
        end,
        ranks,
        word,
        later,
        limit_of(seconds),
        flags_S.shape[0],
        LOOK=LOOK_EVERY,
        IS_TIMED=IS_TIMED,
        num_warps=1,
    )


IS_TIMED = isinstance(_wait_kernel, JITFunction)
"""The interpreter has no clock."""


def limit_of(seconds: float) -> int:
    """Bound of a wait as kernels take it: nanoseconds, or polls.

    Args:
        seconds: of the bound.
    """
    return int(seconds * 1e9) if IS_TIMED else int(seconds / POLL_S)


def new_state(device: torch.device) -> Tensor:
    """A status that says OK, a count that is added to every word, and nanoseconds spent in waits: int64 [3]."""
    return torch.zeros(3, dtype=torch.int64, device=device)


def new_end(device: torch.device) -> Tensor:
    """What the host ends waits with: in memory that a GPU reads too."""
    return torch.zeros(1, dtype=torch.int32, pin_memory=device.type == "cuda")
