"""`paged_write`: the keys and values of a step's rows into their pages, in one launch that a CUDA graph can hold."""

import triton
import triton.language as tl
from torch import Tensor

from sparseray.kernels.launch import launch_kernel


@triton.jit
def _write_kernel(
    p_k, p_v, p_places, p_k_pool, p_v_pool, stride_k, stride_v,
    NK: tl.constexpr, NV: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """One program a row."""
    i_r = tl.program_id(0).to(tl.int64)
    place = tl.load(p_places + i_r).to(tl.int64)
    o_k = tl.arange(0, BK)
    b_k = tl.load(p_k + i_r * stride_k + o_k, mask=o_k < NK, other=0.0)
    tl.store(p_k_pool + place * NK + o_k, b_k, mask=o_k < NK)
    o_v = tl.arange(0, BV)
    b_v = tl.load(p_v + i_r * stride_v + o_v, mask=o_v < NV, other=0.0)
    tl.store(p_v_pool + place * NV + o_v, b_v, mask=o_v < NV)


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
