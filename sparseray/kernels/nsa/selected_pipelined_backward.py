"""Gradients of the selected keys and values with warps of different roles (Gluon, Hopper): the fast twin of
`selected_bwd_kernel` for large groups in half precision, heads of 128 and blocks of 64.

A program takes a block and the queries that selected it (`inverse.py`). One warp gathers the rows of queries, another
those of output gradients, a bulk copy a query; two warpgroups take the tiles of rows in turn and add their dk and dv up
at the end, in a fixed order. Source: arXiv 2502.11089 section 3.4.
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
from sparseray.kernels.nsa.inverse import Inverse
from sparseray.kernels.nsa.pipeline import ROWS, layout_of, thread_barrier
from sparseray.kernels.nsa.tiles import on_hopper
from sparseray.kernels.nsa.tuning import LAUNCH

HALF = 64
"""Columns of half a head: what 128 bytes hold, within which a copy may permute. Rows of several queries can then lie
under each other as one tile."""


@gluon.jit
def _gather(
    d_x, p_n, s_x, s_n, bars, p_queries, e_lo, e_hi, i_kv,
    H: gl.constexpr, G: gl.constexpr, BQ: gl.constexpr, HALF: gl.constexpr, STAGES: gl.constexpr, READY: gl.constexpr,
):  # fmt: skip
    """Rows [2, BQ * G, HALF] of the queries of every tile, and their numbers [BQ * G].

    Behind the last entry, its row again: what has no entry counts for nothing. Numbers are read a tile ahead, the
    places of their rows two.
    """
    ONE_WARP: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    o_m = gl.arange(0, BQ * G, layout=ONE_WARP)
    b_row = gl.load(p_queries + gl.minimum(e_lo + o_m // G, e_hi - 1)) * H + i_kv
    b_n = gl.load(p_n + b_row.to(gl.int64) * G + o_m % G)
    b_row = gl.load(p_queries + gl.minimum(e_lo + BQ + o_m // G, e_hi - 1)) * H + i_kv
    for turn in range(0, (e_hi - e_lo + BQ - 1) // BQ):
        stage = turn % STAGES
        bar = bars.index(READY * STAGES + stage)
        e = e_lo + turn * BQ
        mbarrier.wait(bars.index(2 * STAGES + stage), (turn // STAGES & 1) ^ 1)
        s_n.index(stage).store(b_n)
        mbarrier.arrive(bar)
        mbarrier.expect(bar, BQ * 2 * d_x.block_type.nbytes)
        for q in gl.static_range(BQ):
            row = (gl.load(p_queries + gl.minimum(e + q, e_hi - 1)) * H + i_kv) * G
            tma.async_copy_global_to_shared(d_x, [row, 0], bar, s_x.index((2 * stage) * BQ + q))
            tma.async_copy_global_to_shared(d_x, [row, HALF], bar, s_x.index((2 * stage + 1) * BQ + q))
        b_n = gl.load(p_n + b_row.to(gl.int64) * G + o_m % G)
        b_row = gl.load(p_queries + gl.minimum(e + 2 * BQ + o_m // G, e_hi - 1)) * H + i_kv


@gluon.jit
def _tile(
    b_dk0, b_dk1, b_dv0, b_dv1, s_k, s_v, s_q, s_do, s_lse, s_dg, bars, turn, scale2, p_queries, p_pos, e_lo, e_hi, o_k,
    G: gl.constexpr, BQ: gl.constexpr, STAGES: gl.constexpr, MMA: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """What a tile of rows adds to dk and dv; keys are rows of the products."""
    ROWS: gl.constexpr = BQ * G
    SELECT: gl.constexpr = s_k.shape[1]
    COL: gl.constexpr = gl.SliceLayout(0, MMA)
    IN: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    stage = turn % STAGES
    phase = turn // STAGES & 1
    q0 = s_q.index(2 * stage)
    q1 = s_q.index(2 * stage + 1)
    do0 = s_do.index(2 * stage)
    do1 = s_do.index(2 * stage + 1)
    b_zero = gl.zeros([SELECT, ROWS], gl.float32, layout=MMA)
    mbarrier.wait(bars.index(stage), phase)
    b_s = warpgroup_mma(s_k.index(0), q0.permute((1, 0)), b_zero, use_acc=False, is_async=True)
    b_s = warpgroup_mma(s_k.index(1), q1.permute((1, 0)), b_s, is_async=True)
    mbarrier.wait(bars.index(STAGES + stage), phase)
    b_dp = warpgroup_mma(s_v.index(0), do0.permute((1, 0)), b_zero, use_acc=False, is_async=True)
    b_dp = warpgroup_mma(s_v.index(1), do1.permute((1, 0)), b_dp, is_async=True)
    b_lse = s_lse.index(stage).load(COL)
    b_dg = s_dg.index(stage).load(COL)
    b_s = warpgroup_mma_wait(2, deps=[b_s])
    b_p = gl.exp2(b_s * scale2 - b_lse[None, :])
    if MASKED:
        o_e = e_lo + turn * BQ + gl.arange(0, ROWS, layout=COL) // G
        m_e = o_e < e_hi
        b_t = gl.load(p_pos + gl.load(p_queries + o_e, mask=m_e, other=0), mask=m_e, other=-1)
        b_p = gl.where(o_k[:, None] <= b_t[None, :], b_p, 0.0)
    b_pa = gl.convert_layout(b_p.to(s_q.dtype), IN)
    b_dv0 = warpgroup_mma(b_pa, do0, b_dv0, is_async=True)
    b_dv1 = warpgroup_mma(b_pa, do1, b_dv1, is_async=True)
    b_dp = warpgroup_mma_wait(2, deps=[b_dp])
    b_da = gl.convert_layout((b_p * (b_dp - b_dg[None, :])).to(s_q.dtype), IN)
    b_dk0 = warpgroup_mma(b_da, q0, b_dk0, is_async=True)
    b_dk1 = warpgroup_mma(b_da, q1, b_dk1, is_async=True)
    b_dk0, b_dk1, b_dv0, b_dv1, b_pa, b_da = warpgroup_mma_wait(
        0, deps=[b_dk0, b_dk1, b_dv0, b_dv1, b_pa, b_da]
    )  # fmt: skip
    mbarrier.arrive(bars.index(2 * STAGES + stage))
    return b_dk0, b_dk1, b_dv0, b_dv1


@gluon.jit
def _write(p_out, p_part, b, o_row, o_part, m_row, half, is_whole, scale, D: gl.constexpr, HALF: gl.constexpr,
           MMA: gl.constexpr):  # fmt: skip
    """Half of the columns of a gradient: added to the block's rows, or kept as a part of them."""
    o_d = half * HALF + gl.arange(0, HALF, layout=gl.SliceLayout(0, MMA))
    if is_whole:
        p = p_out + o_row[:, None] * D + o_d[None, :]
        gl.store(p, gl.load(p, mask=m_row[:, None], other=0.0) + b * scale, mask=m_row[:, None])
    else:
        gl.store(p_part + o_part[:, None] * D + o_d[None, :], b * scale, mask=m_row[:, None])


