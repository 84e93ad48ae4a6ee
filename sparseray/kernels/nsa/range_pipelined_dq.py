"""Gradient of the queries of compressed tokens or a window, with warps of different roles (Gluon, Hopper).

The fast twin of the first kernel of `range_backward`, for half precision and head sizes of 64 or 128: as the forward in
`range_pipelined`, but a warpgroup's queries and output gradients stay in its registers. With a window, it also adds the
part of the forced blocks of the selected branch. Source: arXiv 2502.11089 eq. 7.
"""

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from sparseray.kernels.launch import launch_kernel
from sparseray.kernels.nsa.geometry import QUERY, Geometry
from sparseray.kernels.nsa.pipeline import (
    NEVER,
    NO_BLOCKS,
    ROWS,
    Forced,
    forced_positions,
    forced_tiles,
    item_of,
    last_positions,
    load_keys,
    load_rows,
    num_multiprocessors,
    ring_barriers,
    rows_of,
    source_of,
    visible,
    whole_tiles,
)
from sparseray.kernels.nsa.tiles import next_power_of_2
from sparseray.kernels.nsa.tuning import LAUNCH


@gluon.jit
def _dq_step(
    b_dq, b_q, b_do, b_lse, b_dg, s_k, s_v, bars, turn, scale2, o_end, b_t,
    WIN: gl.constexpr, SELECT: gl.constexpr, INITIAL: gl.constexpr, LOCAL: gl.constexpr, STAGES: gl.constexpr,
    MMA_S: gl.constexpr, MMA_Q: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """What a tile of keys adds to dq."""
    stage = turn % STAGES
    phase = turn // STAGES & 1
    ROWS: gl.constexpr = b_dq.shape[0]
    BN: gl.constexpr = s_k.shape[1]
    b_zero = gl.zeros([ROWS, BN], gl.float32, layout=MMA_S)
    mbarrier.wait(bars.index(stage), phase)
    b_s = warpgroup_mma(b_q, s_k.index(stage).permute((1, 0)), b_zero, use_acc=False, is_async=True)
    mbarrier.wait(bars.index(STAGES + stage), phase)
    b_dp = warpgroup_mma(b_do, s_v.index(stage).permute((1, 0)), b_zero, use_acc=False, is_async=True)
    b_s = warpgroup_mma_wait(1, deps=[b_s])
    b_p = gl.exp2(b_s * scale2 - b_lse[:, None])
    if MASKED:
        b_p = gl.where(visible(o_end, b_t, WIN, SELECT, INITIAL, LOCAL), b_p, 0.0)
    b_dp = warpgroup_mma_wait(0, deps=[b_dp])
    mbarrier.arrive(bars.index(3 * STAGES + stage))
    b_ds = gl.convert_layout((b_p * (b_dp - b_dg[:, None])).to(s_k.dtype), gl.DotOperandLayout(0, MMA_Q, 2))
    b_dq = warpgroup_mma(b_ds, s_k.index(stage), b_dq, is_async=True)
    b_dq, b_ds = warpgroup_mma_wait(0, deps=[b_dq, b_ds])
    mbarrier.arrive(bars.index(2 * STAGES + stage))
    return b_dq


@gluon.jit
def _add_keys(
    p_q, p_do, p_lse, p_dg, p_lse2, p_dg2, p_dq, s_k, s_v, bars, p_tiles, p_meta, num_tiles, scale, scale2,
    WHICH: gl.constexpr, H: gl.constexpr, G: gl.constexpr, GP: gl.constexpr, BQ: gl.constexpr, BN: gl.constexpr,
    DQ: gl.constexpr, DV: gl.constexpr, KIND: gl.constexpr, LEN: gl.constexpr, STRIDE: gl.constexpr, WIN: gl.constexpr,
    SELECT: gl.constexpr, INITIAL: gl.constexpr, LOCAL: gl.constexpr, ADD: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """dq of the WHICH-th BQ query tokens of every work item."""
    ROWS: gl.constexpr = BQ * GP
    MMA_S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    MMA_Q: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DQ, 16])
    IN: gl.constexpr = gl.DotOperandLayout(0, MMA_S, 2)
    WIDE: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // DQ, DQ // 8], [4, 1], [1, 0])
    ROW: gl.constexpr = gl.SliceLayout(1, MMA_S)
    COL: gl.constexpr = gl.SliceLayout(0, MMA_S)
    turn = 0
    for item in range(gl.program_id(0), num_tiles * H, gl.num_programs(0)):
        i_kv, i_0, p_row, i_first, count = item_of(
            item, p_tiles, p_meta, num_tiles, H, BQ, BN, KIND, LEN, STRIDE, WIN
        )  # fmt: skip
        if count > 0:
            i_q = i_0 + WHICH * BQ
            lo, hi = whole_tiles(p_row, i_q, i_first, count, BQ, BN, KIND, LEN, STRIDE, WIN)
            b_q = gl.convert_layout(load_rows(p_q, p_row, i_q, i_kv, H, G, GP, BQ, DQ), IN)
            b_do = gl.convert_layout(load_rows(p_do, p_row, i_q, i_kv, H, G, GP, BQ, DV), IN)
            o_row, m_row = rows_of(p_row, i_q, i_kv, H, G, GP, BQ, ROW)
            b_lse = gl.load(p_lse + o_row, mask=m_row, other=float("inf"))
            b_dg = gl.load(p_dg + o_row, mask=m_row, other=0.0)
            b_t = gl.load(p_row + 2).to(gl.int32) + i_q + gl.arange(0, ROWS, layout=ROW) // GP
            b_dq = gl.zeros([ROWS, DQ], gl.float32, layout=MMA_Q)
            for j in range(hi, count):
                o_end = last_positions(
                    i_first + (count - 1 - j + hi) * BN, NEVER, p_row, KIND, LEN, STRIDE, BN, COL
                )
                b_dq = _dq_step(
                    b_dq, b_q, b_do, b_lse, b_dg, s_k, s_v, bars, turn, scale2, o_end, b_t,
                    WIN, 0, 0, 0, STAGES, MMA_S, MMA_Q, True,
                )  # fmt: skip
                turn += 1
            for _ in range(lo, hi):
                b_dq = _dq_step(
                    b_dq, b_q, b_do, b_lse, b_dg, s_k, s_v, bars, turn, scale2, b_t, b_t,
                    WIN, 0, 0, 0, STAGES, MMA_S, MMA_Q, False,
                )  # fmt: skip
                turn += 1
            if WIN > 0:
                for j in range(0, lo):
                    o_end = last_positions(
                        i_first + (lo - 1 - j) * BN, NEVER, p_row, KIND, LEN, STRIDE, BN, COL
                    )
                    b_dq = _dq_step(
                        b_dq, b_q, b_do, b_lse, b_dg, s_k, s_v, bars, turn, scale2, o_end, b_t,
                        WIN, 0, 0, 0, STAGES, MMA_S, MMA_Q, True,
                    )  # fmt: skip
                    turn += 1
            if SELECT > 0:
                b_lse = gl.load(p_lse2 + o_row, mask=m_row, other=float("inf"))
                b_dg = gl.load(p_dg2 + o_row, mask=m_row, other=0.0)
                initial, i_local, forced = forced_tiles(p_row, i_0, BQ, BN, SELECT, INITIAL, LOCAL)
                for j in range(0, forced):
                    o_end = forced_positions(
                        forced - 1 - j, initial, i_local, p_row, SELECT, INITIAL, BN, COL
                    )
                    b_dq = _dq_step(
                        b_dq, b_q, b_do, b_lse, b_dg, s_k, s_v, bars, turn, scale2, o_end, b_t,
                        0, SELECT, INITIAL, LOCAL, STAGES, MMA_S, MMA_Q, True,
                    )  # fmt: skip
                    turn += 1
            o_row, m_row = rows_of(p_row, i_q, i_kv, H, G, GP, BQ, gl.SliceLayout(1, WIDE))
            p_out = p_dq + o_row[:, None] * DQ + gl.arange(0, DQ, layout=gl.SliceLayout(0, WIDE))[None, :]
            b_out = gl.convert_layout(b_dq * scale, WIDE)
            if ADD:
                b_out += gl.load(p_out, mask=m_row[:, None], other=0.0).to(gl.float32)
            gl.store(p_out, b_out.to(p_dq.dtype.element_ty), mask=m_row[:, None])


