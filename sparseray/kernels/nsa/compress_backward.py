"""Gradients of the compression of keys and values (compress.py), without a copy of the overlapping blocks.

Four kernels, and one that adds up parts: through the second layer and GELU, with the small gradients on the way; to the
tokens, each of which adds up the block / stride blocks that hold it in ascending order; to the first layer's matrix by
parts of the rows; and the end of it, which adds the parts in order and what the encoding of places gives. No atomics.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparseray.kernels.dense.sum_parts import sum_parts
from sparseray.kernels.launch import launch_kernel
from sparseray.kernels.nsa.tiles import load_tile, next_power_of_2, precision, split_width, store_tile

MOST_PARTS = 64
"""Of the rows, in the gradients of the second layer and of the biases."""


@triton.jit
def hidden_gradient_kernel(
    p_dy, p_pre, p_w2, p_dpre, p_parts, num_rows, span,
    O: tl.constexpr, OP: tl.constexpr, F: tl.constexpr, BF: tl.constexpr, BC: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    """dpre = (dy w2) gelu'(pre); of a part of the rows dw2 = dy^T gelu(pre) and the sums of dpre and dy, one after another."""
    o_f = tl.program_id(1) * BF + tl.arange(0, BF)
    m_f = o_f < F
    o_o = tl.arange(0, OP)
    m_o = o_o < O
    m_w = m_o[:, None] & m_f[None, :]
    b_w2 = tl.load(p_w2 + o_o[:, None] * F + o_f[None, :], mask=m_w, other=0.0)
    b_dw2 = tl.zeros([OP, BF], tl.float32)
    b_db1 = tl.zeros([BF], tl.float32)
    b_db2 = tl.zeros([OP], tl.float32)
    i_lo = tl.program_id(0) * span
    i_hi = tl.minimum(i_lo + span, num_rows)
    for j in range(i_lo, i_hi, BC):
        o_r = j + tl.arange(0, BC)
        m_r = o_r < i_hi
        b_dy = load_tile(p_dy, o_r.to(tl.int64), m_r, O, 0, OP, True)
        o_tile = o_r.to(tl.int64)[:, None] * F + o_f[None, :]
        m_tile = m_r[:, None] & m_f[None, :]
        b_x = tl.load(p_pre + o_tile, mask=m_tile, other=0.0).to(tl.float32)
        b_cdf = 0.5 * (1.0 + tl.math.erf(b_x * 0.7071067811865476))
        b_slope = b_cdf + b_x * tl.exp(-0.5 * b_x * b_x) * 0.3989422804014327
        b_dpre = (tl.dot(b_dy, b_w2, input_precision=IP) * b_slope).to(p_dpre.dtype.element_ty)
        tl.store(p_dpre + o_tile, b_dpre, mask=m_tile)
        b_hidden = (b_x * b_cdf).to(b_dy.dtype)
        b_dw2 = tl.dot(tl.trans(b_dy), b_hidden, b_dw2, input_precision=IP)
        b_db1 += tl.sum(b_dpre.to(tl.float32), 0)
        b_db2 += tl.sum(b_dy.to(tl.float32), 0)
    p_part = p_parts + tl.program_id(0).to(tl.int64) * (O * F + F + O)
    tl.store(p_part + o_o[:, None] * F + o_f[None, :], b_dw2, mask=m_w)
    tl.store(p_part + O * F + o_f, b_db1, mask=m_f)
    if tl.program_id(1) == 0:
        tl.store(p_part + O * F + F + o_o, b_db2, mask=m_o)


