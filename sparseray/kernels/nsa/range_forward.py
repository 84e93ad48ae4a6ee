"""Attention of every query to one contiguous range of keys: the compressed branch and the sliding window.

A key stands for LEN tokens every STRIDE tokens; it is visible once its last token is at or before the query,
and, with a window, while it is fewer than WINDOW positions back. A program takes a few query tokens with all
query heads of one key/value head as its rows (FlashAttention-2 with the group packed), so a key tile is read
once for the group. Log-sum-exp is kept in base 2. Source: arXiv 2502.11089 eq. 7 and section 3.3.3.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparseray.kernels.launch import launch_kernel
from sparseray.kernels.nsa.geometry import COMPRESSED, KEYS, QUERY, WINDOW, Geometry
from sparseray.kernels.nsa.range_pipelined import fits_pipeline, range_pipelined
from sparseray.kernels.nsa.tiles import (
    can_copy,
    copy_source,
    fetch,
    key_rows,
    load_tile,
    next_power_of_2,
    num_visible,
    precision,
    split_width,
    store_tile,
)
from sparseray.kernels.nsa.tuning import launch_for

LOG2E = 1.4426950408889634


@triton.jit
def _tiles(
    i_lo, i_hi, b_acc, b_m, b_l, b_q0, b_q1, p_k, p_k1, p_v, p_table, o_key, i_kv, i_min, k_len, k_start, b_t, scale2,
    H: tl.constexpr, DQ: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, DV: tl.constexpr,
    DVP: tl.constexpr,
    BN: tl.constexpr, LEN: tl.constexpr, STRIDE: tl.constexpr, WIN: tl.constexpr, MASKED: tl.constexpr,
    IP: tl.constexpr, BULK: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """Tiles of BN keys from i_lo to before i_hi; those that every row sees wholly need no mask."""
    for i in range(i_lo, i_hi, BN):
        o_i = i + tl.arange(0, BN)
        m_i = o_i < k_len
        if PAGE > 0:
            # Pages before the window may be gone, and what lies behind the last key was never written.
            m_i &= o_i >= i_min
        o_row = key_rows(p_table, o_key, o_i, m_i, PAGE) * H + i_kv
        b_k0 = fetch(p_k, o_key + i, o_row, m_i, i_kv, DQ, 0, D0, MASKED, BULK)
        b_s = tl.dot(b_q0, tl.trans(b_k0), input_precision=IP)
        if D1 > 0:
            b_k1 = fetch(p_k1, o_key + i, o_row, m_i, i_kv, DQ, D0, D1, MASKED, BULK)
            b_s = tl.dot(b_q1, tl.trans(b_k1), b_s, input_precision=IP)
        if MASKED:
            b_end = k_start + o_i * STRIDE + LEN - 1
            b_see = m_i[None, :] & (b_end[None, :] <= b_t[:, None])
            if WIN > 0:
                b_see &= b_end[None, :] > b_t[:, None] - WIN
            b_s = tl.where(b_see, b_s, float("-inf"))
        b_new = tl.maximum(b_m, tl.max(b_s, 1) * scale2)
        if MASKED:
            b_safe = tl.where(b_new == float("-inf"), 0.0, b_new)
        else:
            b_safe = b_new
        b_p = tl.exp2(b_s * scale2 - b_safe[:, None])
        b_alpha = tl.exp2(b_m - b_safe)
        b_l = b_l * b_alpha + tl.sum(b_p, 1)
        b_v = fetch(p_v, o_key + i, o_row, m_i, i_kv, DV, 0, DVP, MASKED, BULK)
        b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc * b_alpha[:, None], input_precision=IP)
        b_m = b_new
    return b_acc, b_m, b_l


@triton.jit(do_not_specialize=["num_tiles"])
def range_fwd_kernel(
    p_q, p_k, p_k1, p_v, p_table, p_o, p_lse, p_meta, p_tiles, num_tiles, scale2,
    H: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, BQ: tl.constexpr, BN: tl.constexpr,
    DQ: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr,
    KIND: tl.constexpr, LEN: tl.constexpr, STRIDE: tl.constexpr, WIN: tl.constexpr, IP: tl.constexpr,
    BULK: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    i_kv = tl.program_id(0) // num_tiles
    # The last tiles see the most keys: start them first.
    i_tile = num_tiles - 1 - tl.program_id(0) % num_tiles
    i_seq = tl.load(p_tiles + i_tile * 2)
    if i_seq < 0:
        return
    i_q = tl.load(p_tiles + i_tile * 2 + 1) * BQ
    p_row = p_meta + i_seq * 12
    q_off = tl.load(p_row)
    q_len = tl.load(p_row + 1).to(tl.int32)
    q_start = tl.load(p_row + 2).to(tl.int32)
    k_off = tl.load(p_row + KIND)
    k_len = tl.load(p_row + KIND + 1).to(tl.int32)
    k_start = tl.load(p_row + KIND + 2).to(tl.int32)

    o_m = tl.arange(0, BQ * GP)
    o_q = i_q + o_m // GP
    m_q = (o_q < q_len) & (o_m % GP < G)
    b_t = q_start + o_q
    o_row = (q_off + o_q) * (H * G) + i_kv * G + o_m % GP
    b_q0 = load_tile(p_q, o_row, m_q, DQ, 0, D0, True)
    b_q1 = b_q0
    if D1 > 0:
        b_q1 = load_tile(p_q, o_row, m_q, DQ, D0, D1, True)
    t_first = q_start + i_q
    t_last = q_start + tl.minimum(i_q + BQ, q_len) - 1
    i_hi = tl.minimum(num_visible(t_last, k_start, LEN, STRIDE), k_len)
    i_full = tl.minimum(num_visible(t_first, k_start, LEN, STRIDE), k_len) // BN * BN
    i_min = 0
    i_in = 0
    b_m = tl.full([BQ * GP], float("-inf"), tl.float32)
    b_l = tl.zeros([BQ * GP], tl.float32)
    b_acc = tl.zeros([BQ * GP, DVP], tl.float32)
    if WIN > 0:
        # From i_in on, keys are inside the window of every query of the tile.
        i_min = tl.maximum(t_first - WIN + 1 - k_start, 0)
        i_in = (tl.maximum(t_last - WIN + 1 - k_start, 0) + BN - 1) // BN * BN
        b_acc, b_m, b_l = _tiles(
            i_min // BN * BN, tl.minimum(i_in, i_hi), b_acc, b_m, b_l, b_q0, b_q1, p_k, p_k1, p_v, p_table, k_off, i_kv, i_min,
            k_len, k_start, b_t, scale2, H, DQ, D0, D1, DV, DVP, BN, LEN, STRIDE, WIN, True, IP, BULK, PAGE,
        )  # fmt: skip
    b_acc, b_m, b_l = _tiles(
        i_in, i_full, b_acc, b_m, b_l, b_q0, b_q1, p_k, p_k1, p_v, p_table, k_off, i_kv, i_min,
        k_len, k_start, b_t, scale2, H, DQ, D0, D1, DV, DVP, BN, LEN, STRIDE, WIN, False, IP, BULK, PAGE,
    )  # fmt: skip
    b_acc, b_m, b_l = _tiles(
        tl.maximum(i_in, i_full), i_hi, b_acc, b_m, b_l, b_q0, b_q1, p_k, p_k1, p_v, p_table, k_off, i_kv, i_min,
        k_len, k_start, b_t, scale2, H, DQ, D0, D1, DV, DVP, BN, LEN, STRIDE, WIN, True, IP, BULK, PAGE,
    )  # fmt: skip
    b_none = b_l == 0.0
    b_safe = tl.where(b_none, 1.0, b_l)
    store_tile(p_o, o_row, m_q, b_acc / b_safe[:, None], DV, 0, DVP)
    b_lse = tl.where(b_none, float("-inf"), b_m + tl.log2(b_safe))
    tl.store(p_lse + o_row, b_lse, mask=m_q)


def tokens_per_tile(rows: int, group: int) -> tuple[int, int]:
    """Query tokens of a tile and the padded group size, so that their product is a legal tile height."""
    padded = next_power_of_2(group)
    return max(16, rows, padded) // padded, padded


def page_size(k: Tensor, table: Tensor | None) -> int:
    """Tokens of a page, 0 for keys that are packed."""
    return 0 if table is None else k.shape[1]


def in_bulk(k: Tensor, v: Tensor, table: Tensor | None = None) -> bool:
    """Whether tiles of keys and values come by bulk copies.

    Pages are read by pointers: a bulk copy does not mask, and the end of a page may hold NaN.
    """
    return table is None and can_copy(k) and can_copy(v)


def key_sources(k: Tensor, v: Tensor, rows: int, *, bulk: bool) -> tuple[Any, Any, Any]:
    """What a kernel reads key tiles (both parts of a split head size; None without one) and value tiles from."""
    d0, d1 = split_width(k.shape[-1])
    if not bulk:
        return k, k if d1 else None, v
    src_k = copy_source(k, rows, d0)
    src_k1 = copy_source(k, rows, d1) if d1 else None
    return src_k, src_k1, copy_source(v, rows, max(16, next_power_of_2(v.shape[-1])))


def range_forward(
    q: Tensor, k: Tensor, v: Tensor, geometry: Geometry, *, kind: int, block: int, stride: int, window: int,
    scale: float, table: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output and base-2 log-sum-exp of queries over compressed tokens, over a sliding window or over all keys.

    Args:
        q: [T, HQ, D] packed; k: [S, H, D]; v: [S, H, Dv], contiguous, one dtype.
        kind: COMPRESSED, WINDOW or KEYS, the columns of the geometry that hold these keys.
        block, stride: tokens a key stands for and their distance (1 and 1 for a window).
        window: positions a query sees back, 0 for all.
        table: int32, pages of every sequence, where the keys are pages: k [pages, page size, H, D], v likewise.

    Returns:
        Output [T, HQ, Dv] in the dtype of q, and fp32 [T, HQ], -inf where a query sees no key.
    """
    heads, num_kv = q.shape[1], k.shape[-2]
    out = q.new_empty(q.shape[0], heads, v.shape[-1])
    lse = torch.empty(q.shape[0], heads, dtype=torch.float32, device=q.device)
    width = max(q.shape[-1], v.shape[-1])
    bulk = in_bulk(k, v, table)
    if bulk and fits_pipeline(q, k, v):
        range_pipelined(
            q, k, v, out, lse, geometry, kind=kind, block=block, stride=stride, window=window, scale2=scale * LOG2E
        )  # fmt: skip
        return out, lse
    launch = launch_for("window_fwd" if kind == WINDOW else "range_fwd", width, q.element_size())
    tokens, padded = tokens_per_tile(launch["rows"], heads // num_kv)
    tiles = geometry.tiles(QUERY, tokens)
    d0, d1 = split_width(q.shape[-1])
    assert kind in (COMPRESSED, WINDOW, KEYS)
    dvp = max(16, next_power_of_2(v.shape[-1]))
    launch_kernel(
        range_fwd_kernel, (tiles.shape[0] * num_kv,),
        q, *key_sources(k, v, launch["keys"], bulk=bulk), table, out, lse, geometry.meta, tiles, tiles.shape[0], scale * LOG2E,
        H=num_kv, G=heads // num_kv, GP=padded, BQ=tokens, BN=launch["keys"],
        DQ=q.shape[-1], D0=d0, D1=d1, DV=v.shape[-1], DVP=dvp,
        KIND=kind, LEN=block, STRIDE=stride, WIN=window, IP=precision(q.dtype), BULK=bulk,
        PAGE=page_size(k, table),
        num_warps=launch["num_warps"], num_stages=launch["num_stages"],
    )  # fmt: skip
    return out, lse
