"""Grouped matrix products of the fused MoE layer (Triton): everything around them is fused into them.

Rows are sorted by expert (plan.py). The gather of tokens happens in the load of the first operand,
SwiGLU and its backward in the epilogue, and the weighted combine reads each token's K rows in slot
order, so nothing is scattered and no atomics are used. Operands that lie in order are read through
tensor descriptors (TMA) where their strides allow (`TMA`), by pointers otherwise.

Names: i_ program ids, o_ offsets, p_ pointers, d_ descriptor or pointer of an operand, m_ masks.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _tile(num_m, num_n, GROUP: tl.constexpr):
    """Order tiles so that GROUP row tiles by all column tiles run together and share the L2 cache."""
    pid = tl.program_id(0)
    per_group = GROUP * num_n
    first = (pid // per_group) * GROUP
    height = tl.minimum(num_m - first, GROUP)
    return first + (pid % per_group) % height, (pid % per_group) // height


@triton.jit
def _halves(x):
    """The left and the right half of a block's columns, so that an epilogue holds fewer registers."""
    parts = tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2))
    return tl.split(tl.permute(parts, (0, 2, 1)))


@triton.jit
def _silu_parts(g):
    sig = 1.0 / (1.0 + tl.exp(-g))
    return sig, g * sig


@triton.jit(do_not_specialize=["num_m"])
def up_kernel(
    p_x,
    p_order,
    d_w,
    p_act,
    p_pre,
    p_tile_expert,
    p_tile_row,
    p_tile_end,
    num_m,
    H: tl.constexpr,
    I: tl.constexpr,
    K: tl.constexpr,
    SAVE: tl.constexpr,
    TMA: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """act = silu(x[token] Wg^T) * (x[token] Wu^T); with SAVE also both pre-activations [R, 2I]."""
    num_n: tl.constexpr = (I + BN - 1) // BN
    i_m, i_n = _tile(num_m, num_n, GROUP)
    e = tl.load(p_tile_expert + i_m)
    if e < 0:
        return
    o_r = tl.load(p_tile_row + i_m) + tl.arange(0, BM)
    m_r = o_r < tl.load(p_tile_end + i_m)
    token = tl.load(p_order + o_r, mask=m_r, other=0) // K
    o_k = tl.arange(0, BK)
    o_n = i_n * BN + tl.arange(0, BN)
    p_a = p_x + token[:, None].to(tl.int64) * H + o_k[None, :]
    # Gate and up are one operand: two products of half the width would read shared memory more often than it answers.
    o_w = tl.arange(0, 2 * BN)
    o_w = o_w // BN * I + (i_n * BN + o_w % BN) % I
    acc = tl.zeros([BM, 2 * BN], tl.float32)
    for k in range(0, H, BK):
        if H % BK == 0:
            a = tl.load(p_a + k)  # [BM, BK]
        else:
            a = tl.load(p_a + k, mask=(o_k < H - k)[None, :], other=0.0)
        if TMA:
            w = tl.reshape(d_w.load([e * 2, i_n * BN, k]), [2 * BN, BK]).T  # [BK, 2 BN]
        else:
            p_w = d_w + e.to(tl.int64) * (2 * I * H) + o_w[None, :] * H + (k + o_k)[:, None]
            w = tl.load(p_w, mask=(o_k < H - k)[:, None], other=0.0)
        acc = tl.dot(a, w, acc, input_precision="ieee")
    acc_g, acc_u = _halves(acc)
    m = m_r[:, None] & (o_n < I)[None, :]
    element = p_act.dtype.element_ty
    if SAVE:
        p_out = p_pre + o_r[:, None].to(tl.int64) * (2 * I) + o_n[None, :]
        tl.store(p_out, acc_g.to(element), mask=m)
        tl.store(p_out + I, acc_u.to(element), mask=m)
    _sig, silu = _silu_parts(acc_g)
    tl.store(p_act + o_r[:, None].to(tl.int64) * I + o_n[None, :], (silu * acc_u).to(element), mask=m)


@triton.jit(do_not_specialize=["num_m"])
def rows_kernel(
    d_a,
    d_w,
    p_out,
    p_tile_expert,
    p_tile_row,
    p_tile_end,
    num_m,
    KDIM: tl.constexpr,
    N: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    TMA: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """out[r] = a[r] W_e^T with W_e [N, KDIM], or a[r] W_e with W_e [KDIM, N] where not TRANSPOSED."""
    num_n: tl.constexpr = (N + BN - 1) // BN
    i_m, i_n = _tile(num_m, num_n, GROUP)
    e = tl.load(p_tile_expert + i_m)
    if e < 0:
        return
    row = tl.load(p_tile_row + i_m)
    o_r = row + tl.arange(0, BM)
    m_r = o_r < tl.load(p_tile_end + i_m)
    o_k = tl.arange(0, BK)
    o_n = i_n * BN + tl.arange(0, BN)
    acc = tl.zeros([BM, BN], tl.float32)
    for k in range(0, KDIM, BK):
        m_k = o_k < KDIM - k
        if TMA:
            a = d_a.load([row, k])  # [BM, BK]
            if TRANSPOSED:
                w = d_w.load([e * N + i_n * BN, k]).T
            else:
                w = d_w.load([e * KDIM + k, i_n * BN])  # [BK, BN]; KDIM is a multiple of BK
        else:
            p_a = d_a + o_r[:, None].to(tl.int64) * KDIM + (k + o_k)[None, :]
            a = tl.load(p_a, mask=m_r[:, None] & m_k[None, :], other=0.0)
            p_w = d_w + e.to(tl.int64) * (N * KDIM)
            if TRANSPOSED:
                p_w += (o_n % N)[None, :] * KDIM + (k + o_k)[:, None]
            else:
                p_w += (k + o_k)[:, None] * N + (o_n % N)[None, :]
            w = tl.load(p_w, mask=m_k[:, None], other=0.0)
        acc = tl.dot(a, w, acc, input_precision="ieee")
    p = p_out + o_r[:, None].to(tl.int64) * N + o_n[None, :]
    tl.store(p, acc.to(p_out.dtype.element_ty), mask=m_r[:, None] & (o_n < N)[None, :])


@triton.jit
def _store_act_grad(da, weight, p_pre, p_dpre, p_weighted, o_r, m_r, o_n, I: tl.constexpr):
    """SwiGLU's backward for some columns; returns each row's sum of da * act over them."""
    m = m_r[:, None] & (o_n < I)[None, :]
    o_pre = o_r[:, None].to(tl.int64) * (2 * I) + o_n[None, :]
    g = tl.load(p_pre + o_pre, mask=m, other=0.0).to(tl.float32)
    u = tl.load(p_pre + o_pre + I, mask=m, other=0.0).to(tl.float32)
    sig, silu = _silu_parts(g)
    element = p_dpre.dtype.element_ty
    act = silu * u
    dot = tl.sum(tl.where(m, da * act, 0.0), 1)
    o_act = o_r[:, None].to(tl.int64) * I + o_n[None, :]
    tl.store(p_weighted + o_act, (act * weight[:, None]).to(element), mask=m)
    da = da * weight[:, None]
    tl.store(p_dpre + o_pre, (da * u * (sig + silu * (1.0 - sig))).to(element), mask=m)
    tl.store(p_dpre + o_pre + I, (da * silu).to(element), mask=m)
    return dot


@triton.jit
def act_grad_kernel(
    p_dy,
    p_order,
    p_weights,
    d_w,
    p_pre,
    p_dpre,
    p_weighted,
    p_partial,
    p_tile_expert,
    p_tile_row,
    p_tile_end,
    num_m,
    H: tl.constexpr,
    I: tl.constexpr,
    K: tl.constexpr,
    TMA: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Backward through the combine, the down projection and SwiGLU, with one grouped product.

    With da = dy[token] Wd: the gradients of the pre-activations, the weighted activation (for the
    gradient of Wd), and per column tile the sum of da * act (for the gradient of the routing weight).
    """
    num_n: tl.constexpr = (I + BN - 1) // BN
    i_m, i_n = _tile(num_m, num_n, GROUP)
    e = tl.load(p_tile_expert + i_m)
    if e < 0:
        return
    o_r = tl.load(p_tile_row + i_m) + tl.arange(0, BM)
    m_r = o_r < tl.load(p_tile_end + i_m)
    flat = tl.load(p_order + o_r, mask=m_r, other=0)
    o_k = tl.arange(0, BK)
    o_n = i_n * BN + tl.arange(0, BN)
    p_a = p_dy + (flat // K)[:, None].to(tl.int64) * H + o_k[None, :]
    acc = tl.zeros([BM, BN], tl.float32)
    for k in range(0, H, BK):
        if H % BK == 0:
            a = tl.load(p_a + k)  # [BM, BK]
        else:
            a = tl.load(p_a + k, mask=(o_k < H - k)[None, :], other=0.0)
        if TMA:
            w = d_w.load([e * H + k, i_n * BN])  # [BK, BN]
        else:
            p_w = d_w + e.to(tl.int64) * (H * I) + (k + o_k)[:, None] * I + (o_n % I)[None, :]
            w = tl.load(p_w, mask=(o_k < H - k)[:, None], other=0.0)
        acc = tl.dot(a, w, acc, input_precision="ieee")
    weight = tl.load(p_weights + flat, mask=m_r, other=0.0)
    left, right = _halves(acc)
    dot = tl.zeros([BM], tl.float32)
    for half in tl.static_range(2):
        first, second = _halves(left if half == 0 else right)
        o_n = i_n * BN + half * (BN // 2) + tl.arange(0, BN // 4)
        dot += _store_act_grad(first, weight, p_pre, p_dpre, p_weighted, o_r, m_r, o_n, I)
        dot += _store_act_grad(second, weight, p_pre, p_dpre, p_weighted, o_r, m_r, o_n + BN // 4, I)
    tl.store(p_partial + o_r.to(tl.int64) * num_n + i_n, dot, mask=m_r)


@triton.jit
def _add_columns(p, acc, o_m, first, M: tl.constexpr, N: tl.constexpr, SM: tl.constexpr, SN: tl.constexpr):
    o_n = first + tl.arange(0, acc.shape[1])
    p += o_m[:, None] * SM + o_n[None, :] * SN
    m = (o_m < M)[:, None] & (o_n < N)[None, :]
    tl.store(p, tl.load(p, mask=m, other=0.0) + acc, mask=m)


@triton.jit
def _store_grad(
    p, acc, o_m, first, M: tl.constexpr, N: tl.constexpr, SM: tl.constexpr, SN: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):  # fmt: skip
    """Rows o_m and columns from `first` on of a matrix [M, N] of these strides; adding goes by columns, to hold fewer
    registers."""
    if ACCUMULATE:
        left, right = _halves(acc)
        for half in tl.static_range(2):
            one, two = _halves(left if half == 0 else right)
            o_half = first + half * (acc.shape[1] // 2)
            _add_columns(p, one, o_m, o_half, M, N, SM, SN)
            _add_columns(p, two, o_m, o_half + acc.shape[1] // 4, M, N, SM, SN)
    else:
        o_n = first + tl.arange(0, acc.shape[1])
        m = (o_m < M)[:, None] & (o_n < N)[None, :]
        tl.store(p + o_m[:, None] * SM + o_n[None, :] * SN, acc.to(p.dtype.element_ty), mask=m)


@triton.jit
def weight_grad_kernel(
    d_rows,
    p_tokens,
    p_order,
    p_offsets,
    p_counts,
    p_out,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    K: tl.constexpr,
    ROWS_FIRST: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    TMA: tl.constexpr,
    BR: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Weight gradient of one expert: the sum over its rows of rows[r] (x) tokens[token(r)].

    `rows` [R, ROWS] lies sorted by expert, `tokens` [T, TOKENS] is gathered. The result is
    [ROWS, TOKENS] where ROWS_FIRST, else [TOKENS, ROWS]; zeros for an expert without rows. With ACCUMULATE
    it is added to what is there. The wider side of the tile is the product's second operand. Up to BK rows behind an
    expert's last one are read with TMA and multiplied by zeros: they must be numbers, or behind the last of R.
    """
    num_r: tl.constexpr = (ROWS + BR - 1) // BR
    num_t: tl.constexpr = (TOKENS + BT - 1) // BT
    i_r, i_t = _tile(num_r, num_t, GROUP)
    e = tl.program_id(1)
    first = tl.load(p_offsets + e)
    count = tl.load(p_counts + e)
    if ACCUMULATE:  # noqa: SIM102  (the compiler decides the outer one)
        if count == 0:
            return
    o_k = tl.arange(0, BK)
    o_r = i_r * BR + tl.arange(0, BR)
    o_t = i_t * BT + tl.arange(0, BT)
    if BR <= BT:
        acc = tl.zeros([BR, BT], tl.float32)
    else:
        acc = tl.zeros([BT, BR], tl.float32)
    # A step's tokens are read one step early: the loads that they address are then pipelined as if they were known.
    flat = tl.load(p_order + first + o_k, mask=o_k < count, other=0)
    for k in range(0, count, BK):
        m_k = o_k < count - k
        p_b = p_tokens + (flat // K)[:, None].to(tl.int64) * TOKENS + (o_t % TOKENS)[None, :]
        b = tl.load(p_b, mask=m_k[:, None], other=0.0)  # [BK, BT]
        flat = tl.load(p_order + first + k + BK + o_k, mask=o_k < count - k - BK, other=0)
        if TMA:
            a = d_rows.load([first + k, i_r * BR])  # [BK, BR]
        else:
            p_a = d_rows + (first + k + o_k)[:, None].to(tl.int64) * ROWS + (o_r % ROWS)[None, :]
            a = tl.load(p_a, mask=m_k[:, None], other=0.0)
        if BR <= BT:
            acc = tl.dot(a.T, b, acc, input_precision="ieee")
        else:
            acc = tl.dot(b.T, a, acc, input_precision="ieee")
    p = p_out + e.to(tl.int64) * (ROWS * TOKENS)
    SR: tl.constexpr = TOKENS if ROWS_FIRST else 1
    ST: tl.constexpr = 1 if ROWS_FIRST else ROWS
    if BR <= BT:
        _store_grad(p, acc, o_r, i_t * BT, ROWS, TOKENS, SR, ST, ACCUMULATE)
    else:
        _store_grad(p, acc, o_t, i_r * BR, TOKENS, ROWS, ST, SR, ACCUMULATE)


@triton.jit
def clear_kernel(p_rows, p_first, R, N: tl.constexpr, BN: tl.constexpr):
    """Zeros in as many rows as there are programs, from row `first` on, and in none behind the last of R."""
    row = tl.load(p_first) + tl.program_id(0)
    if row < R:
        for start in range(0, N, BN):
            o_n = start + tl.arange(0, BN)
            zeros = tl.zeros([BN], p_rows.dtype.element_ty)
            tl.store(p_rows + row.to(tl.int64) * N + o_n, zeros, mask=o_n < N)


@triton.jit
def combine_kernel(
    p_rows,
    p_inverse,
    p_weights,
    p_out,
    H: tl.constexpr,
    K: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BH: tl.constexpr,
):
    """out[t] = sum over k, in order, of (weight[t, k] *) rows[inverse[t, k]], in fp32."""
    i_t = tl.program_id(0)
    o_h = tl.program_id(1) * BH + tl.arange(0, BH)
    m_h = o_h < H
    acc = tl.zeros([BH], tl.float32)
    for k in tl.static_range(K):
        row = tl.load(p_inverse + i_t * K + k)
        x = tl.load(p_rows + row.to(tl.int64) * H + o_h, mask=m_h, other=0.0).to(tl.float32)
        if WEIGHTED:
            x = x * tl.load(p_weights + i_t * K + k)
        acc += x
    tl.store(p_out + i_t.to(tl.int64) * H + o_h, acc.to(p_out.dtype.element_ty), mask=m_h)
