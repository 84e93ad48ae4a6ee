"""The gated sum of the three branches, and one pass before the backward that all branches share.

d gate_c = do . o_c is also what each branch's softmax gradient subtracts, so one kernel makes both. The gate
enters the branches as lse - log2 g: exp2(s - that) is g * p, and no branch reads a scaled copy of do.
Source: arXiv 2502.11089 eq. 5.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparseray.kernels.launch import launch_kernel
from sparseray.kernels.nsa.tiles import load_tile, next_power_of_2, store_tile
from sparseray.kernels.nsa.tuning import LAUNCH


@triton.jit(do_not_specialize=["num_rows"])
def combine_kernel(
    p_cmp, p_slc, p_win, p_gate, p_o, num_rows, BR: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr
):
    o_r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    m_r = o_r < num_rows
    b = tl.zeros([BR, DVP], tl.float32)
    for c in tl.static_range(3):
        p_in = p_cmp if c == 0 else (p_slc if c == 1 else p_win)
        b_g = tl.load(p_gate + o_r * 3 + c, mask=m_r, other=0.0).to(tl.float32)
        b += b_g[:, None] * load_tile(p_in, o_r, m_r, DV, 0, DVP, True).to(tl.float32)
    store_tile(p_o, o_r, m_r, b, DV, 0, DVP)


@triton.jit
def prepare_kernel(
    p_do, p_cmp, p_slc, p_win, p_gate, p_lse_cmp, p_lse_slc, p_lse_win, p_row_lse, p_row_dg, p_dgate,
    num_rows,
    BR: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr,
):  # fmt: skip
    o_r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    m_r = o_r < num_rows
    b_do = load_tile(p_do, o_r, m_r, DV, 0, DVP, True).to(tl.float32)
    for c in tl.static_range(3):
        p_in = p_cmp if c == 0 else (p_slc if c == 1 else p_win)
        p_lse = p_lse_cmp if c == 0 else (p_lse_slc if c == 1 else p_lse_win)
        b_o = load_tile(p_in, o_r, m_r, DV, 0, DVP, True).to(tl.float32)
        b_dg = tl.sum(b_do * b_o, 1)
        b_g = tl.load(p_gate + o_r * 3 + c, mask=m_r, other=1.0).to(tl.float32)
        b_lse = tl.load(p_lse + o_r, mask=m_r, other=0.0)
        b_none = (b_lse == float("-inf")) | (b_g == 0.0)
        b_row = tl.where(b_none, float("inf"), b_lse - tl.log2(tl.where(b_none, 1.0, b_g)))
        tl.store(p_row_lse + c * num_rows + o_r, b_row, mask=m_r)
        tl.store(p_row_dg + c * num_rows + o_r, b_dg, mask=m_r)
        tl.store(p_dgate + o_r * 3 + c, b_dg.to(p_dgate.dtype.element_ty), mask=m_r)


@triton.jit(do_not_specialize=["num_rows"])
def dots_kernel(p_a, p_b, p_o, num_rows, BR: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr):
    o_r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    m_r = o_r < num_rows
    b_a = load_tile(p_a, o_r, m_r, DV, 0, DVP, True).to(tl.float32)
    b_b = load_tile(p_b, o_r, m_r, DV, 0, DVP, True).to(tl.float32)
    tl.store(p_o + o_r, tl.sum(b_a * b_b, 1), mask=m_r)


def row_dots(a: Tensor, b: Tensor) -> Tensor:
    """Dot products of the rows of two tensors, fp32 [T, HQ].

    Args:
        a, b: [T, HQ, Dv], contiguous.
    """
    out = torch.empty(a.shape[:2], dtype=torch.float32, device=a.device)
    launch = LAUNCH["combine"]
    launch_kernel(
        dots_kernel, (triton.cdiv(out.numel(), launch["rows"]),),
        a, b, out, out.numel(), BR=launch["rows"], DV=a.shape[2], DVP=max(16, next_power_of_2(a.shape[2])),
        num_warps=launch["num_warps"],
    )  # fmt: skip
    return out


def combine(out_cmp: Tensor, out_slc: Tensor, out_win: Tensor, gates: Tensor) -> Tensor:
    """Sum of gate times branch output.

    Args:
        out_cmp, out_slc, out_win: [T, HQ, Dv].
        gates: [T, HQ, 3], not negative, any float dtype.

    Returns:
        [T, HQ, Dv] in the dtype of the branches.
    """
    out = torch.empty_like(out_cmp)
    rows, width = out.shape[0] * out.shape[1], out.shape[2]
    launch = LAUNCH["combine"]
    launch_kernel(
        combine_kernel, (triton.cdiv(rows, launch["rows"]),),
        out_cmp, out_slc, out_win, gates, out, rows, BR=launch["rows"], DV=width,
        DVP=max(16, next_power_of_2(width)), num_warps=launch["num_warps"],
    )  # fmt: skip
    return out


def prepare_backward(
    do: Tensor, outs: tuple[Tensor, Tensor, Tensor], lses: tuple[Tensor, Tensor, Tensor], gates: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """What the branches' backward kernels read per row.

    Returns:
        row_lse fp32 [3, T, HQ], row_dg fp32 [3, T, HQ], and the gradient of the gates [T, HQ, 3].
    """
    tokens, heads, width = do.shape
    row_lse = torch.empty(3, tokens, heads, dtype=torch.float32, device=do.device)
    row_dg = torch.empty_like(row_lse)
    dgates = torch.empty_like(gates)
    launch = LAUNCH["combine"]
    launch_kernel(
        prepare_kernel, (triton.cdiv(tokens * heads, launch["rows"]),),
        do, *outs, gates, *lses, row_lse, row_dg, dgates, tokens * heads, BR=launch["rows"], DV=width,
        DVP=max(16, next_power_of_2(width)), num_warps=launch["num_warps"],
    )  # fmt: skip
    return row_lse, row_dg, dgates
