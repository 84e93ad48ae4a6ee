"""Rows of experts to the GPUs whose tokens they are of: each to its place, or the sum of a token's.

Stored over NVLink as in peer.py, whose words say when they are there. Twin: link.py's `HostLink`. Programs that follow each other
store for another source each, so what stays here is written while the rest is on its way.

Names: p_ pointers, i_ program ids, o_ offsets, m_ masks; R rows, N numbers of a row, S sources, T tokens, K experts per token,
H hidden.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from sparseray.kernels.launch import launch_kernel
from sparseray.kernels.peer import FLAT, WIDTH, of_table


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
    """One token of one source: the sum over those of its k whose rows are held, in fp32."""
    i_t, i_s = (tl.program_id(0) // S).to(tl.int64), tl.program_id(0) % S
    if tl.load(p_state) == 0:
        held = tl.load(p_held)
        p_into = of_table(p_table, i_s, p_rows) + i_t * STRIDE
        first = (i_s * T + i_t) * K
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
            tl.store(p_into + o_h, acc.to(p_rows.dtype.element_ty), mask=o_h < H)


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
    """Store, for every token of every source, the sum of its rows that are held; zeros where none is.

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
