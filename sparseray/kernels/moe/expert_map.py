"""Expert map of a MoE layer on the GPU: stable sort of (token, slot) pairs by expert, without atomics.

Three launches: ranks and counts per block of tokens, a scan over the blocks, and the placement,
which also cuts every expert's rows into tiles for the grouped matrix products. The order is that of
`reference.group_by_expert`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from sparseray.kernels.launch import launch_kernel

TILE_ROWS = 128
SCAN_BLOCKS = 256
SCAN_EXPERTS = 8
TILES_PER_PROGRAM = 64
_counted: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""The counts of the ids that a plan was made of, as long as these live."""


def aligned(count: int) -> int:
    """So many int32 numbers that what follows them begins at a multiple of 16 bytes: one compiled kernel serves all counts.

    Args:
        count: of those that are needed.
    """
    return -(-count // 4) * 4


@dataclass(frozen=True, kw_only=True)
class ExpertPlan:
    """Where each (token, slot) pair lies when the pairs are sorted by expert; R = T * K.

    Attributes:
        order_R: int32, flat index t*K+k of each sorted row. inverse_R: int32, its inverse.
        counts_E, offsets_E: int32, rows of each expert and where they start.
        tile_expert_M, tile_row_M, tile_end_M: int32, for each tile of `tile_rows` rows its expert
            (-1: no such tile), first row and the end of the expert's rows.
        top_k, tile_rows: K and the rows of a tile.
    """

    order_R: Tensor
    inverse_R: Tensor
    counts_E: Tensor
    offsets_E: Tensor
    tile_expert_M: Tensor
    tile_row_M: Tensor
    tile_end_M: Tensor
    top_k: int
    tile_rows: int


@triton.jit
def rank_block(p_ids, p_ranks, p_counts, i_b, o_t, m_t, chosen, E, K: tl.constexpr):
    """Store each pair's rank among the block's pairs of its expert, and the block's counts.

    `chosen` [BT, BE] counts how often each token of the block chose each expert.
    """
    o_e = tl.arange(0, chosen.shape[1])
    before = tl.cumsum(chosen, 0) - chosen
    for k in tl.static_range(K):
        a = tl.load(p_ids + o_t * K + k, mask=m_t, other=-1).to(tl.int32)
        hot = (o_e[None, :] == a[:, None]).to(tl.int32)
        tl.store(p_ranks + o_t * K + k, tl.sum(before * hot, 1), mask=m_t)
        before += hot
    tl.store(p_counts + i_b * E + o_e, tl.sum(chosen, 0), mask=o_e < E)


@triton.jit(do_not_specialize=["T", "E"])
def _rank_kernel(p_ids, p_ranks, p_counts, T, E, BE: tl.constexpr, K: tl.constexpr, BT: tl.constexpr):
    i_b = tl.program_id(0)
    o_t = i_b * BT + tl.arange(0, BT)
    m_t = o_t < T
    o_e = tl.arange(0, BE)
    chosen = tl.zeros([BT, BE], tl.int32)
    for k in tl.static_range(K):
        a = tl.load(p_ids + o_t * K + k, mask=m_t, other=-1).to(tl.int32)
        chosen += (o_e[None, :] == a[:, None]).to(tl.int32)
    rank_block(p_ids, p_ranks, p_counts, i_b, o_t, m_t, chosen, E, K)


@triton.jit(do_not_specialize=["num_blocks", "E"])
def _scan_kernel(p_block_counts, p_counts, num_blocks, E, BB: tl.constexpr, BE: tl.constexpr):
    """Turn counts per block into the number of earlier rows of the expert, and count all of them."""
    o_e = tl.program_id(0) * BE + tl.arange(0, BE)
    running = tl.zeros([BE], tl.int32)
    for start in range(0, num_blocks, BB):
        o_b = start + tl.arange(0, BB)
        m = (o_b[:, None] < num_blocks) & (o_e[None, :] < E)
        p = p_block_counts + o_b[:, None] * E + o_e[None, :]
        x = tl.load(p, mask=m, other=0)  # [BB, BE]
        tl.store(p, running[None, :] + tl.cumsum(x, 0) - x, mask=m)
        running += tl.sum(x, 0)
    tl.store(p_counts + o_e, running, mask=o_e < E)


@triton.jit(do_not_specialize=["T", "num_blocks", "num_tiles", "E"])
def _place_kernel(
    p_ids,
    p_ranks,
    p_base,
    p_counts,
    p_order,
    p_inverse,
    p_offsets,
    p_tile_expert,
    p_tile_row,
    p_tile_end,
    T,
    num_blocks,
    num_tiles,
    E,
    BE: tl.constexpr,
    K: tl.constexpr,
    BT: tl.constexpr,
    BM: tl.constexpr,
    TILES: tl.constexpr,
):
    i_b = tl.program_id(0)
    o_e = tl.arange(0, BE)
    counts = tl.load(p_counts + o_e, mask=o_e < E, other=0)
    offsets = tl.cumsum(counts, 0) - counts
    if i_b < num_blocks:
        o_t = i_b * BT + tl.arange(0, BT)
        m_t = o_t < T
        for k in tl.static_range(K):
            a = tl.load(p_ids + o_t * K + k, mask=m_t, other=0).to(tl.int32)
            rank = tl.load(p_ranks + o_t * K + k, mask=m_t, other=0)
            base = tl.load(p_base + i_b * E + a, mask=m_t, other=0)
            first = tl.sum(tl.where(o_e[None, :] == a[:, None], offsets[None, :], 0), 1)
            tl.store(p_inverse + o_t * K + k, first + base + rank, mask=m_t)
            tl.store(p_order + first + base + rank, o_t * K + k, mask=m_t)
    else:
        tiles = (counts + BM - 1) // BM
        last = tl.cumsum(tiles, 0)
        o_i = (i_b - num_blocks) * TILES + tl.arange(0, TILES)
        expert = tl.sum((last[None, :] <= o_i[:, None]).to(tl.int32), 1)
        hot = o_e[None, :] == expert[:, None]
        first_tile = tl.sum(tl.where(hot, (last - tiles)[None, :], 0), 1)
        first_row = tl.sum(tl.where(hot, offsets[None, :], 0), 1)
        rows = tl.sum(tl.where(hot, counts[None, :], 0), 1)
        m_i = o_i < num_tiles
        tl.store(p_tile_expert + o_i, tl.where(expert < E, expert, -1), mask=m_i)
        tl.store(p_tile_row + o_i, first_row + (o_i - first_tile) * BM, mask=m_i)
        tl.store(p_tile_end + o_i, first_row + rows, mask=m_i)
        if i_b == num_blocks:
            tl.store(p_offsets + o_e, offsets, mask=o_e < E)


def block_tokens(num_experts: int) -> int:
    """Tokens of one program of the router and of the ranks: [tokens, experts] stays in registers."""
    return max(8, min(32, 2048 // triton.next_power_of_2(num_experts)))


def finish_plan(
    ids_TK: Tensor, ranks_TK: Tensor, block_counts_BE: Tensor, *, num_experts: int, tile_rows: int
) -> ExpertPlan:
    """Scan the blocks' counts (in place) and place the rows; ranks come from `rank_block`."""
    T, K = ids_TK.shape
    num_blocks = block_counts_BE.shape[0]
    num_tiles = max(1, T * K // tile_rows + min(num_experts, T * K))
    integers = {"dtype": torch.int32, "device": ids_TK.device}
    counts, offsets = torch.empty(num_experts, **integers), torch.empty(num_experts, **integers)
    order, inverse = torch.empty(T * K, **integers), torch.empty(T * K, **integers)
    tiles = torch.empty(3, aligned(num_tiles), **integers)[:, :num_tiles]
    grid = (triton.cdiv(num_experts, SCAN_EXPERTS),)
    launch_kernel(
        _scan_kernel,
        grid,
        block_counts_BE,
        counts,
        num_blocks,
        num_experts,
        BB=SCAN_BLOCKS,
        BE=SCAN_EXPERTS,
        num_warps=4,
    )
    launch_kernel(
        _place_kernel,
        (num_blocks + triton.cdiv(num_tiles, TILES_PER_PROGRAM),),
        ids_TK,
        ranks_TK,
        block_counts_BE,
        counts,
        order,
        inverse,
        offsets,
        *tiles,
        T,
        num_blocks,
        num_tiles,
        num_experts,
        BE=triton.next_power_of_2(num_experts),
        K=K,
        BT=block_tokens(num_experts),
        BM=tile_rows,
        TILES=TILES_PER_PROGRAM,
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


def _ranks(topk_ids_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Of each pair its rank among those of its expert in its block of tokens, and the counts of the blocks."""
    T, K = topk_ids_TK.shape
    bt = block_tokens(num_experts)
    num_blocks = max(1, triton.cdiv(T, bt))
    ranks = torch.empty(T, K, dtype=torch.int32, device=topk_ids_TK.device)
    counts = torch.empty(num_blocks, num_experts, dtype=torch.int32, device=topk_ids_TK.device)
    launch_kernel(
        _rank_kernel, (num_blocks,), topk_ids_TK, ranks, counts, T, num_experts,
        BE=triton.next_power_of_2(num_experts), K=K, BT=bt,
    )  # fmt: skip
    return ranks, counts


def count_experts(topk_ids_TK: Tensor, num_experts: int) -> Tensor:
    """How many pairs chose each expert, int64; without atomics, which wait for each other on so few addresses.

    Args:
        topk_ids_TK: integer expert ids.
        num_experts: E.
    """
    known: Tensor | None = _counted.get(topk_ids_TK)
    if known is not None and known.shape[0] == num_experts:
        return known.long()
    return _ranks(topk_ids_TK.contiguous(), num_experts)[1].sum(0)


def plan_experts(topk_ids_TK: Tensor, num_experts: int, *, tile_rows: int = TILE_ROWS) -> ExpertPlan:
    """Sort the (token, slot) pairs by expert, stably, and cut the experts' rows into tiles.

    Args:
        topk_ids_TK: int64 or int32 expert ids, 0 <= id < num_experts.
        num_experts: E.
        tile_rows: rows of a tile of the grouped products.

    Returns:
        The plan; nothing is copied to the host.
    """
    ids_TK = topk_ids_TK.contiguous()
    ranks, counts = _ranks(ids_TK, num_experts)
    plan = finish_plan(ids_TK, ranks, counts, num_experts=num_experts, tile_rows=tile_rows)
    _counted[topk_ids_TK] = plan.counts_E
    return plan
