"""Device code of NSA decoding over paged caches: four kernels a step, partial results merged at the end.

1. `compressed_split_kernel`: attention over a part of the compressed tokens, its probabilities folded into
selection blocks; 2. `choose_kernel`: scores of the blocks and, in the program of a row that ends last, its top n;
beside them attention over the window, which waits for nothing and fills the device; 3. `selected_split_kernel`:
attention over a part of the selected blocks; 4. `merge_kernel`: the three softmaxes put together under their gates.
Sequence lengths are read on the device, so a captured graph serves growing sequences. Which program ends last
does not change a bit: the counter only says that all scores of the row are written.
"""

import triton
import triton.language as tl

from sparseray.kernels.nsa.tiles import (
    load_tile,
    num_visible,
    page_rows,
    selection_keys,
    store_tile,
    take_top,
)


@triton.jit
def _attend(
    b_acc, b_m, b_l, b_q0, b_q1, p_k, p_v, o_key, m_key, b_see, scale2,
    DQ: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr,
    IP: tl.constexpr,
):  # fmt: skip
    """One tile of keys into the running softmax; also the tile's probabilities against the new maximum."""
    b_k0 = load_tile(p_k, o_key, m_key, DQ, 0, D0, True)
    b_s = tl.dot(b_q0, tl.trans(b_k0), input_precision=IP)
    if D1 > 0:
        b_k1 = load_tile(p_k, o_key, m_key, DQ, D0, D1, True)
        b_s = tl.dot(b_q1, tl.trans(b_k1), b_s, input_precision=IP)
    b_s = tl.where(b_see, b_s * scale2, float("-inf"))
    b_new = tl.maximum(b_m, tl.max(b_s, 1))
    b_safe = tl.where(b_new == float("-inf"), 0.0, b_new)
    b_p = tl.exp2(b_s - b_safe[:, None])
    b_alpha = tl.exp2(b_m - b_safe)
    b_l = b_l * b_alpha + tl.sum(b_p, 1)
    b_v = load_tile(p_v, o_key, m_key, DV, 0, DVP, True)
    b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc * b_alpha[:, None], input_precision=IP)
    return b_acc, b_new, b_l, b_p


