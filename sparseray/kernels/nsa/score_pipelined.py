"""Scores of the selection blocks, with warps of different roles (Gluon, Hopper): the fast twin of `score_kernel` of
`top_n.py` for half precision and head sizes of 64 or 128.

Two warpgroups share a tile of query rows and take its key tiles in turn; one more warp copies queries, their log-sum-exp
and key tiles to shared memory, ahead of both. A warpgroup multiplies its keys with one half of the rows while it takes
the exponentials of the other half. Keys are rows, and columns are ordered so that all heads of a query are in one
thread. Programs stay and take tile after tile of queries. Source: arXiv 2502.11089 eq. 8-10.
"""

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from sparseray.kernels.launch import launch_kernel
from sparseray.kernels.nsa.range_pipelined import WIDTHS, layout_of, num_multiprocessors, source_of
from sparseray.kernels.nsa.range_pipelined_backward import numbers_source
from sparseray.kernels.nsa.tiles import can_copy
from sparseray.kernels.nsa.tuning import LAUNCH

ROWS = 256
"""Rows of a tile of queries, both halves: query tokens times query heads of one key/value head."""
KEYS = 64
"""Keys of a tile: what one warpgroup's matrix product takes."""


@gluon.jit
def _item(
    item, p_tiles, p_meta, num_tiles, tile_first, row_first, row_end,
    H: gl.constexpr, BQ: gl.constexpr, BN: gl.constexpr, RP: gl.constexpr, SELECT: gl.constexpr,
):  # fmt: skip
    """Of a work item: key/value head, first query in its sequence, row of the table, and its number of key tiles."""
    i_kv = item % H
    i_tile = tile_first + num_tiles - 1 - item // H
    i_seq = gl.load(p_tiles + i_tile * 2)
    i_q = gl.load(p_tiles + i_tile * 2 + 1) * (2 * BQ)
    p_row = p_meta + gl.maximum(i_seq, 0) * 12
    o_row = gl.load(p_row) + i_q
    q_len = gl.load(p_row + 1).to(gl.int32)
    q_start = gl.load(p_row + 2).to(gl.int32)
    blocks = (q_start + gl.minimum(i_q + 2 * BQ, q_len) - 1) // SELECT + 1
    is_here = (i_seq >= 0) & (o_row < row_end) & (o_row + 2 * BQ > row_first)
    return i_kv, i_q, p_row, gl.where(is_here, (blocks * RP + BN - 1) // BN, 0)


@gluon.jit
def _load(
    d_q, d_lse, d_k, s_q, s_lse, s_k, bars, p_tiles, p_meta, num_tiles, tile_first, row_first, row_end,
    H: gl.constexpr, G: gl.constexpr, BQ: gl.constexpr, BN: gl.constexpr, RP: gl.constexpr, DQ: gl.constexpr,
    SELECT: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    turn = 0
    i_item = 0
    for item in range(gl.program_id(0), num_tiles * H, gl.num_programs(0)):
        i_kv, i_q, p_row, count = _item(
            item, p_tiles, p_meta, num_tiles, tile_first, row_first, row_end, H, BQ, BN, RP, SELECT
        )
        if count > 0:
            q_row = gl.load(p_row).to(gl.int32) + i_q
            k_off = gl.load(p_row + 3).to(gl.int32)
            place = i_item % 2
            bar = bars.index(2 * STAGES + place)
            mbarrier.wait(bars.index(2 * STAGES + 2 + place), (i_item // 2 & 1) ^ 1)
            mbarrier.expect(bar, 2 * d_q.block_type.nbytes + 2 * d_lse.block_type.nbytes)
            for half in gl.static_range(2):
                here = place * 2 + half
                tma.async_copy_global_to_shared(
                    d_q, [i_kv * (G // 2), q_row + half * BQ, 0, 0], bar, s_q.index(here)
                )
                tma.async_copy_global_to_shared(d_lse, [q_row + half * BQ, i_kv * G], bar, s_lse.index(here))
            i_item += 1
            for j in range(0, count):
                stage = turn % STAGES
                mbarrier.wait(bars.index(STAGES + stage), (turn // STAGES & 1) ^ 1)
                mbarrier.expect(bars.index(stage), d_k.block_type.nbytes)
                tma.async_copy_global_to_shared(
                    d_k, [k_off + j * BN, i_kv * DQ], bars.index(stage), s_k.index(stage)
                )
                turn += 1


@gluon.jit
def _multiply(s_k, s_q, BN: gl.constexpr, N: gl.constexpr, MMA: gl.constexpr):
    """k . q of a key tile and half of the rows, under way."""
    b_zero = gl.zeros([BN, N], gl.float32, layout=MMA)
    s_q2 = s_q.reshape((N, s_k.shape[1]))
    return warpgroup_mma(s_k, s_q2.permute((1, 0)), b_zero, use_acc=False, is_async=True)


@gluon.constexpr_function
def _exchange(layout):
    """The layout with a bit of axis 1 in registers instead of lanes, in exchange for a bit of another axis.

    One exchange is a shuffle; two at once would go through shared memory.
    """
    regs, lanes = list(layout.reg_bases), list(layout.lane_bases)
    here = next((i for i, bit in enumerate(lanes) if bit[1]), None)
    there = next((i for i, bit in enumerate(regs) if any(bit) and not bit[1]), None)
    if here is None or there is None:
        return layout
    lanes[here], regs[there] = regs[there], lanes[here]
    return gl.DistributedLinearLayout(regs, lanes, layout.warp_bases, layout.block_bases, layout.shape)


@gluon.jit
def _write(
    b_s, b_lse, j, o_first, k_len, p_out, q_lo, q_hi, width, over, scale2,
    H: gl.constexpr, G: gl.constexpr, BQ: gl.constexpr, BN: gl.constexpr, RP: gl.constexpr, LEN: gl.constexpr,
    STRIDE: gl.constexpr,
):  # fmt: skip
    """Scores of the selection blocks of key tile j, for the BQ queries of one half.

    Args:
        b_s: [BN, G * BQ], products; a column is (pair of heads, query, head of the pair).
        o_first: position of the first query, less that of key 0.
        q_lo, q_hi: which of the queries are written.
    """
    L: gl.constexpr = LEN // STRIDE
    b_p = gl.exp2(b_s * scale2 - b_lse[None, :])
    b_sum = gl.sum(gl.sum(gl.reshape(b_p, [BN, G // 2, BQ, 2]), 3), 1)
    b_sum = gl.reshape(b_sum, [BN // RP, RP, BQ])
    # Neighbouring threads hold a block's keys: a bit of the key number at a time, they go to one thread.
    for _ in gl.static_range(2):
        b_sum = gl.convert_layout(b_sum, _exchange(b_sum.type.layout))
    FOLD: gl.constexpr = b_sum.type.layout
    FLAT: gl.constexpr = gl.SliceLayout(1, FOLD)
    o_r = gl.arange(0, RP, layout=gl.SliceLayout(0, gl.SliceLayout(2, FOLD)))[None, :, None]
    o_j = j * (BN // RP) + gl.arange(0, BN // RP, layout=gl.SliceLayout(1, FLAT))[:, None]
    o_q = gl.arange(0, BQ, layout=gl.SliceLayout(0, FLAT))[None, :]
    # All heads of a query see the same keys. What is not seen may be infinite here, never NaN.
    o_i = gl.expand_dims(o_j, 1) * RP + o_r
    m_see = (o_i < k_len) & (o_i * STRIDE + LEN - 1 <= o_first + gl.expand_dims(o_q, 1))
    b_sum = gl.where(m_see, b_sum, 0.0)
    m_tile = (o_j < width) & (o_q >= q_lo) & (o_q < q_hi)
    p_tile = p_out + o_q * (H * width) + o_j
    b_here = gl.minimum(RP - o_r, L).to(gl.float32)
    gl.store(p_tile, gl.sum(b_sum * b_here, 1), mask=m_tile)
    if L > 1:
        b_next = gl.maximum(L - RP + o_r, 0).to(gl.float32)
        gl.store(p_tile + over, gl.sum(b_sum * b_next, 1), mask=m_tile)


@gluon.jit
def _tile(
    b_s0, b_lse0, s_q1, s_k, bars, turn, end, j, o_first, k_len, p_out, q_lo, q_hi, width, over, scale2,
    H: gl.constexpr, G: gl.constexpr, BQ: gl.constexpr, BN: gl.constexpr, RP: gl.constexpr, LEN: gl.constexpr,
    STRIDE: gl.constexpr, STAGES: gl.constexpr, MMA: gl.constexpr,
):  # fmt: skip
    """Scores of key tile j for the first half of the rows, whose product is under way; returns the second half's."""
    stage = turn % STAGES
    b_s1 = _multiply(s_k.index(stage), s_q1, BN, BQ * G, MMA)
    b_s0 = warpgroup_mma_wait(1, deps=[b_s0])
    _write(
        b_s0, b_lse0, j, o_first, k_len, p_out, q_lo, q_hi, width, over, scale2, H, G, BQ, BN, RP, LEN, STRIDE
    )
    # The branch keeps ptxas from moving the exponentials behind the wait for the second half.
    if turn + 2 < end:
        mbarrier.wait(bars.index((turn + 2) % STAGES), (turn + 2) // STAGES & 1)
    b_s1 = warpgroup_mma_wait(0, deps=[b_s1])
    mbarrier.arrive(bars.index(STAGES + stage))
    return b_s1


@gluon.jit
def _score(
    p_score, s_q, s_lse, s_k, bars, p_tiles, p_meta, num_tiles, tile_first, row_first, row_end, width, over, scale2,
    WHICH: gl.constexpr, H: gl.constexpr, G: gl.constexpr, BQ: gl.constexpr, BN: gl.constexpr, RP: gl.constexpr,
    LEN: gl.constexpr, STRIDE: gl.constexpr, SELECT: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Every second key tile, counted over all work items, from the WHICH-th on."""
    N: gl.constexpr = BQ * G
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    COL: gl.constexpr = gl.SliceLayout(0, MMA)
    LIKE: gl.constexpr = gl.reshape(gl.zeros([N], gl.float32, layout=COL), [G // 2, BQ, 2]).type.layout
    turn = WHICH
    i_item = 0
    base = 0
    for item in range(gl.program_id(0), num_tiles * H, gl.num_programs(0)):
        i_kv, i_q, p_row, count = _item(
            item, p_tiles, p_meta, num_tiles, tile_first, row_first, row_end, H, BQ, BN, RP, SELECT
        )
        if count > 0:
            o_row = gl.load(p_row) + i_q
            q_len = gl.load(p_row + 1).to(gl.int32)
            o_0 = gl.load(p_row + 2).to(gl.int32) + i_q
            o_1 = o_0 + BQ
            k_len = gl.load(p_row + 4).to(gl.int32)
            p_0 = p_score + ((o_row - row_first) * H + i_kv) * width
            p_1 = p_0 + BQ * H * width
            lo = gl.maximum(row_first - o_row, 0).to(gl.int32)
            hi = gl.minimum(row_end - o_row, q_len - i_q).to(gl.int32)
            place = i_item % 2
            mbarrier.wait(bars.index(2 * STAGES + place), i_item // 2 & 1)
            s_q0 = s_q.index(place * 2)
            s_q1 = s_q.index(place * 2 + 1)
            s_lse0 = s_lse.index(place * 2).reshape((BQ, G // 2, 2)).permute((1, 0, 2))
            s_lse1 = s_lse.index(place * 2 + 1).reshape((BQ, G // 2, 2)).permute((1, 0, 2))
            b_lse0 = gl.convert_layout(gl.reshape(s_lse0.load(LIKE), [N]), COL, assert_trivial=True)
            b_lse1 = gl.convert_layout(gl.reshape(s_lse1.load(LIKE), [N]), COL, assert_trivial=True)
            end = base + count
            if turn < end:
                stage = turn % STAGES
                mbarrier.wait(bars.index(stage), turn // STAGES & 1)
                b_s0 = _multiply(s_k.index(stage), s_q0, BN, N, MMA)
                b_s1 = _tile(
                    b_s0, b_lse0, s_q1, s_k, bars, turn, end, turn - base, o_0, k_len, p_0, lo, hi, width, over, scale2,
                    H, G, BQ, BN, RP, LEN, STRIDE, STAGES, MMA,
                )  # fmt: skip
                turn += 2
                # The second half of the tile before, then the first half of this one, each while a product is under way.
                # No product may be under way from one turn to the next: ptxas would run them all one after the other.
                for j in range(turn - base, count, 2):
                    b_s0 = _multiply(s_k.index(turn % STAGES), s_q0, BN, N, MMA)
                    _write(
                        b_s1, b_lse1, j - 2, o_1, k_len, p_1, lo - BQ, hi - BQ, width, over, scale2,
                        H, G, BQ, BN, RP, LEN, STRIDE,
                    )  # fmt: skip
                    b_s1 = _tile(
                        b_s0, b_lse0, s_q1, s_k, bars, turn, end, j, o_0, k_len, p_0, lo, hi, width, over, scale2,
                        H, G, BQ, BN, RP, LEN, STRIDE, STAGES, MMA,
                    )  # fmt: skip
                    turn += 2
                _write(
                    b_s1, b_lse1, turn - base - 2, o_1, k_len, p_1, lo - BQ, hi - BQ, width, over, scale2,
                    H, G, BQ, BN, RP, LEN, STRIDE,
                )  # fmt: skip
            mbarrier.arrive(bars.index(2 * STAGES + 2 + place))
            i_item += 1
            base = end


@gluon.jit
def score_pipelined_kernel(
    d_q, d_lse, d_k, p_score, p_meta, p_tiles, num_tiles, tile_first, row_first, row_end, width, over, scale2,
    H: gl.constexpr, G: gl.constexpr, BQ: gl.constexpr, BN: gl.constexpr, RP: gl.constexpr, DQ: gl.constexpr,
    LEN: gl.constexpr, STRIDE: gl.constexpr, SELECT: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    # Queries of two work items, each in two halves.
    s_q = gl.allocate_shared_memory(d_q.dtype, [4, G // 2, BQ, 2, DQ], d_q.layout)
    s_lse = gl.allocate_shared_memory(gl.float32, [4, BQ, G], d_lse.layout)
    s_k = gl.allocate_shared_memory(d_k.dtype, [STAGES, BN, DQ], d_k.layout)
    # Keys are there, keys are read; queries are there, queries are read.
    bars = gl.allocate_shared_memory(gl.int64, [2 * STAGES + 4, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2 * STAGES + 2):
        mbarrier.init(bars.index(i), count=1)
    for i in gl.static_range(2):
        mbarrier.init(bars.index(2 * STAGES + 2 + i), count=2)
    fence_async_shared()
    gl.thread_barrier()
    gl.warp_specialize(
        [
            (_score, (p_score, s_q, s_lse, s_k, bars, p_tiles, p_meta, num_tiles, tile_first, row_first, row_end, width, over,
                      scale2, 0, H, G, BQ, BN, RP, LEN, STRIDE, SELECT, STAGES)),
            (_score, (p_score, s_q, s_lse, s_k, bars, p_tiles, p_meta, num_tiles, tile_first, row_first, row_end, width, over,
                      scale2, 1, H, G, BQ, BN, RP, LEN, STRIDE, SELECT, STAGES)),
            (_load, (d_q, d_lse, d_k, s_q, s_lse, s_k, bars, p_tiles, p_meta, num_tiles, tile_first, row_first, row_end,
                     H, G, BQ, BN, RP, DQ, SELECT, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


def _queries_source(q: Tensor, tokens: int, group: int) -> TensorDescriptor:
    """Descriptor of tiles of pairs of heads, tokens, heads of a pair and values of q, [T, HQ, D]."""
    total, heads, width = q.shape
    box = (group // 2, tokens, 2, width)
    return TensorDescriptor(
        q, [heads // 2, total, 2, width], [2 * width, heads * width, width, 1], list(box), layout_of(box, q.dtype)
    )  # fmt: skip


def fits_pipeline(q: Tensor, k: Tensor, keys_per_block: int) -> bool:
    """Whether `score_pipelined` has layouts for these; tiles of k must be readable by bulk copies besides.

    Args:
        keys_per_block: compressed tokens that start in a selection block, a power of two.
    """
    group = q.shape[1] // k.shape[1]
    is_whole = 4 <= group <= 64 and group & (group - 1) == 0
    return is_whole and k.shape[2] in WIDTHS and keys_per_block <= 16 and can_copy(q)


def score_pipelined(
    q: Tensor, k: Tensor, lse: Tensor, scores: Tensor, tiles: Tensor, meta: Tensor, *, num_tiles: int, tile_first: int,
    row_first: int, row_end: int, block: int, stride: int, select_block: int, scale2: float,
) -> None:  # fmt: skip
    """Write what `score_kernel` writes for the same arguments.

    Args:
        tiles: query tiles of ROWS // group tokens (`Geometry.tiles`).
        scale2: factor of the scores, base 2.
    """
    num_kv, group = k.shape[1], q.shape[1] // k.shape[1]
    tokens = ROWS // group // 2
    launch_kernel(
        score_pipelined_kernel, (min(num_multiprocessors(q.device), num_tiles * num_kv),),
        _queries_source(q, tokens, group), numbers_source(lse, tokens, group), source_of(k, KEYS), scores, meta, tiles,
        num_tiles, tile_first, row_first, row_end, scores.shape[3], scores.stride(0), scale2,
        H=num_kv, G=group, BQ=tokens, BN=KEYS, RP=select_block // stride, DQ=k.shape[2], LEN=block, STRIDE=stride,
        SELECT=select_block, STAGES=LAUNCH["score_pipelined"]["num_stages"], num_warps=4, maxnreg=168,
    )  # fmt: skip
