"""Squared norm of many tensors, summed in an order that depends on their sizes alone, and the scale that clips by it.

Each program adds up one piece of a tensor; the last launch adds the pieces in order, in fp64.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparseray.kernels.launch import launch_kernel

PIECE, TILE = 1 << 16, 8192


@triton.jit
def _pieces_kernel(p_x, p_sums, n, PIECE: tl.constexpr, TILE: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * PIECE
    acc = tl.zeros([TILE], tl.float32)
    for start in range(0, PIECE, TILE):
        o = first + start + tl.arange(0, TILE)
        b = tl.load(p_x + o, mask=o < n, other=0.0).to(tl.float32)
        acc += b * b
    tl.store(p_sums + tl.program_id(0), tl.sum(acc, 0))


@triton.jit
def _total_kernel(p_sums, p_total, n, TILE: tl.constexpr):
    acc = tl.zeros([TILE], tl.float64)
    for start in range(0, n, TILE):
        o = start + tl.arange(0, TILE)
        acc += tl.load(p_sums + o, mask=o < n, other=0.0).to(tl.float64)
    tl.store(p_total, tl.sum(acc, 0).to(tl.float32))


@torch.no_grad()
def squared_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Sum of all elements' squares: fp32 scalar on the device, the same bits in every run.

    Args:
        tensors: at least one, contiguous, of one device; bf16, fp16 or fp32.
    """
    counts = [triton.cdiv(x.numel(), PIECE) for x in tensors]
    sums = torch.empty(sum(counts), dtype=torch.float32, device=tensors[0].device)
    total = torch.empty((), dtype=torch.float32, device=sums.device)
    for x, part in zip(tensors, sums.split(counts)):
        if not x.is_contiguous():
            raise ValueError(f"squared_norm: {tuple(x.shape)} with strides {x.stride()} is not contiguous")
        if x.numel():
            launch_kernel(
                _pieces_kernel, (part.numel(),), x, part, x.numel(), PIECE=PIECE, TILE=TILE, num_warps=4
            )
    launch_kernel(_total_kernel, (1,), sums, total, sums.numel(), TILE=TILE, num_warps=8)
    return total


def clip_scale(squared: Tensor, max_norm: float) -> Tensor:
    """What gradients are multiplied with so that their norm is at most max_norm, as torch's clip_grad_norm_.

    Args:
        squared: fp32 scalar of `squared_norm`, or a sum of several.
        max_norm: above 0.
    """
    return (max_norm / (squared.sqrt() + 1e-6)).clamp(max=1.0)