@triton.jit
def compressed_split_kernel(
    p_q, p_k, p_v, p_table, p_lens, p_fold, p_top, p_m, p_l, p_acc, table_width, num_tiles, parts, scale2,
    H: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, LQ: tl.constexpr, LP: tl.constexpr, BJ: tl.constexpr,
    RP: tl.constexpr, SPLITS: tl.constexpr, PAGES: tl.constexpr, PAGE: tl.constexpr, LEN: tl.constexpr,
    STRIDE: tl.constexpr, SELECT: tl.constexpr,
    DQ: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr,
    IP: tl.constexpr,
):  # fmt: skip
    """Tiles of BJ selection blocks. Kept of each, head by head: what its probabilities add to the score of a block
    and of the next one (0-based eq. 9), and the largest logit that they are measured against."""
    R: tl.constexpr = SELECT // STRIDE
    L: tl.constexpr = LEN // STRIDE
    WHOLE: tl.constexpr = (R == RP) & (PAGE % (BJ * R) == 0)
    i_split = tl.program_id(0)
    i_kv = tl.program_id(1)
    i_b = tl.program_id(2).to(tl.int64)
    n_ctx = tl.load(p_lens + i_b)
    p_table += i_b * table_width
    o_m = tl.arange(0, LP * GP)
    o_q = o_m // GP
    o_g = o_m % GP
    m_q = (o_q < LQ) & (o_g < G)
    o_row = (i_b * LQ + o_q) * (H * G) + i_kv * G + o_g
    o_tile = ((i_b * LQ + o_q) * H + i_kv) * num_tiles
    b_t = n_ctx - LQ + o_q
    n_key = num_visible(n_ctx - 1, 0, LEN, STRIDE)
    span = ((n_key + R * SPLITS - 1) // (R * SPLITS) + BJ - 1) // BJ * BJ
    j_lo = i_split * span
    j_hi = tl.minimum(j_lo + span, (n_key + R - 1) // R)
    b_q0 = load_tile(p_q, o_row, m_q, DQ, 0, D0, True)
    b_q1 = b_q0
    if D1 > 0:
        b_q1 = load_tile(p_q, o_row, m_q, DQ, D0, D1, True)
    b_m = tl.full([LP * GP], float("-inf"), tl.float32)
    b_l = tl.zeros([LP * GP], tl.float32)
    b_acc = tl.zeros([LP * GP, DVP], tl.float32)
    o_c = tl.arange(0, BJ * RP)
    o_r = tl.arange(0, RP)
    b_own = tl.where(o_r < R, tl.minimum(R - o_r, L), 0).to(tl.float32)[None, None, :]
    b_next = tl.where(o_r < R, tl.maximum(L - R + o_r, 0), 0).to(tl.float32)[None, None, :]
    # The pages of all tiles at once: a look-up inside the loop would wait for memory in every turn.
    o_p = tl.arange(0, PAGES)
    m_p = (j_lo + o_p * BJ < j_hi) if WHOLE else (o_p < 0)
    b_pages = tl.load(p_table + (j_lo + o_p * BJ) * R // PAGE, mask=m_p, other=0)
    for j in range(j_lo, j_hi, BJ):
        o_i = (j + o_c // RP) * R + o_c % RP
        m_i = (o_c % RP < R) & (o_i < n_key)
        if WHOLE:
            page = tl.sum(tl.where(o_p == (j - j_lo) // BJ, b_pages, 0), 0)
            o_key = page.to(tl.int64) * PAGE + j * R % PAGE + o_c
        else:
            o_key = page_rows(p_table, o_i, m_i, PAGE)
        b_see = m_i[None, :] & ((o_i * STRIDE + LEN - 1)[None, :] <= b_t[:, None])
        b_acc, b_m, b_l, b_p = _attend(
            b_acc,
            b_m,
            b_l,
            b_q0,
            b_q1,
            p_k,
            p_v,
            o_key * H + i_kv,
            m_i,
            b_see,
            scale2,
            DQ,
            D0,
            D1,
            DV,
            DVP,
            IP,
        )
        b_p = tl.reshape(b_p, [LP * GP, BJ, RP])
        p_tile = p_fold + ((o_tile + j // BJ) * (2 * G) + o_g)[:, None] * BJ + tl.arange(0, BJ)[None, :]
        tl.store(p_tile, tl.sum(b_p * b_own, 2), mask=m_q[:, None])
        tl.store(p_tile + G * BJ, tl.sum(b_p * b_next, 2), mask=m_q[:, None])
        tl.store(p_top + (o_tile + j // BJ) * G + o_g, b_m, mask=m_q)
    tl.store(p_m + o_row * parts + i_split, b_m, mask=m_q)
    tl.store(p_l + o_row * parts + i_split, b_l, mask=m_q)
    store_tile(p_acc, o_row * parts + i_split, m_q, b_acc, DV, 0, DVP)


@triton.jit
def _score(
    p_m, p_l, p_fold, p_top, p_score, i_q, i_kv, j, i_now, n_block, num_blocks, num_tiles, parts,
    H: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, SPLITS: tl.constexpr, SP: tl.constexpr, BJ: tl.constexpr,
    BC: tl.constexpr,
):  # fmt: skip
    """Scores of BC blocks from j on, all heads of the group added up; row 1 holds what goes to the next block."""
    o_g = tl.arange(0, GP)
    m_g = o_g < G
    o_row = i_q * (H * G) + i_kv * G + o_g
    o_j = j + tl.arange(0, BC)
    # Tiles without a compressed token were not written.
    m_j = m_g[:, None] & ((o_j <= i_now) & (o_j // BJ * BJ < n_block))[None, :]
    o_tile = (i_q * H + i_kv) * num_tiles + o_j // BJ
    p_in = p_fold + (o_tile[None, :] * (2 * G) + o_g[:, None]) * BJ + (o_j % BJ)[None, :]
    b_own = tl.load(p_in, mask=m_j, other=0.0)
    b_next = tl.load(p_in + G * BJ, mask=m_j, other=0.0)
    b_top = tl.load(p_top + o_tile[None, :] * G + o_g[:, None], mask=m_j, other=float("-inf"))
    o_s = tl.arange(0, SP)
    m_s = m_g[:, None] & (o_s < SPLITS)[None, :]
    b_m = tl.load(p_m + o_row[:, None] * parts + o_s[None, :], mask=m_s, other=float("-inf"))
    b_l = tl.load(p_l + o_row[:, None] * parts + o_s[None, :], mask=m_s, other=0.0)
    b_max = tl.max(b_m, 1)
    b_max = tl.where(b_max == float("-inf"), 0.0, b_max)
    b_sum = tl.sum(b_l * tl.exp2(b_m - b_max[:, None]), 1)
    b_lse = tl.where(b_sum == 0.0, float("inf"), b_max + tl.log2(tl.where(b_sum == 0.0, 1.0, b_sum)))
    b_w = tl.exp2(b_top - b_lse[:, None])
    tl.store(p_score + o_j, tl.sum(b_own * b_w, 0), mask=o_j < num_blocks)
    tl.store(p_score + num_blocks + o_j, tl.sum(b_next * b_w, 0), mask=o_j < num_blocks)


@triton.jit
def _top_n(
    p_score, p_index, i_now, num_blocks, n, BW: tl.constexpr, INITIAL: tl.constexpr, LOCAL: tl.constexpr
):
    o_j = tl.arange(0, BW)
    m_j = (o_j <= i_now) & (o_j < num_blocks)
    # Not from the first-level cache: other multiprocessors wrote these.
    b_score = tl.load(p_score + o_j, mask=m_j, other=0.0, cache_modifier=".cg")
    m_next = m_j & (o_j > 0)
    b_score += tl.load(p_score + num_blocks + o_j - 1, mask=m_next, other=0.0, cache_modifier=".cg")
    b_take, b_slot = take_top(selection_keys(b_score, o_j, m_j, i_now, INITIAL, LOCAL), n)
    tl.store(p_index + b_slot, o_j, mask=b_take)


@triton.jit
def _attend_blocks(
    p_q, p_k, p_v, p_table, p_index, p_m, p_l, p_acc, i_q, i_kv, i_part, parts, t, t_lo, i_lo, i_hi, scale2,
    H: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, LISTED: tl.constexpr, ITEMS: tl.constexpr,
    SELECT: tl.constexpr, BN: tl.constexpr, PAGE: tl.constexpr,
    DQ: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr,
    IP: tl.constexpr,
):  # fmt: skip
    """Attention of one query token to positions t_lo to t of blocks i_lo to i_hi, or of those listed there."""
    WHOLE: tl.constexpr = (SELECT == BN) & (PAGE % SELECT == 0)
    o_g = tl.arange(0, GP)
    m_g = o_g < G
    o_row = i_q * (H * G) + i_kv * G + o_g
    o_p = i_lo + tl.arange(0, ITEMS)
    b_blocks = o_p
    if LISTED:
        b_blocks = tl.load(p_index + o_p, mask=o_p < i_hi, other=0)
    b_pages = tl.load(p_table + b_blocks * SELECT // PAGE, mask=o_p < i_hi, other=0)
    b_q0 = load_tile(p_q, o_row, m_g, DQ, 0, D0, True)
    b_q1 = b_q0
    if D1 > 0:
        b_q1 = load_tile(p_q, o_row, m_g, DQ, D0, D1, True)
    b_m = tl.full([GP], float("-inf"), tl.float32)
    b_l = tl.zeros([GP], tl.float32)
    b_acc = tl.zeros([GP, DVP], tl.float32)
    o_c = tl.arange(0, BN)
    for i in range(i_lo, i_hi):
        i_block = tl.sum(tl.where(o_p == i, b_blocks, 0), 0)
        o_t = i_block * SELECT + o_c
        m_t = (o_c < SELECT) & (o_t >= t_lo) & (o_t <= t)
        if WHOLE:
            page = tl.sum(tl.where(o_p == i, b_pages, 0), 0)
            o_key = page.to(tl.int64) * PAGE + i_block * SELECT % PAGE + o_c
        else:
            o_key = page_rows(p_table, o_t, m_t, PAGE)
        b_acc, b_m, b_l, _ = _attend(
            b_acc,
            b_m,
            b_l,
            b_q0,
            b_q1,
            p_k,
            p_v,
            o_key * H + i_kv,
            m_t,
            m_t[None, :],
            scale2,
            DQ,
            D0,
            D1,
            DV,
            DVP,
            IP,
        )
    tl.store(p_m + o_row * parts + i_part, b_m, mask=m_g)
    tl.store(p_l + o_row * parts + i_part, b_l, mask=m_g)
    store_tile(p_acc, o_row * parts + i_part, m_g, b_acc, DV, 0, DVP)


@triton.jit
def choose_kernel(
    p_q, p_k, p_v, p_table, p_lens, p_m, p_l, p_acc, p_fold, p_top, p_score, p_ended, p_index,
    table_width, num_score, num_blocks, num_tiles, parts, n, scale2,
    H: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, LQ: tl.constexpr, SPLITS: tl.constexpr, SP: tl.constexpr,
    BJ: tl.constexpr, BC: tl.constexpr, BW: tl.constexpr, CHUNKS: tl.constexpr, FIRST: tl.constexpr,
    WINP: tl.constexpr, PER: tl.constexpr, ITEMS: tl.constexpr, WIN: tl.constexpr, LEN: tl.constexpr, STRIDE: tl.constexpr,
    SELECT: tl.constexpr, BN: tl.constexpr, PAGE: tl.constexpr, INITIAL: tl.constexpr, LOCAL: tl.constexpr,
    DQ: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr,
    IP: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    is_score = pid < num_score
    i_row = tl.where(is_score, pid // CHUNKS, (pid - num_score) // WINP).to(tl.int64)
    i_kv = i_row % H
    i_q = i_row // H
    n_ctx = tl.load(p_lens + i_q // LQ)
    t = n_ctx - LQ + (i_q % LQ).to(tl.int32)
    i_now = t // SELECT
    if is_score:
        p_score += i_row * 2 * num_blocks
        j = pid % CHUNKS * BC
        if j <= i_now:
            n_block = (num_visible(n_ctx - 1, 0, LEN, STRIDE) * STRIDE + SELECT - 1) // SELECT
            _score(
                p_m, p_l, p_fold, p_top, p_score, i_q, i_kv, j, i_now, n_block, num_blocks, num_tiles, parts,
                H, G, GP, SPLITS, SP, BJ, BC,
            )  # fmt: skip
        # All threads have written before one of them says so.
        tl.debug_barrier()
        if tl.atomic_add(p_ended + i_row, 1, sem="acq_rel") == CHUNKS - 1:
            tl.store(p_ended + i_row, 0)
            _top_n(p_score, p_index + i_row * n, i_now, num_blocks, n, BW, INITIAL, LOCAL)
    else:
        i_part = (pid - num_score) % WINP
        i_lo = tl.maximum(t - WIN + 1, 0) // SELECT + i_part * PER
        _attend_blocks(
            p_q, p_k, p_v, p_table + i_q // LQ * table_width, p_index, p_m, p_l, p_acc, i_q, i_kv, FIRST + i_part,
            parts, t, t - WIN + 1, i_lo, tl.minimum(i_lo + PER, i_now + 1), scale2,
            H, G, GP, False, ITEMS, SELECT, BN, PAGE, DQ, D0, D1, DV, DVP, IP,
        )  # fmt: skip


@triton.jit
def selected_split_kernel(
    p_q, p_k, p_v, p_table, p_lens, p_index, p_m, p_l, p_acc, table_width, parts, n, scale2,
    H: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, LQ: tl.constexpr, FIRST: tl.constexpr, PER: tl.constexpr,
    ITEMS: tl.constexpr, SELECT: tl.constexpr, BN: tl.constexpr, PAGE: tl.constexpr,
    DQ: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr,
    IP: tl.constexpr,
):  # fmt: skip
    i_part = tl.program_id(0)
    i_kv = tl.program_id(1)
    i_q = tl.program_id(2).to(tl.int64)
    t = tl.load(p_lens + i_q // LQ) - LQ + (i_q % LQ).to(tl.int32)
    i_hi = tl.minimum(i_part * PER + PER, tl.minimum(n, t // SELECT + 1))
    _attend_blocks(
        p_q, p_k, p_v, p_table + i_q // LQ * table_width, p_index + (i_q * H + i_kv) * n, p_m, p_l, p_acc, i_q, i_kv,
        FIRST + i_part, parts, t, 0, i_part * PER, i_hi, scale2,
        H, G, GP, True, ITEMS, SELECT, BN, PAGE, DQ, D0, D1, DV, DVP, IP,
    )  # fmt: skip


@triton.jit
def merge_kernel(
    p_m, p_l, p_acc, p_gate, p_o, parts,
    CMP: tl.constexpr, SLC: tl.constexpr, PP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr,
):  # fmt: skip
    i_row = tl.program_id(0).to(tl.int64)
    o_p = tl.arange(0, PP)
    m_p = o_p < parts
    b_m = tl.load(p_m + i_row * parts + o_p, mask=m_p, other=float("-inf"))
    b_l = tl.load(p_l + i_row * parts + o_p, mask=m_p, other=0.0)
    b_w = tl.zeros([PP], tl.float32)
    for c in tl.static_range(3):
        b_in = (o_p >= CMP).to(tl.int32) + (o_p >= CMP + SLC).to(tl.int32) == c
        top = tl.max(tl.where(b_in, b_m, float("-inf")), 0)
        top = tl.where(top == float("-inf"), 0.0, top)
        b_e = tl.where(b_in, tl.exp2(b_m - top), 0.0)
        total = tl.sum(b_e * b_l, 0)
        gate = tl.load(p_gate + i_row * 3 + c).to(tl.float32)
        b_w += b_e * (gate / tl.where(total == 0.0, 1.0, total))
    b_part = load_tile(p_acc, i_row * parts + o_p, m_p, DV, 0, DVP, True)
    b_o = tl.sum(b_part * b_w[:, None], 0)
    o_d = tl.arange(0, DVP)
    tl.store(p_o + i_row * DV + o_d, b_o.to(p_o.dtype.element_ty), mask=o_d < DV)
