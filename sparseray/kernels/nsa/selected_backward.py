"""Gradients of the selected branch.

A program takes one block and the queries that selected it (`inverse.py`) and adds up dk and dv of the block.
For small groups it also writes what each (query, block) pair gives to dq, which a second kernel adds in
ascending order of the blocks; the queries then come a chunk at a time, and dk and dv stay in fp32 between
chunks. Large groups take dq query by query (`selected_forward.py`): there the pairs' rows would be more bytes
than the keys. No atomics: the same inputs give the same bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparseray.kernels.launch import launch_kernel
from sparseray.kernels.nsa.geometry import KEYS, Geometry
from sparseray.kernels.nsa.inverse import Inverse, invert_selection, pays_by_block, queries_per_chunk
from sparseray.kernels.nsa.pipeline import Forced
from sparseray.kernels.nsa.range_forward import LOG2E, in_bulk, tokens_per_tile
from sparseray.kernels.nsa.selected_forward import selected_query_gradient, shared_constants
from sparseray.kernels.nsa.selected_pipelined_backward import fits_pipeline, selected_pipelined_dkdv
from sparseray.kernels.nsa.tiles import add_tile, block_rows, can_copy, load_tile, next_power_of_2, store_tile
from sparseray.kernels.nsa.tuning import LAUNCH, launch_for


@triton.jit
def selected_bwd_kernel(
    p_q, p_k, p_v, p_do, p_lse, p_dg, p_part_q, p_dk, p_dv, p_part_k, p_part_v, p_entries, p_queries, p_parts,
    p_tiles, p_meta, p_pos, num_blocks, n, first, scale, scale2,
    H: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, BQ: tl.constexpr, SELECT: tl.constexpr,
    BN: tl.constexpr, DQ: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr,
    IP: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    p_part = p_parts + tl.program_id(0) * 6
    i_row = tl.load(p_part)
    if i_row < 0:
        return
    num_parts = tl.load(p_part + 2)
    i_slot = tl.load(p_part + 3) + tl.load(p_part + 1)
    o_c = tl.arange(0, BN)
    i_kv, o_i, m_i, o_key = block_rows(i_row, o_c, p_tiles, p_meta, num_blocks, H, SELECT)
    b_k0 = load_tile(p_k, o_key, m_i, DQ, 0, D0, True)
    b_dk0 = tl.zeros([BN, D0], tl.float32)
    if D1 > 0:
        b_k1 = load_tile(p_k, o_key, m_i, DQ, D0, D1, True)
        b_dk1 = tl.zeros([BN, D1], tl.float32)
    b_v = load_tile(p_v, o_key, m_i, DV, 0, DVP, True)
    b_dv = tl.zeros([BN, DVP], tl.float32)
    e_lo = tl.load(p_part + 4)
    e_hi = tl.load(p_part + 5)
    o_m = tl.arange(0, BQ * GP)
    o_g = o_m % GP
    for e in range(e_lo, e_hi, BQ):
        o_e = e + o_m // GP
        m_e = o_e < e_hi
        m_q = m_e & (o_g < G)
        b_i = tl.load(p_queries + o_e, mask=m_e, other=0)
        b_t = tl.load(p_pos + b_i, mask=m_e, other=-1)
        o_row = b_i.to(tl.int64) * (H * G) + i_kv * G + o_g
        b_q0 = load_tile(p_q, o_row, m_q, DQ, 0, D0, True)
        b_s = tl.dot(b_k0, tl.trans(b_q0), input_precision=IP)
        if D1 > 0:
            b_q1 = load_tile(p_q, o_row, m_q, DQ, D0, D1, True)
            b_s = tl.dot(b_k1, tl.trans(b_q1), b_s, input_precision=IP)
        b_do = load_tile(p_do, o_row, m_q, DV, 0, DVP, True)
        b_lse = tl.load(p_lse + o_row, mask=m_q, other=float("inf"))
        b_dg = tl.load(p_dg + o_row, mask=m_q, other=0.0)
        b_dp = tl.dot(b_v, tl.trans(b_do), input_precision=IP)
        b_see = m_i[:, None] & (o_i[:, None] <= b_t[None, :])
        b_p = tl.where(b_see, tl.exp2(b_s * scale2 - b_lse[None, :]), 0.0)
        b_dv = tl.dot(b_p.to(b_do.dtype), b_do, b_dv, input_precision=IP)
        b_ds = (b_p * (b_dp - b_dg[None, :])).to(b_q0.dtype)
        b_dk0 = tl.dot(b_ds, b_q0, b_dk0, input_precision=IP)
        if D1 > 0:
            b_dk1 = tl.dot(b_ds, b_q1, b_dk1, input_precision=IP)
        if PAIRS:
            b_f = tl.load(p_entries + o_e, mask=m_e, other=0) - first * (H * n)
            o_out = b_f.to(tl.int64) * G + o_g
            b_dst = tl.trans(b_ds)
            store_tile(p_part_q, o_out, m_q, tl.dot(b_dst, b_k0, input_precision=IP), DQ, 0, D0)
            if D1 > 0:
                store_tile(p_part_q, o_out, m_q, tl.dot(b_dst, b_k1, input_precision=IP), DQ, D0, D1)
    if num_parts == 1:
        add_tile(p_dk, o_key, m_i, b_dk0 * scale, DQ, 0, D0, True)
        if D1 > 0:
            add_tile(p_dk, o_key, m_i, b_dk1 * scale, DQ, D0, D1, True)
        add_tile(p_dv, o_key, m_i, b_dv, DV, 0, DVP, True)
    else:
        o_part = i_slot.to(tl.int64) * SELECT + o_c
        store_tile(p_part_k, o_part, m_i, b_dk0 * scale, DQ, 0, D0)
        if D1 > 0:
            store_tile(p_part_k, o_part, m_i, b_dk1 * scale, DQ, D0, D1)
        store_tile(p_part_v, o_part, m_i, b_dv, DV, 0, DVP)


@triton.jit
def add_parts_kernel(
    p_out, p_part_sum, p_parts, p_tiles, p_meta, num_blocks,
    H: tl.constexpr, SELECT: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    p_part = p_parts + tl.program_id(0) * 6
    i_row = tl.load(p_part)
    num_parts = tl.load(p_part + 2)
    # The first part of a row adds them all.
    if (i_row < 0) | (num_parts == 1) | (tl.load(p_part + 1) > 0):
        return
    o_c = tl.program_id(1) * BN + tl.arange(0, BN)
    _, _, m_i, o_key = block_rows(i_row, o_c, p_tiles, p_meta, num_blocks, H, SELECT)
    i_slot = tl.load(p_part + 3).to(tl.int64)
    b_sum = tl.zeros([BN, DP], tl.float32)
    # BP parts are on their way together.
    o = tl.arange(0, BP * BN)
    o_row = (i_slot + o // BN) * SELECT + tl.program_id(1) * BN + o % BN
    m_row = tl.program_id(1) * BN + o % BN < SELECT
    for i in range(0, num_parts, BP):
        m = m_row & (i + o // BN < num_parts)
        b = load_tile(p_part_sum, o_row + i * SELECT, m, D, 0, DP, True)
        b_sum += tl.sum(tl.reshape(b, [BP, BN, DP]), 0)
    add_tile(p_out, o_key, m_i, b_sum, D, 0, DP, True)


@triton.jit
def add_queries_kernel(
    p_part, p_dq, p_pos, first, n, scale,
    H: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, SELECT: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    ADD: tl.constexpr,
):  # fmt: skip
    """dq of one query and key/value head: what its selected blocks gave, the lowest first."""
    i_local = (tl.program_id(0) // H).to(tl.int64)
    i_kv = tl.program_id(0) % H
    count = tl.minimum(n, tl.load(p_pos + first + i_local) // SELECT + 1)
    o_g = tl.arange(0, GP)
    m_g = o_g < G
    b_sum = tl.zeros([GP, DP], tl.float32)
    for i in range(0, count):
        o_part = ((i_local * H + i_kv) * n + i) * G + o_g
        b_sum += load_tile(p_part, o_part, m_g, D, 0, DP, True).to(tl.float32)
    add_tile(p_dq, ((first + i_local) * H + i_kv) * G + o_g, m_g, b_sum * scale, D, 0, DP, ADD)


def selected_backward(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, row_lse: Tensor, row_dg: Tensor, dq: Tensor, index: Tensor,
    positions: Tensor, geometry: Geometry, *, select_block: int, scale: float, add: bool, forced: Forced | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Write the gradient of the selected branch to dq, or add it, and return dk and dv in the dtype of k.

    The part of dq of the forced blocks, if any are named, is left to `range_backward`. Rows, dq and `add` as in `range_backward`; index and positions as in `selected_forward`.
    """
    (total, heads, width), (num_kv, value) = q.shape, v.shape[1:]
    n, group = index.shape[2], heads // num_kv
    by_pair = pays_by_block(group)
    if not by_pair:  # Before the table: the device is busy while the host makes it.
        selected_query_gradient(
            q, k, v, do, row_lse, row_dg, dq, index, positions, geometry, select_block=select_block, scale=scale,
            add=add, forced=forced,
        )  # fmt: skip
    is_pipelined = (
        not by_pair
        and in_bulk(k, v)
        and can_copy(q)
        and can_copy(do)
        and fits_pipeline(q, k, v, select_block)
    )
    if is_pipelined:
        launch = LAUNCH["selected_pipelined_dkdv"]
    else:
        launch = launch_for("block_bwd" if by_pair else "selected_dkdv", max(width, value), q.element_size())
    chunk = queries_per_chunk(heads, n, width, q.element_size()) if by_pair else total
    part = max(launch["part"], min(chunk, total) * num_kv * n // launch["programs"])
    inverse = invert_selection(index, geometry, select_block=select_block, chunk=chunk, part=part)
    # Both in one piece of memory, which is cleared and converted by one launch each.
    sums = torch.zeros(k.numel() + v.numel(), dtype=torch.float32, device=k.device)
    dk, dv = sums[: k.numel()].view(k.shape), sums[k.numel() :].view(v.shape)
    slots = (inverse.num_slots, select_block)
    part_k, part_v = (torch.empty(*slots, x.shape[2], dtype=torch.float32, device=x.device) for x in (k, v))
    part_q = q.new_empty(inverse.chunk * num_kv * n * group if by_pair else 0, width)
    for i, first in enumerate(range(0, total, inverse.chunk)):
        _one_chunk(
            (q, k, v, do, row_lse, row_dg, part_q, dk, dv, part_k, part_v), i, inverse, positions, geometry,
            launch, n=n, select_block=select_block, scale=scale, by_pair=by_pair, is_pipelined=is_pipelined,
        )  # fmt: skip
        if by_pair:
            launch_kernel(
                add_queries_kernel, (min(inverse.chunk, total - first) * num_kv,),
                part_q, dq, positions, first, n, scale, H=num_kv, G=group, GP=next_power_of_2(group),
                SELECT=select_block, D=width, DP=next_power_of_2(width), ADD=add, num_warps=1,
            )  # fmt: skip
    found = sums.to(k.dtype)
    return found[: k.numel()].view(k.shape), found[k.numel() :].view(v.shape)


def _one_chunk(
    tensors: tuple[Tensor, ...], i: int, inverse: Inverse, positions: Tensor, geometry: Geometry,
    launch: dict[str, int], *, n: int, select_block: int, scale: float, by_pair: bool, is_pipelined: bool,
) -> None:  # fmt: skip
    """Pairs of the i-th chunk of queries: what they add to dk and dv, and their rows of dq."""
    q, k, v, do, row_lse, row_dg, _, dk, dv, part_k, part_v = tensors
    tiles = geometry.tiles(KEYS, select_block)
    parts = inverse.parts[i]
    if is_pipelined:
        selected_pipelined_dkdv(
            q, k, v, do, row_lse, row_dg, dk, dv, part_k, part_v, parts, inverse, tiles, geometry.meta, positions,
            select_block=select_block, scale=scale, scale2=scale * LOG2E,
        )  # fmt: skip
    else:
        tokens, padded = tokens_per_tile(launch["rows"], q.shape[1] // k.shape[1])
        launch_kernel(
            selected_bwd_kernel, (parts.shape[0],),
            *tensors, inverse.entries, inverse.queries, parts, tiles, geometry.meta, positions, tiles.shape[0], n,
            i * inverse.chunk, scale, scale * LOG2E, GP=padded, BQ=tokens, PAIRS=by_pair,
            **shared_constants(q, k, v, select_block), num_warps=launch["num_warps"], num_stages=launch["num_stages"],
        )  # fmt: skip
    for out, part in ((dk, part_k), (dv, part_v)):
        launch_kernel(
            add_parts_kernel, (parts.shape[0], triton.cdiv(select_block, 16)),
            out, part, parts, tiles, geometry.meta, tiles.shape[0], H=k.shape[1], SELECT=select_block, BN=16, BP=8,
            D=out.shape[2], DP=next_power_of_2(out.shape[2]), num_warps=4,
        )  # fmt: skip
