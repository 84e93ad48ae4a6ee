"""Which blocks a query reads: scores of the selection blocks from the compressed attention, and the top n.

The scores recompute q . k of the compressed branch, turn it into probabilities with the log-sum-exp, add the
heads of a group in a fixed order and fold neighbouring compressed tokens into selection blocks (0-based
eq. 9). They exist for one chunk of queries at a time. The best are found by bisection on the bits of the
scores (non-negative floats order like integers), from a bound that groups of blocks give; ties go to the lower
index; indices come out ascending.
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


@triton.jit(do_not_specialize=["num_tiles", "tile_first", "row_first", "row_end", "width", "over"])
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
def _pack(b_hit):
    """A word for each column of [W, R, 32]: bit r is that of row r."""
    o_r = tl.arange(0, b_hit.shape[1])
    return tl.sum(b_hit.to(tl.int32) << o_r[None, :, None], 1)


@triton.jit
def _take_lowest(b_word, o_word):
    """The lowest place whose bit is set, and the words without it; bit r of a word stands for its place + 32 r."""
    b_bit = b_word & -b_word
    b_row = (b_bit.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127
    b_at = tl.where(b_word == 0, 0x7FFFFFFF, o_word + b_row * 32)
    at = tl.min(b_at)
    return at, tl.where(b_at == at, b_word & (b_word - 1), b_word)


@triton.jit
def _largest(b_key, o_word, N: tl.constexpr, GROUPS: tl.constexpr):
    """Words with the bits of the N largest keys of [W, R, 32], ties to lower places; at least N are not negative.

    The columns make GROUPS groups, N or more, so N keys reach the least of the groups' maxima; halving starts there.
    """
    b_top = tl.max(tl.max(b_key, 1), 0)
    hi = tl.max(b_top, 0)
    lo = 0
    if GROUPS <= 32:
        lo = tl.maximum(tl.min(tl.max(tl.reshape(b_top, [32 // GROUPS, GROUPS]), 0), 0), 0)
    reach = 0
    while lo < hi:
        mid = hi - (hi - lo) // 2
        reach = tl.sum((b_key >= mid).to(tl.int32))
        lo = tl.where(reach >= N, mid, lo)
        hi = tl.where(reach > N, hi, tl.where(reach == N, mid, mid - 1))
    b_word = _pack(b_key >= lo)
    if (N > 1) & (reach != N):
        b_equal = _pack(b_key == lo)
        b_word = b_word ^ b_equal
        for _ in range(0, N - tl.sum((b_key > lo).to(tl.int32))):
            _, b_rest = _take_lowest(b_equal, o_word)
            b_word = b_word | (b_equal ^ b_rest)
            b_equal = b_rest
    return b_word


@triton.jit(do_not_specialize=["row_first", "width", "over"])
def top_n_kernel(
    p_score, p_index, p_pos, row_first, width, over,
    H: tl.constexpr, BW: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, GROUPS: tl.constexpr, SELECT: tl.constexpr,
    INITIAL: tl.constexpr, LOCAL: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One query and key/value head: the first blocks, the best of those in between, the local ones."""
    R: tl.constexpr = min(16, BW // 32)
    W: tl.constexpr = BW // (32 * R)
    i_row = tl.program_id(0).to(tl.int64)
    i_now = tl.load(p_pos + row_first + i_row // H) // SELECT
    o_n = tl.arange(0, NP)
    b_out = tl.where(o_n < INITIAL, o_n, o_n + i_now + 1 - N)
    if i_now < N:
        b_out = tl.where(o_n <= i_now, o_n, -1)
    elif INITIAL + LOCAL < N:
        o_word = tl.arange(0, W)[:, None] * (32 * R) + tl.arange(0, 32)[None, :]
        o_j = o_word[:, None, :] + tl.arange(0, R)[None, :, None] * 32
        m_j = (o_j >= INITIAL) & (o_j <= i_now - LOCAL) & (o_j < width)
        p_row = p_score + i_row * width + o_j
        # Scores are not negative, so their bits order like integers; those of -1 are below all.
        b_score = tl.load(p_row, mask=m_j, other=-1.0)
        if OVERLAP:
            b_score += tl.load(p_row + over - 1, mask=m_j & (o_j > 0), other=0.0)
        b_word = _largest(b_score.to(tl.int32, bitcast=True), o_word, N - INITIAL - LOCAL, GROUPS)
        for k in range(INITIAL, N - LOCAL):
            at, b_word = _take_lowest(b_word, o_word)
            b_out = tl.where(o_n == k, at, b_out)
    tl.store(p_index + (row_first * H + i_row) * N + o_n, b_out, mask=o_n < N)


def top_n(
    scores: Tensor, index: Tensor, positions: Tensor, first: int, *, select_block: int, num_initial: int, num_local: int,
    overlap: bool,
) -> None:  # fmt: skip
    """Write the blocks of some queries: the first and the local ones, and the best between them.

    Args:
        scores: fp32 [2, queries, H, blocks], not negative: of each block, and what it adds to the next one.
        index: int32 [T, H, num_selected] of all queries, ascending, padded with -1; theirs is written.
        positions: int32 [T].
        first: packed number of the first of the queries.
        overlap: whether blocks add to the next one.
    """
    (_, rows, num_kv, width), n = scores.shape, index.shape[2]
    launch_kernel(
        top_n_kernel, (rows * num_kv,), scores, index, positions, first, width, rows * num_kv * width,
        H=num_kv, BW=max(32, next_power_of_2(width)), N=n, NP=next_power_of_2(n),
        GROUPS=next_power_of_2(n - num_initial - num_local), SELECT=select_block,
        INITIAL=num_initial, LOCAL=num_local, OVERLAP=overlap, num_warps=LAUNCH["top_n"]["num_warps"],
    )  # fmt: skip


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
        top_n(
            scores, index, positions, first, select_block=select_block, num_initial=num_initial, num_local=num_local,
            overlap=block > stride,
        )  # fmt: skip
    return index
