"""Rounds between GPUs in a CUDA graph that outlives generations: what peer.py does, by addresses that lie on the device.

A captured step may be replayed after a GPU was lost, with other peers: where their memory lies, who takes part and in
which generation are read from a table. So a launch here is for all peers at once, and nothing of them is compiled or
captured. Statuses and words are those of peer.py; the word's generation and the rounds before lie in `state`.

Names: p_ pointers, i_ program ids, o_ offsets, m_ masks; S peers by rank, T tokens of C at most, K experts per token,
H hidden, R = C * K pairs of one peer.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparseray.kernels.launch import launch_kernel
from sparseray.kernels.peer import IS_TIMED, LOOK_EVERY, await_word, end_of, limit_of

X, IDS, ROWS, FLAGS, FIELDS = 0, 1, 2, 3, 4
"""Columns of the table: where a peer has the own tokens, their ids, its rows, and its words."""
OTHERS, OWNERS, RANK = 0, 1, 2
"""Fields of who takes part: bits of all others, bits of all that hold experts (the own one too), and the own rank."""
BLOCK_ROWS = 8
WIDTH = 1024


def new_table(peers: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Addresses of peers, int64 [S, FIELDS], and who takes part, int64 [3].

    Args:
        peers: S.
        device: own.
    """
    return tuple(torch.zeros(shape, dtype=torch.int64, device=device) for shape in ((peers, FIELDS), (3,)))  # type: ignore[return-value]


@triton.jit(do_not_specialize=["T"])
def _give_kernel(
    p_x, p_ids, p_table, p_who, p_state, T, C, H, K: tl.constexpr, BK: tl.constexpr, BH: tl.constexpr,
    BR: tl.constexpr,
):  # fmt: skip
    """Tokens i_r * BR and on of the own ones to the peer of rank i_s; ids say -1 where there is none."""
    i_s, i_r = tl.program_id(0), tl.program_id(1)
    if (tl.load(p_state) == 0) & (((tl.load(p_who + 1) >> i_s) & 1) == 1):
        o_r = i_r * BR + tl.arange(0, BR)
        p_row = tl.load(p_table + i_s * 4)
        p_to = p_row.to(tl.pointer_type(p_x.dtype.element_ty))
        for h in range(0, H, BH):
            o_h = h + tl.arange(0, BH)
            o = o_r.to(tl.int64)[:, None] * H + o_h[None, :]
            m = (o_r < T)[:, None] & (o_h < H)[None, :]
            tl.store(p_to + o, tl.load(p_x + o, mask=m), mask=m)
        o_k = tl.arange(0, BK)
        o = o_r[:, None] * K + o_k[None, :]
        m = (o_r < C)[:, None] & (o_k < K)[None, :]
        b_ids = tl.load(p_ids + o, mask=m & (o_r < T)[:, None], other=-1)
        p_to_ids = tl.load(p_table + i_s * 4 + 1).to(tl.pointer_type(tl.int32))
        tl.store(p_to_ids + o, b_ids, mask=m)


@triton.jit(do_not_specialize=["count"])
def _say_kernel(p_table, p_who, p_state, count, FIELD: tl.constexpr):
    """Tell the peer of rank i_s, if it is among those that a field names and not oneself."""
    i_s, rank = tl.program_id(0), tl.load(p_who + 2)
    if (tl.load(p_state) == 0) & (((tl.load(p_who + FIELD) >> i_s) & 1) == 1) & (i_s != rank):
        p_flags = tl.load(p_table + i_s * 4 + 3).to(tl.pointer_type(tl.int64))
        tl.atomic_xchg(p_flags + rank, tl.load(p_state + 1) + count, sem="release", scope="sys")


@triton.jit(do_not_specialize=["count", "limit"])
def _await_kernel(
    p_flags,
    p_who,
    p_state,
    p_end,
    count,
    limit,
    S,
    FIELD: tl.constexpr,
    LOOK: tl.constexpr,
    IS_TIMED: tl.constexpr,
):
    """Wait for the words of the peers that a field names; one of a later generation ends it."""
    status, word = tl.load(p_state), tl.load(p_state + 1) + count
    later, until = ((word >> 32) + 1) << 32, end_of(limit, IS_TIMED)
    ranks, me = tl.load(p_who + FIELD), tl.load(p_who + 2)
    for rank in range(S):
        if (((ranks >> rank) & 1) == 1) & (rank != me):
            status = await_word(p_flags + rank, p_end, status, word, later, until, LOOK, IS_TIMED)
    tl.store(p_state, status)


