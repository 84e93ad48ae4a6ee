"""Expert layer for decoding, 1 to 512 tokens: bound by reading each touched expert's weights once.

Up to PAIRED_ROWS (token, slot) pairs, two launches without any map: one program per pair (or token)
and slice of columns, matrix-vector products, the combine inside the second. Above that, one launch
sorts the pairs and the training kernels run with narrow tiles. Nothing is copied to the host and
shapes fix the grids, so a call can be captured in a CUDA graph.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparseray.kernels.launch import launch_kernel
from sparseray.kernels.moe.expert_map import ExpertPlan, aligned, plan_experts
from sparseray.kernels.moe.ffn import LayerConfig, TileConfig, combine, project_rows, up_project

PAIRED_ROWS = 32
SORTED_ROWS = 512
SORTED_TILE = 4096
"""Values, a token's row for each expert, that a program of four warps sorts by."""
CUT_TILES = 32
"""That one program cuts."""


@triton.jit
def _pair_up_kernel(
    p_x,
    p_ids,
    p_w,
    p_act,
    H: tl.constexpr,
    I: tl.constexpr,
    K: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    STAGES: tl.constexpr,
):
    i_r = tl.program_id(0)
    o_n = tl.program_id(1) * BN + tl.arange(0, BN)
    o_k = tl.arange(0, BK)
    m_n = o_n < I
    e = tl.load(p_ids + i_r).to(tl.int64)
    p_g = p_w + e * (2 * I * H) + o_n[:, None] * H + o_k[None, :]
    acc_g = tl.zeros([BN, BK], tl.float32)
    acc_u = tl.zeros([BN, BK], tl.float32)
    for k in tl.range(0, H, BK, num_stages=STAGES):
        m_k = o_k < H - k
        m = m_n[:, None] & m_k[None, :]
        x = tl.load(p_x + (i_r // K).to(tl.int64) * H + k + o_k, mask=m_k, other=0.0).to(tl.float32)
        acc_g += tl.load(p_g + k, mask=m, other=0.0).to(tl.float32) * x[None, :]  # [BN, BK]
        acc_u += tl.load(p_g + I * H + k, mask=m, other=0.0).to(tl.float32) * x[None, :]
    g, u = tl.sum(acc_g, 1), tl.sum(acc_u, 1)
    act = g / (1.0 + tl.exp(-g)) * u
    tl.store(p_act + i_r.to(tl.int64) * I + o_n, act.to(p_act.dtype.element_ty), mask=m_n)


@triton.jit
def _pair_down_kernel(
    p_act,
    p_ids,
    p_weights,
    p_w,
    p_out,
    H: tl.constexpr,
    I: tl.constexpr,
    K: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    STAGES: tl.constexpr,
):
    i_t = tl.program_id(0)
    o_n = tl.program_id(1) * BN + tl.arange(0, BN)
    o_k = tl.arange(0, BK)
    m_n = o_n < H
    acc = tl.zeros([BN, BK], tl.float32)
    chunks: tl.constexpr = (I + BK - 1) // BK
    for i in tl.range(0, K * chunks, num_stages=STAGES):
        slot, k = i // chunks, (i % chunks) * BK
        e = tl.load(p_ids + i_t * K + slot).to(tl.int64)
        weight = tl.load(p_weights + i_t * K + slot)
        m_k = o_k < I - k
        p_a = p_act + (i_t * K + slot).to(tl.int64) * I + k + o_k
        a = tl.load(p_a, mask=m_k, other=0.0).to(tl.float32) * weight
        p = p_w + e * (H * I) + o_n[:, None] * I + (k + o_k)[None, :]
        w = tl.load(p, mask=m_n[:, None] & m_k[None, :], other=0.0)  # [BN, BK]
        acc += w.to(tl.float32) * a[None, :]
    out = tl.sum(acc, 1).to(p_out.dtype.element_ty)
    tl.store(p_out + i_t.to(tl.int64) * H + o_n, out, mask=m_n)


@triton.jit(do_not_specialize=["T", "num_tiles"])
def _sort_kernel(
    p_ids,
    p_order,
    p_inverse,
    p_counts,
    p_offsets,
    p_tile_expert,
    p_tile_row,
    p_tile_end,
    T,
    num_tiles,
    E: tl.constexpr,
    BE: tl.constexpr,
    K: tl.constexpr,
    BT: tl.constexpr,
    BM: tl.constexpr,
    TILES: tl.constexpr,
):
    """The expert map: each program counts all pairs, then the first K place one of every token, the others cut TILES tiles.

    Counting again costs less than what a single program would do one after another.
    """
    i_p = tl.program_id(0)
    o_t = tl.arange(0, BT)
    o_e = tl.arange(0, BE)
    m_t = o_t < T
    chosen = tl.zeros([BT, BE], tl.int32)
    before = tl.zeros([BT, BE], tl.int32)
    for k in tl.static_range(K):
        ids = tl.load(p_ids + o_t * K + k, mask=m_t, other=-1).to(tl.int32)
        hot = (o_e[None, :] == ids[:, None]).to(tl.int32)
        chosen += hot
        before += hot * (i_p > k).to(tl.int32)
    counts = tl.sum(chosen, 0)
    last_row = tl.cumsum(counts, 0)
    if i_p < K:
        # By expert, then by token, then by rank.
        places = tl.cumsum(chosen, 0) - chosen + before + (last_row - counts)[None, :]
        ids = tl.load(p_ids + o_t * K + i_p, mask=m_t, other=-1).to(tl.int32)
        place = tl.sum(tl.where(o_e[None, :] == ids[:, None], places, 0), 1)
        tl.store(p_inverse + o_t * K + i_p, place, mask=m_t)
        tl.store(p_order + place, o_t * K + i_p, mask=m_t)
    else:
        if i_p == K:
            tl.store(p_counts + o_e, counts, mask=o_e < E)
            tl.store(p_offsets + o_e, last_row - counts, mask=o_e < E)
        tiles = (counts + BM - 1) // BM
        last = tl.cumsum(tiles, 0)
        o_i = (i_p - K) * TILES + tl.arange(0, TILES)
        expert = tl.sum((last[None, :] <= o_i[:, None]).to(tl.int32), 1)
        own = o_e[None, :] == expert[:, None]
        first_tile = tl.sum(tl.where(own, (last - tiles)[None, :], 0), 1)
        end = tl.sum(tl.where(own, last_row[None, :], 0), 1)
        first_row = end - tl.sum(tl.where(own, counts[None, :], 0), 1)
        m_i = o_i < num_tiles
        tl.store(p_tile_expert + o_i, tl.where(expert < E, expert, -1), mask=m_i)
        tl.store(p_tile_row + o_i, first_row + (o_i - first_tile) * BM, mask=m_i)
        tl.store(p_tile_end + o_i, end, mask=m_i)


def plan_few_rows(topk_ids_TK: Tensor, num_experts: int, *, tile_rows: int) -> ExpertPlan:
    """`plan_experts` in one launch, for at most SORTED_ROWS pairs."""
    topk_ids_TK = topk_ids_TK.contiguous()
    T, K = topk_ids_TK.shape
    R = T * K
    num_tiles = R // tile_rows + min(num_experts, R)
    block, columns = max(16, triton.next_power_of_2(T)), triton.next_power_of_2(num_experts)
    sizes = [R, R, num_experts, num_experts, num_tiles, num_tiles, num_tiles]
    room = [aligned(size) for size in sizes]
    integers = torch.empty(sum(room), dtype=torch.int32, device=topk_ids_TK.device)
    pieces = [piece[:size] for piece, size in zip(integers.split(room), sizes)]
    order, inverse, counts, offsets, *tiles = pieces
    launch_kernel(
        _sort_kernel,
        (K + triton.cdiv(num_tiles, CUT_TILES),),
        topk_ids_TK,
        order,
        inverse,
        counts,
        offsets,
        *tiles,
        T,
        num_tiles,
        E=num_experts,
        BE=columns,
        K=K,
        BT=block,
        BM=tile_rows,
        TILES=CUT_TILES,
        num_warps=4 if block * columns <= SORTED_TILE else 8,
    )
    return ExpertPlan(
        order_R=order,
        inverse_R=inverse,
        counts_E=counts,
        offsets_E=offsets,
        tile_expert_M=tiles[0],
        tile_row_M=tiles[1],
        tile_end_M=tiles[2],
        top_k=K,
        tile_rows=tile_rows,
    )


def decode_config(rows_per_expert: float, dtype: torch.dtype) -> LayerConfig:
    """Narrow tiles that keep many loads of weights in flight; taller ones as experts get more rows.

    Args:
        rows_per_expert: mean number of rows.
        dtype: of the weights; tiles of four-byte ones are half as deep, as deep ones overflow the shared memory.
    """
    shorten = 1 if dtype.itemsize <= 2 else 2
    if rows_per_expert > 24:
        # One tile of 64 rows for nearly every expert: 32 rows would read the weights of half of them twice.
        m = 64
        up = TileConfig(n=128, k=64 // shorten, group=4, warps=8, stages=4)
        down = TileConfig(n=256, k=64 // shorten, group=4, warps=8, stages=4)
    else:
        m = 16 if rows_per_expert <= 8 else 32
        up = TileConfig(n=64, k=128 // shorten, group=4, warps=4, stages=3)
        down = TileConfig(n=128, k=128 // shorten, group=4, warps=4, stages=3)
    return LayerConfig(m=m, up=up, down=down, act_grad=up, input_grad=down)


@dataclass(frozen=True, kw_only=True)
class PairConfig:
    """Slice of columns, depth, warps and stages of the two matrix-vector kernels."""

    up: tuple[int, int, int, int] = (16, 256, 4, 3)
    down: tuple[int, int, int, int] = (8, 256, 4, 4)


def decode_pairs(
    x_TH: Tensor,
    topk_ids_TK: Tensor,
    topk_weights_TK: Tensor,
    w_gate_up_E2IH: Tensor,
    w_down_EHI: Tensor,
    config: PairConfig | None = None,
) -> Tensor:
    """`moe_ffn_decode` without a map: each pair reads its expert's weights itself."""
    (T, H), K, I = x_TH.shape, topk_ids_TK.shape[1], w_down_EHI.shape[2]
    config = config or PairConfig()
    act_RI, out_TH = x_TH.new_empty(T * K, I), torch.empty_like(x_TH)
    sizes = {"H": H, "I": I, "K": K}
    bn, bk, warps, stages = config.up
    bk = min(bk, triton.next_power_of_2(H))
    launch_kernel(
        _pair_up_kernel,
        (T * K, triton.cdiv(I, bn)),
        x_TH,
        topk_ids_TK,
        w_gate_up_E2IH,
        act_RI,
        BN=bn,
        BK=bk,
        STAGES=stages,
        num_warps=warps,
        **sizes,
    )
    bn, bk, warps, stages = config.down
    bk = min(bk, triton.next_power_of_2(I))
    launch_kernel(
        _pair_down_kernel,
        (T, triton.cdiv(H, bn)),
        act_RI,
        topk_ids_TK,
        topk_weights_TK,
        w_down_EHI,
        out_TH,
        BN=bn,
        BK=bk,
        STAGES=stages,
        num_warps=warps,
        **sizes,
    )
    return out_TH


@torch.no_grad()
def moe_ffn_decode(
    x_TH: Tensor,
    topk_ids_TK: Tensor,
    topk_weights_TK: Tensor,
    w_gate_up_E2IH: Tensor,
    w_down_EHI: Tensor,
    *,
    config: LayerConfig | None = None,
) -> Tensor:
    """`ffn.moe_ffn` for a few tokens, without gradients; may be captured in a CUDA graph.

    Args:
        x_TH, topk_ids_TK, topk_weights_TK, w_gate_up_E2IH, w_down_EHI: as for `moe_ffn`, contiguous.
        config: tiles for more than PAIRED_ROWS pairs; None chooses by the rows an expert gets.

    Returns:
        y_TH in x's dtype. The bits depend on which of the two forms ran, hence on T.
    """
    T, K = topk_ids_TK.shape
    if config is None and T * K <= PAIRED_ROWS:
        return decode_pairs(x_TH, topk_ids_TK, topk_weights_TK, w_gate_up_E2IH, w_down_EHI)
    num_experts = w_down_EHI.shape[0]
    config = config or decode_config(T * K / num_experts, w_down_EHI.dtype)
    is_small = T * K <= SORTED_ROWS and T * num_experts <= 8 * SORTED_TILE
    make_plan = plan_few_rows if is_small else plan_experts
    plan = make_plan(topk_ids_TK, num_experts, tile_rows=config.m)
    act_RI, _ = up_project(x_TH, w_gate_up_E2IH, plan, config, save=False)
    y_RH = project_rows(act_RI, w_down_EHI, plan, config, config.down, transposed=True)
    return combine(y_RH, plan, topk_weights_TK)
