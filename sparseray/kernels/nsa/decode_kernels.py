"""Device code of NSA decoding over paged caches: one launch a step, five kinds of tasks.

1. `_compressed`: attention over a part of the compressed tokens, its probabilities folded into selection blocks;
2. over a part of the window, which waits for nothing; 3. `_choose`: scores of some blocks, of which the best are
kept; 4. `_chosen`, `_attend_blocks`: attention over a part of the selected blocks, each part taking some
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

from sparseray.kernels.nsa.tiles import (
    load_tile,
    num_visible,
    page_rows,
    store_tile,
    take_top,
)

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
    DQ: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr,
    IP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Tiles of BJ selection blocks. Kept of each, head by head: what its probabilities add to the scores of its blocks
    (0-based eq. 9) and of the first one of the next tile, and the largest logit that they are measured against."""
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
    b_q0 = load_tile(p_q, o_row, m_q, DQ, 0, D0, True)
    b_q1 = b_q0
    if D1 > 0:
        b_q1 = load_tile(p_q, o_row, m_q, DQ, D0, D1, True)
    b_m = tl.full([LP * GP], float("-inf"), tl.float32)
    b_l = tl.zeros([LP * GP], tl.float32)
    b_acc = tl.zeros([LP * GP, DVP], tl.float32)
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
            b_page = tl.gather(b_pages, (j - j_lo) // BJ * PER + o_c // PAGE, 0)
            o_key = b_page.to(tl.int64) * PAGE + o_c % PAGE
        else:
            o_key = page_rows(p_table, o_i, m_i, PAGE)
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
    tl.store(p_m + o_row * parts + i_split, b_m, mask=m_q)
    tl.store(p_l + o_row * parts + i_split, b_l, mask=m_q)
    store_tile(p_acc, o_row * parts + i_split, m_q, b_acc, DV, 0, DVP)


@triton.jit
def _places(b_key, n, N: tl.constexpr):
    """A place below n for each of the n largest of N keys that are not negative, a higher one for the others.

    Few keys are compared all with all, which needs no turn of a loop; of equal ones the first counts as larger.
    """
    if N <= 256:
        b_place = tl.sum((b_key[:, None] > b_key[None, :]).to(tl.int32), 0)
        if tl.sum(b_place, 0) != N * (N - 1) // 2:
            b_all = (b_key.to(tl.int64) << 32) | (N - tl.arange(0, N))
            b_place = tl.sum((b_all[:, None] > b_all[None, :]).to(tl.int32), 0)
    else:
        b_take, b_slot = take_top(b_key, n)
        b_place = tl.where(b_take, b_slot, N)
    return b_place


@triton.jit
def _choose(
    p_m, p_l, p_fold, p_over, p_top, p_best, i_q, i_kv, i_lo, i_hi, t, n_ctx, num_tiles, parts,
    H: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, SPLITS: tl.constexpr, SP: tl.constexpr, BJ: tl.constexpr,
    PIECE: tl.constexpr, KEEP: tl.constexpr, LEN: tl.constexpr, STRIDE: tl.constexpr, SELECT: tl.constexpr,
    INITIAL: tl.constexpr, LOCAL: tl.constexpr,
):  # fmt: skip
    """Scores of pieces i_lo to i_hi, all heads of the group added up; the KEEP best blocks of a piece are kept.

    Kept as key << 32 | block. Keys are the bits of the scores, which are not negative and so order like integers;
    above them the forced blocks, below them those there are not.
    """
    TILES: tl.constexpr = PIECE // BJ
    i_now = t // SELECT
    o_g = tl.arange(0, GP)
    m_g = o_g < G
    o_row = i_q * (H * G) + i_kv * G + o_g
    # Tiles without a compressed token were not written.
    n_block = (num_visible(n_ctx - 1, 0, LEN, STRIDE) * STRIDE + SELECT - 1) // SELECT
    o_s = tl.arange(0, SP)
    m_s = m_g[:, None] & (o_s < SPLITS)[None, :]
    b_m = tl.load(p_m + o_row[:, None] * parts + o_s[None, :], mask=m_s, other=float("-inf"))
    b_l = tl.load(p_l + o_row[:, None] * parts + o_s[None, :], mask=m_s, other=0.0)
    b_max = tl.max(b_m, 1)
    b_max = tl.where(b_max == float("-inf"), 0.0, b_max)
    b_sum = tl.sum(b_l * tl.exp2(b_m - b_max[:, None]), 1)
    b_lse = tl.where(b_sum == 0.0, float("inf"), b_max + tl.log2(tl.where(b_sum == 0.0, 1.0, b_sum)))[None, :]
    o_b = tl.arange(0, BJ)[None, None, :]
    for i in range(i_lo, i_hi):
        o_tile = i * TILES + tl.arange(0, TILES)
        m_in = (o_tile * BJ < n_block)[:, None] & m_g[None, :]
        o_in = ((i_q * H + i_kv) * num_tiles + o_tile)[:, None] * G + o_g[None, :]
        b_top = tl.load(p_top + o_in, mask=m_in, other=float("-inf"))
        b_in = tl.load(p_fold + o_in[:, :, None] * BJ + o_b, mask=m_in[:, :, None], other=0.0)
        # The first block of a tile is also reached into by the last compressed tokens of the tile before.
        m_over = ((o_tile > 0) & ((o_tile - 1) * BJ < n_block))[:, None] & m_g[None, :]
        b_over_top = tl.load(p_top + o_in - G, mask=m_over, other=float("-inf"))
        b_over = tl.load(p_over + o_in - G, mask=m_over, other=0.0)
        # Head by head and against one logit, as inside a tile: blocks whose scores are equal stay so in fp32.
        b_ref = tl.maximum(b_top, b_over_top)
        b_ref = tl.where(b_ref == float("-inf"), 0.0, b_ref)
        b_over *= tl.exp2(b_over_top - b_ref)
        b_in = b_in * tl.exp2(b_top - b_ref)[:, :, None] + tl.where(o_b == 0, b_over[:, :, None], 0.0)
        b_score = tl.sum(b_in * tl.exp2(b_ref - b_lse)[:, :, None], 1)
        o_j = i * PIECE + tl.arange(0, PIECE)
        m_now = o_j <= i_now
        b_key = tl.reshape(b_score, [PIECE]).to(tl.int32, bitcast=True)
        b_key = tl.where((o_j < INITIAL) | (o_j > i_now - LOCAL), 0x7FFFFFFF - o_j, b_key)
        # Gathered in place: what follows compares all pairs and is to have its own layout, not that of the tiles.
        b_key = tl.gather(tl.where(m_now, b_key, -1 - o_j), tl.arange(0, PIECE), 0)
        b_place = _places(b_key, KEEP, PIECE)
        tl.store(p_best + i * KEEP + b_place, (b_key.to(tl.int64) << 32) | o_j, mask=b_place < KEEP)


@triton.jit
def _chosen(p_best, o_r, n, KEPT: tl.constexpr, BEST: tl.constexpr):
    """The blocks at places o_r of the top n."""
    o_b = tl.arange(0, BEST)
    b_best = tl.load(p_best + o_b, mask=o_b < KEPT, other=0)
    b_key = tl.where(o_b < KEPT, (b_best >> 32).to(tl.int32), -(2**30) - o_b)
    b_is = _places(b_key, n, BEST)[:, None] == o_r[None, :]
    return tl.sum(tl.where(b_is, b_best.to(tl.int32)[:, None], 0), 0)


@triton.jit
def _attend_blocks(
    p_q, p_k, p_v, p_table, p_m, p_l, p_acc, i_q, i_kv, i_part, parts, b_blocks, count, t_lo, t, scale2,
    H: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, ITEMS: tl.constexpr, SELECT: tl.constexpr, BN: tl.constexpr,
    PAGE: tl.constexpr,
    DQ: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr,
    IP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Attention of one query token to positions t_lo to t of the first `count` of b_blocks [ITEMS]."""
    WHOLE: tl.constexpr = (SELECT == BN) & (PAGE % SELECT == 0)
    o_g = tl.arange(0, GP)
    m_g = o_g < G
    o_row = i_q * (H * G) + i_kv * G + o_g
    o_p = tl.arange(0, ITEMS)
    b_pages = tl.load(p_table + b_blocks * SELECT // PAGE, mask=o_p < count, other=0)
    b_q0 = load_tile(p_q, o_row, m_g, DQ, 0, D0, True)
    b_q1 = b_q0
    if D1 > 0:
        b_q1 = load_tile(p_q, o_row, m_g, DQ, D0, D1, True)
    b_m = tl.full([GP], float("-inf"), tl.float32)
    b_l = tl.zeros([GP], tl.float32)
    b_acc = tl.zeros([GP, DVP], tl.float32)
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
        b_acc, b_m, b_l, _ = _attend(
            b_acc, b_m, b_l, b_q0, b_q1, p_k, p_v, o_key * H + i_kv, m_t, m_t[None, :], scale2, DQ, D0, D1, DV, DVP, IP
        )  # fmt: skip
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
    DQ: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr,
    IP: tl.constexpr, SPIN: tl.constexpr, CMP_STAGES: tl.constexpr, SLC_STAGES: tl.constexpr,
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
            H, G, GP, LQ, LP, BJ, RP, CMP, PAGES, CMP_PAGE, LEN, STRIDE, SELECT, DQ, D0, D1, DV, DVP, IP, CMP_STAGES,
        )  # fmt: skip
        _count(p_row + ATTENDED)
    elif kind == 2:
        _wait(p_row + ATTENDED, (past + 1) * CMP, SPIN)
        _choose(
            p_m, p_l, p_fold, p_over, p_top, p_best, i_q, i_kv, i_part * SCORE_PER,
            tl.minimum(i_part * SCORE_PER + SCORE_PER, KEPT // KEEP), t, n_ctx, num_tiles, parts,
            H, G, GQ, CMP, SP, BJ, PIECE, KEEP, LEN, STRIDE, SELECT, INITIAL, LOCAL,
        )  # fmt: skip
        _count(p_query + SCORED)
    elif kind == 3:
        _wait(p_query + SCORED, (past + 1) * SCORES, SPIN)
        i_lo = i_part * SLC_PER
        b_blocks = _chosen(p_best, i_lo + tl.arange(0, SLC_ITEMS), n, KEPT, BEST)
        _attend_blocks(
            p_q, p_sk, p_sv, p_st + i_b * st_width, p_m, p_l, p_acc, i_q, i_kv, CMP + i_part, parts, b_blocks,
            tl.minimum(SLC_PER, tl.minimum(n, t // SELECT + 1) - i_lo), 0, t, scale2,
            H, G, GQ, SLC_ITEMS, SELECT, BN, SLC_PAGE, DQ, D0, D1, DV, DVP, IP, SLC_STAGES,
        )  # fmt: skip
        _count(p_query + READ)
    elif kind == 1:
        i_lo = tl.maximum(t - WIN + 1, 0) // SELECT + i_part * WIN_PER
        _attend_blocks(
            p_q, p_wk, p_wv, p_wt + i_b * wt_width, p_m, p_l, p_acc, i_q, i_kv, CMP + SLC + i_part, parts,
            i_lo + tl.arange(0, WIN_ITEMS), tl.minimum(WIN_PER, t // SELECT + 1 - i_lo), t - WIN + 1, t, scale2,
            H, G, GQ, WIN_ITEMS, SELECT, BN, WIN_PAGE, DQ, D0, D1, DV, DVP, IP, SLC_STAGES,
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
