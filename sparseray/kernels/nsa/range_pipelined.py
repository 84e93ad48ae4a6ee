"""Attention to compressed tokens or a window, forward, with warps of different roles (Gluon, Hopper): the fast twin of
`range_forward` for half precision and head sizes of 64 or 128.

Two warpgroups each take the rows of a few query tokens; one more warp copies key and value tiles to shared memory for
both, ahead of them. A warpgroup keeps two matrix products under way: q . k of the next tile and p . v of this one run
while it takes exponentials (FlashAttention-3, arXiv 2407.08608, section 3.2). Programs stay and take tile after tile of
queries, the longest first. Source: arXiv 2502.11089 eq. 7.
"""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
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
    WIDTHS,
    Attended,
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
    thread_barrier,
    visible,
    whole_tiles,
)
from sparseray.kernels.nsa.tiles import next_power_of_2, on_hopper
from sparseray.kernels.nsa.tuning import LAUNCH


@gluon.jit
def _softmax(
    b_s, b_m, b_l, scale2, o_end, b_t, WIN: gl.constexpr, SELECT: gl.constexpr, INITIAL: gl.constexpr,
    LOCAL: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """Probabilities of a tile, the running maximum and sum with it, and the factor for what was summed before."""
    if MASKED:
        b_s = gl.where(visible(o_end, b_t, WIN, SELECT, INITIAL, LOCAL), b_s, float("-inf"))
    b_new = gl.maximum(b_m, gl.max(b_s, 1) * scale2)
    b_safe = b_new
    if MASKED:
        b_safe = gl.where(b_new == float("-inf"), 0.0, b_new)
    b_p = gl.exp2(b_s * scale2 - b_safe[:, None])
    b_alpha = gl.exp2(b_m - b_safe)
    return b_p, b_new, b_l * b_alpha + gl.sum(b_p, 1), b_alpha


@gluon.jit
def _step(
    b_p, b_m, b_l, b_acc, s_q, s_k, s_v, bars, turn, scale2, o_end, b_t,
    BN: gl.constexpr, WIN: gl.constexpr, SELECT: gl.constexpr, INITIAL: gl.constexpr, LOCAL: gl.constexpr,
    STAGES: gl.constexpr, MMA_S: gl.constexpr, MMA_O: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """p . v of tile turn - 1 and the probabilities of tile `turn`."""
    ROWS: gl.constexpr = s_q.shape[0]
    stage = turn % STAGES
    last = (turn - 1) % STAGES
    mbarrier.wait(bars.index(stage), turn // STAGES & 1)
    b_zero = gl.zeros([ROWS, BN], gl.float32, layout=MMA_S)
    b_s = warpgroup_mma(s_q, s_k.index(stage).permute((1, 0)), b_zero, use_acc=False, is_async=True)
    mbarrier.wait(bars.index(STAGES + last), (turn - 1) // STAGES & 1)
    b_acc = warpgroup_mma(b_p, s_v.index(last), b_acc, is_async=True)
    b_s = warpgroup_mma_wait(1, deps=[b_s])
    mbarrier.arrive(bars.index(2 * STAGES + stage))
    b_new_p, b_m, b_l, b_alpha = _softmax(
        b_s, b_m, b_l, scale2, o_end, b_t, WIN, SELECT, INITIAL, LOCAL, MASKED
    )  # fmt: skip
    b_acc, b_p = warpgroup_mma_wait(0, deps=[b_acc, b_p])
    mbarrier.arrive(bars.index(3 * STAGES + last))
    b_acc *= gl.convert_layout(b_alpha, gl.SliceLayout(1, MMA_O))[:, None]
    return gl.convert_layout(b_new_p.to(s_v.dtype), gl.DotOperandLayout(0, MMA_O, 2)), b_m, b_l, b_acc


@gluon.jit
def _begin(
    s_q, s_k, bars, turn, scale2, o_end, b_t,
    BN: gl.constexpr, WIN: gl.constexpr, SELECT: gl.constexpr, INITIAL: gl.constexpr, LOCAL: gl.constexpr,
    STAGES: gl.constexpr, MMA_S: gl.constexpr, MMA_O: gl.constexpr, DV: gl.constexpr,
):  # fmt: skip
    """The probabilities of the first tile of a range, and the running softmax with it."""
    ROWS: gl.constexpr = s_q.shape[0]
    ROW_S: gl.constexpr = gl.SliceLayout(1, MMA_S)
    stage = turn % STAGES
    mbarrier.wait(bars.index(stage), turn // STAGES & 1)
    b_zero = gl.zeros([ROWS, BN], gl.float32, layout=MMA_S)
    b_s = warpgroup_mma(s_q, s_k.index(stage).permute((1, 0)), b_zero, use_acc=False, is_async=True)
    b_s = warpgroup_mma_wait(0, deps=[b_s])
    mbarrier.arrive(bars.index(2 * STAGES + stage))
    b_m = gl.full([ROWS], float("-inf"), gl.float32, layout=ROW_S)
    b_l = gl.zeros([ROWS], gl.float32, layout=ROW_S)
    b_p, b_m, b_l, _ = _softmax(b_s, b_m, b_l, scale2, o_end, b_t, WIN, SELECT, INITIAL, LOCAL, True)
    b_p = gl.convert_layout(b_p.to(s_k.dtype), gl.DotOperandLayout(0, MMA_O, 2))
    return b_p, b_m, b_l, gl.zeros([ROWS, DV], gl.float32, layout=MMA_O)


@gluon.jit
def _end(
    b_p, b_m, b_l, b_acc, s_v, bars, turn, p_o, p_lse, p_row, i_q, i_kv,
    H: gl.constexpr, G: gl.constexpr, GP: gl.constexpr, BQ: gl.constexpr, DV: gl.constexpr, STAGES: gl.constexpr,
    MMA_S: gl.constexpr, MMA_O: gl.constexpr,
):  # fmt: skip
    """p . v of the last tile of a range, and what the range gave."""
    WIDE: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // DV, DV // 8], [4, 1], [1, 0])
    stage = (turn - 1) % STAGES
    mbarrier.wait(bars.index(STAGES + stage), (turn - 1) // STAGES & 1)
    b_acc = warpgroup_mma(b_p, s_v.index(stage), b_acc, is_async=True)
    b_acc, b_p = warpgroup_mma_wait(0, deps=[b_acc, b_p])
    mbarrier.arrive(bars.index(3 * STAGES + stage))
    b_none = b_l == 0.0
    b_safe = gl.where(b_none, 1.0, b_l)
    b_o = b_acc * gl.convert_layout(1.0 / b_safe, gl.SliceLayout(1, MMA_O))[:, None]
    o_row, m_row = rows_of(p_row, i_q, i_kv, H, G, GP, BQ, gl.SliceLayout(1, WIDE))
    p_out = p_o + o_row[:, None] * DV + gl.arange(0, DV, layout=gl.SliceLayout(0, WIDE))[None, :]
    gl.store(p_out, gl.convert_layout(b_o.to(p_o.dtype.element_ty), WIDE), mask=m_row[:, None])
    o_row, m_row = rows_of(p_row, i_q, i_kv, H, G, GP, BQ, gl.SliceLayout(1, MMA_S))
    gl.store(p_lse + o_row, gl.where(b_none, float("-inf"), b_m + gl.log2(b_safe)), mask=m_row)


@gluon.jit
def _attend(
    p_q, p_o, p_lse, p_o2, p_lse2, s_q, s_k, s_v, bars, p_tiles, p_meta, num_tiles, scale2,
    WHICH: gl.constexpr, H: gl.constexpr, G: gl.constexpr, GP: gl.constexpr, BQ: gl.constexpr, BN: gl.constexpr,
    DQ: gl.constexpr, DV: gl.constexpr, KIND: gl.constexpr, LEN: gl.constexpr, STRIDE: gl.constexpr, WIN: gl.constexpr,
    SELECT: gl.constexpr, INITIAL: gl.constexpr, LOCAL: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The WHICH-th BQ query tokens of every work item."""
    ROWS: gl.constexpr = BQ * GP
    MMA_S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    MMA_O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DV, 16])
    COL: gl.constexpr = gl.SliceLayout(0, MMA_S)
    turn = 0
    for item in range(gl.program_id(0), num_tiles * H, gl.num_programs(0)):
        i_kv, i_0, p_row, i_first, count = item_of(
            item, p_tiles, p_meta, num_tiles, H, BQ, BN, KIND, LEN, STRIDE, WIN
        )  # fmt: skip
        if count > 0:
            i_q = i_0 + WHICH * BQ
            lo, hi = whole_tiles(p_row, i_q, i_first, count, BQ, BN, KIND, LEN, STRIDE, WIN)
            s_q.store(load_rows(p_q, p_row, i_q, i_kv, H, G, GP, BQ, DQ))
            fence_async_shared()
            thread_barrier()
            b_t = (
                gl.load(p_row + 2).to(gl.int32)
                + i_q
                + gl.arange(0, ROWS, layout=gl.SliceLayout(1, MMA_S)) // GP
            )
            o_end = last_positions(i_first + (count - 1) * BN, NEVER, p_row, KIND, LEN, STRIDE, BN, COL)
            b_p, b_m, b_l, b_acc = _begin(
                s_q, s_k, bars, turn, scale2, o_end, b_t, BN, WIN, 0, 0, 0, STAGES, MMA_S, MMA_O, DV
            )  # fmt: skip
            turn += 1
            # The last tiles first: those that some query does not see wholly, whole ones, and with a window the others.
            hi = gl.minimum(hi, count - 1)
            for j in range(hi, count - 1):
                i_k = i_first + (count - 2 - j + hi) * BN
                o_end = last_positions(i_k, NEVER, p_row, KIND, LEN, STRIDE, BN, COL)
                b_p, b_m, b_l, b_acc = _step(
                    b_p, b_m, b_l, b_acc, s_q, s_k, s_v, bars, turn, scale2, o_end, b_t,
                    BN, WIN, 0, 0, 0, STAGES, MMA_S, MMA_O, True,
                )  # fmt: skip
                turn += 1
            for _ in range(lo, hi):
                b_p, b_m, b_l, b_acc = _step(
                    b_p, b_m, b_l, b_acc, s_q, s_k, s_v, bars, turn, scale2, o_end, b_t,
                    BN, WIN, 0, 0, 0, STAGES, MMA_S, MMA_O, False,
                )  # fmt: skip
                turn += 1
            if WIN > 0:
                lo = gl.minimum(lo, hi)
                for j in range(0, lo):
                    i_k = i_first + (lo - 1 - j) * BN
                    o_end = last_positions(i_k, NEVER, p_row, KIND, LEN, STRIDE, BN, COL)
                    b_p, b_m, b_l, b_acc = _step(
                        b_p, b_m, b_l, b_acc, s_q, s_k, s_v, bars, turn, scale2, o_end, b_t,
                        BN, WIN, 0, 0, 0, STAGES, MMA_S, MMA_O, True,
                    )  # fmt: skip
                    turn += 1
            _end(
                b_p, b_m, b_l, b_acc, s_v, bars, turn, p_o, p_lse, p_row, i_q, i_kv,
                H, G, GP, BQ, DV, STAGES, MMA_S, MMA_O,
            )  # fmt: skip
            if SELECT > 0:
                initial, i_local, forced = forced_tiles(p_row, i_0, BQ, BN, SELECT, INITIAL, LOCAL)
                o_end = forced_positions(forced - 1, initial, i_local, p_row, SELECT, INITIAL, BN, COL)
                b_p, b_m, b_l, b_acc = _begin(
                    s_q, s_k, bars, turn, scale2, o_end, b_t,
                    BN, 0, SELECT, INITIAL, LOCAL, STAGES, MMA_S, MMA_O, DV,
                )  # fmt: skip
                turn += 1
                for j in range(1, forced):
                    o_end = forced_positions(
                        forced - 1 - j, initial, i_local, p_row, SELECT, INITIAL, BN, COL
                    )
                    b_p, b_m, b_l, b_acc = _step(
                        b_p, b_m, b_l, b_acc, s_q, s_k, s_v, bars, turn, scale2, o_end, b_t,
                        BN, 0, SELECT, INITIAL, LOCAL, STAGES, MMA_S, MMA_O, True,
                    )  # fmt: skip
                    turn += 1
                _end(
                    b_p, b_m, b_l, b_acc, s_v, bars, turn, p_o2, p_lse2, p_row, i_q, i_kv,
                    H, G, GP, BQ, DV, STAGES, MMA_S, MMA_O,
                )  # fmt: skip


@gluon.jit(do_not_specialize=["num_tiles"])
def range_pipelined_kernel(
    p_q, d_k, d_v, d_k2, d_v2, p_o, p_lse, p_o2, p_lse2, p_meta, p_tiles, num_tiles, scale2,
    H: gl.constexpr, G: gl.constexpr, GP: gl.constexpr, BQ: gl.constexpr, BN: gl.constexpr,
    DQ: gl.constexpr, DV: gl.constexpr, KIND: gl.constexpr, LEN: gl.constexpr, STRIDE: gl.constexpr, WIN: gl.constexpr,
    SELECT: gl.constexpr, INITIAL: gl.constexpr, LOCAL: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = d_k.dtype
    s_k = gl.allocate_shared_memory(dtype, [STAGES, BN, DQ], d_k.layout)
    s_v = gl.allocate_shared_memory(dtype, [STAGES, BN, DV], d_v.layout)
    s_q0 = gl.allocate_shared_memory(dtype, [BQ * GP, DQ], d_k.layout)
    s_q1 = gl.allocate_shared_memory(dtype, [BQ * GP, DQ], d_k.layout)
    bars = ring_barriers(STAGES)
    gl.warp_specialize(
        [
            (_attend, (p_q, p_o, p_lse, p_o2, p_lse2, s_q0, s_k, s_v, bars, p_tiles, p_meta, num_tiles, scale2,
                       0, H, G, GP, BQ, BN, DQ, DV, KIND, LEN, STRIDE, WIN, SELECT, INITIAL, LOCAL, STAGES)),
            (_attend, (p_q, p_o, p_lse, p_o2, p_lse2, s_q1, s_k, s_v, bars, p_tiles, p_meta, num_tiles, scale2,
                       1, H, G, GP, BQ, BN, DQ, DV, KIND, LEN, STRIDE, WIN, SELECT, INITIAL, LOCAL, STAGES)),
            (load_keys, (d_k, d_v, d_k2, d_v2, s_k, s_v, bars, p_tiles, p_meta, num_tiles,
                         H, BQ, BN, DQ, DV, KIND, LEN, STRIDE, WIN, SELECT, INITIAL, LOCAL, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


def fits_pipeline(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether `range_pipelined` runs on this GPU with these heads; tiles must be readable by bulk copies besides."""
    is_laid_out = q.shape[1] // k.shape[1] <= ROWS and k.shape[2] in WIDTHS and v.shape[2] in WIDTHS
    return is_laid_out and on_hopper(q)


def range_pipelined(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, geometry: Geometry, *, kind: int, block: int, stride: int,
    window: int, scale2: float, forced: Forced | None = None,
) -> Attended | None:  # fmt: skip
    """Write what `range_forward` returns for the same arguments to out and lse.

    Args:
        scale2: factor of the scores, base 2.
        forced: blocks of the selected branch for the same queries to attend to besides.

    Returns:
        What the forced blocks gave.
    """
    num_kv, group = k.shape[1], q.shape[1] // k.shape[1]
    padded = next_power_of_2(group)
    launch = LAUNCH["window_pipelined" if window else "range_pipelined"]
    tokens = ROWS // padded
    tiles = geometry.tiles(QUERY, 2 * tokens)
    num_programs = min(num_multiprocessors(q.device), tiles.shape[0] * num_kv)
    found: Attended | None = None
    more: tuple[Tensor | None, Tensor | None] = (None, None)
    if forced is not None:
        found = Attended(
            out=torch.empty_like(out), lse=torch.empty_like(lse), num_initial=forced.num_initial,
            num_local=forced.num_local,
        )  # fmt: skip
        more = (forced.k, forced.v)
    launch_kernel(
        range_pipelined_kernel, (num_programs,),
        q, *(x if x is None else source_of(x, launch["keys"]) for x in (k, v, *more)), out, lse,
        *((None, None) if found is None else (found.out, found.lse)), geometry.meta, tiles, tiles.shape[0], scale2,
        H=num_kv, G=group, GP=padded, BQ=tokens, BN=launch["keys"], DQ=k.shape[2], DV=v.shape[2], KIND=kind, LEN=block,
        STRIDE=stride, WIN=window, **(NO_BLOCKS if forced is None else forced.constants()), STAGES=launch["num_stages"],
        # Two thirds of the registers go to two of three warpgroups: 240 a thread there, 24 for the copying warp.
        num_warps=4, maxnreg=168,
    )  # fmt: skip
    return found
