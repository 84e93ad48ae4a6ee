"""Gradients of attention over one contiguous range of keys: the compressed branch and the sliding window.

Seven matrix products in two kernels, none with atomics: dq by query tile, dk and dv by key tile. Long key
tiles split their queries; the parts are fp32 and are added in order, so the gradients are bitwise repeatable.
`row_lse` already holds the gate (lse - log2 g, +inf where nothing is visible), so exp2(s - row_lse) is g * p.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparseray.kernels.dense.sum_parts import sum_parts
from sparseray.kernels.launch import launch_kernel
from sparseray.kernels.nsa.geometry import QUERY, WINDOW, Geometry
from sparseray.kernels.nsa.pipeline import ROWS, Forced
from sparseray.kernels.nsa.range_forward import LOG2E, in_bulk, key_sources, tokens_per_tile
from sparseray.kernels.nsa.range_pipelined_dkdv import fits_pipeline, range_pipelined_dkdv
from sparseray.kernels.nsa.range_pipelined_dq import range_pipelined_dq
from sparseray.kernels.nsa.tiles import (
    add_tile,
    can_copy,
    fetch,
    load_tile,
    next_power_of_2,
    num_visible,
    precision,
    split_width,
    store_tile,
)
from sparseray.kernels.nsa.tuning import launch_for


@triton.jit
def _dq_step(
    b_dq0, b_dq1, b_q0, b_q1, b_do, b_lse, b_dg, b_t, p_k, p_k1, p_v, k_off, k_len, k_start, i, i_kv, scale2,
    H: tl.constexpr, DQ: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, DV: tl.constexpr,
    DVP: tl.constexpr,
    BN: tl.constexpr, LEN: tl.constexpr, STRIDE: tl.constexpr, WIN: tl.constexpr, IP: tl.constexpr,
    BULK: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    o_i = i + tl.arange(0, BN)
    m_i = o_i < k_len
    o_key = (k_off + o_i) * H + i_kv
    b_k0 = fetch(p_k, k_off + i, o_key, m_i, i_kv, DQ, 0, D0, True, BULK)
    b_s = tl.dot(b_q0, tl.trans(b_k0), input_precision=IP)
    if D1 > 0:
        b_k1 = fetch(p_k1, k_off + i, o_key, m_i, i_kv, DQ, D0, D1, True, BULK)
        b_s = tl.dot(b_q1, tl.trans(b_k1), b_s, input_precision=IP)
    b_v = fetch(p_v, k_off + i, o_key, m_i, i_kv, DV, 0, DVP, True, BULK)
    b_dp = tl.dot(b_do, tl.trans(b_v), input_precision=IP)
    b_p = tl.exp2(b_s * scale2 - b_lse[:, None])
    if MASKED:
        b_end = k_start + o_i * STRIDE + LEN - 1
        b_see = m_i[None, :] & (b_end[None, :] <= b_t[:, None])
        if WIN > 0:
            b_see &= b_end[None, :] > b_t[:, None] - WIN
        b_p = tl.where(b_see, b_p, 0.0)
    b_ds = (b_p * (b_dp - b_dg[:, None])).to(b_k0.dtype)
    b_dq0 = tl.dot(b_ds, b_k0, b_dq0, input_precision=IP)
    if D1 > 0:
        b_dq1 = tl.dot(b_ds, b_k1, b_dq1, input_precision=IP)
    return b_dq0, b_dq1


@triton.jit
def range_dq_kernel(
    p_q, p_k, p_k1, p_v, p_do, p_lse, p_dg, p_dq, p_meta, p_tiles, num_tiles, scale, scale2,
    H: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, BQ: tl.constexpr, BN: tl.constexpr,
    DQ: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr,
    KIND: tl.constexpr, LEN: tl.constexpr, STRIDE: tl.constexpr, WIN: tl.constexpr, IP: tl.constexpr,
    ADD: tl.constexpr, BULK: tl.constexpr,
):  # fmt: skip
    i_kv = tl.program_id(0) // num_tiles
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
    b_do = load_tile(p_do, o_row, m_q, DV, 0, DVP, True)
    b_lse = tl.load(p_lse + o_row, mask=m_q, other=float("inf"))
    b_dg = tl.load(p_dg + o_row, mask=m_q, other=0.0)
    t_first = q_start + i_q
    t_last = q_start + tl.minimum(i_q + BQ, q_len) - 1
    i_hi = tl.minimum(num_visible(t_last, k_start, LEN, STRIDE), k_len)
    i_lo = 0
    if WIN > 0:
        i_lo = tl.maximum(t_first - WIN + 1 - k_start, 0) // BN * BN
    b_dq0 = tl.zeros([BQ * GP, D0], tl.float32)
    b_dq1 = tl.zeros([BQ * GP, D1 if D1 > 0 else 1], tl.float32)
    i_mask = i_lo
    if WIN == 0:
        i_mask = tl.minimum(num_visible(t_first, k_start, LEN, STRIDE), k_len) // BN * BN
        for i in range(0, i_mask, BN):
            b_dq0, b_dq1 = _dq_step(
                b_dq0, b_dq1, b_q0, b_q1, b_do, b_lse, b_dg, b_t, p_k, p_k1, p_v, k_off, k_len, k_start, i,
                i_kv,
                scale2, H, DQ, D0, D1, DV, DVP, BN, LEN, STRIDE, WIN, IP, BULK, False,
            )  # fmt: skip
    for i in range(i_mask, i_hi, BN):
        b_dq0, b_dq1 = _dq_step(
            b_dq0, b_dq1, b_q0, b_q1, b_do, b_lse, b_dg, b_t, p_k, p_k1, p_v, k_off, k_len, k_start, i, i_kv,
            scale2, H, DQ, D0, D1, DV, DVP, BN, LEN, STRIDE, WIN, IP, BULK, True,
        )  # fmt: skip
    add_tile(p_dq, o_row, m_q, b_dq0 * scale, DQ, 0, D0, ADD)
    if D1 > 0:
        add_tile(p_dq, o_row, m_q, b_dq1 * scale, DQ, D0, D1, ADD)


@triton.jit
def _dkdv_step(
    b_dk0, b_dk1, b_dv, b_k0, b_k1, b_v, b_end, m_i, p_q, p_do, p_lse, p_dg, q_off, q_hi, q_start, i, i_kv,
    scale2,
    H: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, BQ: tl.constexpr, DQ: tl.constexpr, D0: tl.constexpr,
    D1: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, WIN: tl.constexpr, IP: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Keys are rows here. A query beyond q_hi reads +inf as its log-sum-exp, so its probabilities are 0."""
    o_m = tl.arange(0, BQ * GP)
    o_q = i + o_m // GP
    m_q = (o_q < q_hi) & (o_m % GP < G)
    o_row = (q_off + o_q) * (H * G) + i_kv * G + o_m % GP
    b_q0 = load_tile(p_q, o_row, m_q, DQ, 0, D0, True)
    b_s = tl.dot(b_k0, tl.trans(b_q0), input_precision=IP)
    if D1 > 0:
        b_q1 = load_tile(p_q, o_row, m_q, DQ, D0, D1, True)
        b_s = tl.dot(b_k1, tl.trans(b_q1), b_s, input_precision=IP)
    b_do = load_tile(p_do, o_row, m_q, DV, 0, DVP, True)
    b_lse = tl.load(p_lse + o_row, mask=m_q, other=float("inf"))
    b_dg = tl.load(p_dg + o_row, mask=m_q, other=0.0)
    b_dp = tl.dot(b_v, tl.trans(b_do), input_precision=IP)
    b_p = tl.exp2(b_s * scale2 - b_lse[None, :])
    if MASKED:
        b_t = q_start + o_q
        b_see = m_i[:, None] & (b_end[:, None] <= b_t[None, :])
        if WIN > 0:
            b_see &= b_end[:, None] > b_t[None, :] - WIN
        b_p = tl.where(b_see, b_p, 0.0)
    b_dv = tl.dot(b_p.to(b_do.dtype), b_do, b_dv, input_precision=IP)
    b_ds = (b_p * (b_dp - b_dg[None, :])).to(b_q0.dtype)
    b_dk0 = tl.dot(b_ds, b_q0, b_dk0, input_precision=IP)
    if D1 > 0:
        b_dk1 = tl.dot(b_ds, b_q1, b_dk1, input_precision=IP)
    return b_dk0, b_dk1, b_dv