@triton.jit
def _answer_kernel(p_y, p_order, p_count, p_table, p_state, R, H, BH: tl.constexpr, BR: tl.constexpr):
    """Rows i_r * BR and on of those computed here to their places with the peers whose tokens they are of."""
    i_r, i_h = tl.program_id(0), tl.program_id(1)
    count = tl.load(p_count)
    if (tl.load(p_state) == 0) & (i_r * BR < count):
        o_r, o_h = i_r * BR + tl.arange(0, BR), i_h * BH + tl.arange(0, BH)
        m_r = o_r < count
        pair = tl.load(p_order + o_r, mask=m_r, other=0)
        p_rows = tl.load(p_table + (pair // R).to(tl.int64) * 4 + 2, mask=m_r, other=0)
        # A slot that is gone may have left tokens where nobody is now.
        m_r = m_r & (p_rows != 0)
        m = m_r[:, None] & (o_h < H)[None, :]
        b = tl.load(p_y + o_r.to(tl.int64)[:, None] * H + o_h[None, :], mask=m)
        p_to = p_rows.to(tl.pointer_type(p_y.dtype.element_ty))
        tl.store(p_to[:, None] + (pair % R).to(tl.int64)[:, None] * H + o_h[None, :], b, mask=m)


def give(x_TH: Tensor, ids_TK: Tensor, most: int, table: Tensor, who: Tensor, state: Tensor) -> None:
    """Put the own tokens and their experts' ids where all that hold experts read them.

    Args:
        x_TH: contiguous; may have no rows.
        ids_TK: int32, contiguous.
        most: tokens of a round; places beyond the own ones get an id of -1.
        table, who: of `new_table`.
        state: as in peer.py.
    """
    (T, K), H = ids_TK.shape, x_TH.shape[1]
    launch_kernel(
        _give_kernel,
        (table.shape[0], triton.cdiv(most, BLOCK_ROWS)),
        x_TH if T else table.view(x_TH.dtype),
        ids_TK if T else table.view(torch.int32),
        table,
        who,
        state,
        T,
        most,
        H,
        K=K,
        BK=triton.next_power_of_2(K),
        BH=min(WIDTH, triton.next_power_of_2(H)),
        BR=BLOCK_ROWS,
        num_warps=4,
    )


def say(count: int, field: int, table: Tensor, who: Tensor, state: Tensor) -> None:
    """Tell peers that all that was launched before can be read.

    Args:
        count: of the round's words.
        field: OTHERS or OWNERS: whom.
        table, who, state: as in `give`.
    """
    launch_kernel(_say_kernel, (table.shape[0],), table, who, state, count, FIELD=field, num_warps=1)


def wait(
    count: int, field: int, flags_S: Tensor, who: Tensor, state: Tensor, end: Tensor, seconds: float
) -> None:
    """Let nothing that is launched after this begin before peers have come so far.

    Args:
        count: of the round's words.
        field: OTHERS or OWNERS: for whom.
        flags_S: own words.
        who, state: as in `give`.
        end, seconds: as in peer.py.
    """
    launch_kernel(
        _await_kernel,
        (1,),
        flags_S,
        who,
        state,
        end,
        count,
        limit_of(seconds),
        flags_S.shape[0],
        FIELD=field,
        LOOK=LOOK_EVERY,
        IS_TIMED=IS_TIMED,
        num_warps=1,
    )


def answer(y_RH: Tensor, order_R: Tensor, count: Tensor, pairs: int, table: Tensor, state: Tensor) -> None:
    """Put rows that were computed here back to the peers whose tokens they are of.

    Args:
        y_RH: rows of all peers' pairs, by expert; those beyond `count` are of nobody.
        order_R: int32, pair of each row; pairs of one peer follow those of the one before.
        count: int32 scalar, rows that were computed.
        pairs: of one peer.
        table, state: as in `give`.
    """
    R, H = y_RH.shape
    block = min(WIDTH, triton.next_power_of_2(H))
    launch_kernel(
        _answer_kernel,
        (triton.cdiv(R, BLOCK_ROWS), triton.cdiv(H, block)),
        y_RH,
        order_R,
        count,
        table,
        state,
        pairs,
        H,
        BH=block,
        BR=BLOCK_ROWS,
        num_warps=4,
    )
