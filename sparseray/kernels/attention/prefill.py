"""`paged_prefill`: full attention of chunks of prompts, of any lengths, to paged caches, grouped heads, in one launch.

The queries of all chunks are packed. A program attends from a tile of one chunk's rows, for one head; which tile of
which chunk it has is read from the lengths on the device, and shapes alone decide the launch, so it can be captured in
a CUDA graph. A row's bits depend on its own chunk alone. Oracle: `kernels.dense.reference.paged_attention_reference`.
"""

import triton
import triton.language as tl
from torch import Tensor

from sparseray.kernels.launch import launch_kernel
from sparseray.kernels.nsa.range_forward import LOG2E
from sparseray.kernels.nsa.tiles import load_tile, next_power_of_2, precision, split_width, store_tile

ROWS, KEYS, STAGES = 128, 64, 3
"""Queries of a tile, keys that it takes at a time, and how many tiles of keys are on their way."""


@triton.jit
def _attend(
    b_acc, b_m, b_l, b_q0, b_q1, p_k, p_v, o_key, b_t, o_t, n_ctx, scale2,
    MASK: tl.constexpr, DQ: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr,
    IP: tl.constexpr,
):  # fmt: skip
    """One tile of keys into the running softmax; without MASK every query sees all of them."""
    m_t = o_t < n_ctx
    b_s = tl.dot(b_q0, tl.trans(load_tile(p_k, o_key, m_t, DQ, 0, D0, MASK)), input_precision=IP)
    if D1 > 0:
        b_s = tl.dot(b_q1, tl.trans(load_tile(p_k, o_key, m_t, DQ, D0, D1, MASK)), b_s, input_precision=IP)
    b_s *= scale2
    if MASK:
        b_s = tl.where(o_t[None, :] <= b_t[:, None], b_s, float("-inf"))
    b_new = tl.maximum(b_m, tl.max(b_s, 1))
    b_p = tl.exp2(b_s - b_new[:, None])
    b_alpha = tl.exp2(b_m - b_new)
    b_l = b_l * b_alpha + tl.sum(b_p, 1)
    b_v = load_tile(p_v, o_key, m_t, DV, 0, DVP, MASK)
    b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc * b_alpha[:, None], input_precision=IP)
    return b_acc, b_new, b_l


@triton.jit(do_not_specialize=["chunks", "pages"])
def _chunks_kernel(
    p_q, p_k, p_v, p_table, p_bounds, p_lens, p_o, chunks, pages, scale2,
    H: tl.constexpr, G: tl.constexpr, BB: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PAGE: tl.constexpr,
    DQ: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, IP: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """A tile of BM rows of one chunk, or nothing; the last tiles, which see the most, begin first."""
    i_h = tl.program_id(0)
    i_tile = tl.num_programs(1) - 1 - tl.program_id(1)
    o_b = tl.arange(0, BB)
    b_first = tl.load(p_bounds + o_b, mask=o_b < chunks, other=0)
    b_rows = tl.load(p_bounds + o_b + 1, mask=o_b < chunks, other=0) - b_first
    b_tiles = (b_rows + BM - 1) // BM
    b_last = tl.cumsum(b_tiles, 0)
    i_b = tl.sum((b_last <= i_tile).to(tl.int32), 0)
    if i_b < chunks:
        is_own = o_b == i_b
        first = tl.sum(tl.where(is_own, b_first, 0), 0)
        rows = tl.sum(tl.where(is_own, b_rows, 0), 0)
        start_row = (i_tile - tl.sum(tl.where(is_own, b_last - b_tiles, 0), 0)) * BM
        n_ctx = tl.load(p_lens + i_b)
        p_table += i_b * pages
        o_m = start_row + tl.arange(0, BM)
        o_row = (first + o_m).to(tl.int64) * (H * G) + i_h
        b_t = n_ctx - rows + o_m
        b_q0 = load_tile(p_q, o_row, o_m < rows, DQ, 0, D0, True)
        b_q1 = b_q0
        if D1 > 0:
            b_q1 = load_tile(p_q, o_row, o_m < rows, DQ, D0, D1, True)
        b_m = tl.full([BM], float("-inf"), tl.float32)
        b_l = tl.zeros([BM], tl.float32)
        b_acc = tl.zeros([BM, DVP], tl.float32)
        o_c = tl.arange(0, BN)
        # The first row sees all keys up to its own.
        whole = (n_ctx - rows + start_row + 1) // BN * BN
        for start in tl.range(0, whole, BN, num_stages=STAGES):
            o_key = tl.load(p_table + start // PAGE).to(tl.int64) * PAGE + start % PAGE + o_c
            b_acc, b_m, b_l = _attend(
                b_acc, b_m, b_l, b_q0, b_q1, p_k, p_v, o_key * H + i_h // G, b_t, start + o_c, n_ctx, scale2,
                False, DQ, D0, D1, DV, DVP, IP,
            )  # fmt: skip
        for start in range(whole, tl.minimum(n_ctx - rows + start_row + BM, n_ctx), BN):
            o_key = tl.load(p_table + start // PAGE).to(tl.int64) * PAGE + start % PAGE + o_c
            b_acc, b_m, b_l = _attend(
                b_acc, b_m, b_l, b_q0, b_q1, p_k, p_v, o_key * H + i_h // G, b_t, start + o_c, n_ctx, scale2,
                True, DQ, D0, D1, DV, DVP, IP,
            )  # fmt: skip
        store_tile(p_o, o_row, o_m < rows, b_acc / b_l[:, None], DV, 0, DVP)


def paged_prefill(
    q_RQD: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    bounds: Tensor,
    context_lens: Tensor,
    out: Tensor,
) -> Tensor:
    """Attend from the last tokens of every sequence, a chunk of any length, to its pages, causally.

    Args:
        q_RQD: the chunks of all sequences one after the other, contiguous; rows after the last chunk are not read.
        k_cache, v_cache: [pages, page size, G, D] and [.., V], contiguous; G divides Q, and the page size is a multiple
            of 16. The chunks' own keys and values are already in them.
        block_table: int32 [B, pages of a sequence].
        bounds: int32 [B + 1], where each chunk begins in q, and where the last one ends; a chunk may be empty.
        context_lens: int32 [B], tokens of every sequence, its chunk included.
        out: [R, Q, V], contiguous; rows of chunks are written. Returned.
    """
    (rows, heads, width), (page, num_kv, value_dim) = q_RQD.shape, v_cache.shape[1:]
    chunks, pages = block_table.shape
    d0, d1 = split_width(width)
    tiles, keys = triton.cdiv(rows, ROWS) + chunks, min(KEYS, page & -page)
    launch_kernel(
        _chunks_kernel, (heads, tiles), q_RQD, k_cache, v_cache, block_table, bounds, context_lens, out, chunks, pages,
        width**-0.5 * LOG2E,
        H=num_kv, G=heads // num_kv, BB=next_power_of_2(chunks), BM=ROWS, BN=keys, PAGE=page, DQ=width, D0=d0, D1=d1,
        DV=value_dim, DVP=max(16, next_power_of_2(value_dim)), IP=precision(q_RQD.dtype),
        STAGES=STAGES if q_RQD.element_size() == 2 else 1, num_warps=4 if width <= 64 else 8,
    )  # fmt: skip
    return out
