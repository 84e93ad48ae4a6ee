"""Attention to the compressed tokens, forward, with warps of different roles (Gluon, Hopper): the fast twin of
`range_forward` for half precision and head sizes of 64 or 128.

Two warpgroups each take the rows of a few query tokens; one more warp copies key and value tiles to shared memory for
both, ahead of them. A warpgroup keeps two matrix products under way: q . k of the next tile and p . v of this one run
while it takes exponentials (FlashAttention-3, arXiv 2407.08608, section 3.2). Programs stay and take tile after tile of
queries, the longest first. Source: arXiv 2502.11089 eq. 7.
"""

from functools import lru_cache

import torch
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
from sparseray.kernels.nsa.geometry import QUERY, Geometry
from sparseray.kernels.nsa.tiles import next_power_of_2
from sparseray.kernels.nsa.tuning import LAUNCH

ROWS = 64
"""Rows of a warpgroup: query tokens times query heads of one key/value head."""
WIDTHS = (64, 128)
"""Head sizes for which the tiles fit shared memory and the layouts below are right."""


@gluon.jit
def _item(item, p_tiles, p_meta, num_tiles, H: gl.constexpr, BQ: gl.constexpr, BN: gl.constexpr, KIND: gl.constexpr,
          LEN: gl.constexpr, STRIDE: gl.constexpr):  # fmt: skip
    """Of a work item: key/value head, first query in its sequence, row of the table, and its number of key tiles."""
    i_kv = item % H
    i_tile = num_tiles - 1 - item // H
    i_seq = gl.load(p_tiles + i_tile * 2)
    i_q = gl.load(p_tiles + i_tile * 2 + 1) * (2 * BQ)
    p_row = p_meta + gl.maximum(i_seq, 0) * 12
    q_len = gl.load(p_row + 1).to(gl.int32)
    q_start = gl.load(p_row + 2).to(gl.int32)
    k_len = gl.load(p_row + KIND + 1).to(gl.int32)
    k_start = gl.load(p_row + KIND + 2).to(gl.int32)
    t_last = q_start + gl.minimum(i_q + 2 * BQ, q_len) - 1
    seen = gl.minimum(gl.maximum(t_last - k_start - LEN + 1 + STRIDE, 0) // STRIDE, k_len)
    # A tile whose queries see nothing still takes a turn, which writes zeros.
    count = gl.where(i_seq < 0, 0, gl.maximum((seen + BN - 1) // BN, 1))
    return i_kv, i_q, p_row, count


@gluon.jit
def _load_keys(
    d_k, d_v, s_k, s_v, bars, p_tiles, p_meta, num_tiles,
    H: gl.constexpr, BQ: gl.constexpr, BN: gl.constexpr, DQ: gl.constexpr, DV: gl.constexpr, KIND: gl.constexpr,
    LEN: gl.constexpr, STRIDE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    turn = 0
    for item in range(gl.program_id(0), num_tiles * H, gl.num_programs(0)):
        i_kv, _, p_row, count = _item(item, p_tiles, p_meta, num_tiles, H, BQ, BN, KIND, LEN, STRIDE)
        k_off = gl.load(p_row + KIND).to(gl.int32)
        for j in range(0, count):
            stage = turn % STAGES
            phase = (turn // STAGES & 1) ^ 1
            row = k_off + (count - 1 - j) * BN
            mbarrier.wait(bars.index(2 * STAGES + stage), phase)
            mbarrier.expect(bars.index(stage), d_k.block_type.nbytes)
            tma.async_copy_global_to_shared(d_k, [row, i_kv * DQ], bars.index(stage), s_k.index(stage))
            mbarrier.wait(bars.index(3 * STAGES + stage), phase)
            mbarrier.expect(bars.index(STAGES + stage), d_v.block_type.nbytes)
            tma.async_copy_global_to_shared(
                d_v, [row, i_kv * DV], bars.index(STAGES + stage), s_v.index(stage)
            )
            turn += 1


@gluon.jit
def _softmax(b_s, b_m, b_l, scale2, o_end, b_t, MASKED: gl.constexpr):
    """Probabilities of a tile, the running maximum and sum with it, and the factor for what was summed before."""
    if MASKED:
        b_s = gl.where(o_end[None, :] <= b_t[:, None], b_s, float("-inf"))
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
    BN: gl.constexpr, STAGES: gl.constexpr, MMA_S: gl.constexpr, ROWS: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """p . v of tile turn - 1 and the probabilities of tile `turn`."""
    stage = turn % STAGES
    last = (turn - 1) % STAGES
    mbarrier.wait(bars.index(stage), turn // STAGES & 1)
    b_zero = gl.zeros([ROWS, BN], gl.float32, layout=MMA_S)
    b_s = warpgroup_mma(s_q, s_k.index(stage).permute((1, 0)), b_zero, use_acc=False, is_async=True)
    mbarrier.wait(bars.index(STAGES + last), (turn - 1) // STAGES & 1)
    b_acc = warpgroup_mma(b_p, s_v.index(last), b_acc, is_async=True)
    b_s = warpgroup_mma_wait(1, deps=[b_s])
    mbarrier.arrive(bars.index(2 * STAGES + stage))
    b_new_p, b_m, b_l, b_alpha = _softmax(b_s, b_m, b_l, scale2, o_end, b_t, MASKED)
    b_acc, b_p = warpgroup_mma_wait(0, deps=[b_acc, b_p])
    mbarrier.arrive(bars.index(3 * STAGES + last))
    return b_new_p, b_m, b_l, b_acc, b_alpha


@gluon.jit
def _attend(
    p_q, p_o, p_lse, s_q, s_k, s_v, bars, p_tiles, p_meta, num_tiles, scale2,
    WHICH: gl.constexpr, H: gl.constexpr, G: gl.constexpr, GP: gl.constexpr, BQ: gl.constexpr, BN: gl.constexpr,
    DQ: gl.constexpr, DV: gl.constexpr, KIND: gl.constexpr, LEN: gl.constexpr, STRIDE: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """The WHICH-th BQ query tokens of every work item."""
    ROWS: gl.constexpr = BQ * GP
    MMA_S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    MMA_O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DV, 16])
    P_IN: gl.constexpr = gl.DotOperandLayout(0, MMA_O, 2)
    WIDE: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // DQ, DQ // 8], [4, 1], [1, 0])
    WIDE_O: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // DV, DV // 8], [4, 1], [1, 0])
    ROW_S: gl.constexpr = gl.SliceLayout(1, MMA_S)
    ROW_O: gl.constexpr = gl.SliceLayout(1, MMA_O)
    turn = 0
    for item in range(gl.program_id(0), num_tiles * H, gl.num_programs(0)):
        i_kv, i_q, p_row, count = _item(item, p_tiles, p_meta, num_tiles, H, BQ, BN, KIND, LEN, STRIDE)
        if count > 0:
            i_q += WHICH * BQ
            q_off = gl.load(p_row)
            q_len = gl.load(p_row + 1).to(gl.int32)
            q_start = gl.load(p_row + 2).to(gl.int32)
            k_len = gl.load(p_row + KIND + 1).to(gl.int32)
            k_start = gl.load(p_row + KIND + 2).to(gl.int32)
            # Tiles of which every row sees every key.
            seen = gl.minimum(gl.maximum(q_start + i_q - k_start - LEN + 1 + STRIDE, 0) // STRIDE, k_len)
            full = gl.minimum(seen // BN, count)

            o_m = gl.arange(0, ROWS, layout=gl.SliceLayout(1, WIDE))
            o_q = i_q + o_m // GP
            m_q = (o_q < q_len) & (o_m % GP < G)
            o_row = (q_off + o_q) * (H * G) + i_kv * G + o_m % GP
            o_d = gl.arange(0, DQ, layout=gl.SliceLayout(0, WIDE))
            b_q = gl.load(p_q + o_row[:, None] * DQ + o_d[None, :], mask=m_q[:, None], other=0.0)
            s_q.store(b_q)
            fence_async_shared()
            gl.thread_barrier()

            b_t = q_start + i_q + gl.arange(0, ROWS, layout=ROW_S) // GP
            o_n = gl.arange(0, BN, layout=gl.SliceLayout(0, MMA_S))
            b_m = gl.full([ROWS], float("-inf"), gl.float32, layout=ROW_S)
            b_l = gl.zeros([ROWS], gl.float32, layout=ROW_S)
            b_acc = gl.zeros([ROWS, DV], gl.float32, layout=MMA_O)
            # Keys behind the sequence's last end never.
            i_last = (count - 1) * BN
            o_end = gl.where(i_last + o_n < k_len, k_start + (i_last + o_n) * STRIDE + LEN - 1, 0x7FFFFFFF)
            stage = turn % STAGES
            mbarrier.wait(bars.index(stage), turn // STAGES & 1)
            b_zero = gl.zeros([ROWS, BN], gl.float32, layout=MMA_S)
            b_s = warpgroup_mma(s_q, s_k.index(stage).permute((1, 0)), b_zero, use_acc=False, is_async=True)
            b_s = warpgroup_mma_wait(0, deps=[b_s])
            mbarrier.arrive(bars.index(2 * STAGES + stage))
            b_new, b_m, b_l, _ = _softmax(b_s, b_m, b_l, scale2, o_end, b_t, True)
            b_p = gl.convert_layout(b_new.to(s_v.dtype), P_IN)
            turn += 1
            for j in range(1, count - full):
                i_k = (count - 1 - j) * BN
                o_end = k_start + (i_k + o_n) * STRIDE + LEN - 1
                b_new, b_m, b_l, b_acc, b_alpha = _step(
                    b_p, b_m, b_l, b_acc, s_q, s_k, s_v, bars, turn, scale2, o_end, b_t, BN, STAGES, MMA_S, ROWS, True
                )  # fmt: skip
                b_acc *= gl.convert_layout(b_alpha, ROW_O)[:, None]
                b_p = gl.convert_layout(b_new.to(s_v.dtype), P_IN)
                turn += 1
            for _ in range(gl.maximum(count - full, 1), count):
                b_new, b_m, b_l, b_acc, b_alpha = _step(
                    b_p, b_m, b_l, b_acc, s_q, s_k, s_v, bars, turn, scale2, o_end, b_t, BN, STAGES, MMA_S, ROWS, False
                )  # fmt: skip
                b_acc *= gl.convert_layout(b_alpha, ROW_O)[:, None]
                b_p = gl.convert_layout(b_new.to(s_v.dtype), P_IN)
                turn += 1
            stage = (turn - 1) % STAGES
            mbarrier.wait(bars.index(STAGES + stage), (turn - 1) // STAGES & 1)
            b_acc = warpgroup_mma(b_p, s_v.index(stage), b_acc, is_async=True)
            b_acc, b_p = warpgroup_mma_wait(0, deps=[b_acc, b_p])
            mbarrier.arrive(bars.index(3 * STAGES + stage))

            b_none = b_l == 0.0
            b_safe = gl.where(b_none, 1.0, b_l)
            b_o = (b_acc * gl.convert_layout(1.0 / b_safe, ROW_O)[:, None]).to(p_o.dtype.element_ty)
            o_m = gl.arange(0, ROWS, layout=gl.SliceLayout(1, WIDE_O))
            o_q = i_q + o_m // GP
            m_q = (o_q < q_len) & (o_m % GP < G)
            o_row = (q_off + o_q) * (H * G) + i_kv * G + o_m % GP
            o_d = gl.arange(0, DV, layout=gl.SliceLayout(0, WIDE_O))
            gl.store(
                p_o + o_row[:, None] * DV + o_d[None, :], gl.convert_layout(b_o, WIDE_O), mask=m_q[:, None]
            )
            o_m = gl.arange(0, ROWS, layout=ROW_S)
            o_q = i_q + o_m // GP
            b_lse = gl.where(b_none, float("-inf"), b_m + gl.log2(b_safe))
            gl.store(
                p_lse + (q_off + o_q) * (H * G) + i_kv * G + o_m % GP,
                b_lse,
                mask=(o_q < q_len) & (o_m % GP < G),
            )


@gluon.jit
def range_pipelined_kernel(
    p_q, d_k, d_v, p_o, p_lse, p_meta, p_tiles, num_tiles, scale2,
    H: gl.constexpr, G: gl.constexpr, GP: gl.constexpr, BQ: gl.constexpr, BN: gl.constexpr, DQ: gl.constexpr,
    DV: gl.constexpr, KIND: gl.constexpr, LEN: gl.constexpr, STRIDE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = d_k.dtype
    s_k = gl.allocate_shared_memory(dtype, [STAGES, BN, DQ], d_k.layout)
    s_v = gl.allocate_shared_memory(dtype, [STAGES, BN, DV], d_v.layout)
    s_q0 = gl.allocate_shared_memory(dtype, [BQ * GP, DQ], d_k.layout)
    s_q1 = gl.allocate_shared_memory(dtype, [BQ * GP, DQ], d_k.layout)
    # Keys are there, values are there, keys are read, values are read.
    bars = gl.allocate_shared_memory(gl.int64, [4 * STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2 * STAGES):
        mbarrier.init(bars.index(i), count=1)
        mbarrier.init(bars.index(2 * STAGES + i), count=2)
    fence_async_shared()
    gl.thread_barrier()
    gl.warp_specialize(
        [
            (_attend, (p_q, p_o, p_lse, s_q0, s_k, s_v, bars, p_tiles, p_meta, num_tiles, scale2,
                       0, H, G, GP, BQ, BN, DQ, DV, KIND, LEN, STRIDE, STAGES)),
            (_attend, (p_q, p_o, p_lse, s_q1, s_k, s_v, bars, p_tiles, p_meta, num_tiles, scale2,
                       1, H, G, GP, BQ, BN, DQ, DV, KIND, LEN, STRIDE, STAGES)),
            (_load_keys, (d_k, d_v, s_k, s_v, bars, p_tiles, p_meta, num_tiles,
                          H, BQ, BN, DQ, DV, KIND, LEN, STRIDE, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


@lru_cache(maxsize=16)
def num_multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@lru_cache(maxsize=16)
def layout_of(shape: tuple[int, ...], dtype: torch.dtype) -> gl.NVMMASharedLayout:
    """How a tile lies in shared memory, for copies and products alike."""
    return gl.NVMMASharedLayout.get_default_for(
        list(shape), gl.float16 if dtype == torch.float16 else gl.bfloat16
    )


def source_of(x: Tensor, keys: int) -> TensorDescriptor:
    """Descriptor of tiles of `keys` rows of one head of x, [S, H, D] read as [S, H * D]."""
    wide = x.shape[1] * x.shape[2]
    return TensorDescriptor(
        x, [x.shape[0], wide], [wide, 1], [keys, x.shape[2]], layout_of((keys, x.shape[2]), x.dtype)
    )


def fits_pipeline(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether `range_pipelined` has layouts for these heads; tiles must be readable by bulk copies besides."""
    return q.shape[1] // k.shape[1] <= ROWS and k.shape[2] in WIDTHS and v.shape[2] in WIDTHS


def range_pipelined(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, geometry: Geometry, *, kind: int, block: int, stride: int,
    scale2: float,
) -> None:  # fmt: skip
    """Write what `range_forward` returns for the same arguments, without a window, to out and lse.

    Args:
        scale2: factor of the scores, base 2.
    """
    num_kv, group = k.shape[1], q.shape[1] // k.shape[1]
    padded = next_power_of_2(group)
    launch = LAUNCH["range_pipelined"]
    tokens = ROWS // padded
    tiles = geometry.tiles(QUERY, 2 * tokens)
    num_programs = min(num_multiprocessors(q.device), tiles.shape[0] * num_kv)
    launch_kernel(
        range_pipelined_kernel, (num_programs,),
        q, source_of(k, launch["keys"]), source_of(v, launch["keys"]), out, lse, geometry.meta, tiles, tiles.shape[0], scale2,
        H=num_kv, G=group, GP=padded, BQ=tokens, BN=launch["keys"], DQ=k.shape[2], DV=v.shape[2], KIND=kind, LEN=block,
        STRIDE=stride, STAGES=launch["num_stages"],
        # Two thirds of the registers go to two of three warpgroups: 240 a thread there, 24 for the copying warp.
        num_warps=4, maxnreg=168,
    )  # fmt: skip
