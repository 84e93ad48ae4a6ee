"""The blocks that a decoding step selects: scores of pieces of blocks, of which each keeps its best, then the best of those.

Device code of `decode_kernels`. A piece's blocks are compared all with all, which needs no turn of a loop; ties go to
the lower block. Source: arXiv 2502.11089 eq. 9 to 12.
"""

import triton
import triton.language as tl

from sparseray.kernels.nsa.tiles import num_visible, take_top


@triton.jit
def places(b_key, n, N: tl.constexpr):
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
def _keep(
    p_best,
    b_score,
    i,
    i_now,
    PIECE: tl.constexpr,
    KEEP: tl.constexpr,
    INITIAL: tl.constexpr,
    LOCAL: tl.constexpr,
):
    """The KEEP best blocks of piece i, as key << 32 | block.

    Keys are the bits of the scores, which are not negative and so order like integers; above them the forced blocks,
    below them those there are not.
    """
    o_j = i * PIECE + tl.arange(0, PIECE)
    b_key = tl.where(
        (o_j < INITIAL) | (o_j > i_now - LOCAL), 0x7FFFFFFF - o_j, b_score.to(tl.int32, bitcast=True)
    )
    # Gathered in place: what follows compares all pairs and is to have its own layout, not that of the tiles.
    b_key = tl.gather(tl.where(o_j <= i_now, b_key, -1 - o_j), tl.arange(0, PIECE), 0)
    b_place = places(b_key, KEEP, PIECE)
    tl.store(p_best + i * KEEP + b_place, (b_key.to(tl.int64) << 32) | o_j, mask=b_place < KEEP)


@triton.jit
def choose(
    p_m, p_l, p_fold, p_over, p_top, p_best, i_q, i_kv, i_lo, i_hi, t, n_ctx, num_tiles, parts,
    H: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, SPLITS: tl.constexpr, SP: tl.constexpr, BJ: tl.constexpr,
    PIECE: tl.constexpr, KEEP: tl.constexpr, LEN: tl.constexpr, STRIDE: tl.constexpr, SELECT: tl.constexpr,
    INITIAL: tl.constexpr, LOCAL: tl.constexpr,
):  # fmt: skip
    """Scores of pieces i_lo to i_hi, all heads of the group added up; the best blocks of each are kept."""
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
        _keep(p_best, tl.reshape(b_score, [PIECE]), i, i_now, PIECE, KEEP, INITIAL, LOCAL)


@triton.jit
def choose_single(
    p_m, p_l, p_logit, p_best, i_row, i_lo, i_hi, t, n_key, parts,
    SPLITS: tl.constexpr, SP: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, L: tl.constexpr, PIECE: tl.constexpr,
    KEEP: tl.constexpr, SELECT: tl.constexpr, INITIAL: tl.constexpr, LOCAL: tl.constexpr,
):  # fmt: skip
    """`choose` of a key/value head with one query, from the logits of its R compressed tokens a block (0-based eq. 9)."""
    o_s = tl.arange(0, SP)
    b_m = tl.load(p_m + i_row * parts + o_s, mask=o_s < SPLITS, other=float("-inf"))
    b_l = tl.load(p_l + i_row * parts + o_s, mask=o_s < SPLITS, other=0.0)
    top = tl.max(b_m, 0)
    top = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(b_l * tl.exp2(b_m - top), 0)
    lse = tl.where(total == 0.0, float("inf"), top + tl.log2(tl.where(total == 0.0, 1.0, total)))
    o_r = tl.arange(0, RP)[None, :]
    b_own = tl.where(o_r < R, tl.minimum(R - o_r, L), 0)
    b_next = tl.where(o_r < R, tl.maximum(L - R + o_r, 0), 0)
    for i in range(i_lo, i_hi):
        o_j = (i * PIECE + tl.arange(0, PIECE))[:, None]
        o_in = o_j * RP + o_r
        m_in = (o_r < R) & (o_j * R + o_r < n_key)
        # What the block before adds: its last compressed tokens reach into this one.
        m_before = (b_next > 0) & (o_j > 0) & ((o_j - 1) * R + o_r < n_key)
        b_p = tl.exp2(tl.load(p_logit + o_in, mask=m_in, other=float("-inf")) - lse)
        b_before = tl.exp2(tl.load(p_logit + o_in - RP, mask=m_before, other=float("-inf")) - lse)
        b_score = tl.sum(b_p * b_own + b_before * b_next, 1)
        _keep(p_best, b_score, i, t // SELECT, PIECE, KEEP, INITIAL, LOCAL)


@triton.jit
def chosen(p_best, o_r, n, KEPT: tl.constexpr, BEST: tl.constexpr):
    """The blocks at places o_r of the top n."""
    o_b = tl.arange(0, BEST)
    b_best = tl.load(p_best + o_b, mask=o_b < KEPT, other=0)
    b_key = tl.where(o_b < KEPT, (b_best >> 32).to(tl.int32), -(2**30) - o_b)
    b_is = places(b_key, n, BEST)[:, None] == o_r[None, :]
    return tl.sum(tl.where(b_is, b_best.to(tl.int32)[:, None], 0), 0)
