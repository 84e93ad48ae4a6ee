"""Tokens to the GPUs that have experts of theirs, and rows of experts back: each to its place, or the sum of a token's.

Stored over NVLink as in peer.py, whose words say when they are there. Twin: link.py's `HostLink`. Programs that follow each other
store for another source each, so what stays here is written while the rest is on its way.

Names: p_ pointers, i_ program ids, o_ offsets, m_ masks; R rows, N numbers of a row, S sources, O owners of experts, T tokens,
K experts per token, E experts, H hidden.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparseray.kernels.launch import launch_kernel
from sparseray.kernels.peer import FLAT, WIDTH, of_stores, of_table

OWNERS_BLOCK = 256
"""Tokens whose owners one program finds."""


@triton.jit
def _owners_kernel(p_ids, p_bits, p_out, T, K: tl.constexpr, KP: tl.constexpr, BT: tl.constexpr):
    """Which owners the experts of each token have, as bits."""
    o_t = tl.program_id(0) * BT + tl.arange(0, BT)
    o_k = tl.arange(0, KP)
    m = (o_t < T)[:, None] & (o_k < K)[None, :]
    ids = tl.load(p_ids + o_t[:, None] * K + o_k[None, :], mask=m, other=0)
    bits = tl.load(p_bits + ids, mask=m, other=0)
    tl.store(p_out + o_t, tl.reduce(bits, 1, _either), mask=o_t < T)


@triton.jit
def _either(a, b):
    return a | b


@triton.jit(do_not_specialize=["COUNT"])
def _put_tokens_kernel(
    p_from, p_table, p_owners, p_state, T, COUNT, H: tl.constexpr, BH: tl.constexpr, BT: tl.constexpr
):
    """Tokens i * BT and on, and those as many programs further, to each of COUNT places whose bit they have."""
    if tl.load(p_state) == 0:
        o_h = tl.arange(0, BH)
        for first in range(tl.program_id(0) * BT, T, tl.num_programs(0) * BT):
            o_t = first + tl.arange(0, BT)
            m_t = o_t < T
            owners = tl.load(p_owners + o_t, mask=m_t, other=0)
            at = o_t.to(tl.int64)[:, None] * H + o_h[None, :]
            b = tl.load(p_from + at, mask=m_t[:, None] & (o_h < H)[None, :])
            for i in range(COUNT):
                m = (((owners >> i) & 1) == 1)[:, None] & (o_h < H)[None, :]
                tl.store(of_table(p_table, i, p_from) + at, b, mask=m)


@triton.jit
def _sum_of_owners_kernel(p_rows, p_owners, p_out, O: tl.constexpr, H: tl.constexpr, BH: tl.constexpr):
    """One token: the sum, in the owners' order and in fp32, of what those gave whose bit it has."""
    i_t = tl.program_id(0).to(tl.int64)
    owners = tl.load(p_owners + i_t)
    for start in range(0, H, BH):
        o_h = start + tl.arange(0, BH)
        acc = tl.zeros([BH], tl.float32)
        for i in tl.static_range(O):
            m = (((owners >> i) & 1) == 1) & (o_h < H)
            acc += tl.load(p_rows + (i_t * O + i) * H + o_h, mask=m, other=0.0).to(tl.float32)
        tl.store(p_out + i_t * H + o_h, acc.to(p_out.dtype.element_ty), mask=o_h < H)


