"""Which blocks a query reads: scores of the selection blocks from the compressed attention, and the top n.

The scores recompute q . k of the compressed branch, turn it into probabilities with the log-sum-exp, add the
heads of a group in a fixed order and fold neighbouring compressed tokens into selection blocks (0-based
eq. 9). They exist for one chunk of queries at a time. The top n are found by bisection on the bits of the
scores (non-negative floats order like integers); ties go to the lower index; indices come out ascending.
Source: arXiv 2502.11089 eq. 8-12.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparseray.kernels.launch import launch_kernel
from sparseray.kernels.nsa.geometry import QUERY, Geometry, query_positions
from sparseray.kernels.nsa.inverse import pays_by_block
from sparseray.kernels.nsa.range_forward import LOG2E, in_bulk, key_sources, page_size, tokens_per_tile
from sparseray.kernels.nsa.tiles import (
    fetch,
    key_rows,
    load_tile,
    next_power_of_2,
    num_visible,
    precision,
    split_width,
    take_top,
)
from sparseray.kernels.nsa.tuning import LAUNCH, launch_for


@triton.jit
def _place(o_m, BQ: tl.constexpr, GP: tl.constexpr):
    """Query and head at column o_m of a tile of BQ queries with GP heads each.

    In a product's result a thread holds columns 2 c and 2 c + 1 of every 8, c being its place among four. So c counts
    queries: all heads of a query are then in one thread, and adding them up moves nothing between threads.
    """
    E: tl.constexpr = min(2, GP)
    C: tl.constexpr = min(4, BQ)
    return o_m // (C * GP) * C + o_m // E % C, o_m // (E * C) % (GP // E) * E + o_m % E


@triton.jit
def _score_step(
    j, b_q0, b_q1, b_lse, b_t, p_k, p_k1, p_table, k_off, k_len, i_kv, p_out, over, m_out, width, scale2,
    H: tl.constexpr, GP: tl.constexpr, BQ: tl.constexpr, BJ: tl.constexpr, RP: tl.constexpr,
    DQ: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, LEN: tl.constexpr, STRIDE: tl.constexpr,
    SELECT: tl.constexpr, IP: tl.constexpr, BULK: tl.constexpr, PAGE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Scores of BJ selection blocks; keys are rows, and `_place` puts the heads of one sum into one thread."""
    R: tl.constexpr = SELECT // STRIDE
    L: tl.constexpr = LEN // STRIDE
    o_c = tl.arange(0, BJ * RP)
    o_i = (j + o_c // RP) * R + o_c % RP
    m_i = (o_c % RP < R) & (o_i < k_len)
    o_key = key_rows(p_table, k_off, o_i, m_i, PAGE) * H + i_kv
    b_k0 = fetch(p_k, k_off + j * R, o_key, m_i, i_kv, DQ, 0, D0, True, BULK)
    b_s = tl.dot(b_k0, tl.trans(b_q0), input_precision=IP)
    if D1 > 0:
        b_k1 = fetch(p_k1, k_off + j * R, o_key, m_i, i_kv, DQ, D0, D1, True, BULK)
        b_s = tl.dot(b_k1, tl.trans(b_q1), b_s, input_precision=IP)
    b_p = tl.exp2(b_s * scale2 - b_lse[None, :])
    if MASKED:
        b_see = m_i[:, None] & ((o_i * STRIDE + LEN - 1)[:, None] <= b_t[None, :])
        b_p = tl.where(b_see, b_p, 0.0)
    E: tl.constexpr = min(2, GP)
    C: tl.constexpr = min(4, BQ)
    b_sum = tl.sum(tl.sum(tl.reshape(b_p, [BJ * RP, BQ // C, GP // E, C, E]), 4), 2)
    b_sum = tl.reshape(b_sum, [BJ, RP, BQ])
    o_r = tl.arange(0, RP)
    o_j = j + tl.arange(0, BJ)
    m_tile = (o_j < width)[:, None] & m_out[None, :]
    b_here = tl.where(o_r < R, tl.minimum(R - o_r, L), 0).to(tl.float32)
    p_tile = p_out[None, :] + o_j[:, None]
    tl.store(p_tile, tl.sum(b_sum * b_here[None, :, None], 1), mask=m_tile)
    if L > 1:
        b_next = tl.where(o_r < R, tl.maximum(L - R + o_r, 0), 0).to(tl.float32)
        tl.store(p_tile + over, tl.sum(b_sum * b_next[None, :, None], 1), mask=m_tile)


@triton.jit
def score_kernel(
    p_q, p_k, p_k1, p_table, p_lse, p_score, p_meta, p_tiles, num_tiles, tile_first, row_first, row_end, width, over,
    scale2,
    H: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, BQ: tl.constexpr, BJ: tl.constexpr, RP: tl.constexpr,
    DQ: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, LEN: tl.constexpr, STRIDE: tl.constexpr,
    SELECT: tl.constexpr, IP: tl.constexpr, BULK: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """Per query and selection block: what its own compressed tokens add, and (at + over) what they add to the
    next block, which they reach into."""
    i_kv = tl.program_id(0) // num_tiles
    i_tile = tile_first + num_tiles - 1 - tl.program_id(0) % num_tiles
    i_seq = tl.load(p_tiles + i_tile * 2)
    if i_seq < 0:
        return
    i_q = tl.load(p_tiles + i_tile * 2 + 1) * BQ
    p_row = p_meta + i_seq * 12
    q_off = tl.load(p_row)
    q_len = tl.load(p_row + 1).to(tl.int32)
    q_start = tl.load(p_row + 2).to(tl.int32)
    k_off = tl.load(p_row + 3)
    k_len = tl.load(p_row + 4).to(tl.int32)
    if (q_off + i_q >= row_end) | (q_off + i_q + BQ <= row_first):
        return
    o_q, o_g = _place(tl.arange(0, BQ * GP), BQ, GP)
    o_q += i_q
    m_q = (o_q < q_len) & (o_g < G)
    b_t = q_start + o_q
    o_row = (q_off + o_q) * (H * G) + i_kv * G + o_g
    b_q0 = load_tile(p_q, o_row, m_q, DQ, 0, D0, True)
    b_q1 = b_q0
    if D1 > 0:
        b_q1 = load_tile(p_q, o_row, m_q, DQ, D0, D1, True)
    b_lse = tl.load(p_lse + o_row, mask=m_q, other=float("inf"))
    b_lse = tl.where(b_lse == float("-inf"), float("inf"), b_lse)
    o_out = q_off + i_q + tl.arange(0, BQ)
    m_out = (i_q + tl.arange(0, BQ) < q_len) & (o_out >= row_first) & (o_out < row_end)
    p_out = p_score + ((o_out - row_first) * H + i_kv) * width
    num_blocks = (q_start + tl.minimum(i_q + BQ, q_len) - 1) // SELECT + 1
    num_full = tl.minimum(num_visible(q_start + i_q, 0, LEN, STRIDE), k_len) // (SELECT // STRIDE) // BJ * BJ
    for j in range(0, num_full, BJ):
        _score_step(
            j, b_q0, b_q1, b_lse, b_t, p_k, p_k1, p_table, k_off, k_len, i_kv, p_out, over, m_out, width, scale2,
            H, GP, BQ, BJ, RP, DQ, D0, D1, LEN, STRIDE, SELECT, IP, BULK, PAGE, RP * STRIDE != SELECT,
        )  # fmt: skip
    for j in range(num_full, num_blocks, BJ):
        _score_step(
            j, b_q0, b_q1, b_lse, b_t, p_k, p_k1, p_table, k_off, k_len, i_kv, p_out, over, m_out, width, scale2,
            H, GP, BQ, BJ, RP, DQ, D0, D1, LEN, STRIDE, SELECT, IP, BULK, PAGE, True,
        )  # fmt: skip


@triton.jit
def _selection_keys(b_score, o_j, m_j, i_now, INITIAL: tl.constexpr, LOCAL: tl.constexpr):
    """Integers that order like the scores: infinite for the first and local blocks, -1 where masked out.

    Scores are not negative, so their bits order like integers.
    """
    b_key = b_score.to(tl.int32, bitcast=True)
    b_key = tl.where((o_j < INITIAL) | (o_j > i_now - LOCAL), 0x7F800000, b_key)
    return tl.where(m_j, b_key, -1)


@triton.jit
def top_n_kernel(
    p_score, p_index, p_pos, row_first, width, over, n,
    H: tl.constexpr, BW: tl.constexpr, NP: tl.constexpr, SELECT: tl.constexpr,
    INITIAL: tl.constexpr, LOCAL: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    i_row = tl.program_id(0).to(tl.int64)
    i_q = row_first + i_row // H
    t = tl.load(p_pos + i_q)
    i_now = t // SELECT
    o_j = tl.arange(0, BW)
    m_j = (o_j <= i_now) & (o_j < width)
    p_row = p_score + i_row * width + o_j
    b_score = tl.load(p_row, mask=m_j, other=0.0)
    if OVERLAP:
        b_score += tl.load(p_row + over - 1, mask=m_j & (o_j > 0), other=0.0)
    b_take, b_slot = take_top(_selection_keys(b_score, o_j, m_j, i_now, INITIAL, LOCAL), n)
    p_out = p_index + (row_first * H + i_row) * n
    tl.store(p_out + b_slot, o_j, mask=b_take)
    o_n = tl.arange(0, NP)
    tl.store(
        p_out + o_n, tl.full([NP], -1, tl.int32), mask=(o_n >= tl.sum(b_take.to(tl.int32), 0)) & (o_n < n)
    )


def select_blocks(
    q: Tensor, k_cmp: Tensor, lse: Tensor, geometry: Geometry, *, block: int, stride: int, select_block: int,
    num_selected: int, num_initial: int, num_local: int, scale: float,
    table: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Blocks that every query reads, for every key/value head.

    Args:
        q: [T, HQ, D] packed; k_cmp: [C, H, D].
        lse: fp32 [T, HQ], base-2 log-sum-exp of the compressed branch.
        table: int32, pages of every sequence, where the compressed keys are pages (`range_forward`).

    Returns:
        int32 [T, H, num_selected]: ascending, padded with -1.
    """
    tokens_total, heads, width_q = q.shape
    num_kv = k_cmp.shape[-2]
    index = torch.empty(tokens_total, num_kv, num_selected, dtype=torch.int32, device=q.device)
    name = "score_small" if pays_by_block(heads // num_kv) else "score"
    launch = launch_for(name, width_q, q.element_size())
    tokens, padded = tokens_per_tile(launch["rows"], heads // num_kv)
    tiles = geometry.tiles(QUERY, tokens)
    positions = query_positions(geometry)
    rp = next_power_of_2(select_block // stride)
    d0, d1 = split_width(width_q)
    chunk = -(-launch["chunk"] // tokens) * tokens
    bj = max(1, launch["keys"] // rp)
    bulk = rp * stride == select_block and in_bulk(k_cmp, k_cmp, table)
    src_k, src_k1, _ = key_sources(k_cmp, k_cmp, bj * rp, bulk=bulk)
    single = geometry.num_seqs == 1
    start = geometry.max_keys - tokens_total if single else 0
    for first in range(0, tokens_total, chunk):
        end = min(first + chunk, tokens_total)
        longest = start + end if single else geometry.max_keys
        width = -(-longest // select_block)
        scores = torch.empty(2, end - first, num_kv, width, dtype=torch.float32, device=q.device)
        # With one sequence the tiles of a chunk are known; otherwise one outside the chunk returns at once.
        tile_first = first // tokens if single else 0
        num_tiles = -(-(end - first) // tokens) if single else tiles.shape[0]
        launch_kernel(
            score_kernel, (num_tiles * num_kv,),
            q, src_k, src_k1, table, lse, scores, geometry.meta, tiles, num_tiles, tile_first, first, end, width,
            (end - first) * num_kv * width, scale * LOG2E,
            H=num_kv, G=heads // num_kv, GP=padded, BQ=tokens, BJ=bj, RP=rp,
            DQ=width_q, D0=d0, D1=d1, LEN=block, STRIDE=stride, SELECT=select_block, IP=precision(q.dtype),
            BULK=bulk, PAGE=page_size(k_cmp, table),
            num_warps=launch["num_warps"], num_stages=launch["num_stages"],
        )  # fmt: skip
        launch_kernel(
            top_n_kernel, ((end - first) * num_kv,),
            scores, index, positions, first, width, (end - first) * num_kv * width, num_selected,
            H=num_kv, BW=max(16, next_power_of_2(width)), NP=next_power_of_2(num_selected),
            SELECT=select_block,
            INITIAL=num_initial, LOCAL=num_local, OVERLAP=block > stride,
            num_warps=LAUNCH["top_n"]["num_warps"],
        )  # fmt: skip
    return index