@triton.jit
def token_gradient_kernel(
    p_pre, p_w, p_slots, p_dx, num_rows,
    H: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, F: tl.constexpr, BF: tl.constexpr,
    BS: tl.constexpr, LEN: tl.constexpr, STRIDE: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    """dx[t, h] = sum over the blocks c that hold token t, ascending, of dpre[c, h] . w[:, t - start[c]].

    A program takes the tokens that stand at one place of their stride: they share the columns of w.
    """
    NF: tl.constexpr = (F + BF - 1) // BF
    OVER: tl.constexpr = LEN // STRIDE
    i_r = tl.program_id(1)
    o_s = tl.program_id(0) * BS + tl.arange(0, BS)
    m_s = o_s < num_rows
    p_row = p_slots + (o_s // H) * 5
    t = tl.load(p_row, mask=m_s, other=0) + i_r
    m_s &= i_r < tl.load(p_row + 1, mask=m_s, other=0)
    i_slot = tl.load(p_row + 2, mask=m_s, other=0)
    c_off = tl.load(p_row + 3, mask=m_s, other=0)
    c_len = tl.load(p_row + 4, mask=m_s, other=0)
    b_dx0 = tl.zeros([BS, D0], tl.float32)
    b_dx1 = tl.zeros([BS, D1 if D1 > 0 else 1], tl.float32)
    for k in range(0, OVER * NF):
        n = OVER - 1 - k // NF
        i_c = i_slot - n
        m_c = m_s & (i_c >= 0) & (i_c < c_len)
        o_f = (k % NF) * BF + tl.arange(0, BF)
        m_f = o_f < F
        p_tile = p_pre + ((c_off + i_c) * H + o_s % H)[:, None] * F + o_f[None, :]
        b_pre = tl.load(p_tile, mask=m_c[:, None] & m_f[None, :], other=0.0)
        o_w = o_f.to(tl.int64) * LEN + i_r + n * STRIDE
        b_dx0 = tl.dot(b_pre, load_tile(p_w, o_w, m_f, D, 0, D0, True), b_dx0, input_precision=IP)
        if D1 > 0:
            b_dx1 = tl.dot(b_pre, load_tile(p_w, o_w, m_f, D, D0, D1, True), b_dx1, input_precision=IP)
    store_tile(p_dx, t * H + o_s % H, m_s, b_dx0, D, 0, D0)
    if D1 > 0:
        store_tile(p_dx, t * H + o_s % H, m_s, b_dx1, D, D0, D1)


@triton.jit
def weight_gradient_kernel(
    p_x, p_pre, p_starts, p_dw, num_rows, span,
    H: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, F: tl.constexpr, BF: tl.constexpr,
    BC: tl.constexpr, LEN: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    """dw[f, i] = sum over a part of the rows (c, h) of dpre[c, h, f] x[start[c] + i, h]; no copy of the blocks."""
    i = tl.program_id(0)
    o_f = tl.program_id(1) * BF + tl.arange(0, BF)
    m_f = o_f < F
    i_lo = tl.program_id(2) * span
    i_hi = tl.minimum(i_lo + span, num_rows)
    b_dw0 = tl.zeros([BF, D0], tl.float32)
    b_dw1 = tl.zeros([BF, D1 if D1 > 0 else 1], tl.float32)
    for j in range(i_lo, i_hi, BC):
        o_r = j + tl.arange(0, BC)
        m_r = o_r < i_hi
        o_x = (tl.load(p_starts + o_r // H, mask=m_r, other=0) + i) * H + o_r % H
        p_tile = p_pre + o_r.to(tl.int64)[:, None] * F + o_f[None, :]
        b_pre = tl.trans(tl.load(p_tile, mask=m_r[:, None] & m_f[None, :], other=0.0))
        b_dw0 = tl.dot(b_pre, load_tile(p_x, o_x, m_r, D, 0, D0, True), b_dw0, input_precision=IP)
        if D1 > 0:
            b_dw1 = tl.dot(b_pre, load_tile(p_x, o_x, m_r, D, D0, D1, True), b_dw1, input_precision=IP)
    o_out = (tl.program_id(2).to(tl.int64) * F + o_f) * LEN + i
    store_tile(p_dw, o_out, m_f, b_dw0, D, 0, D0)
    if D1 > 0:
        store_tile(p_dw, o_out, m_f, b_dw1, D, D0, D1)


@triton.jit
def first_weights_kernel(
    p_parts, p_w, p_db1, p_pos, p_dw, p_dpos, P, N, F: tl.constexpr, BF: tl.constexpr, BN: tl.constexpr
):
    """Parts of dw [F, N] added up, and with an encoding of places dw += db1 pos and dpos = db1 w."""
    o_n = tl.program_id(0) * BN + tl.arange(0, BN)
    m_n = o_n < N
    o_f = tl.program_id(1) * BF + tl.arange(0, BF)
    o = o_f[:, None] * N + o_n[None, :]
    m = (o_f < F)[:, None] & m_n[None, :]
    b_dw = tl.zeros([BF, BN], tl.float32)
    for i in range(0, P):
        b_dw += tl.load(p_parts + i * (F * N) + o, mask=m, other=0.0)
    if p_pos is not None:
        b_pos = tl.load(p_pos + o_n, mask=m_n, other=0.0).to(tl.float32)
        b_dw += tl.load(p_db1 + o_f, mask=o_f < F, other=0.0).to(tl.float32)[:, None] * b_pos[None, :]
        if tl.program_id(1) == 0:
            b_dpos = tl.zeros([BN], tl.float32)
            for f in range(0, F, BF):
                o_g = f + tl.arange(0, BF)
                b_db1 = tl.load(p_db1 + o_g, mask=o_g < F, other=0.0).to(tl.float32)
                m_w = (o_g < F)[:, None] & m_n[None, :]
                b_w = tl.load(p_w + o_g[:, None] * N + o_n[None, :], mask=m_w, other=0.0).to(tl.float32)
                b_dpos += tl.sum(b_w * b_db1[:, None], 0)
            tl.store(p_dpos + o_n, b_dpos.to(p_dpos.dtype.element_ty), mask=m_n)
    tl.store(p_dw + o, b_dw.to(p_dw.dtype.element_ty), mask=m)


def _second_layer(dy: Tensor, pre: Tensor, w2: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the hidden layer before GELU, of w2 and of both biases."""
    (rows, hidden), width = pre.shape, w2.shape[0]
    dpre = torch.empty_like(pre)
    span = triton.cdiv(triton.cdiv(rows, MOST_PARTS), 64) * 64
    parts = torch.empty(
        triton.cdiv(rows, span), width * hidden + hidden + width, dtype=torch.float32, device=dy.device
    )
    columns, padded = min(64, max(16, next_power_of_2(hidden))), max(16, next_power_of_2(width))
    launch_kernel(
        hidden_gradient_kernel, (parts.shape[0], triton.cdiv(hidden, columns)), dy, pre, w2, dpre, parts, rows, span,
        O=width, OP=padded, F=hidden, BF=columns, BC=64, IP=precision(dy.dtype), num_warps=4 if padded <= 64 else 8,
    )  # fmt: skip
    dw2, db1, db2 = sum_parts(parts, w2.dtype).split([width * hidden, hidden, width])
    return dpre, dw2.view(w2.shape), db1, db2


def compress_backward(
    dy: Tensor, x: Tensor, w1: Tensor, w2: Tensor, pos: Tensor | None, pre: Tensor, tables: tuple[Tensor, ...], *,
    block: int, stride: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Gradients of x, w1, b1, w2, b2 and pos.

    Args:
        dy: [C * H, D_out], contiguous; x, w1, w2 and pos as in `compress`, packed and contiguous.
        pre: [C * H, F], the hidden layer before GELU.
        tables: first tokens of the blocks, and the slots (`compress.block_tables`).
        block, stride: in tokens.
    """
    (starts, slots), (heads, width), (rows, hidden) = tables, x.shape[1:], pre.shape
    dx, dw1 = torch.empty_like(x), torch.empty_like(w1)
    dpos = None if pos is None else torch.empty_like(pos)
    if rows == 0:
        db1, dw2, db2 = (torch.zeros_like(t) for t in (w1[:, 0], w2, w2[:, 0]))
        return dx.zero_(), dw1.zero_(), db1, dw2, db2, None if dpos is None else dpos.zero_()
    dpre, dw2, db1, db2 = _second_layer(dy, pre, w2)
    d0, d1 = split_width(width)
    columns = min(64, max(16, next_power_of_2(hidden)))
    shared: dict[str, Any] = {
        "H": heads,
        "D": width,
        "D0": d0,
        "D1": d1,
        "F": hidden,
        "BF": columns,
        "LEN": block,
    }
    shared |= {"IP": precision(x.dtype), "num_warps": 4, "num_stages": 3}
    strided = slots.shape[0] * heads
    launch_kernel(
        token_gradient_kernel, (triton.cdiv(strided, 64), stride), dpre, w1, slots, dx, strided,
        BS=64, STRIDE=stride, **shared,
    )  # fmt: skip
    # Parts of the rows, so that short inputs fill the device too.
    span = triton.cdiv(triton.cdiv(rows, min(8, triton.cdiv(rows, 512))), 64) * 64
    parts = torch.empty(triton.cdiv(rows, span), *w1.shape, dtype=torch.float32, device=x.device)
    launch_kernel(
        weight_gradient_kernel, (block, triton.cdiv(hidden, columns), parts.shape[0]),
        x, dpre, starts, parts, rows, span, BC=64, **shared,
    )  # fmt: skip
    launch_kernel(
        first_weights_kernel, (triton.cdiv(w1.shape[1], 64), triton.cdiv(hidden, 32)),
        parts, w1, db1, None if pos is None else pos.contiguous(), dw1, dpos, parts.shape[0], w1.shape[1], F=hidden, BF=32, BN=64,
        num_warps=4,
    )  # fmt: skip
    return dx, dw1, db1, dw2, db2, dpos
