"""The keys and values of a step's rows into their pages, in one launch that a CUDA graph can hold: `paged_write`,
`rotary_write`, which takes them from the fused projection and rotates keys and queries on the way, and `latent_append`
for latent attention, which norms and rotates.
"""

import triton
import triton.language as tl
from torch import Tensor

from sparseray.kernels.launch import launch_kernel


@triton.jit
def _copy(p_rows, p_pool, i_r, place, stride, N: tl.constexpr, BN: tl.constexpr):
    o = tl.arange(0, BN)
    tl.store(p_pool + place * N + o, tl.load(p_rows + i_r * stride + o, mask=o < N, other=0.0), mask=o < N)


@triton.jit
def _write_kernel(
    p_k, p_v, p_places, p_k_pool, p_v_pool, stride_k, stride_v,
    NK: tl.constexpr, NV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """One program a row."""
    i_r = tl.program_id(0).to(tl.int64)
    place = tl.load(p_places + i_r).to(tl.int64)
    _copy(p_k, p_k_pool, i_r, place, stride_k, NK, BK)
    _copy(p_v, p_v_pool, i_r, place, stride_v, NV, BV)


@triton.jit
def _rotary_write_kernel(
    p_fused, p_cos, p_sin, p_places, p_q, p_k_pool, p_v_pool,
    Q: tl.constexpr, G: tl.constexpr, D: tl.constexpr, NV: tl.constexpr, BH: tl.constexpr, BC: tl.constexpr,
    BV: tl.constexpr,
):  # fmt: skip
    """One program a row."""
    C: tl.constexpr = D // 2
    i_r = tl.program_id(0).to(tl.int64)
    place = tl.load(p_places + i_r).to(tl.int64)
    p_fused += i_r * ((Q + G) * D + NV)
    o_h = tl.arange(0, BH)[:, None]
    o_c = tl.arange(0, BC)[None, :]
    m = (o_h < Q + G) & (o_c < C)
    o = o_h * D + o_c
    b_first = tl.load(p_fused + o, mask=m, other=0.0).to(tl.float32)  # [BH, BC]
    b_second = tl.load(p_fused + o + C, mask=m, other=0.0).to(tl.float32)
    b_cos = tl.load(p_cos + i_r * C + o_c, mask=o_c < C, other=0.0)
    b_sin = tl.load(p_sin + i_r * C + o_c, mask=o_c < C, other=0.0)
    element = p_q.dtype.element_ty
    b_low = (b_first * b_cos - b_second * b_sin).to(element)
    b_high = (b_second * b_cos + b_first * b_sin).to(element)
    p_own = p_q + i_r * (Q * D) + o
    tl.store(p_own, b_low, mask=m & (o_h < Q))
    tl.store(p_own + C, b_high, mask=m & (o_h < Q))
    p_key = p_k_pool + place * (G * D) + o - Q * D
    tl.store(p_key, b_low, mask=m & (o_h >= Q))
    tl.store(p_key + C, b_high, mask=m & (o_h >= Q))
    _copy(p_fused + (Q + G) * D, p_v_pool, 0, place, 0, NV, BV)


@triton.jit
def _append_kernel(
    p_x, p_weight, p_cos, p_sin, p_places, p_pool, stride_x, eps,
    C: tl.constexpr, P: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """One program a row."""
    i_r = tl.program_id(0).to(tl.int64)
    p_out = p_pool + tl.load(p_places + i_r).to(tl.int64) * (C + P)
    p_x += i_r * stride_x
    o_c = tl.arange(0, BC)
    b = tl.load(p_x + o_c, mask=o_c < C, other=0.0).to(tl.float32)
    b_w = tl.load(p_weight + o_c, mask=o_c < C, other=0.0).to(tl.float32)
    b = b * tl.rsqrt(tl.sum(b * b, 0) / C + eps) * b_w
    tl.store(p_out + o_c, b.to(p_pool.dtype.element_ty), mask=o_c < C)
    o_p = tl.arange(0, BP)
    m_p = o_p < P // 2
    b_first = tl.load(p_x + C + 2 * o_p, mask=m_p, other=0.0).to(tl.float32)
    b_second = tl.load(p_x + C + 2 * o_p + 1, mask=m_p, other=0.0).to(tl.float32)
    b_cos = tl.load(p_cos + i_r * (P // 2) + o_p, mask=m_p, other=0.0)
    b_sin = tl.load(p_sin + i_r * (P // 2) + o_p, mask=m_p, other=0.0)
    tl.store(p_out + C + 2 * o_p, (b_first * b_cos - b_second * b_sin).to(p_pool.dtype.element_ty), mask=m_p)
    tl.store(
        p_out + C + 2 * o_p + 1, (b_second * b_cos + b_first * b_sin).to(p_pool.dtype.element_ty), mask=m_p
    )


def latent_append(
    x_RK: Tensor, weight_C: Tensor, eps: float, cos_RP: Tensor, sin_RP: Tensor, places_R: Tensor, pool: Tensor
) -> None:
    """Write every row's normed latent and rotated key to its place.

    Args:
        x_RK: latents, then keys whose channels 2i and 2i + 1 turn together; rows may be apart.
        weight_C, eps: of the root-mean-square norm.
        cos_RP, sin_RP: fp32, contiguous, of each row's position and pair.
        places_R: as of `paged_write`.
        pool: [pages, page size, 1, K], contiguous.
    """
    width, latent = x_RK.shape[1], weight_C.shape[0]
    launch_kernel(
        _append_kernel, (x_RK.shape[0],),
        x_RK, weight_C, cos_RP, sin_RP, places_R, pool, x_RK.stride(0), eps,
        C=latent, P=width - latent, BC=triton.next_power_of_2(latent),
        BP=triton.next_power_of_2((width - latent) // 2), num_warps=4,
    )  # fmt: skip


def paged_write(k_RGD: Tensor, v_RGV: Tensor, places_R: Tensor, k_pool: Tensor, v_pool: Tensor) -> None:
    """Write every row's heads to its place.

    Args:
        k_RGD, v_RGV: a row's heads lie together; rows may be apart.
        places_R: integers, page * page size + position in the page; where rows share a place, one of them stays.
        k_pool, v_pool: [pages, page size, G, D] and [.., V], contiguous, in the dtype of the rows.
    """
    nk, nv = k_RGD[0].numel(), v_RGV[0].numel()
    if not (k_RGD[0].is_contiguous() and v_RGV[0].is_contiguous()):
        k_RGD, v_RGV = k_RGD.contiguous(), v_RGV.contiguous()
    launch_kernel(
        _write_kernel, (k_RGD.shape[0],),
        k_RGD, v_RGV, places_R, k_pool, v_pool, k_RGD.stride(0), v_RGV.stride(0),
        NK=nk, NV=nv, BK=triton.next_power_of_2(nk), BV=triton.next_power_of_2(nv), num_warps=4,
    )  # fmt: skip


def rotary_write(
    fused_RX: Tensor,
    num_queries: int,
    cos_RC: Tensor,
    sin_RC: Tensor,
    places_R: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
) -> Tensor:
    """Write every row's rotated keys and its values to its place; the rotated queries, [R, Q, D].

    Args:
        fused_RX: query heads, key heads and value heads of a row, contiguous.
        num_queries: Q.
        cos_RC, sin_RC: fp32, contiguous, of each row's position; channel i is paired with i + C, D = 2C.
        places_R, k_pool, v_pool: as of `paged_write`.
    """
    rows, (num_kv, width) = len(fused_RX), k_pool.shape[2:]
    nv = v_pool.shape[2] * v_pool.shape[3]
    q_RQD = fused_RX.new_empty(rows, num_queries, width)
    launch_kernel(
        _rotary_write_kernel, (rows,), fused_RX, cos_RC, sin_RC, places_R, q_RQD, k_pool, v_pool,
        Q=num_queries, G=num_kv, D=width, NV=nv, BH=triton.next_power_of_2(num_queries + num_kv),
        BC=triton.next_power_of_2(width // 2), BV=triton.next_power_of_2(nv), num_warps=4,
    )  # fmt: skip
    return q_RQD
