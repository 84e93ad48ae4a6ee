"""Device code of NSA decoding over paged caches: four kernels a step, partial results merged at the end.

1. `compressed_split_kernel`: attention over a part of the compressed tokens, its logits kept;
2. `block_score_kernel`: logits to scores of selection blocks; 3. `sparse_split_kernel`: top n (found again by
every program), then attention over a part of the selected blocks or of the window;
4. `merge_kernel`: the three softmaxes put together under their gates.
Sequence lengths are read on the device, so a captured graph serves growing sequences.
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
    return b_acc, b_new, b_l, b_s


@triton.jit
def compressed_split_kernel(
    p_q, p_k, p_v, p_table, p_lens, p_logit, p_m, p_l, p_acc, table_width, num_logits, parts, scale2,
    H: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, LQ: tl.constexpr, LP: tl.constexpr, BN: tl.constexpr,
    SPLITS: tl.constexpr, PAGE: tl.constexpr, LEN: tl.constexpr, STRIDE: tl.constexpr,
    DQ: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr,
    IP: tl.constexpr,
):  # fmt: skip
    i_split = tl.program_id(0)
    i_kv = tl.program_id(1)
    i_b = tl.program_id(2).to(tl.int64)
    n_ctx = tl.load(p_lens + i_b)
    o_m = tl.arange(0, LP * GP)
    o_q = o_m // GP
    m_q = (o_q < LQ) & (o_m % GP < G)
    o_row = (i_b * LQ + o_q) * (H * G) + i_kv * G + o_m % GP
    b_t = n_ctx - LQ + o_q
    n_key = num_visible(n_ctx - 1, 0, LEN, STRIDE)
    span = ((n_key + SPLITS - 1) // SPLITS + BN - 1) // BN * BN
    i_lo = i_split * span
    i_hi = tl.minimum(i_lo + span, n_key)
    b_q0 = load_tile(p_q, o_row, m_q, DQ, 0, D0, True)
    b_q1 = b_q0
    if D1 > 0:
        b_q1 = load_tile(p_q, o_row, m_q, DQ, D0, D1, True)
    b_m = tl.full([LP * GP], float("-inf"), tl.float32)
    b_l = tl.zeros([LP * GP], tl.float32)
    b_acc = tl.zeros([LP * GP, DVP], tl.float32)
    for i in range(i_lo, i_hi, BN):
        o_i = i + tl.arange(0, BN)
        m_i = o_i < i_hi
        o_key = page_rows(p_table + i_b * table_width, o_i, m_i, PAGE) * H + i_kv
        b_see = m_i[None, :] & ((o_i * STRIDE + LEN - 1)[None, :] <= b_t[:, None])
        b_acc, b_m, b_l, b_s = _attend(
            b_acc, b_m, b_l, b_q0, b_q1, p_k, p_v, o_key, m_i, b_see, scale2, DQ, D0, D1, DV, DVP, IP
        )
        tl.store(p_logit + o_row[:, None] * num_logits + o_i[None, :], b_s, mask=m_q[:, None] & m_i[None, :])
    tl.store(p_m + o_row * parts + i_split, b_m, mask=m_q)
    tl.store(p_l + o_row * parts + i_split, b_l, mask=m_q)
    store_tile(p_acc, o_row * parts + i_split, m_q, b_acc, DV, 0, DVP)


@triton.jit
def block_score_kernel(
    p_logit, p_m, p_l, p_lens, p_score, num_logits, num_scores, parts,
    H: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, LQ: tl.constexpr, BJ: tl.constexpr,
    SPLITS: tl.constexpr,
    SP: tl.constexpr, LEN: tl.constexpr, STRIDE: tl.constexpr, SELECT: tl.constexpr,
):  # fmt: skip
    R: tl.constexpr = SELECT // STRIDE
    L: tl.constexpr = LEN // STRIDE
    i_kv = tl.program_id(1)
    i_q = tl.program_id(2).to(tl.int64)
    t = tl.load(p_lens + i_q // LQ) - LQ + (i_q % LQ).to(tl.int32)
    i_j = tl.program_id(0) * BJ
    if i_j > t // SELECT:
        return
    o_g = tl.arange(0, GP)
    m_g = o_g < G
    o_row = i_q * (H * G) + i_kv * G + o_g
    o_s = tl.arange(0, SP)
    m_s = m_g[:, None] & (o_s < SPLITS)[None, :]
    b_m = tl.load(p_m + o_row[:, None] * parts + o_s[None, :], mask=m_s, other=float("-inf"))
    b_l = tl.load(p_l + o_row[:, None] * parts + o_s[None, :], mask=m_s, other=0.0)
    b_top = tl.max(b_m, 1)
    b_top = tl.where(b_top == float("-inf"), 0.0, b_top)
    b_sum = tl.sum(b_l * tl.exp2(b_m - b_top[:, None]), 1)
    b_lse = tl.where(b_sum == 0.0, float("inf"), b_top + tl.log2(tl.where(b_sum == 0.0, 1.0, b_sum)))
    n_key = num_visible(t, 0, LEN, STRIDE)
    o_j = i_j + tl.arange(0, BJ)
    b_score = tl.zeros([BJ], tl.float32)
    for r in tl.static_range(R + L - 1):
        # Offset r - (L - 1) from the block's first token; weighted by how many (m, n) of eq. 9 meet there.
        o_i = o_j * R + r - (L - 1)
        m_i = m_g[:, None] & ((o_i >= 0) & (o_i < n_key))[None, :]
        b_s = tl.load(p_logit + o_row[:, None] * num_logits + o_i[None, :], mask=m_i, other=float("-inf"))
        b_score += min(min(r + 1, R + L - 1 - r), min(R, L)) * tl.sum(tl.exp2(b_s - b_lse[:, None]), 0)
    tl.store(p_score + (i_q * H + i_kv) * num_scores + o_j, b_score, mask=o_j < num_scores)


@triton.jit
def sparse_split_kernel(
    p_q, p_ks, p_vs, p_kw, p_vw, p_slc_table, p_win_table, p_lens, p_score, p_m, p_l, p_acc,
    slc_width, win_width, num_scores, parts, n, scale2,
    H: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, LQ: tl.constexpr, FIRST: tl.constexpr,
    SLC: tl.constexpr,
    PER: tl.constexpr, WINP: tl.constexpr, BW: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    SELECT: tl.constexpr, WIN: tl.constexpr, INITIAL: tl.constexpr, LOCAL: tl.constexpr,
    SLC_PAGE: tl.constexpr, WIN_PAGE: tl.constexpr,
    DQ: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr,
    IP: tl.constexpr,
):  # fmt: skip
    i_part = tl.program_id(0)
    i_kv = tl.program_id(1)
    i_q = tl.program_id(2).to(tl.int64)
    i_b = i_q // LQ
    t = tl.load(p_lens + i_b) - LQ + (i_q % LQ).to(tl.int32)
    o_g = tl.arange(0, GP)
    m_g = o_g < G
    o_row = i_q * (H * G) + i_kv * G + o_g
    b_q0 = load_tile(p_q, o_row, m_g, DQ, 0, D0, True)
    b_q1 = b_q0
    if D1 > 0:
        b_q1 = load_tile(p_q, o_row, m_g, DQ, D0, D1, True)
    b_m = tl.full([GP], float("-inf"), tl.float32)
    b_l = tl.zeros([GP], tl.float32)
    b_acc = tl.zeros([GP, DVP], tl.float32)
    if i_part < SLC:
        i_now = t // SELECT
        o_j = tl.arange(0, BW)
        m_j = (o_j <= i_now) & (o_j < num_scores)
        b_score = tl.load(p_score + (i_q * H + i_kv) * num_scores + o_j, mask=m_j, other=0.0)
        b_take, b_slot = take_top(selection_keys(b_score, o_j, m_j, i_now, INITIAL, LOCAL), n)
        i_hi = tl.minimum(i_part * PER + PER, tl.minimum(n, i_now + 1))
        for i in range(i_part * PER, i_hi):
            i_block = tl.sum(tl.where(b_take & (b_slot == i), o_j, 0), 0)
            o_c = tl.arange(0, BN)
            o_t = i_block * SELECT + o_c
            m_t = (o_c < SELECT) & (o_t <= t)
            o_key = page_rows(p_slc_table + i_b * slc_width, o_t, m_t, SLC_PAGE) * H + i_kv
            b_acc, b_m, b_l, _ = _attend(
                b_acc,
                b_m,
                b_l,
                b_q0,
                b_q1,
                p_ks,
                p_vs,
                o_key,
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
    else:
        span: tl.constexpr = (WIN + WINP - 1) // WINP
        t_lo = t - WIN + 1 + (i_part - SLC) * span
        t_hi = tl.minimum(t_lo + span, t + 1)
        for i in range(tl.maximum(t_lo, 0), t_hi, BK):
            o_t = i + tl.arange(0, BK)
            m_t = o_t < t_hi
            o_key = page_rows(p_win_table + i_b * win_width, o_t, m_t, WIN_PAGE) * H + i_kv
            b_acc, b_m, b_l, _ = _attend(
                b_acc,
                b_m,
                b_l,
                b_q0,
                b_q1,
                p_kw,
                p_vw,
                o_key,
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
    tl.store(p_m + o_row * parts + FIRST + i_part, b_m, mask=m_g)
    tl.store(p_l + o_row * parts + FIRST + i_part, b_l, mask=m_g)
    store_tile(p_acc, o_row * parts + FIRST + i_part, m_g, b_acc, DV, 0, DVP)


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
