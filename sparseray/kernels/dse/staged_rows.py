"""Rows that lie staged on the GPU, as tokens read them and as a later commit left them (Triton); oracles: `PlainRowOps`.

Both only copy. Which rows two steps share is found by a search in the sorted list of the later one, in the same launch
that copies them: nothing else knows it in time, and nobody waits for it.

Shapes: N tokens' addresses, U distinct rows, V those of the other step, D row width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparseray.kernels.launch import launch_kernel

BLOCK_ROWS = 16


@triton.jit(do_not_specialize=["N"])
def _take_kernel(p_x, p_places, p_out, N, D: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr):
    o_n = tl.program_id(0) * BN + tl.arange(0, BN)
    o_d = tl.arange(0, BD)
    m_n = o_n < N
    m = m_n[:, None] & (o_d < D)[None, :]
    place = tl.load(p_places + o_n, mask=m_n, other=0).to(tl.int64)
    x = tl.load(p_x + place[:, None] * D + o_d[None, :], mask=m, other=0.0)
    tl.store(p_out + o_n.to(tl.int64)[:, None] * D + o_d[None, :], x, mask=m)


def take_rows(x_UD: Tensor, places_N: Tensor) -> Tensor:
    """x[places], in x's dtype: [N, D].

    Args:
        x_UD: contiguous.
        places_N: int32 or int64, below U (unchecked).
    """
    N, D = places_N.numel(), x_UD.shape[1]
    out_ND = torch.empty(N, D, dtype=x_UD.dtype, device=x_UD.device)
    launch_kernel(
        _take_kernel,
        (triton.cdiv(N, 2 * BLOCK_ROWS),),
        x_UD, places_N, out_ND, N, D=D, BN=2 * BLOCK_ROWS, BD=triton.next_power_of_2(D), num_warps=4,
    )  # fmt: skip
    return out_ND


@triton.jit(do_not_specialize=["U", "V", "steps"])
def _newer_kernel(
    p_w, p_m, p_v, p_t, p_ids, p_w2, p_m2, p_v2, p_t2, p_ids2, U, V, steps,
    D: tl.constexpr, BU: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    o_u = tl.program_id(0) * BU + tl.arange(0, BU)
    m_u = o_u < U
    row = tl.load(p_ids + o_u, mask=m_u, other=-1)
    # Before `low` all of the other rows are smaller, from `high` on none is.
    low, high = tl.zeros([BU], tl.int32), tl.zeros([BU], tl.int32) + V
    for _ in range(0, steps):
        middle = (low + high) // 2
        is_open = low < high
        is_smaller = tl.load(p_ids2 + middle, mask=is_open, other=0) < row
        low = tl.where(is_open & is_smaller, middle + 1, low)
        high = tl.where(is_open & (is_smaller == 0), middle, high)
    m_u = m_u & (low < V)
    m_u = m_u & (tl.load(p_ids2 + low, mask=m_u, other=-1) == row)
    tl.store(p_v + o_u, tl.load(p_v2 + low, mask=m_u, other=0.0), mask=m_u)
    tl.store(p_t + o_u, tl.load(p_t2 + low, mask=m_u, other=0), mask=m_u)
    o_d = tl.arange(0, BD)
    m = m_u[:, None] & (o_d < D)[None, :]
    here = o_u.to(tl.int64)[:, None] * D + o_d[None, :]
    there = low.to(tl.int64)[:, None] * D + o_d[None, :]
    tl.store(p_w + here, tl.load(p_w2 + there, mask=m, other=0.0), mask=m)
    tl.store(p_m + here, tl.load(p_m2 + there, mask=m, other=0.0), mask=m)


def take_newer(
    fields: tuple[Tensor, ...], ids_U: Tensor, newer: tuple[Tensor, ...], newer_ids_V: Tensor
) -> None:
    """Overwrite the rows that are in both lists by the other's, in place.

    Args:
        fields: weight [U, D], m [U, D], v [U] and t [U], contiguous.
        ids_U: int64, rising, none below 0.
        newer: the same of the other list.
        newer_ids_V: int64, rising.
    """
    U, V, D = ids_U.numel(), newer_ids_V.numel(), fields[0].shape[1]
    launch_kernel(
        _newer_kernel,
        (triton.cdiv(U, BLOCK_ROWS),),
        *fields, ids_U, *newer, newer_ids_V, U, V, V.bit_length(),
        D=D, BU=BLOCK_ROWS, BD=triton.next_power_of_2(D), num_warps=4,
    )  # fmt: skip