@gluon.jit
def _add_rows(
    s_k, s_v, s_q, s_do, s_lse, s_dg, s_sum, bars, p_queries, p_pos, p_dk, p_dv, p_part_k, p_part_v, p_part, p_seq, e_lo,
    e_hi, i_block, i_kv, scale, scale2,
    WHICH: gl.constexpr, H: gl.constexpr, G: gl.constexpr, BQ: gl.constexpr, SELECT: gl.constexpr, HALF: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Every second tile of rows, from the WHICH-th on."""
    MMA: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16])
    o_c = gl.arange(0, SELECT, layout=gl.SliceLayout(1, MMA))
    o_k = i_block * SELECT + o_c
    b_dk0 = gl.zeros([SELECT, HALF], gl.float32, layout=MMA)
    b_dk1 = gl.zeros([SELECT, HALF], gl.float32, layout=MMA)
    b_dv0 = gl.zeros([SELECT, HALF], gl.float32, layout=MMA)
    b_dv1 = gl.zeros([SELECT, HALF], gl.float32, layout=MMA)
    i_part = gl.load(p_part + 1)
    num_parts = gl.load(p_part + 2)
    count = (e_hi - e_lo + BQ - 1) // BQ
    # The first queries of a block are its own tokens, which do not see all of it.
    first = gl.where(i_part == 0, gl.minimum((SELECT + BQ - 1) // BQ, count), 0)
    whole = gl.maximum((e_hi - e_lo) // BQ, first)
    for turn in range(WHICH, first, 2):
        b_dk0, b_dk1, b_dv0, b_dv1 = _tile(
            b_dk0, b_dk1, b_dv0, b_dv1, s_k, s_v, s_q, s_do, s_lse, s_dg, bars, turn, scale2, p_queries, p_pos, e_lo,
            e_hi, o_k, G, BQ, STAGES, MMA, True,
        )  # fmt: skip
    for turn in range(first + (first + WHICH) % 2, whole, 2):
        b_dk0, b_dk1, b_dv0, b_dv1 = _tile(
            b_dk0, b_dk1, b_dv0, b_dv1, s_k, s_v, s_q, s_do, s_lse, s_dg, bars, turn, scale2, p_queries, p_pos, e_lo,
            e_hi, o_k, G, BQ, STAGES, MMA, False,
        )  # fmt: skip
    for turn in range(whole + (whole + WHICH) % 2, count, 2):
        b_dk0, b_dk1, b_dv0, b_dv1 = _tile(
            b_dk0, b_dk1, b_dv0, b_dv1, s_k, s_v, s_q, s_do, s_lse, s_dg, bars, turn, scale2, p_queries, p_pos, e_lo,
            e_hi, o_k, G, BQ, STAGES, MMA, True,
        )  # fmt: skip
    done = bars.index(3 * STAGES + 1)
    if WHICH == 1:
        s_sum.index(0).store(b_dk0)
        s_sum.index(1).store(b_dk1)
        s_sum.index(2).store(b_dv0)
        s_sum.index(3).store(b_dv1)
        mbarrier.arrive(done)
    else:
        mbarrier.wait(done, 0)
        k_len = gl.load(p_seq + 7).to(gl.int32)
        o_row = (gl.load(p_seq + 6) + o_k) * H + i_kv
        o_part = (gl.load(p_part + 3) + i_part).to(gl.int64) * SELECT + o_c
        m_row = o_k < k_len
        D: gl.constexpr = 2 * HALF
        is_whole = num_parts == 1
        b_dk0 += s_sum.index(0).load(MMA)
        _write(p_dk, p_part_k, b_dk0, o_row, o_part, m_row, 0, is_whole, scale, D, HALF, MMA)
        b_dk1 += s_sum.index(1).load(MMA)
        _write(p_dk, p_part_k, b_dk1, o_row, o_part, m_row, 1, is_whole, scale, D, HALF, MMA)
        b_dv0 += s_sum.index(2).load(MMA)
        _write(p_dv, p_part_v, b_dv0, o_row, o_part, m_row, 0, is_whole, 1.0, D, HALF, MMA)
        b_dv1 += s_sum.index(3).load(MMA)
        _write(p_dv, p_part_v, b_dv1, o_row, o_part, m_row, 1, is_whole, 1.0, D, HALF, MMA)


@gluon.jit
def selected_pipelined_bwd_kernel(
    d_q, d_k, d_v, d_do, p_lse, p_dg, p_dk, p_dv, p_part_k, p_part_v, p_queries, p_parts, p_tiles, p_meta, p_pos,
    num_blocks, scale, scale2,
    H: gl.constexpr, G: gl.constexpr, BQ: gl.constexpr, SELECT: gl.constexpr, HALF: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    p_part = p_parts + gl.program_id(0) * 6
    i_row = gl.load(p_part)
    dtype: gl.constexpr = d_q.dtype
    LINE: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    SUM: gl.constexpr = gl.SwizzledSharedLayout(2, 1, 16, [1, 0])
    s_k = gl.allocate_shared_memory(dtype, [2, SELECT, HALF], d_k.layout)
    s_v = gl.allocate_shared_memory(dtype, [2, SELECT, HALF], d_v.layout)
    s_q = gl.allocate_shared_memory(dtype, [2 * STAGES * BQ, G, HALF], d_q.layout)
    s_do = gl.allocate_shared_memory(dtype, [2 * STAGES * BQ, G, HALF], d_do.layout)
    s_lse = gl.allocate_shared_memory(gl.float32, [STAGES, BQ * G], LINE)
    s_dg = gl.allocate_shared_memory(gl.float32, [STAGES, BQ * G], LINE)
    s_sum = gl.allocate_shared_memory(gl.float32, [4, SELECT, HALF], SUM)
    # The same rows as tiles: those of BQ queries lie under each other.
    r_q = s_q._reinterpret(dtype, [2 * STAGES, BQ * G, HALF], d_k.layout)
    r_do = s_do._reinterpret(dtype, [2 * STAGES, BQ * G, HALF], d_k.layout)
    # Queries are there, output gradients are there, both are read; the keys are there, the second half is added up.
    bars = gl.allocate_shared_memory(gl.int64, [3 * STAGES + 2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        # Copied rows and stored numbers.
        mbarrier.init(bars.index(i), count=2)
        mbarrier.init(bars.index(STAGES + i), count=2)
        mbarrier.init(bars.index(2 * STAGES + i), count=1)
    mbarrier.init(bars.index(3 * STAGES), count=1)
    mbarrier.init(bars.index(3 * STAGES + 1), count=1)
    fence_async_shared()
    thread_barrier()
    if i_row >= 0:
        i_kv = i_row // num_blocks
        p_tile = p_tiles + (i_row % num_blocks) * 2
        p_seq = p_meta + gl.load(p_tile) * 12
        i_block = gl.load(p_tile + 1)
        e_lo = gl.load(p_part + 4)
        e_hi = gl.load(p_part + 5)
        row = gl.load(p_seq + 6).to(gl.int32) + i_block * SELECT
        bar = bars.index(3 * STAGES)
        mbarrier.expect(bar, 2 * (d_k.block_type.nbytes + d_v.block_type.nbytes))
        for half in gl.static_range(2):
            tma.async_copy_global_to_shared(d_k, [row, (2 * i_kv + half) * HALF], bar, s_k.index(half))
            tma.async_copy_global_to_shared(d_v, [row, (2 * i_kv + half) * HALF], bar, s_v.index(half))
        mbarrier.wait(bar, 0)
        gl.warp_specialize(
            [
                (_add_rows, (s_k, s_v, r_q, r_do, s_lse, s_dg, s_sum, bars, p_queries, p_pos, p_dk, p_dv, p_part_k,
                             p_part_v, p_part, p_seq, e_lo, e_hi, i_block, i_kv, scale, scale2,
                             0, H, G, BQ, SELECT, HALF, STAGES)),
                (_add_rows, (s_k, s_v, r_q, r_do, s_lse, s_dg, s_sum, bars, p_queries, p_pos, p_dk, p_dv, p_part_k,
                             p_part_v, p_part, p_seq, e_lo, e_hi, i_block, i_kv, scale, scale2,
                             1, H, G, BQ, SELECT, HALF, STAGES)),
                (_gather, (d_q, p_lse, s_q, s_lse, bars, p_queries, e_lo, e_hi, i_kv,
                           H, G, BQ, HALF, STAGES, 0)),
                (_gather, (d_do, p_dg, s_do, s_dg, bars, p_queries, e_lo, e_hi, i_kv,
                           H, G, BQ, HALF, STAGES, 1)),
            ],
            [4, 1, 1],
            [240, 24, 24],
        )  # fmt: skip


def _rows_source(x: Tensor, rows: int) -> TensorDescriptor:
    """Descriptor of half the columns of `rows` heads of a token of x, [T, heads, 128]."""
    total = x.shape[0] * x.shape[1]
    return TensorDescriptor(
        x, [total, x.shape[2]], [x.shape[2], 1], [rows, HALF], layout_of((rows, HALF), x.dtype)
    )


def _keys_source(x: Tensor, rows: int) -> TensorDescriptor:
    """Descriptor of half the columns of one head of `rows` tokens of x, [S, H, 128]."""
    wide = x.shape[1] * x.shape[2]
    return TensorDescriptor(x, [x.shape[0], wide], [wide, 1], [rows, HALF], layout_of((rows, HALF), x.dtype))


def fits_pipeline(q: Tensor, k: Tensor, v: Tensor, select_block: int) -> bool:
    """Whether `selected_pipelined_dkdv` runs on this GPU with these sizes; rows must be readable by bulk copies besides."""
    group = q.shape[1] // k.shape[1]
    is_whole = 16 <= group <= ROWS and group & (group - 1) == 0
    is_laid_out = is_whole and k.shape[2] == v.shape[2] == 2 * HALF and select_block == ROWS
    return is_laid_out and on_hopper(q)


def selected_pipelined_dkdv(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, row_lse: Tensor, row_dg: Tensor, dk: Tensor, dv: Tensor, part_k: Tensor,
    part_v: Tensor, parts: Tensor, inverse: Inverse, tiles: Tensor, meta: Tensor, positions: Tensor, *, select_block: int,
    scale: float, scale2: float,
) -> None:  # fmt: skip
    """Add the gradients of whole rows of the table to dk and dv, fp32 [S, H, 128], and write those of cut ones to
    part_k and part_v; arguments as in `selected_backward`."""
    launch, group = LAUNCH["selected_pipelined_dkdv"], q.shape[1] // k.shape[1]
    launch_kernel(
        selected_pipelined_bwd_kernel, (parts.shape[0],),
        _rows_source(q, group), _keys_source(k, select_block), _keys_source(v, select_block), _rows_source(do, group),
        row_lse, row_dg, dk, dv, part_k, part_v, inverse.queries, parts, tiles, meta, positions, tiles.shape[0], scale, scale2,
        H=k.shape[1], G=group, BQ=ROWS // group, SELECT=select_block, HALF=HALF,
        STAGES=launch["num_stages"], num_warps=4, maxnreg=168,
    )  # fmt: skip