@triton.jit
def range_dkdv_kernel(
    p_q, p_k, p_v, p_do, p_lse, p_dg, p_dk, p_dv, p_meta, p_tiles, num_tiles, num_splits, num_keys, split,
    scale, scale2,
    H: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, BQ: tl.constexpr, BN: tl.constexpr,
    DQ: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr,
    KIND: tl.constexpr, LEN: tl.constexpr, STRIDE: tl.constexpr, WIN: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    i_kv = tl.program_id(0) // (num_tiles * num_splits)
    i_tile = tl.program_id(0) // num_splits % num_tiles
    i_split = tl.program_id(0) % num_splits
    i_seq = tl.load(p_tiles + i_tile * 2)
    if i_seq < 0:
        return
    i_k = tl.load(p_tiles + i_tile * 2 + 1) * BN
    p_row = p_meta + i_seq * 12
    q_off = tl.load(p_row)
    q_len = tl.load(p_row + 1).to(tl.int32)
    q_start = tl.load(p_row + 2).to(tl.int32)
    k_off = tl.load(p_row + KIND)
    k_len = tl.load(p_row + KIND + 1).to(tl.int32)
    k_start = tl.load(p_row + KIND + 2).to(tl.int32)
    o_i = i_k + tl.arange(0, BN)
    m_i = o_i < k_len
    o_key = (k_off + o_i) * H + i_kv
    b_end = k_start + o_i * STRIDE + LEN - 1
    b_k0 = load_tile(p_k, o_key, m_i, DQ, 0, D0, True)
    b_dk0 = tl.zeros([BN, D0], tl.float32)
    b_dk1 = tl.zeros([BN, D1 if D1 > 0 else 1], tl.float32)
    b_k1 = b_k0
    if D1 > 0:
        b_k1 = load_tile(p_k, o_key, m_i, DQ, D0, D1, True)
    b_v = load_tile(p_v, o_key, m_i, DV, 0, DVP, True)
    b_dv = tl.zeros([BN, DVP], tl.float32)
    q_lo = tl.maximum(k_start + i_k * STRIDE + LEN - 1 - q_start, i_split * split)
    q_lo = tl.maximum(q_lo, 0) // BQ * BQ
    q_hi = tl.minimum(q_len, (i_split + 1) * split)
    if WIN > 0:
        q_hi = tl.minimum(q_hi, k_start + i_k + BN - 1 + WIN - q_start)
    # Keys of a window: programs that run at the same time begin at the same query, so its rows are read from memory
    # once for all of them, and take the queries before it last.
    q_turn = q_lo
    q_mask = q_hi
    if WIN > 0:
        TURN: tl.constexpr = (WIN + BN + BQ - 1) // BQ * BQ
        q_turn = tl.minimum((q_lo + TURN - 1) // TURN * TURN, q_hi)
    else:
        # From here on every query sees the whole key tile.
        q_mask = tl.maximum(k_start + (i_k + BN - 1) * STRIDE + LEN - 1 - q_start, 0)
        q_mask = tl.minimum(tl.maximum((q_mask + BQ - 1) // BQ * BQ, q_lo), q_hi)
    for i in range(q_turn, q_mask, BQ):
        b_dk0, b_dk1, b_dv = _dkdv_step(
            b_dk0, b_dk1, b_dv, b_k0, b_k1, b_v, b_end, m_i, p_q, p_do, p_lse, p_dg, q_off, q_hi, q_start,
            i, i_kv,
            scale2, H, G, GP, BQ, DQ, D0, D1, DV, DVP, WIN, IP, True,
        )  # fmt: skip
    for i in range(q_lo if WIN > 0 else (q_mask + BQ - 1) // BQ * BQ, q_turn if WIN > 0 else q_hi, BQ):
        b_dk0, b_dk1, b_dv = _dkdv_step(
            b_dk0, b_dk1, b_dv, b_k0, b_k1, b_v, b_end, m_i, p_q, p_do, p_lse, p_dg, q_off, q_hi, q_start,
            i, i_kv,
            scale2, H, G, GP, BQ, DQ, D0, D1, DV, DVP, WIN, IP, WIN > 0,
        )  # fmt: skip
    o_out = (i_split.to(tl.int64) * num_keys + k_off + o_i) * H + i_kv
    store_tile(p_dk, o_out, m_i, b_dk0 * scale, DQ, 0, D0)
    if D1 > 0:
        store_tile(p_dk, o_out, m_i, b_dk1 * scale, DQ, D0, D1)
    store_tile(p_dv, o_out, m_i, b_dv, DV, 0, DVP)


def _constants(
    q: Tensor, k: Tensor, v: Tensor, *, kind: int, block: int, stride: int, window: int
) -> dict[str, Any]:
    """Compile-time constants common to both tiled kernels."""
    d0, d1 = split_width(q.shape[-1])
    return {
        "H": k.shape[1], "G": q.shape[1] // k.shape[1], "DQ": q.shape[-1], "D0": d0, "D1": d1, "DV": v.shape[-1],
        "DVP": max(16, next_power_of_2(v.shape[-1])), "KIND": kind, "LEN": block, "STRIDE": stride, "WIN": window,
        "IP": precision(q.dtype),
    }  # fmt: skip


def _query_gradient(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, row_lse: Tensor, row_dg: Tensor, dq: Tensor, geometry: Geometry, *,
    scale: float, add: bool, forced: tuple[Forced, Tensor, Tensor] | None, **keys: int,
) -> None:  # fmt: skip
    """Write dq, or add it; arguments as in `range_backward`, kind, block, stride and window as `keys`."""
    bulk = in_bulk(k, v)
    if bulk and fits_pipeline(q, k, v):
        range_pipelined_dq(
            q, k, v, do, row_lse, row_dg, dq, geometry, scale=scale, scale2=scale * LOG2E, add=add, forced=forced, **keys
        )  # fmt: skip
        return
    assert forced is None
    name = "window_dq" if keys["kind"] == WINDOW else "range_dq"
    launch = launch_for(name, max(q.shape[-1], v.shape[-1]), q.element_size())
    tokens, padded = tokens_per_tile(launch["rows"], q.shape[1] // k.shape[1])
    tiles = geometry.tiles(QUERY, tokens)
    launch_kernel(
        range_dq_kernel, (tiles.shape[0] * k.shape[1],),
        q, *key_sources(k, v, launch["keys"], bulk=bulk), do, row_lse, row_dg, dq, geometry.meta, tiles, tiles.shape[0],
        scale, scale * LOG2E, GP=padded, BQ=tokens, BN=launch["keys"], ADD=add, BULK=bulk, **_constants(q, k, v, **keys),
        num_warps=launch["num_warps"], num_stages=launch["num_stages"],
    )  # fmt: skip


def _key_gradients(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, row_lse: Tensor, row_dg: Tensor, geometry: Geometry, *, scale: float,
    **keys: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dk and dv; arguments as in `range_backward`, kind, block, stride and window as `keys`."""
    num_kv = k.shape[1]
    is_pipelined = in_bulk(k, v) and can_copy(do) and fits_pipeline(q, k, v)
    name = "window" if keys["kind"] == WINDOW else "range"
    name += "_pipelined_dkdv" if is_pipelined else "_dkdv"
    launch = launch_for(name, max(q.shape[-1], v.shape[-1]), q.element_size())
    tokens, padded = tokens_per_tile(ROWS if is_pipelined else launch["rows"], q.shape[1] // num_kv)
    tiles = geometry.tiles(keys["kind"], launch["keys"])
    longest = min(geometry.totals[QUERY], geometry.max_keys)
    num_splits = max(1, launch["programs"] // (tiles.shape[0] * num_kv))
    # A whole number of query tiles, or neighbouring splits would share one.
    split = -(-max(-(-longest // num_splits), launch["split"]) // tokens) * tokens
    num_splits = max(1, -(-longest // split))
    dtype = k.dtype if num_splits == 1 else torch.float32
    dk, dv = (torch.empty(num_splits, *x.shape, dtype=dtype, device=x.device) for x in (k, v))
    if is_pipelined:
        range_pipelined_dkdv(
            q, k, v, do, row_lse, row_dg, dk, dv, tiles, geometry.meta, launch, split=split, scale=scale,
            scale2=scale * LOG2E, **keys,
        )  # fmt: skip
    else:
        launch_kernel(
            range_dkdv_kernel, (tiles.shape[0] * num_splits * num_kv,),
            q, k, v, do, row_lse, row_dg, dk, dv, geometry.meta, tiles, tiles.shape[0], num_splits, k.shape[0], split,
            scale, scale * LOG2E, GP=padded, BQ=tokens, BN=launch["keys"], **_constants(q, k, v, **keys),
            num_warps=launch["num_warps"], num_stages=launch["num_stages"],
        )  # fmt: skip
    if num_splits == 1:
        return dk[0], dv[0]
    return sum_parts(dk, k.dtype), sum_parts(dv, v.dtype)


def range_backward(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, row_lse: Tensor, row_dg: Tensor, dq: Tensor,
    geometry: Geometry, *,
    kind: int, block: int, stride: int, window: int, scale: float, add: bool,
    forced: tuple[Forced, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of `range_forward` times its gate.

    Args:
        do: gradient of the gated sum, [T, HQ, Dv].
        row_lse: fp32 [T, HQ], base-2 log-sum-exp minus log2 of the gate, +inf where nothing is visible.
        row_dg: fp32 [T, HQ], do . out of this branch, which is the gradient of its gate.
        dq: [T, HQ, D], written, or added to if `add`.
        forced: blocks whose part of dq is to be added too (only where `fits_pipeline`), and row_lse and row_dg of the
            selected branch.

    Returns:
        dk and dv in the dtype of k.
    """
    rest = (q, k, v, do, row_lse, row_dg)
    keys: dict[str, Any] = {"kind": kind, "block": block, "stride": stride, "window": window}
    _query_gradient(*rest, dq, geometry, scale=scale, add=add, forced=forced, **keys)
    if k.shape[0] == 0:
        return torch.zeros_like(k), torch.zeros_like(v)
    return _key_gradients(*rest, geometry, scale=scale, **keys)
