"""The first launch of `latent_decode` with warps of different roles (Gluon, Hopper), for 16-bit numbers.

One warp copies tiles of latents and rotated keys to shared memory, in bulk, some ahead of the warpgroups that compute.
A product of a warpgroup reads both of its sides from shared memory, so a tile serves the scores, [tokens, rows], and
turned the output, [C, rows], without passing through registers. Where a tile reaches over a sequence's end, the rows
behind it are set to zero there: a bulk copy cannot mask, and behind the end anything may lie.
"""

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

from sparseray.kernels.nsa.pipeline import layout_of, thread_barrier
from sparseray.kernels.nsa.tiles import on_hopper


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def _part_of(item, tiles, s_ends, p_lens, least, most, BN: gl.constexpr, LAYOUT: gl.constexpr):
    """Sequence, number in it, tile of rows, context, first and end token of the part that an item is."""
    b_end = s_ends.load(LAYOUT)
    i_part = item // tiles
    i_b = gl.sum((b_end <= i_part).to(gl.int32), 0)
    i_s = i_part - gl.max(gl.where(b_end <= i_part, b_end, 0), 0)
    n_ctx = gl.load(p_lens + i_b)
    length = (gl.maximum(least, (n_ctx + most - 1) // most) + BN - 1) // BN * BN
    return i_b, i_s, item % tiles, n_ctx, i_s * length, gl.minimum((i_s + 1) * length, n_ctx)


@gluon.jit
def _copy_tiles(
    d_c, d_r, s_c, s_r, bars, s_ends, p_table, p_lens, pages, tiles, least, most,
    BN: gl.constexpr, PAGE: gl.constexpr, C: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Every tile of every part, in the order in which it is read."""
    ENDS: gl.constexpr = gl.BlockedLayout([s_ends.shape[0] // 32], [32], [1], [0])
    total = gl.max(s_ends.load(ENDS), 0) * tiles
    turn = 0
    for item in range(gl.program_id(0), total, gl.num_programs(0)):
        i_b, _, _, _, lo, hi = _part_of(item, tiles, s_ends, p_lens, least, most, BN, ENDS)
        for start in range(lo, hi, BN):
            row = gl.load(p_table + i_b * pages + start // PAGE) * PAGE + start % PAGE
            stage = turn % STAGES
            mbarrier.wait(bars.index(STAGES + stage), (turn // STAGES & 1) ^ 1)
            full = bars.index(stage)
            mbarrier.expect(full, d_c.block_type.nbytes + d_r.block_type.nbytes)
            tma.async_copy_global_to_shared(d_c, [row, 0], full, s_c.index(stage))
            tma.async_copy_global_to_shared(d_r, [row, C], full, s_r.index(stage))
            turn += 1


@gluon.jit
def _clear_behind(s_tile, start, n_ctx, BN: gl.constexpr, C: gl.constexpr, W: gl.constexpr):
    """Set the rows of tokens that a sequence does not have to zero."""
    WIDE: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [W, 1], [1, 0])
    is_there = start + gl.arange(0, BN, layout=gl.SliceLayout(1, WIDE)) < n_ctx
    for i in gl.static_range(C // 64):
        s_part = s_tile.slice(i * 64, 64, dim=1)
        b = s_part.load(WIDE)
        s_part.store(gl.where(is_there[:, None], b, gl.zeros_like(b)))
    fence_async_shared()
    thread_barrier()


@gluon.jit
def _load_queries(
    p_q, p_turned, s_qc, s_qr, token_q, head_q, token_turned, head_turned, first, heads, rows, i_m,
    BR: gl.constexpr, C: gl.constexpr, P: gl.constexpr, W: gl.constexpr,
):  # fmt: skip
    """A tile of a sequence's rows to shared memory."""
    WIDE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // P, P // 8], [W, 1], [1, 0])
    o_m = i_m * BR + gl.arange(0, BR, layout=gl.SliceLayout(1, WIDE))
    o_d = gl.arange(0, P, layout=gl.SliceLayout(0, WIDE))
    o_row = (first + o_m // heads) * token_turned + o_m % heads * head_turned
    s_qr.store(gl.load(p_turned + o_row[:, None] + o_d[None, :], mask=(o_m < rows)[:, None], other=0.0))
    LONG: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [W, 1], [1, 0])
    o_m = i_m * BR + gl.arange(0, BR, layout=gl.SliceLayout(1, LONG))
    o_d = gl.arange(0, 64, layout=gl.SliceLayout(0, LONG))
    o_row = (first + o_m // heads) * token_q + o_m % heads * head_q
    p_tile = p_q + o_row[:, None] + o_d[None, :]
    for i in gl.static_range(C // 64):
        s_qc.slice(i * 64, 64, dim=1).store(gl.load(p_tile + i * 64, mask=(o_m < rows)[:, None], other=0.0))
    fence_async_shared()
    thread_barrier()


@gluon.jit
def _attend(
    p_q, p_turned, p_lens, p_m, p_l, p_acc, token_q, head_q, token_turned, head_turned, s_c, s_r, s_qc, s_qr, s_p, bars,
    s_ends, new, heads, tiles, least, most, scale2,
    BR: gl.constexpr, BN: gl.constexpr, C: gl.constexpr, P: gl.constexpr, STAGES: gl.constexpr, W: gl.constexpr,
):  # fmt: skip
    """The softmax of every part, not yet divided."""
    SPLIT: gl.constexpr = W // 4
    MMA_S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, SPLIT], [16, BR // SPLIT, 16])
    MMA_O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [W, 1], [16, BR, 16])
    ROW: gl.constexpr = gl.SliceLayout(0, MMA_S)
    ENDS: gl.constexpr = gl.BlockedLayout([s_ends.shape[0] // 32], [32], [W], [0])
    total = gl.max(s_ends.load(ENDS), 0) * tiles
    rows = new * heads
    turn = 0
    for item in range(gl.program_id(0), total, gl.num_programs(0)):
        i_b, i_s, i_m, n_ctx, lo, hi = _part_of(item, tiles, s_ends, p_lens, least, most, BN, ENDS)
        _load_queries(
            p_q, p_turned, s_qc, s_qr, token_q, head_q, token_turned, head_turned, i_b * new, heads, rows, i_m,
            BR, C, P, W,
        )  # fmt: skip
        o_m = i_m * BR + gl.arange(0, BR, layout=ROW)
        b_t = gl.where(o_m < rows, n_ctx - new + o_m // heads, -1)
        b_m = gl.full([BR], float("-inf"), gl.float32, layout=ROW)
        b_l = gl.zeros([BN, BR], gl.float32, layout=MMA_S)
        b_acc = gl.zeros([C, BR], gl.float32, layout=MMA_O)
        for start in range(lo, hi, BN):
            stage = turn % STAGES
            s_tile = s_c.index(stage)
            mbarrier.wait(bars.index(stage), turn // STAGES & 1)
            if start + BN > n_ctx:
                _clear_behind(s_tile, start, n_ctx, BN, C, W)
            b_zero = gl.zeros([BN, BR], gl.float32, layout=MMA_S)
            b_s = warpgroup_mma(s_tile, s_qc.permute((1, 0)), b_zero, use_acc=False, is_async=True)
            b_s = warpgroup_mma(s_r.index(stage), s_qr.permute((1, 0)), b_s, is_async=True)
            b_s = warpgroup_mma_wait(0, deps=[b_s])
            o_t = start + gl.arange(0, BN, layout=gl.SliceLayout(1, MMA_S))
            b_s = gl.where(o_t[:, None] <= b_t[None, :], b_s * scale2, float("-inf"))
            b_new = gl.maximum(b_m, gl.max(b_s, 0))
            b_safe = gl.where(b_new == float("-inf"), 0.0, b_new)
            b_p = gl.exp2(b_s - b_safe[None, :])
            b_alpha = gl.exp2(b_m - b_safe)
            b_l = b_l * b_alpha[None, :] + b_p
            b_m = b_new
            s_p.store(b_p.to(s_p.dtype))
            fence_async_shared()
            thread_barrier()
            b_acc *= gl.convert_layout(b_alpha, gl.SliceLayout(0, MMA_O))[None, :]
            b_acc = warpgroup_mma(s_tile.permute((1, 0)), s_p, b_acc, is_async=True)
            b_acc = warpgroup_mma_wait(0, deps=[b_acc])
            thread_barrier()
            mbarrier.arrive(bars.index(STAGES + stage))
            turn += 1
        o_part = (i_b * rows + o_m).to(gl.int64) * most + i_s
        gl.store(p_m + o_part, b_m, mask=o_m < rows)
        gl.store(p_l + o_part, gl.sum(b_l, 0), mask=o_m < rows)
        o_m = i_m * BR + gl.arange(0, BR, layout=gl.SliceLayout(0, MMA_O))
        o_part = (i_b * rows + o_m).to(gl.int64) * most + i_s
        o_c = gl.arange(0, C, layout=gl.SliceLayout(1, MMA_O))
        gl.store(p_acc + o_part[None, :] * C + o_c[:, None], b_acc, mask=(o_m < rows)[None, :])


@gluon.jit
def latent_pipelined_kernel(
    p_q, p_turned, d_c, d_r, p_table, p_lens, p_m, p_l, p_acc, token_q, head_q, token_turned, head_turned,
    batch, new, heads, pages, least, most, scale2,
    BB: gl.constexpr, BR: gl.constexpr, BN: gl.constexpr, PAGE: gl.constexpr, C: gl.constexpr, P: gl.constexpr,
    STAGES: gl.constexpr, W: gl.constexpr,
):  # fmt: skip
    """As `_parts_kernel`."""
    dtype: gl.constexpr = d_c.dtype
    s_c = gl.allocate_shared_memory(dtype, [STAGES, BN, C], d_c.layout)
    s_r = gl.allocate_shared_memory(dtype, [STAGES, BN, P], d_r.layout)
    s_qc = gl.allocate_shared_memory(dtype, [BR, C], d_c.layout)
    s_qr = gl.allocate_shared_memory(dtype, [BR, P], d_r.layout)
    s_p = gl.allocate_shared_memory(dtype, [BN, BR], gl.NVMMASharedLayout.get_default_for([BN, BR], dtype))
    LINE: gl.constexpr = gl.BlockedLayout([BB // 32], [32], [W], [0])
    s_ends = gl.allocate_shared_memory(gl.int32, [BB], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    o_b = gl.arange(0, BB, layout=LINE)
    b_len = gl.load(p_lens + o_b, mask=o_b < batch, other=0)
    b_length = (gl.maximum(least, (b_len + most - 1) // most) + BN - 1) // BN * BN
    s_ends.store(gl.associative_scan((b_len + b_length - 1) // b_length, 0, _add))
    bars = gl.allocate_shared_memory(gl.int64, [2 * STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2 * STAGES):
        mbarrier.init(bars.index(i), count=1)
    fence_async_shared()
    thread_barrier()
    tiles = (new * heads + BR - 1) // BR
    gl.warp_specialize(
        [
            (_attend, (p_q, p_turned, p_lens, p_m, p_l, p_acc, token_q, head_q, token_turned, head_turned,
                       s_c, s_r, s_qc, s_qr, s_p, bars, s_ends, new, heads, tiles, least, most, scale2,
                       BR, BN, C, P, STAGES, W)),
            (_copy_tiles, (d_c, d_r, s_c, s_r, bars, s_ends, p_table, p_lens, pages, tiles, least, most,
                           BN, PAGE, C, STAGES)),
        ],
        [1],
        [40],
    )  # fmt: skip


def fits(cache: Tensor, latent: int) -> bool:
    """Whether the kernel runs on this GPU with these pages.

    Args:
        cache: [pages, page size, 1, C + P].
        latent: C.
    """
    page, width = cache.shape[1], cache.shape[3]
    is_laid_out = latent in (256, 512) and width - latent in (32, 64) and page % 64 == 0
    return is_laid_out and cache.dtype in (torch.bfloat16, torch.float16) and on_hopper(cache)


def sources_of(cache: Tensor, latent: int, tokens: int) -> tuple[TensorDescriptor, TensorDescriptor]:
    """Descriptors of tiles of latents and of rotated keys.

    Args:
        cache: [pages, page size, 1, C + P], read as rows of C + P.
        latent: C.
        tokens: of a tile.
    """
    rows, width = cache.shape[0] * cache.shape[1], cache.shape[3]
    shapes = (tokens, latent), (tokens, width - latent)
    latents, rotated = (
        TensorDescriptor(cache, [rows, width], [width, 1], list(shape), layout_of(shape, cache.dtype))
        for shape in shapes
    )
    return latents, rotated
