"""Device code of NSA decoding over paged caches: one launch a step, five kinds of tasks.

1. `_compressed`: attention over a part of the compressed tokens, its probabilities folded into selection blocks;
2. over a part of the window, which waits for nothing; 3. `choose`: scores of some blocks, of which the best are
kept; 4. `chosen`, `_attend_blocks`: attention over a part of the selected blocks, each part taking some
places of the top n; 5. `_merge`: the three softmaxes put together under their gates. A row is one key/value head of
one sequence.

Tasks count what they finished in `state`, and a task that needs others waits for their count. Every task has a
higher program id than those it waits for, and programs start in the order of their ids (as CUB's single-pass scans
rely on too), so what is waited for always runs or has run. Counts only grow, and no step resets them. Sequence lengths
are read on the device, so a captured graph serves growing sequences. The order in which tasks end changes no bit: the
counts only say that something is written.
"""

import triton
import triton.language as tl

from sparseray.kernels.nsa.decode_choice import choose, choose_single, chosen
from sparseray.kernels.nsa.decode_single import attend_places, query_row, store_places
from sparseray.kernels.nsa.tiles import load_tile, num_visible, page_rows, store_tile

ATTENDED, MERGED, SCORED, READ = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
"""Counts of a row in `state`: compressed parts, merges; then for every query token pieces scored, and parts of the
selected blocks and the window read."""


@triton.jit
def _wait(p_count, target, SPIN: tl.constexpr):
    """Until `target` tasks have counted at p_count; what they stored before is visible then.

    The interpreter runs the programs in order, so there all of them have.
    """
    if SPIN:
        p_int = p_count.to(tl.uint64)
        count = target - 1
        while count < target:
            count = tl.inline_asm_elementwise(
                "ld.acquire.gpu.global.s64 $0, [$1];", "=l,l", [p_int], dtype=tl.int64, is_pure=False, pack=1
            )


