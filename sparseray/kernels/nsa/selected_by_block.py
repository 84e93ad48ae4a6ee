"""Attention over selected blocks, forward, by block: for small groups of query heads.

Reading a query's blocks for its own few heads moves a block for hardly any work: with G heads a group, 64 keys
serve G rows. Here a program takes one block and the queries that selected it (`inverse.py`), so the rows of many
queries share the block's keys and values. Each (query, block) pair leaves a partial output, normalised by
itself, and its log-sum-exp; a second kernel puts a query's pairs together, the lowest block first, and adds up the
three branches under their gates.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparseray.kernels.launch import launch_kernel
from sparseray.kernels.nsa.geometry import KEYS, Geometry
from sparseray.kernels.nsa.inverse import invert_selection, queries_per_chunk
from sparseray.kernels.nsa.pipeline import Attended
from sparseray.kernels.nsa.range_forward import LOG2E, tokens_per_tile
from sparseray.kernels.nsa.selected_forward import add_branches, shared_constants
from sparseray.kernels.nsa.tiles import block_rows, load_tile, next_power_of_2, store_tile
from sparseray.kernels.nsa.tuning import launch_for


@triton.jit
def block_fwd_kernel(
    p_q, p_k, p_v, p_part, p_part_lse, p_entries, p_queries, p_parts, p_tiles, p_meta, p_pos, num_blocks, n, first, scale2,
    H: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, BQ: tl.constexpr, SELECT: tl.constexpr,
    BN: tl.constexpr, DQ: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr,
    IP: tl.constexpr,
):  # fmt: skip
    p_of = p_parts + tl.program_id(0) * 6
    i_row = tl.load(p_of)
    if i_row < 0:
        return
    i_kv, o_i, m_i, o_key = block_rows(i_row, tl.arange(0, BN), p_tiles, p_meta, num_blocks, H, SELECT)
    b_k0 = load_tile(p_k, o_key, m_i, DQ, 0, D0, True)
    if D1 > 0:
        b_k1 = load_tile(p_k, o_key, m_i, DQ, D0, D1, True)
    b_v = load_tile(p_v, o_key, m_i, DV, 0, DVP, True)
    e_hi = tl.load(p_of + 5)
    o_m = tl.arange(0, BQ * GP)
    o_g = o_m % GP
    for e in range(tl.load(p_of + 4), e_hi, BQ):
        o_e = e + o_m // GP
        m_e = o_e < e_hi
        m_q = m_e & (o_g < G)
        b_i = tl.load(p_queries + o_e, mask=m_e, other=0)
        # The block's first key is visible to whoever selected it, and to the rows that are none.
        b_t = tl.load(p_pos + b_i, mask=m_e, other=0x7FFFFFFF)
        o_row = b_i.to(tl.int64) * (H * G) + i_kv * G + o_g
        b_q0 = load_tile(p_q, o_row, m_q, DQ, 0, D0, True)
        b_s = tl.dot(b_q0, tl.trans(b_k0), input_precision=IP)
        if D1 > 0:
            b_q1 = load_tile(p_q, o_row, m_q, DQ, D0, D1, True)
            b_s = tl.dot(b_q1, tl.trans(b_k1), b_s, input_precision=IP)
        b_see = m_i[None, :] & (o_i[None, :] <= b_t[:, None])
        b_s = tl.where(b_see, b_s * scale2, float("-inf"))
        b_m = tl.max(b_s, 1)
        b_p = tl.exp2(b_s - b_m[:, None])
        b_l = tl.sum(b_p, 1)
        b_o = tl.dot(b_p.to(b_v.dtype), b_v, input_precision=IP)
        b_f = tl.load(p_entries + o_e, mask=m_e, other=0) - first * (H * n)
        o_out = b_f.to(tl.int64) * G + o_g
        store_tile(p_part, o_out, m_q, b_o / b_l[:, None], DV, 0, DVP)
        tl.store(p_part_lse + o_out, b_m + tl.log2(b_l), mask=m_q)


@triton.jit
def merge_blocks_kernel(
    p_part, p_part_lse, p_forced, p_forced_lse, p_cmp, p_win, p_gate, p_out, p_o, p_lse, p_pos, first, n,
    H: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, NP: tl.constexpr, SELECT: tl.constexpr, DV: tl.constexpr,
    DVP: tl.constexpr, KEEP: tl.constexpr, FORCED: tl.constexpr,
):  # fmt: skip
    i_local = (tl.program_id(0) // H).to(tl.int64)
    i_kv = tl.program_id(0) % H
    count = tl.minimum(n + FORCED, tl.load(p_pos + first + i_local) // SELECT + 1) - FORCED
    o_g = tl.arange(0, GP)
    m_g = o_g < G
    o_n = tl.arange(0, NP)
    o_row = (first + i_local) * (H * G) + i_kv * G + o_g
    o_pair = (i_local * H + i_kv) * n * G + o_g
    m_pair = (o_n < count)[:, None] & m_g[None, :]
    b_lse = tl.load(p_part_lse + o_pair[None, :] + o_n[:, None] * G, mask=m_pair, other=float("-inf"))
    b_top = tl.max(b_lse, 0)
    if FORCED > 0:
        b_forced_lse = tl.load(p_forced_lse + o_row, mask=m_g, other=0.0)
        b_top = tl.maximum(b_top, b_forced_lse)
    b_top = tl.where(m_g, b_top, 0.0)
    b_sum = tl.sum(tl.exp2(b_lse - b_top[None, :]), 0)
    if FORCED > 0:
        b_sum += tl.exp2(b_forced_lse - b_top)
    b_all = b_top + tl.log2(tl.where(m_g, b_sum, 1.0))
    b_o = tl.zeros([GP, DVP], tl.float32)
    if FORCED > 0:
        b_o += tl.exp2(b_forced_lse - b_all)[:, None] * load_tile(p_forced, o_row, m_g, DV, 0, DVP, True).to(
            tl.float32
        )
    for i in range(0, count):
        b_w = tl.exp2(tl.load(p_part_lse + o_pair + i * G, mask=m_g, other=0.0) - b_all)
        b_o += b_w[:, None] * load_tile(p_part, o_pair + i * G, m_g, DV, 0, DVP, True).to(tl.float32)
    b_o = b_o.to(p_out.dtype.element_ty)
    if KEEP:
        store_tile(p_o, o_row, m_g, b_o, DV, 0, DVP)
        tl.store(p_lse + o_row, b_all, mask=m_g)
    store_tile(p_out, o_row, m_g, add_branches(p_cmp, p_win, p_gate, o_row, m_g, b_o, DV, DVP), DV, 0, DVP)


def selected_by_block(
    q: Tensor, k: Tensor, v: Tensor, index: Tensor, positions: Tensor, geometry: Geometry,
    others: tuple[Tensor, Tensor], gates: Tensor, *, select_block: int, scale: float, keep: bool,
    forced: Attended | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """What `selected_forward` returns, for packed keys."""
    (total, heads, width), (num_kv, value) = q.shape, v.shape[1:]
    n, group = index.shape[2], heads // num_kv
    launch = launch_for("block_fwd", max(width, value), q.element_size())
    num_forced = 0
    if forced is not None:
        # The blocks between the first ones and the last ones.
        num_forced = forced.num_initial + forced.num_local
        count = (positions // select_block + 1).clamp(max=n) - num_forced
        n -= num_forced
        index = index[..., forced.num_initial : forced.num_initial + n]
        place = torch.arange(n, device=q.device, dtype=torch.int32)
        index = index.masked_fill((place >= count[:, None])[:, None], -1)
    chunk = queries_per_chunk(heads, n, value, q.element_size())
    inverse = invert_selection(index, geometry, select_block=select_block, chunk=chunk, part=launch["part"])
    summed = torch.empty_like(others[0])
    out = torch.empty_like(summed) if keep else q.new_empty(0)
    lse = torch.empty(q.shape[:2] if keep else 0, dtype=torch.float32, device=q.device)
    pairs = inverse.chunk * num_kv * n * group
    part = torch.empty(pairs, value, dtype=q.dtype, device=q.device)
    part_lse = torch.empty(pairs, dtype=torch.float32, device=q.device)
    tokens, padded = tokens_per_tile(launch["rows"], group)
    tiles = geometry.tiles(KEYS, select_block)
    for i, first in enumerate(range(0, total, inverse.chunk)):
        launch_kernel(
            block_fwd_kernel, (inverse.parts.shape[1],),
            q, k, v, part, part_lse, inverse.entries, inverse.queries, inverse.parts[i], tiles, geometry.meta, positions,
            tiles.shape[0], n, first, scale * LOG2E, GP=padded, BQ=tokens,
            **shared_constants(q, k, v, select_block), num_warps=launch["num_warps"],
            num_stages=launch["num_stages"],
        )  # fmt: skip
        launch_kernel(
            merge_blocks_kernel, (min(inverse.chunk, total - first) * num_kv,),
            part, part_lse, *((None, None) if forced is None else (forced.out, forced.lse)), *others, gates, summed, out,
            lse, positions, first, n, H=num_kv, G=group, GP=next_power_of_2(group), NP=next_power_of_2(n),
            SELECT=select_block, DV=value, DVP=next_power_of_2(value), KEEP=keep, FORCED=num_forced,
            num_warps=1,
        )  # fmt: skip
    return summed, out, lse
