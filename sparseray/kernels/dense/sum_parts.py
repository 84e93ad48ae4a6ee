"""The sum of partial results that programs left one under the other, in an order that depends on their number alone.

The last stage of gradients of weights: one launch adds them up in fp32 and writes the weights' dtype.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparseray.kernels.launch import launch_kernel

TILE, PROGRAMS = 4096, 264
"""Values that a program holds at a time; programs that there should be (two a multiprocessor of 132)."""


@triton.jit
def _sum_parts_kernel(p_parts, p_out, P, N, BP: tl.constexpr, BN: tl.constexpr):
    o_n = tl.program_id(0) * BN + tl.arange(0, BN)
    m_n = (o_n < N)[None, :]
    acc = tl.zeros([BP, BN], tl.float32)
    for start in range(0, P, BP):
        o_p = start + tl.arange(0, BP)
        o = o_p[:, None].to(tl.int64) * N + o_n[None, :]
        acc += tl.load(p_parts + o, mask=(o_p < P)[:, None] & m_n, other=0.0)
    tl.store(p_out + o_n, tl.sum(acc, 0).to(p_out.dtype.element_ty), mask=o_n < N)


def sum_parts(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum over the first axis.

    Args:
        parts: fp32, contiguous; of none the sum is 0.
        dtype: of the sum.
    """
    P, out = parts.shape[0], torch.empty(parts.shape[1:], dtype=dtype, device=parts.device)
    N = out.numel()
    # All parts at once, so that what a program reads is on its way together, and few where there are few.
    most = min(512, max(128, TILE // triton.next_power_of_2(max(1, P))))
    columns = min(most, max(32, triton.next_power_of_2(N // PROGRAMS)))
    if N:
        launch_kernel(
            _sum_parts_kernel, (triton.cdiv(N, columns),), parts, out, P, N,
            BP=min(triton.next_power_of_2(max(1, P)), TILE // columns), BN=columns, num_warps=4,
        )  # fmt: skip
    return out