@triton.jit
def _count(p_count):
    """Say that this task has stored everything."""
    # All threads have written before one of them says so.
    tl.debug_barrier()
    tl.atomic_add(p_count, 1, sem="release")


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
def _compressed(
    p_q, p_k, p_v, p_table, p_fold, p_over, p_top, p_m, p_l, p_acc, i_b, i_kv, i_split, n_ctx, num_tiles, parts, scale2,
    H: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, LQ: tl.constexpr, LP: tl.constexpr, BJ: tl.constexpr,
    RP: tl.constexpr, SPLITS: tl.constexpr, PAGES: tl.constexpr, PAGE: tl.constexpr, LEN: tl.constexpr,
    STRIDE: tl.constexpr, SELECT: tl.constexpr,
    DQ: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr,
    IP: tl.constexpr, SINGLE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Tiles of BJ selection blocks. Kept of each, head by head: what its probabilities add to the scores of its blocks
    (0-based eq. 9) and of the first one of the next tile, and the largest logit that they are measured against.
    SINGLE: its logits."""
    R: tl.constexpr = SELECT // STRIDE
    L: tl.constexpr = LEN // STRIDE
    # A tile of keys lies on one page, or on PER whole ones.
    WHOLE: tl.constexpr = (R == RP) & (PAGE % (BJ * R) == 0)
    PER: tl.constexpr = BJ * R // PAGE if (R == RP) & (BJ * R % PAGE == 0) else 0
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
    ROWS: tl.constexpr = BJ * RP if SINGLE else LP * GP
    if SINGLE:
        b_q0 = query_row(p_q, i_b * H + i_kv, DQ, DP)
    else:
        b_q0 = load_tile(p_q, o_row, m_q, DQ, 0, D0, True)
    b_q1 = b_q0
    if D1 > 0 and not SINGLE:
        b_q1 = load_tile(p_q, o_row, m_q, DQ, D0, D1, True)
    b_m = tl.full([ROWS], float("-inf"), tl.float32)
    b_l = tl.zeros([ROWS], tl.float32)
    b_acc = tl.zeros([ROWS, DVP], tl.float32)
    o_c = tl.arange(0, BJ * RP)
    o_j = tl.arange(0, BJ)[None, :]
    o_r = tl.arange(0, RP)
    b_own = tl.where(o_r < R, tl.minimum(R - o_r, L), 0).to(tl.float32)[None, None, :]
    b_next = tl.where(o_r < R, tl.maximum(L - R + o_r, 0), 0).to(tl.float32)[None, None, :]
    # The pages of all tiles at once: a look-up inside the loop would wait for memory in every turn.
    o_p = tl.arange(0, PAGES)
    if WHOLE:
        b_pages = tl.load(p_table + (j_lo + o_p * BJ) * R // PAGE, mask=j_lo + o_p * BJ < j_hi, other=0)
    elif PER > 0:
        o_page = j_lo * R // PAGE + o_p
        b_pages = tl.load(p_table + o_page, mask=o_page * PAGE < j_hi * R, other=0)
    for j in tl.range(j_lo, j_hi, BJ, num_stages=STAGES):
        o_i = (j + o_c // RP) * R + o_c % RP
        m_i = (o_c % RP < R) & (o_i < n_key)
        if WHOLE:
            page = tl.sum(tl.where(o_p == (j - j_lo) // BJ, b_pages, 0), 0)
            o_key = page.to(tl.int64) * PAGE + j * R % PAGE + o_c
        elif PER > 0:
            # Tiles are fetched ahead, past the last one too: what they look up must be inside.
            o_ahead = tl.minimum((j - j_lo) // BJ * PER + o_c // PAGE, PAGES - 1)
            b_page = tl.gather(b_pages, o_ahead, 0)
            o_key = b_page.to(tl.int64) * PAGE + o_c % PAGE
        else:
            o_key = page_rows(p_table, o_i, m_i, PAGE)
        if SINGLE:
            b_acc, b_m, b_l, b_s = attend_places(
                b_acc, b_m, b_l, b_q0, p_k, p_v, o_key * H + i_kv, m_i, scale2, DQ, DP, DV, DVP
            )
            tl.store(p_fold + ((i_b * H + i_kv) * num_tiles * BJ + j) * RP + o_c, b_s, mask=m_i)
        else:
            b_see = m_i[None, :] & ((o_i * STRIDE + LEN - 1)[None, :] <= b_t[:, None])
            b_acc, b_m, b_l, b_p = _attend(
                b_acc, b_m, b_l, b_q0, b_q1, p_k, p_v, o_key * H + i_kv, m_i, b_see, scale2, DQ, D0, D1, DV, DVP, IP
            )  # fmt: skip
            b_p = tl.reshape(b_p, [LP * GP, BJ, RP])
            b_over = tl.sum(b_p * b_next, 2)
            b_shifted = tl.gather(b_over, tl.broadcast_to(tl.maximum(o_j - 1, 0), [LP * GP, BJ]), 1)
            b_fold = tl.sum(b_p * b_own, 2) + tl.where(o_j > 0, b_shifted, 0.0)
            o_out = (o_tile + j // BJ) * G + o_g
            tl.store(p_fold + o_out[:, None] * BJ + o_j, b_fold, mask=m_q[:, None])
            tl.store(p_over + o_out, tl.sum(tl.where(o_j == BJ - 1, b_over, 0.0), 1), mask=m_q)
            tl.store(p_top + o_out, b_m, mask=m_q)
    if SINGLE:
        store_places(p_m, p_l, p_acc, (i_b * H + i_kv) * parts + i_split, b_m, b_l, b_acc, DV, DVP)
    else:
        tl.store(p_m + o_row * parts + i_split, b_m, mask=m_q)
        tl.store(p_l + o_row * parts + i_split, b_l, mask=m_q)
        store_tile(p_acc, o_row * parts + i_split, m_q, b_acc, DV, 0, DVP)


@triton.jit
def _attend_blocks(
    p_q, p_k, p_v, p_table, p_m, p_l, p_acc, i_q, i_kv, i_part, parts, b_blocks, count, t_lo, t, scale2,
    H: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, ITEMS: tl.constexpr, SELECT: tl.constexpr, BN: tl.constexpr,
    PAGE: tl.constexpr,
    DQ: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr,
    IP: tl.constexpr, SINGLE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Attention of one query token to positions t_lo to t of the first `count` of b_blocks [ITEMS]."""
    WHOLE: tl.constexpr = (SELECT == BN) & (PAGE % SELECT == 0)
    o_g = tl.arange(0, GP)
    m_g = o_g < G
    o_row = i_q * (H * G) + i_kv * G + o_g
    o_p = tl.arange(0, ITEMS)
    b_pages = tl.load(p_table + b_blocks * SELECT // PAGE, mask=o_p < count, other=0)
    ROWS: tl.constexpr = BN if SINGLE else GP
    if SINGLE:
        b_q0 = query_row(p_q, i_q * H + i_kv, DQ, DP)
    else:
        b_q0 = load_tile(p_q, o_row, m_g, DQ, 0, D0, True)
    b_q1 = b_q0
    if D1 > 0 and not SINGLE:
        b_q1 = load_tile(p_q, o_row, m_g, DQ, D0, D1, True)
    b_m = tl.full([ROWS], float("-inf"), tl.float32)
    b_l = tl.zeros([ROWS], tl.float32)
    b_acc = tl.zeros([ROWS, DVP], tl.float32)
    o_c = tl.arange(0, BN)
    for i in tl.range(0, count, num_stages=STAGES):
        i_block = tl.sum(tl.where(o_p == i, b_blocks, 0), 0)
        o_t = i_block * SELECT + o_c
        m_t = (o_c < SELECT) & (o_t >= t_lo) & (o_t <= t)
        if WHOLE:
            page = tl.sum(tl.where(o_p == i, b_pages, 0), 0)
            o_key = page.to(tl.int64) * PAGE + i_block * SELECT % PAGE + o_c
        else:
            o_key = page_rows(p_table, o_t, m_t, PAGE)
        if SINGLE:
            b_acc, b_m, b_l, _ = attend_places(
                b_acc, b_m, b_l, b_q0, p_k, p_v, o_key * H + i_kv, m_t, scale2, DQ, DP, DV, DVP
            )
        else:
            b_acc, b_m, b_l, _ = _attend(
                b_acc, b_m, b_l, b_q0, b_q1, p_k, p_v, o_key * H + i_kv, m_t, m_t[None, :], scale2, DQ, D0, D1, DV, DVP, IP
            )  # fmt: skip
    if SINGLE:
        store_places(p_m, p_l, p_acc, (i_q * H + i_kv) * parts + i_part, b_m, b_l, b_acc, DV, DVP)
    else:
        tl.store(p_m + o_row * parts + i_part, b_m, mask=m_g)
        tl.store(p_l + o_row * parts + i_part, b_l, mask=m_g)
        store_tile(p_acc, o_row * parts + i_part, m_g, b_acc, DV, 0, DVP)


@triton.jit
def _merge(
    p_m, p_l, p_acc, p_gate, p_o, row_first, parts,
    CMP: tl.constexpr, SLC: tl.constexpr, PP: tl.constexpr, HEADS: tl.constexpr, HP: tl.constexpr, DV: tl.constexpr,
    DVP: tl.constexpr,
):  # fmt: skip
    """The three branches of HEADS query heads from row_first on, under their gates."""
    o_h = tl.arange(0, HP)
    m_h = o_h < HEADS
    o_row = row_first + o_h
    o_p = tl.arange(0, PP)
    m_p = m_h[:, None] & (o_p < parts)[None, :]
    o_part = o_row[:, None] * parts + o_p[None, :]
    b_m = tl.load(p_m + o_part, mask=m_p, other=float("-inf"))
    b_l = tl.load(p_l + o_part, mask=m_p, other=0.0)
    o_d = tl.arange(0, DVP)
    m_d = o_d < DV
    b_part = tl.load(
        p_acc + o_part[:, :, None] * DV + o_d[None, None, :],
        mask=m_p[:, :, None] & m_d[None, None, :],
        other=0.0,
    )
    b_w = tl.zeros([HP, PP], tl.float32)
    for c in tl.static_range(3):
        b_in = ((o_p >= CMP).to(tl.int32) + (o_p >= CMP + SLC).to(tl.int32) == c)[None, :]
        b_top = tl.max(tl.where(b_in, b_m, float("-inf")), 1)
        b_top = tl.where(b_top == float("-inf"), 0.0, b_top)
        b_e = tl.where(b_in, tl.exp2(b_m - b_top[:, None]), 0.0)
        b_sum = tl.sum(b_e * b_l, 1)
        b_gate = tl.load(p_gate + o_row * 3 + c, mask=m_h, other=0.0).to(tl.float32)
        b_w += b_e * (b_gate / tl.where(b_sum == 0.0, 1.0, b_sum))[:, None]
    b_o = tl.sum(b_part * b_w[:, :, None], 1).to(p_o.dtype.element_ty)
    tl.store(p_o + o_row[:, None] * DV + o_d[None, :], b_o, mask=m_h[:, None] & m_d[None, :])


@triton.jit
def _task(
    k, num_rows, LQ: tl.constexpr, CMP: tl.constexpr, WINP: tl.constexpr, SCORES: tl.constexpr, SLC: tl.constexpr,
    MERGES: tl.constexpr,
):  # fmt: skip
    """Kind, row, query token and part of task k: the tasks of all rows, kind by kind."""
    kind = 0
    per = CMP
    each = CMP
    first = 0
    end = num_rows * CMP
    for c in tl.static_range(1, 5):
        if k >= end:
            kind = c
            per = WINP if c == 1 else (SCORES if c == 2 else (SLC if c == 3 else MERGES))
            each = LQ * per
            first = end
            end += num_rows * each
    k -= first
    return kind, k // each, k % each // per, k % per


@triton.jit
def decode_kernel(
    p_q, p_gate, p_o, p_lens, p_ck, p_cv, p_ct, p_sk, p_sv, p_st, p_wk, p_wv, p_wt, p_fold, p_over, p_top, p_best, p_m,
    p_l, p_acc, p_state, ct_width, st_width, wt_width, num_rows, num_tiles, n, scale2,
    H: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, LQ: tl.constexpr, LP: tl.constexpr,
    CMP: tl.constexpr, WINP: tl.constexpr, SCORES: tl.constexpr, SLC: tl.constexpr, MERGES: tl.constexpr,
    BJ: tl.constexpr, RP: tl.constexpr, PAGES: tl.constexpr, SP: tl.constexpr, SCORE_PER: tl.constexpr,
    PIECE: tl.constexpr, KEEP: tl.constexpr, KEPT: tl.constexpr, BEST: tl.constexpr, PP: tl.constexpr, HP: tl.constexpr,
    WIN_PER: tl.constexpr, WIN_ITEMS: tl.constexpr, SLC_PER: tl.constexpr, SLC_ITEMS: tl.constexpr,
    LEN: tl.constexpr, STRIDE: tl.constexpr, SELECT: tl.constexpr, BN: tl.constexpr, WIN: tl.constexpr,
    CMP_PAGE: tl.constexpr, SLC_PAGE: tl.constexpr, WIN_PAGE: tl.constexpr, INITIAL: tl.constexpr, LOCAL: tl.constexpr,
    DQ: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr,
    IP: tl.constexpr, SINGLE: tl.constexpr, SPIN: tl.constexpr, CMP_STAGES: tl.constexpr, SLC_STAGES: tl.constexpr,
):  # fmt: skip
    """A task a program; the kinds come in the order in which they wait for each other."""
    GQ: tl.constexpr = 16 if GP < 16 else GP
    kind, i_row, i_lq, i_part = _task(tl.program_id(0), num_rows, LQ, CMP, WINP, SCORES, SLC, MERGES)
    i_kv = i_row % H
    i_b = (i_row // H).to(tl.int64)
    i_q = i_b * LQ + i_lq
    p_row = p_state + i_row * (2 + 2 * LQ)
    p_query = p_row + 2 * i_lq
    # Counts only grow; the merges that have ended tell how many steps there were before this one.
    past = tl.load(p_row + MERGED) // (LQ * MERGES)
    n_ctx = tl.load(p_lens + i_b)
    t = n_ctx - LQ + i_lq
    parts = CMP + SLC + WINP
    p_best += (i_q * H + i_kv) * KEPT
    if kind == 0:
        _compressed(
            p_q, p_ck, p_cv, p_ct + i_b * ct_width, p_fold, p_over, p_top, p_m, p_l, p_acc, i_b, i_kv, i_part, n_ctx,
            num_tiles, parts, scale2,
            H, G, GP, LQ, LP, BJ, RP, CMP, PAGES, CMP_PAGE, LEN, STRIDE, SELECT, DQ, D0, D1, DP, DV, DVP,
            IP, SINGLE, CMP_STAGES,
        )  # fmt: skip
        _count(p_row + ATTENDED)
    elif kind == 2:
        _wait(p_row + ATTENDED, (past + 1) * CMP, SPIN)
        i_lo = i_part * SCORE_PER
        i_hi = tl.minimum(i_lo + SCORE_PER, KEPT // KEEP)
        if SINGLE:
            choose_single(
                p_m, p_l, p_fold + i_row.to(tl.int64) * num_tiles * BJ * RP, p_best, i_row.to(tl.int64), i_lo, i_hi, t,
                num_visible(t, 0, LEN, STRIDE), parts,
                CMP, SP, SELECT // STRIDE, RP, LEN // STRIDE, PIECE, KEEP, SELECT, INITIAL, LOCAL,
            )  # fmt: skip
        else:
            choose(
                p_m, p_l, p_fold, p_over, p_top, p_best, i_q, i_kv, i_lo, i_hi, t, n_ctx, num_tiles, parts,
                H, G, GQ, CMP, SP, BJ, PIECE, KEEP, LEN, STRIDE, SELECT, INITIAL, LOCAL,
            )  # fmt: skip
        _count(p_query + SCORED)
    elif kind == 3:
        _wait(p_query + SCORED, (past + 1) * SCORES, SPIN)
        i_lo = i_part * SLC_PER
        b_blocks = chosen(p_best, i_lo + tl.arange(0, SLC_ITEMS), n, KEPT, BEST)
        _attend_blocks(
            p_q, p_sk, p_sv, p_st + i_b * st_width, p_m, p_l, p_acc, i_q, i_kv, CMP + i_part, parts, b_blocks,
            tl.minimum(SLC_PER, tl.minimum(n, t // SELECT + 1) - i_lo), 0, t, scale2,
            H, G, GQ, SLC_ITEMS, SELECT, BN, SLC_PAGE, DQ, D0, D1, DP, DV, DVP, IP, SINGLE,
            SLC_STAGES,
        )  # fmt: skip
        _count(p_query + READ)
    elif kind == 1:
        i_lo = tl.maximum(t - WIN + 1, 0) // SELECT + i_part * WIN_PER
        _attend_blocks(
            p_q, p_wk, p_wv, p_wt + i_b * wt_width, p_m, p_l, p_acc, i_q, i_kv, CMP + SLC + i_part, parts,
            i_lo + tl.arange(0, WIN_ITEMS), tl.minimum(WIN_PER, t // SELECT + 1 - i_lo), t - WIN + 1, t, scale2,
            H, G, GQ, WIN_ITEMS, SELECT, BN, WIN_PAGE, DQ, D0, D1, DP, DV, DVP, IP, SINGLE,
            SLC_STAGES,
        )  # fmt: skip
        _count(p_query + READ)
    else:
        _wait(p_query + READ, (past + 1) * (SLC + WINP), SPIN)
        HEADS: tl.constexpr = G // MERGES
        _merge(
            p_m, p_l, p_acc, p_gate, p_o, i_q * (H * G) + i_kv * G + i_part * HEADS, parts,
            CMP, SLC, PP, HEADS, HP, DV, DVP,
        )  # fmt: skip
        tl.atomic_add(p_row + MERGED, 1, sem="relaxed")
