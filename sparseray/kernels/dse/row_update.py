"""Row-wise Adam and squared norms of a step's rows, staged on the GPU (Triton); oracles: `PlainRowOps`.

The update is that of `cpu.rowwise_adam_`: fp32 but for the bias corrections (fp64), and bfloat16 rows are rounded
stochastically by the same hash of (seed, row, updates, column). One order of every sum, so the same bits in every run;
a mean square adds up in another order than on a CPU.

Shapes: U rows, D row width, B ranges.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparseray.kernels.launch import launch_kernel

TILE = 4096
BLOCK = 1024
"""Numbers of the rows that a program updates."""
GOLDEN = tl.constexpr(0x9E3779B97F4A7C15)


@triton.jit
def _range_norms_kernel(p_x, p_first, p_norms, D: tl.constexpr, TILE: tl.constexpr):
    i = tl.program_id(0)
    first, last = tl.load(p_first + i) * D, tl.load(p_first + i + 1) * D
    acc = tl.zeros([TILE], tl.float32)
    for start in range(first, last, TILE):
        o = start + tl.arange(0, TILE)
        b = tl.load(p_x + o, mask=o < last, other=0.0)
        acc += b * b
    tl.store(p_norms + i, tl.sum(acc, 0))


def range_norms(x_UD: Tensor, first_B1: Tensor) -> Tensor:
    """Sums of the squares of consecutive ranges of rows, fp32 [B].

    Args:
        x_UD: fp32, contiguous.
        first_B1: int64, each range's first row, and the row after the last one's.
    """
    norms_B = torch.empty(first_B1.numel() - 1, dtype=torch.float32, device=x_UD.device)
    launch_kernel(
        _range_norms_kernel,
        (norms_B.numel(),),
        x_UD,
        first_B1,
        norms_B,
        D=x_UD.shape[1],
        TILE=TILE,
        num_warps=8,
    )
    return norms_B


@triton.jit
def _mixed(x):
    """The output function of SplitMix64, on uint64."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def _times(x, y):
    return tl.mul(x, y, sanitize_overflow=False)


@triton.jit
def _plus(x, y):
    return tl.add(x, y, sanitize_overflow=False)


@triton.jit
def _rounded(b_w, key, o_d):
    """The bits of fp32 numbers as bfloat16, int16: up with the probability of the part that is cut off."""
    low, high = key.to(tl.uint32), (key >> 32).to(tl.uint32)
    x = _plus(low, _times(o_d.to(tl.uint32), 0x9E3779B9))
    x = _times(x ^ (x >> 16), 0x21F0AAAD) ^ high
    x = _times(x ^ (x >> 15), 0x735A2D97)
    x = x ^ (x >> 15)
    bits = b_w.to(tl.uint32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    noise = tl.where(magnitude < 0x7F800000, x >> 16, 0)
    not_a_number = tl.where(magnitude > 0x7F800000, 0x40, 0)
    return ((_plus(bits, noise) >> 16) | not_a_number).to(tl.uint16).to(tl.int16, bitcast=True)


@triton.jit(do_not_specialize=["U"])
def _adam_kernel(
    p_w, p_m, p_v, p_t, p_ids, p_sums, U, scale, lr, keep1, new1, keep2, new2, eps, seed,
    LOG1: tl.constexpr, LOG2: tl.constexpr,
    D: tl.constexpr, BU: tl.constexpr, BD: tl.constexpr, ROUNDED: tl.constexpr,
):  # fmt: skip
    o_u = tl.program_id(0) * BU + tl.arange(0, BU)
    o_d = tl.arange(0, BD)
    m_u = o_u < U
    m = m_u[:, None] & (o_d < D)[None, :]
    o = o_u.to(tl.int64)[:, None] * D + o_d[None, :]
    b_g = tl.load(p_sums + o, mask=m, other=0.0) * scale
    second = keep2 * tl.load(p_v + o_u, mask=m_u, other=0.0) + new2 * (tl.sum(b_g * b_g, 1) / D)
    tl.store(p_v + o_u, second, mask=m_u)
    count = tl.load(p_t + o_u, mask=m_u, other=0) + 1
    tl.store(p_t + o_u, count, mask=m_u)
    root = tl.sqrt(second.to(tl.float64) / (1.0 - tl.exp2(count.to(tl.float64) * LOG2))) + eps
    rate = (lr / (1.0 - tl.exp2(count.to(tl.float64) * LOG1)) / root).to(tl.float32)
    b_m = keep1 * tl.load(p_m + o, mask=m, other=0.0) + new1 * b_g
    tl.store(p_m + o, b_m, mask=m)
    b_w = tl.load(p_w + o, mask=m, other=0)
    if ROUNDED:
        # int16: the upper half of an fp32 number.
        b_w = (b_w.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    b_w -= rate[:, None] * b_m
    if ROUNDED:
        key = _mixed(tl.load(p_ids + o_u, mask=m_u, other=0).to(tl.uint64) * GOLDEN + seed)
        key = _mixed(count.to(tl.uint64) * GOLDEN + key)
        tl.store(p_w + o, _rounded(b_w, key[:, None], o_d[None, :]), mask=m)
    else:
        tl.store(p_w + o, b_w, mask=m)


@torch.no_grad()
def row_adam(
    weight_UD: Tensor,
    m_UD: Tensor,
    v_U: Tensor,
    t_U: Tensor,
    ids_U: Tensor,
    sums_UD: Tensor,
    *,
    scale: float,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    seed: int,
) -> None:
    """`RowOps.row_adam` of contiguous tensors, in one launch; nothing is copied to the host."""
    U, D = weight_UD.shape
    is_rounded, width = weight_UD.dtype == torch.bfloat16, triton.next_power_of_2(D)
    rows = max(1, BLOCK // width)
    launch_kernel(
        _adam_kernel,
        (triton.cdiv(U, rows),),
        weight_UD.view(torch.int16) if is_rounded else weight_UD,
        m_UD,
        v_U,
        t_U,
        ids_U,
        sums_UD,
        U,
        float(scale),
        float(lr),
        float(betas[0]),
        1.0 - betas[0],
        float(betas[1]),
        1.0 - betas[1],
        float(eps),
        seed,
        LOG1=math.log2(betas[0]) if betas[0] else -math.inf,
        LOG2=math.log2(betas[1]) if betas[1] else -math.inf,
        D=D,
        BU=rows,
        BD=width,
        ROUNDED=is_rounded,
        num_warps=4,
    )