@gluon.jit
def range_pipelined_dq_kernel(
    p_q, d_k, d_v, d_k2, d_v2, p_do, p_lse, p_dg, p_lse2, p_dg2, p_dq, p_meta, p_tiles, num_tiles, scale, scale2,
    H: gl.constexpr, G: gl.constexpr, GP: gl.constexpr, BQ: gl.constexpr, BN: gl.constexpr, DQ: gl.constexpr,
    DV: gl.constexpr, KIND: gl.constexpr, LEN: gl.constexpr, STRIDE: gl.constexpr, WIN: gl.constexpr,
    SELECT: gl.constexpr, INITIAL: gl.constexpr, LOCAL: gl.constexpr, ADD: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = d_k.dtype
    s_k = gl.allocate_shared_memory(dtype, [STAGES, BN, DQ], d_k.layout)
    s_v = gl.allocate_shared_memory(dtype, [STAGES, BN, DV], d_v.layout)
    bars = ring_barriers(STAGES)
    gl.warp_specialize(
        [
            (_add_keys, (p_q, p_do, p_lse, p_dg, p_lse2, p_dg2, p_dq, s_k, s_v, bars, p_tiles, p_meta, num_tiles, scale,
                         scale2, 0, H, G, GP, BQ, BN, DQ, DV, KIND, LEN, STRIDE, WIN, SELECT, INITIAL, LOCAL, ADD,
                         STAGES)),
            (_add_keys, (p_q, p_do, p_lse, p_dg, p_lse2, p_dg2, p_dq, s_k, s_v, bars, p_tiles, p_meta, num_tiles, scale,
                         scale2, 1, H, G, GP, BQ, BN, DQ, DV, KIND, LEN, STRIDE, WIN, SELECT, INITIAL, LOCAL, ADD,
                         STAGES)),
            (load_keys, (d_k, d_v, d_k2, d_v2, s_k, s_v, bars, p_tiles, p_meta, num_tiles,
                         H, BQ, BN, DQ, DV, KIND, LEN, STRIDE, WIN, SELECT, INITIAL, LOCAL, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


def range_pipelined_dq(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, row_lse: Tensor, row_dg: Tensor, dq: Tensor, geometry: Geometry, *,
    kind: int, block: int, stride: int, window: int, scale: float, scale2: float, add: bool,
    forced: tuple[Forced, Tensor, Tensor] | None = None,
) -> None:  # fmt: skip
    """Write the gradient of the queries, or add it; arguments as in `range_backward`."""
    launch = LAUNCH["window_pipelined_dq" if window else "range_pipelined_dq"]
    num_kv, group = k.shape[1], q.shape[1] // k.shape[1]
    padded = next_power_of_2(group)
    tokens = ROWS // padded
    tiles = geometry.tiles(QUERY, 2 * tokens)
    more: tuple[Tensor | None, ...] = (None, None)
    rows: tuple[Tensor | None, ...] = (None, None)
    constants = NO_BLOCKS
    if forced is not None:
        blocks, rows = forced[0], forced[1:]
        more, constants = (blocks.k, blocks.v), blocks.constants()
    launch_kernel(
        range_pipelined_dq_kernel, (min(num_multiprocessors(q.device), tiles.shape[0] * num_kv),),
        q, *(x if x is None else source_of(x, launch["keys"]) for x in (k, v, *more)), do, row_lse, row_dg, *rows, dq,
        geometry.meta, tiles, tiles.shape[0], scale, scale2,
        H=num_kv, G=group, GP=padded, BQ=tokens, BN=launch["keys"], DQ=k.shape[2], DV=v.shape[2], KIND=kind, LEN=block,
        STRIDE=stride, WIN=window, **constants, ADD=add, STAGES=launch["num_stages"], num_warps=4, maxnreg=168,
    )  # fmt: skip
