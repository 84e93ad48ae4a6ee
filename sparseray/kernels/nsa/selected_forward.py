"""Attention over selected blocks by query, forward, and its query gradient.

This branch comes last, so its forward also adds up the three under their gates, while they are in registers.

A program takes one query token with all query heads of one key/value head, so a selected block is loaded once
for the group (arXiv 2502.11089 section 3.4). The head is the slowest grid axis: one head's keys and values
fit the L2 cache, four heads' do not. Log-sum-exp is kept in base 2.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparseray.kernels.launch import launch_kernel
from sparseray.kernels.nsa.geometry import Geometry, query_sequences
from sparseray.kernels.nsa.pipeline import Attended, Forced
from sparseray.kernels.nsa.range_forward import LOG2E, in_bulk, key_sources, page_size
from sparseray.kernels.nsa.tiles import (
    add_tile,
    fetch,
    key_rows,
    load_tile,
    next_power_of_2,
    precision,
    split_width,
    store_tile,
)
from sparseray.kernels.nsa.tuning import launch_for


@triton.jit
def _range(p_row, n, t, SELECT: tl.constexpr, BN: tl.constexpr, INITIAL: tl.constexpr, LOCAL: tl.constexpr):
    """First and end of the tiles of BN keys in the blocks of a query at position t; none of those in its last block that
    lie behind t. The INITIAL first blocks and the LOCAL last ones, with which blocks ascend, are left out."""
    PARTS: tl.constexpr = (SELECT + BN - 1) // BN
    count = tl.minimum(n, t // SELECT + 1) - LOCAL
    if (PARTS > 1) & (LOCAL == 0):
        i_lo = tl.load(p_row + count - 1) * SELECT
        count = (count - 1) * PARTS + tl.minimum(PARTS, (t - i_lo) // BN + 1)
    else:
        count *= PARTS
    return INITIAL * PARTS, count


@triton.jit
def _tile(p_row, i, t, SELECT: tl.constexpr, BN: tl.constexpr):
    """First position of the i-th tile, the positions of its keys, and which of them belong to it."""
    PARTS: tl.constexpr = (SELECT + BN - 1) // BN
    i_lo = tl.load(p_row + i // PARTS) * SELECT + i % PARTS * BN
    o_i = i_lo + tl.arange(0, BN)
    m_i = o_i <= t
    if SELECT % BN != 0:
        m_i &= i % PARTS * BN + tl.arange(0, BN) < SELECT
    return i_lo, o_i, m_i


@triton.jit
def add_branches(p_cmp, p_win, p_gate, o_row, m_row, b_o, DV: tl.constexpr, DVP: tl.constexpr):
    """The gated sum of rows of the three branches, b_o those of the selected one."""
    p_gate += o_row * 3
    b_cmp = load_tile(p_cmp, o_row, m_row, DV, 0, DVP, True).to(tl.float32)
    b_win = load_tile(p_win, o_row, m_row, DV, 0, DVP, True).to(tl.float32)
    b_out = b_cmp * tl.load(p_gate, mask=m_row, other=0.0).to(tl.float32)[:, None]
    b_out += b_o.to(tl.float32) * tl.load(p_gate + 1, mask=m_row, other=0.0).to(tl.float32)[:, None]
    return b_out + b_win * tl.load(p_gate + 2, mask=m_row, other=0.0).to(tl.float32)[:, None]


@triton.jit(do_not_specialize=["num_q"])
def selected_fwd_kernel(
    p_q, p_k, p_k1, p_v, p_table, p_index, p_pos, p_seq, p_forced, p_forced_lse, p_cmp, p_win, p_gate, p_out, p_o, p_lse,
    p_meta, num_q, n, scale2,
    H: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, SELECT: tl.constexpr, BN: tl.constexpr,
    DQ: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr,
    IP: tl.constexpr,
    BULK: tl.constexpr, PAGE: tl.constexpr, KEEP: tl.constexpr, INITIAL: tl.constexpr, LOCAL: tl.constexpr,
):  # fmt: skip
    i_kv = tl.program_id(0) // num_q
    i_q = (tl.program_id(0) % num_q).to(tl.int64)
    t = tl.load(p_pos + i_q)
    i_seq = tl.load(p_seq + i_q)
    k_off = tl.load(p_meta + i_seq * 12 + 6)
    o_g = tl.arange(0, GP)
    m_g = o_g < G
    o_row = i_q * (H * G) + i_kv * G + o_g
    b_q0 = load_tile(p_q, o_row, m_g, DQ, 0, D0, True)
    if D1 > 0:
        b_q1 = load_tile(p_q, o_row, m_g, DQ, D0, D1, True)
    p_row = p_index + (i_q * H + i_kv) * n
    i_first, i_end = _range(p_row, n, t, SELECT, BN, INITIAL, LOCAL)
    if LOCAL > 0:
        # What the forced blocks gave, one of which holds the query itself.
        b_m = tl.load(p_forced_lse + o_row, mask=m_g, other=0.0)
        b_l = tl.full([GP], 1.0, tl.float32)
        b_acc = load_tile(p_forced, o_row, m_g, DV, 0, DVP, True).to(tl.float32)
    else:
        b_m = tl.full([GP], float("-inf"), tl.float32)
        b_l = tl.zeros([GP], tl.float32)
        b_acc = tl.zeros([GP, DVP], tl.float32)
    for i in range(i_first, i_end):
        i_lo, o_i, m_i = _tile(p_row, i, t, SELECT, BN)
        row = k_off + i_lo
        o_key = key_rows(p_table, k_off, o_i, m_i, PAGE) * H + i_kv
        b_k0 = fetch(p_k, row, o_key, m_i, i_kv, DQ, 0, D0, True, BULK)
        b_s = tl.dot(b_q0, tl.trans(b_k0), input_precision=IP)
        if D1 > 0:
            b_k1 = fetch(p_k1, row, o_key, m_i, i_kv, DQ, D0, D1, True, BULK)
            b_s = tl.dot(b_q1, tl.trans(b_k1), b_s, input_precision=IP)
        if (LOCAL == 0) | (SELECT % BN != 0):
            b_s = tl.where(m_i[None, :], b_s, float("-inf"))
        b_new = tl.maximum(b_m, tl.max(b_s, 1) * scale2)
        b_p = tl.exp2(b_s * scale2 - b_new[:, None])
        b_alpha = tl.exp2(b_m - b_new)
        b_l = b_l * b_alpha + tl.sum(b_p, 1)
        b_v = fetch(p_v, row, o_key, m_i, i_kv, DV, 0, DVP, True, BULK)
        b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc * b_alpha[:, None], input_precision=IP)
        b_m = b_new
    # Rounded as the other branches are, which the backward sees too.
    b_o = (b_acc / b_l[:, None]).to(p_out.dtype.element_ty)
    if KEEP:
        store_tile(p_o, o_row, m_g, b_o, DV, 0, DVP)
        tl.store(p_lse + o_row, b_m + tl.log2(b_l), mask=m_g)
    b_out = add_branches(p_cmp, p_win, p_gate, o_row, m_g, b_o, DV, DVP)
    store_tile(p_out, o_row, m_g, b_out, DV, 0, DVP)


@triton.jit
def selected_dq_kernel(
    p_q, p_k, p_k1, p_v, p_do, p_lse, p_dg, p_dq, p_index, p_pos, p_seq, p_meta, num_q, n, scale, scale2,
    H: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, SELECT: tl.constexpr, BN: tl.constexpr,
    DQ: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr,
    IP: tl.constexpr,
    BULK: tl.constexpr,
    ADD: tl.constexpr, INITIAL: tl.constexpr, LOCAL: tl.constexpr,
):  # fmt: skip
    i_kv = tl.program_id(0) // num_q
    i_q = (tl.program_id(0) % num_q).to(tl.int64)
    t = tl.load(p_pos + i_q)
    i_seq = tl.load(p_seq + i_q)
    k_off = tl.load(p_meta + i_seq * 12 + 6)
    o_g = tl.arange(0, GP)
    m_g = o_g < G
    o_row = i_q * (H * G) + i_kv * G + o_g
    b_q0 = load_tile(p_q, o_row, m_g, DQ, 0, D0, True)
    b_dq0 = tl.zeros([GP, D0], tl.float32)
    if D1 > 0:
        b_q1 = load_tile(p_q, o_row, m_g, DQ, D0, D1, True)
        b_dq1 = tl.zeros([GP, D1], tl.float32)
    b_do = load_tile(p_do, o_row, m_g, DV, 0, DVP, True)
    b_lse = tl.load(p_lse + o_row, mask=m_g, other=float("inf"))
    b_dg = tl.load(p_dg + o_row, mask=m_g, other=0.0)
    p_row = p_index + (i_q * H + i_kv) * n
    i_first, i_end = _range(p_row, n, t, SELECT, BN, INITIAL, LOCAL)
    for i in range(i_first, i_end):
        i_lo, o_i, m_i = _tile(p_row, i, t, SELECT, BN)
        row = k_off + i_lo
        o_key = (k_off + o_i) * H + i_kv
        b_k0 = fetch(p_k, row, o_key, m_i, i_kv, DQ, 0, D0, True, BULK)
        b_s = tl.dot(b_q0, tl.trans(b_k0), input_precision=IP)
        if D1 > 0:
            b_k1 = fetch(p_k1, row, o_key, m_i, i_kv, DQ, D0, D1, True, BULK)
            b_s = tl.dot(b_q1, tl.trans(b_k1), b_s, input_precision=IP)
        b_v = fetch(p_v, row, o_key, m_i, i_kv, DV, 0, DVP, True, BULK)
        b_dp = tl.dot(b_do, tl.trans(b_v), input_precision=IP)
        b_p = tl.exp2(b_s * scale2 - b_lse[:, None])
        if (LOCAL == 0) | (SELECT % BN != 0):
            b_p = tl.where(m_i[None, :], b_p, 0.0)
        b_ds = (b_p * (b_dp - b_dg[:, None])).to(b_k0.dtype)
        b_dq0 = tl.dot(b_ds, b_k0, b_dq0, input_precision=IP)
        if D1 > 0:
            b_dq1 = tl.dot(b_ds, b_k1, b_dq1, input_precision=IP)
    add_tile(p_dq, o_row, m_g, b_dq0 * scale, DQ, 0, D0, ADD)
    if D1 > 0:
        add_tile(p_dq, o_row, m_g, b_dq1 * scale, DQ, D0, D1, ADD)


def shared_constants(q: Tensor, k: Tensor, v: Tensor, select_block: int) -> dict[str, Any]:
    """Compile-time constants common to the kernels of the selected branch."""
    d0, d1 = split_width(q.shape[-1])
    return {
        "H": k.shape[-2], "G": q.shape[1] // k.shape[-2], "SELECT": select_block, "BN": max(16,
        next_power_of_2(select_block)),
        "DQ": q.shape[-1], "D0": d0, "D1": d1, "DV": v.shape[-1], "DVP": max(16,
        next_power_of_2(v.shape[-1])),
        "IP": precision(q.dtype),
    }  # fmt: skip


def _by_query(
    name: str, q: Tensor, k: Tensor, v: Tensor, select_block: int, table: Tensor | None,
    forced: Forced | Attended | None,
) -> dict[str, Any]:  # fmt: skip
    """Compile-time constants and options of a kernel that goes by query."""
    constants, bulk = shared_constants(q, k, v, select_block), in_bulk(k, v, table)
    width, padded = max(q.shape[-1], v.shape[-1]), max(16, next_power_of_2(constants["G"]))
    # Bulk copies need no threads, and 16 rows of 256 bytes no second warp's registers.
    is_lean = bulk and padded == 16 and width * q.element_size() <= 256
    launch = launch_for(name + "_bulk" if is_lean else name, width, q.element_size())
    tile = min(constants["BN"], launch["keys"])
    options = {"num_warps": launch["num_warps"], "num_stages": launch["num_stages"]}
    left_out = {"INITIAL": forced.num_initial if forced else 0, "LOCAL": forced.num_local if forced else 0}
    return constants | {"GP": padded, "BN": tile, "BULK": bulk} | left_out | options


def selected_forward(
    q: Tensor, k: Tensor, v: Tensor, index: Tensor, positions: Tensor, geometry: Geometry,
    others: tuple[Tensor, Tensor], gates: Tensor, *, select_block: int, scale: float, keep: bool, table: Tensor | None = None,
    forced: Attended | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Attention of queries to their selected blocks, added to the two other branches.

    Args:
        q: [T, HQ, D] packed; k: [S, H, D]; v: [S, H, Dv], contiguous, one dtype.
        index: int32 [T, H, n], ascending, padded with -1 (`select_blocks`).
        positions: int32 [T], position of every query in its sequence.
        others: outputs [T, HQ, Dv] of the compressed branch and of the window.
        gates: [T, HQ, 3].
        keep: whether this branch's own output and log-sum-exp are wanted.
        table: int32, pages of every sequence, where the keys are pages (`range_forward`).
        forced: what the blocks gave that are selected whatever the scores, for the others to be added to.

    Returns:
        The gated sum [T, HQ, Dv] in the dtype of q, this branch's output likewise and its base-2 log-sum-exp, fp32
        [T, HQ]; the last two are empty unless they are kept.
    """
    summed = torch.empty_like(others[0])
    out = torch.empty_like(summed) if keep else q.new_empty(0)
    lse = torch.empty(q.shape[:2] if keep else 0, dtype=torch.float32, device=q.device)
    options = _by_query("selected_fwd", q, k, v, select_block, table, forced)
    launch_kernel(
        selected_fwd_kernel, (q.shape[0] * k.shape[-2],),
        q, *key_sources(k, v, options["BN"], bulk=options["BULK"]), table, index, positions, query_sequences(geometry),
        *((None, None) if forced is None else (forced.out, forced.lse)), *others, gates, summed, out, lse, geometry.meta, q.shape[0], index.shape[-1], scale * LOG2E,
        PAGE=page_size(k, table), KEEP=keep, **options,
    )  # fmt: skip
    return summed, out, lse


def selected_query_gradient(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, row_lse: Tensor, row_dg: Tensor, dq: Tensor, index: Tensor,
    positions: Tensor, geometry: Geometry, *, select_block: int, scale: float, add: bool, forced: Forced | None = None,
) -> None:  # fmt: skip
    """Write or add the gradient of the selected branch to dq, without the forced blocks if any are named; rows as in
    `range_backward`."""
    options = _by_query("selected_dq", q, k, v, select_block, None, forced)
    launch_kernel(
        selected_dq_kernel, (q.shape[0] * k.shape[1],),
        q, *key_sources(k, v, options["BN"], bulk=options["BULK"]), do, row_lse, row_dg, dq, index, positions,
        query_sequences(geometry), geometry.meta, q.shape[0], index.shape[-1], scale, scale * LOG2E, ADD=add, **options,
    )  # fmt: skip
