"""Gradient of an embedding without atomics: rows sorted by id, summed in pieces, the pieces in order.

The sorted list is cut every BLOCK positions. One program sums each run of equal ids within a block; where an id's
run goes on over blocks, a second launch adds up the blocks' sums in order. No chain is longer than a block or the
number of blocks of the most frequent id, and nothing is copied to the host. Oracle: `reference.embedding_grad_reference`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparseray.kernels.launch import launch_kernel

BLOCK, ROWS, COLUMNS = 64, 4, 1024
"""Positions of a piece; rows and columns that a program has in flight."""


@triton.jit
def _id(p_ids, i, R):
    """The sorted id at position i; -1 where there is none."""
    return tl.load(p_ids + i, mask=(i >= 0) & (i < R), other=-1)


@triton.jit
def _add(p_out, o, m, b, ACCUMULATE: tl.constexpr):
    if ACCUMULATE:
        b += tl.load(p_out + o, mask=m, other=0.0)
    tl.store(p_out + o, b.to(p_out.dtype.element_ty), mask=m)


@triton.jit
def _runs_kernel(
    p_ids, p_order, p_grads, p_out, p_parts, R,
    H: tl.constexpr, ACCUMULATE: tl.constexpr, BLOCK: tl.constexpr, BR: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """The run that begins at this position: to its id's row if it is whole, else to its block's part (first, last)."""
    i = tl.program_id(0)
    index = _id(p_ids, i, R)
    is_first = i % BLOCK == 0
    is_start = _id(p_ids, i - 1, R) != index
    if (index >= 0) & (is_first | is_start):
        end = (i // BLOCK + 1) * BLOCK
        o_i = i + tl.arange(0, BLOCK)
        count = tl.sum(((o_i < end) & (_id(p_ids, o_i, R) == index)).to(tl.int32), 0)
        o_h = tl.program_id(1) * BH + tl.arange(0, BH)
        m_h = o_h < H
        acc = tl.zeros([BH], tl.float32)
        for start in range(0, count, BR):
            o_r = start + tl.arange(0, BR)
            row = tl.load(p_order + i + o_r, mask=o_r < count, other=0)
            m = (o_r < count)[:, None] & m_h[None, :]
            acc += tl.sum(
                tl.load(p_grads + row[:, None] * H + o_h[None, :], mask=m, other=0.0).to(tl.float32), 0
            )
        goes_on = (i + count == end) & (_id(p_ids, end, R) == index)
        if is_start & (goes_on == 0):
            _add(p_out, index.to(tl.int64) * H + o_h, m_h, acc, ACCUMULATE)
        else:
            slot = i // BLOCK * 2 + tl.where(is_first, 0, 1)
            tl.store(p_parts + slot.to(tl.int64) * H + o_h, acc, mask=m_h)


@triton.jit
def _join_kernel(
    p_ids, p_out, p_parts, R, H: tl.constexpr, ACCUMULATE: tl.constexpr, BLOCK: tl.constexpr, BH: tl.constexpr
):
    """The id whose run begins in this block and goes on into the next: its parts, in order."""
    i_b = tl.program_id(0)
    last = (i_b + 1) * BLOCK - 1
    index = _id(p_ids, last, R)
    is_whole = _id(p_ids, i_b * BLOCK, R) == index
    begins = (is_whole == 0) | (_id(p_ids, i_b * BLOCK - 1, R) != index)
    if (index >= 0) & (_id(p_ids, last + 1, R) == index) & begins:
        o_h = tl.program_id(1) * BH + tl.arange(0, BH)
        m_h = o_h < H
        slot = (i_b * 2 + tl.where(is_whole, 0, 1)).to(tl.int64)
        acc = tl.load(p_parts + slot * H + o_h, mask=m_h, other=0.0)
        block = i_b + 1
        while _id(p_ids, block * BLOCK, R) == index:
            acc += tl.load(p_parts + block.to(tl.int64) * (2 * H) + o_h, mask=m_h, other=0.0)
            block += 1
        _add(p_out, index.to(tl.int64) * H + o_h, m_h, acc, ACCUMULATE)


@torch.no_grad()
def embedding_grad_(out_VH: Tensor, ids_R: Tensor, grads_RH: Tensor, *, accumulate: bool = False) -> Tensor:
    """Write (or with `accumulate` add) the sum of each id's gradients to its row; return out_VH.

    Args:
        out_VH: contiguous; without `accumulate` rows of absent ids become 0, and a row is rounded once.
        ids_R: int64 below V; negative ones do not count.
        grads_RH: bf16, fp16 or fp32.
    """
    R, H = grads_RH.shape
    if not accumulate:
        out_VH.zero_()
    # Half as many passes of the sort as with 64 bits.
    ordered_R, order_R = torch.sort(ids_R.int(), stable=True)
    columns = min(COLUMNS, triton.next_power_of_2(H))
    blocks, tiles = triton.cdiv(R, BLOCK), triton.cdiv(H, columns)
    parts = torch.empty(2 * blocks, H, dtype=torch.float32, device=grads_RH.device)
    sizes = {"H": H, "ACCUMULATE": accumulate, "BLOCK": BLOCK, "BH": columns}
    launch_kernel(
        _runs_kernel, (R, tiles), ordered_R, order_R, grads_RH.contiguous(), out_VH, parts, R, **sizes,
        BR=ROWS, num_warps=4,
    )  # fmt: skip
    launch_kernel(_join_kernel, (blocks, tiles), ordered_R, out_VH, parts, R, **sizes, num_warps=1)
    return out_VH