@triton.jit(do_not_specialize=["S"])
def _give_rows_kernel(
    p_rows, p_table, p_order, p_held, p_state, S, R, SPAN, N, STRIDE, BN: tl.constexpr, BR: tl.constexpr
):
    """Rows i_r * BR and on, as far as they are held, to the places that their order says, of SPAN for each source."""
    i_r, i_n = tl.program_id(0), tl.program_id(1)
    held = tl.minimum(R, tl.load(p_held))
    # Rows of one source lie one after another, about as many of each.
    each = tl.cdiv(tl.cdiv(held, BR), S)
    is_one = i_r < each * S
    i_r = i_r % S * each + i_r // S
    if (tl.load(p_state) == 0) & is_one & (i_r * BR < held):
        o_r = i_r * BR + tl.arange(0, BR).to(tl.int64)
        o_n = i_n * BN + tl.arange(0, BN)
        m_r = o_r < held
        m = m_r[:, None] & (o_n < N)[None, :]
        b = tl.load(p_rows + o_r[:, None] * N + o_n[None, :], mask=m)
        order = tl.load(p_order + o_r, mask=m_r, other=0)
        p_into = of_table(p_table, order // SPAN, p_rows)
        tl.store(p_into[:, None] + (order % SPAN).to(tl.int64)[:, None] * STRIDE + o_n[None, :], b, mask=m)


@triton.jit(do_not_specialize=["S"])
def _give_sums_kernel(
    p_rows,
    p_table,
    p_inverse,
    p_weights,
    p_held,
    p_state,
    S,
    T,
    STRIDE,
    H: tl.constexpr,
    K: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BH: tl.constexpr,
):
    """One token of one source: the sum over those of its k whose rows are held, in fp32, if any is."""
    i_t, i_s = (tl.program_id(0) // S).to(tl.int64), tl.program_id(0) % S
    if tl.load(p_state) == 0:
        held = tl.load(p_held)
        p_into = of_table(p_table, i_s, p_rows) + i_t * STRIDE
        first = (i_s * T + i_t) * K
        # Nobody reads what a token has where no expert of it is (`sum_of_owners`).
        nearest = held
        for k in tl.static_range(K):
            nearest = tl.minimum(nearest, tl.load(p_inverse + first + k))
        for start in range(0, H, BH):
            o_h = start + tl.arange(0, BH)
            acc = tl.zeros([BH], tl.float32)
            for k in tl.static_range(K):
                row = tl.load(p_inverse + first + k).to(tl.int64)
                m = (row < held) & (o_h < H)
                x = tl.load(p_rows + row * H + o_h, mask=m, other=0.0).to(tl.float32)
                if WEIGHTED:
                    x = x * tl.load(p_weights + first + k)
                acc += x
            tl.store(p_into + o_h, acc.to(p_rows.dtype.element_ty), mask=(o_h < H) & (nearest < held))


def owners_of(ids_TK: Tensor, bits_E: Tensor) -> Tensor:
    """Which owners the experts of each token have, as bits, int64 [T].

    Args:
        ids_TK: int32, experts of each token, contiguous.
        bits_E: int64, of each expert the bit of its owner.
    """
    T, K = ids_TK.shape
    out_T = torch.empty(T, dtype=torch.int64, device=ids_TK.device)
    padded = triton.next_power_of_2(K)
    launch_kernel(
        _owners_kernel, (triton.cdiv(T, OWNERS_BLOCK),),
        ids_TK, bits_E, out_T, T, K=K, KP=padded, BT=OWNERS_BLOCK, num_warps=4,
    )  # fmt: skip
    return out_T


def put_tokens(x_TH: Tensor, owners_T: Tensor, table: Tensor, state: Tensor, *, beside: bool = False) -> None:
    """Store each token where its bits say, at its own place.

    Args:
        x_TH: contiguous.
        owners_T: of `owners_of`; bit i is of the table's i-th place.
        table: of `table_of`; contiguous places of the same dtype and size.
        state: of `new_state`; where it is not OK nothing is stored.
        beside: as of `put_all`.
    """
    T, H = x_TH.shape
    programs, block, warps = of_stores(beside)
    wide = triton.next_power_of_2(H)
    tokens = max(1, block // wide)
    launch_kernel(
        _put_tokens_kernel, (min(programs, triton.cdiv(T, tokens)),),
        x_TH, table, owners_T, state, T, len(table), H=H, BH=wide, BT=tokens, num_warps=warps,
    )  # fmt: skip


def sum_of_owners(rows_TOH: Tensor, owners_T: Tensor) -> Tensor:
    """What `give_sums` gave for each token, summed over its owners in their order, [T, H].

    Args:
        rows_TOH: contiguous; what belongs to no owner of a token may be anything.
        owners_T: of `owners_of`.
    """
    T, owners, H = rows_TOH.shape
    out_TH = rows_TOH.new_empty(T, H)
    launch_kernel(
        _sum_of_owners_kernel, (T,),
        rows_TOH, owners_T, out_TH, O=owners, H=H, BH=min(2048, triton.next_power_of_2(H)), num_warps=4,
    )  # fmt: skip
    return out_TH


def give_rows(
    rows_RN: Tensor, order_R: Tensor, held: Tensor, table: Tensor, span: int, stride: int, state: Tensor
) -> None:
    """Store each row where its source wants it.

    Args:
        rows_RN: contiguous; numbers of one dimension are rows of one.
        order_R: int32; row r belongs to source order // span, at place order % span.
        held: int32 scalar, how many rows there are, if fewer.
        table: of `table_of`; a place for each source.
        span: places of a source.
        stride: numbers from one place to the next.
        state: of `new_state`; where it is not OK nothing is stored.
    """
    R, S, width = order_R.shape[0], len(table), rows_RN[0].numel() if len(rows_RN) else 0
    if not R:
        return
    columns = min(WIDTH, triton.next_power_of_2(width))
    height = max(1, FLAT // columns)
    launch_kernel(
        _give_rows_kernel,
        (triton.cdiv(triton.cdiv(R, height), S) * S, triton.cdiv(width, columns)),
        rows_RN,
        table,
        order_R,
        held,
        state,
        S,
        R,
        span,
        width,
        stride,
        BN=columns,
        BR=height,
        num_warps=4,
    )


def give_sums(
    rows_RH: Tensor,
    inverse_SR: Tensor,
    weights_STK: Tensor | None,
    held: Tensor,
    table: Tensor,
    shape: tuple[int, int, int],
    stride: int,
    state: Tensor,
) -> None:
    """Store, for every token of every source, the sum of its rows that are held; nothing where none is.

    Args:
        rows_RH: contiguous.
        inverse_SR: int32, the row of each (source, token, k); from `held` on where it is not here.
        weights_STK: fp32, factors of the rows; None for 1.
        held: int32 scalar, rows that are here.
        table: of `table_of`; where the first token's sum of each source goes.
        shape: S, T and K.
        stride: numbers from one token's sum to the next one's.
        state: of `new_state`; where it is not OK nothing is stored.
    """
    (S, T, K), H = shape, rows_RH.shape[1]
    launch_kernel(
        _give_sums_kernel,
        (T * S,),
        rows_RH,
        table,
        inverse_SR,
        inverse_SR if weights_STK is None else weights_STK,
        held,
        state,
        S,
        T,
        stride,
        H=H,
        K=K,
        WEIGHTED=weights_STK is not None,
        BH=min(2048, triton.next_power_of_2(H)),
        num_warps=4,
    )
