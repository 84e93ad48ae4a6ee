"""Gradients of the keys and values of compressed tokens or a window, with warps of different roles (Gluon, Hopper).

The fast twin of the second kernel of `range_backward`, for half precision and head sizes of 64 or 128. A program holds a
tile of keys and values and their gradients: two warpgroups with half of the keys each. One more warp copies queries,
output gradients and their rows' numbers to shared memory, ahead of both. Keys are rows, so probabilities leave a product
in the layout in which the next one takes them. Source: arXiv 2502.11089 eq. 7.
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
from sparseray.kernels.nsa.pipeline import (
    ROWS,
    layout_of,
    source_of,
    thread_barrier,
)
from sparseray.kernels.nsa.range_pipelined import fits_pipeline as fits_forward


@gluon.jit
def _span(
    p_row, i_k, i_split, split, BK: gl.constexpr, BQ: gl.constexpr, KIND: gl.constexpr, LEN: gl.constexpr,
    STRIDE: gl.constexpr, WIN: gl.constexpr,
):  # fmt: skip
    """First and end of the queries of a part that see a key tile, the first that sees all of it, and by how much query
    0 is behind the first key."""
    q_len = gl.load(p_row + 1).to(gl.int32)
    shift = gl.load(p_row + 2).to(gl.int32) - gl.load(p_row + KIND + 2).to(gl.int32)
    q_lo = gl.maximum(i_k * STRIDE + LEN - 1 - shift, i_split * split)
    q_lo = gl.maximum(q_lo, 0) // BQ * BQ
    q_hi = gl.minimum(q_len, (i_split + 1) * split)
    if WIN > 0:
        q_hi = gl.minimum(q_hi, i_k + BK - 1 + WIN - shift)
    q_full = gl.maximum((i_k + BK - 1) * STRIDE + LEN - 1 - shift, 0)
    q_full = gl.minimum(gl.maximum((q_full + BQ - 1) // BQ * BQ, q_lo), q_hi)
    return q_lo, q_hi, q_full, shift


@gluon.jit
def _first_turn(q_lo, q_hi, BK: gl.constexpr, BQ: gl.constexpr, WIN: gl.constexpr):
    """Where the queries of a window's keys begin: programs that run at the same time begin at the same one, so its rows
    are read from memory once for all of them, and take the queries before it last."""
    q_turn = q_lo
    if WIN > 0:
        TURN: gl.constexpr = (WIN + BK + BQ - 1) // BQ * BQ
        q_turn = (q_lo + TURN - 1) // TURN * TURN
        q_turn = gl.where(q_turn < q_hi, q_turn, q_lo)
    return q_turn


@gluon.jit
def _load_queries(
    d_q, d_do, d_lse, d_dg, s_q, s_do, s_lse, s_dg, bars, p_row, i_kv, i_k, i_split, split,
    G: gl.constexpr, BK: gl.constexpr, BQ: gl.constexpr, KIND: gl.constexpr, LEN: gl.constexpr, STRIDE: gl.constexpr,
    WIN: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    q_off = gl.load(p_row).to(gl.int32)
    q_lo, q_hi, _, _ = _span(p_row, i_k, i_split, split, BK, BQ, KIND, LEN, STRIDE, WIN)
    i = _first_turn(q_lo, q_hi, BK, BQ, WIN)
    for turn in range(0, (gl.maximum(q_hi - q_lo, 0) + BQ - 1) // BQ):
        stage = turn % STAGES
        bar = bars.index(stage)
        mbarrier.wait(bars.index(STAGES + stage), (turn // STAGES & 1) ^ 1)
        mbarrier.expect(
            bar,
            d_q.block_type.nbytes + d_do.block_type.nbytes + d_lse.block_type.nbytes + d_dg.block_type.nbytes,
        )
        tma.async_copy_global_to_shared(d_q, [q_off + i, i_kv * G, 0], bar, s_q.index(stage))
        tma.async_copy_global_to_shared(d_lse, [q_off + i, i_kv * G], bar, s_lse.index(stage))
        tma.async_copy_global_to_shared(d_do, [q_off + i, i_kv * G, 0], bar, s_do.index(stage))
        tma.async_copy_global_to_shared(d_dg, [q_off + i, i_kv * G], bar, s_dg.index(stage))
        i = gl.where(i + BQ < q_hi, i + BQ, q_lo)


@gluon.jit
def _step(
    b_dk, b_dv, s_k, s_v, s_q, s_do, s_lse, s_dg, bars, turn, scale2, o_end, o_q, q_hi,
    ROWS: gl.constexpr, BN: gl.constexpr, WIN: gl.constexpr, STAGES: gl.constexpr, MMA_S: gl.constexpr,
    MMA_D: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """What a tile of query rows adds to dk and dv of BN keys."""
    stage = turn % STAGES
    COL: gl.constexpr = gl.SliceLayout(0, MMA_S)
    P_IN: gl.constexpr = gl.DotOperandLayout(0, MMA_D, 2)
    s_q2 = s_q.index(stage).reshape((ROWS, s_k.shape[1]))
    s_do2 = s_do.index(stage).reshape((ROWS, s_v.shape[1]))
    mbarrier.wait(bars.index(stage), turn // STAGES & 1)
    b_zero = gl.zeros([BN, ROWS], gl.float32, layout=MMA_S)
    b_s = warpgroup_mma(s_k, s_q2.permute((1, 0)), b_zero, use_acc=False, is_async=True)
    b_dp = warpgroup_mma(s_v, s_do2.permute((1, 0)), b_zero, use_acc=False, is_async=True)
    b_lse = s_lse.index(stage).reshape((ROWS,)).load(COL)
    b_dg = s_dg.index(stage).reshape((ROWS,)).load(COL)
    b_s = warpgroup_mma_wait(1, deps=[b_s])
    b_p = gl.exp2(b_s * scale2 - b_lse[None, :])
    if MASKED:
        b_see = (o_end[:, None] <= o_q[None, :]) & (o_q < q_hi)[None, :]
        if WIN > 0:
            b_see = b_see & (o_end[:, None] > o_q[None, :] - WIN)
        b_p = gl.where(b_see, b_p, 0.0)
    b_pa = gl.convert_layout(b_p.to(s_q.dtype), P_IN)
    b_dv = warpgroup_mma(b_pa, s_do2, b_dv, is_async=True)
    b_dp = warpgroup_mma_wait(1, deps=[b_dp])
    b_da = gl.convert_layout((b_p * (b_dp - b_dg[None, :])).to(s_q.dtype), P_IN)
    b_dk = warpgroup_mma(b_da, s_q2, b_dk, is_async=True)
    b_dk, b_dv, b_pa, b_da = warpgroup_mma_wait(0, deps=[b_dk, b_dv, b_pa, b_da])
    mbarrier.arrive(bars.index(STAGES + stage))
    return b_dk, b_dv


@gluon.jit
def _write(p_out, b, first, i_k, k_len, H: gl.constexpr, MMA: gl.constexpr):
    """A gradient's rows of the keys from i_k on."""
    ROWS: gl.constexpr = b.shape[0]
    WIDTH: gl.constexpr = b.shape[1]
    o_n = i_k + gl.arange(0, ROWS, layout=gl.SliceLayout(1, MMA))
    o_d = gl.arange(0, WIDTH, layout=gl.SliceLayout(0, MMA))
    p_tile = p_out + (first + o_n * H)[:, None] * WIDTH + o_d[None, :]
    gl.store(p_tile, b.to(p_out.dtype.element_ty), mask=(o_n < k_len)[:, None])


@gluon.jit
def _add_queries(
    s_k, s_v, s_q, s_do, s_lse, s_dg, bars, p_dk, p_dv, p_row, i_kv, i_k, i_split, split, num_keys, scale, scale2,
    WHICH: gl.constexpr, H: gl.constexpr, GP: gl.constexpr, BK: gl.constexpr, BQ: gl.constexpr, DQ: gl.constexpr,
    DV: gl.constexpr, KIND: gl.constexpr, LEN: gl.constexpr, STRIDE: gl.constexpr, WIN: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """The WHICH-th half of the keys."""
    BN: gl.constexpr = BK // 2
    ROWS: gl.constexpr = BQ * GP
    MMA_S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    MMA_K: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DQ, 16])
    MMA_V: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DV, 16])
    q_lo, q_hi, q_full, shift = _span(p_row, i_k, i_split, split, BK, BQ, KIND, LEN, STRIDE, WIN)
    k_off = gl.load(p_row + KIND)
    k_len = gl.load(p_row + KIND + 1).to(gl.int32)
    # The last position of a key, less that of query 0: query o_q sees it from there on.
    o_n = i_k + WHICH * BN + gl.arange(0, BN, layout=gl.SliceLayout(1, MMA_S))
    o_end = o_n * STRIDE + LEN - 1 - shift
    o_c = gl.arange(0, ROWS, layout=gl.SliceLayout(0, MMA_S)) // GP
    b_dk = gl.zeros([BN, DQ], gl.float32, layout=MMA_K)
    b_dv = gl.zeros([BN, DV], gl.float32, layout=MMA_V)
    turn = 0
    if WIN > 0:
        i = _first_turn(q_lo, q_hi, BK, BQ, WIN)
        for turn_w in range(0, (gl.maximum(q_hi - q_lo, 0) + BQ - 1) // BQ):
            b_dk, b_dv = _step(
                b_dk, b_dv, s_k, s_v, s_q, s_do, s_lse, s_dg, bars, turn_w, scale2, o_end, i + o_c, q_hi,
                ROWS, BN, WIN, STAGES, MMA_S, MMA_K, True,
            )  # fmt: skip
            i = gl.where(i + BQ < q_hi, i + BQ, q_lo)
    else:
        for i in range(q_lo, q_full, BQ):
            b_dk, b_dv = _step(
                b_dk, b_dv, s_k, s_v, s_q, s_do, s_lse, s_dg, bars, turn, scale2, o_end, i + o_c, q_hi,
                ROWS, BN, WIN, STAGES, MMA_S, MMA_K, True,
            )  # fmt: skip
            turn += 1
        q_even = gl.maximum(q_full, q_hi // BQ * BQ)
        for i in range(q_full, q_even, BQ):
            b_dk, b_dv = _step(
                b_dk, b_dv, s_k, s_v, s_q, s_do, s_lse, s_dg, bars, turn, scale2, o_end, i + o_c, q_hi,
                ROWS, BN, WIN, STAGES, MMA_S, MMA_K, False,
            )  # fmt: skip
            turn += 1
        # The part's last tile may reach behind its end.
        for i in range(q_even, q_hi, BQ):
            b_dk, b_dv = _step(
                b_dk, b_dv, s_k, s_v, s_q, s_do, s_lse, s_dg, bars, turn, scale2, o_end, i + o_c, q_hi,
                ROWS, BN, WIN, STAGES, MMA_S, MMA_K, True,
            )  # fmt: skip
            turn += 1
    first = (i_split.to(gl.int64) * num_keys + k_off) * H + i_kv
    _write(p_dk, b_dk * scale, first, i_k + WHICH * BN, k_len, H, MMA_K)
    _write(p_dv, b_dv, first, i_k + WHICH * BN, k_len, H, MMA_V)


@gluon.jit
def range_pipelined_dkdv_kernel(
    d_q, d_k, d_v, d_do, d_lse, d_dg, p_dk, p_dv, p_meta, p_tiles, num_tiles, num_splits, num_keys, split, scale, scale2,
    H: gl.constexpr, G: gl.constexpr, BK: gl.constexpr, BQ: gl.constexpr, DQ: gl.constexpr, DV: gl.constexpr,
    KIND: gl.constexpr, LEN: gl.constexpr, STRIDE: gl.constexpr, WIN: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    # The last parts are seen by the most keys: start them first.
    i_split = num_splits - 1 - gl.program_id(0) // (num_tiles * H)
    i_kv = gl.program_id(0) % H
    i_tile = gl.program_id(0) // H % num_tiles
    i_seq = gl.load(p_tiles + i_tile * 2)
    i_k = gl.load(p_tiles + i_tile * 2 + 1) * BK
    p_row = p_meta + gl.maximum(i_seq, 0) * 12
    dtype: gl.constexpr = d_q.dtype
    s_k0 = gl.allocate_shared_memory(dtype, [BK // 2, DQ], d_k.layout)
    s_k1 = gl.allocate_shared_memory(dtype, [BK // 2, DQ], d_k.layout)
    s_v0 = gl.allocate_shared_memory(dtype, [BK // 2, DV], d_v.layout)
    s_v1 = gl.allocate_shared_memory(dtype, [BK // 2, DV], d_v.layout)
    s_q = gl.allocate_shared_memory(dtype, [STAGES, BQ, G, DQ], d_q.layout)
    s_do = gl.allocate_shared_memory(dtype, [STAGES, BQ, G, DV], d_do.layout)
    s_lse = gl.allocate_shared_memory(gl.float32, [STAGES, BQ, G], d_lse.layout)
    s_dg = gl.allocate_shared_memory(gl.float32, [STAGES, BQ, G], d_dg.layout)
    # Queries are there, queries are read; the keys are there.
    bars = gl.allocate_shared_memory(gl.int64, [2 * STAGES + 1, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(bars.index(i), count=1)
        mbarrier.init(bars.index(STAGES + i), count=2)
    mbarrier.init(bars.index(2 * STAGES), count=1)
    fence_async_shared()
    thread_barrier()
    if i_seq >= 0:
        row = gl.load(p_row + KIND).to(gl.int32) + i_k
        bar = bars.index(2 * STAGES)
        mbarrier.expect(bar, 2 * d_k.block_type.nbytes + 2 * d_v.block_type.nbytes)
        tma.async_copy_global_to_shared(d_k, [row, i_kv * DQ], bar, s_k0)
        tma.async_copy_global_to_shared(d_k, [row + BK // 2, i_kv * DQ], bar, s_k1)
        tma.async_copy_global_to_shared(d_v, [row, i_kv * DV], bar, s_v0)
        tma.async_copy_global_to_shared(d_v, [row + BK // 2, i_kv * DV], bar, s_v1)
        mbarrier.wait(bar, 0)
        gl.warp_specialize(
            [
                (_add_queries, (s_k0, s_v0, s_q, s_do, s_lse, s_dg, bars, p_dk, p_dv, p_row, i_kv, i_k, i_split, split,
                                num_keys, scale, scale2, 0, H, G, BK, BQ, DQ, DV, KIND, LEN, STRIDE, WIN, STAGES)),
                (_add_queries, (s_k1, s_v1, s_q, s_do, s_lse, s_dg, bars, p_dk, p_dv, p_row, i_kv, i_k, i_split, split,
                                num_keys, scale, scale2, 1, H, G, BK, BQ, DQ, DV, KIND, LEN, STRIDE, WIN, STAGES)),
                (_load_queries, (d_q, d_do, d_lse, d_dg, s_q, s_do, s_lse, s_dg, bars, p_row, i_kv, i_k, i_split, split,
                                 G, BK, BQ, KIND, LEN, STRIDE, WIN, STAGES)),
            ],
            [4, 1],
            [240, 24],
        )  # fmt: skip


def _rows_source(x: Tensor, tokens: int, group: int) -> TensorDescriptor:
    """Descriptor of tiles of `tokens` tokens with the heads of one group of x, [T, HQ, D]."""
    shape = list(x.shape)
    return TensorDescriptor(
        x, shape, [shape[1] * shape[2], shape[2], 1], [tokens, group, shape[2]],
        layout_of((tokens, group, shape[2]), x.dtype),
    )  # fmt: skip


def _numbers_source(x: Tensor, tokens: int, group: int) -> TensorDescriptor:
    """Likewise of x, fp32 [T, HQ]."""
    flat = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)
    return TensorDescriptor(x, list(x.shape), [x.shape[1], 1], [tokens, group], flat)


def fits_pipeline(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether both `range_pipelined_dq` and `range_pipelined_dkdv` run here with these heads; the latter's tiles of rows
    are whole groups, a power of two."""
    group = q.shape[1] // k.shape[1]
    return group >= 4 and group & (group - 1) == 0 and fits_forward(q, k, v)


def range_pipelined_dkdv(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, row_lse: Tensor, row_dg: Tensor, dk: Tensor, dv: Tensor, tiles: Tensor,
    meta: Tensor, launch: dict[str, int], *, kind: int, block: int, stride: int, window: int, split: int, scale: float,
    scale2: float,
) -> None:  # fmt: skip
    """Write the gradients of keys and values of every part of the queries.

    Args:
        dk, dv: [parts, S, H, D | Dv], written.
        tiles: key tiles of launch["keys"] (`Geometry.tiles`).
        split: queries of a part, a multiple of ROWS // group.
        others: as in `range_backward`.
    """
    num_kv, group = k.shape[1], q.shape[1] // k.shape[1]
    tokens = ROWS // group
    half = launch["keys"] // 2
    launch_kernel(
        range_pipelined_dkdv_kernel, (tiles.shape[0] * dk.shape[0] * num_kv,),
        _rows_source(q, tokens, group), source_of(k, half), source_of(v, half), _rows_source(do, tokens, group),
        _numbers_source(row_lse, tokens, group), _numbers_source(row_dg, tokens, group), dk, dv, meta, tiles,
        tiles.shape[0], dk.shape[0], k.shape[0], split, scale, scale2,
        H=num_kv, G=group, BK=launch["keys"], BQ=tokens, DQ=k.shape[2], DV=v.shape[2], KIND=kind, LEN=block, STRIDE=stride,
        WIN=window, STAGES=launch["num_stages"], num_warps=4, maxnreg=168,
    )  # fmt: skip
