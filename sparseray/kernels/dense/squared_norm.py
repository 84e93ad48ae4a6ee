"""Squared norms of many tensors, summed in an order that depends on their sizes alone, and the scale that clips by one.

Each program adds up one piece of a row; the last launch adds each sum's pieces in order, in fp64. Many small tensors are
one piece each, by torch's norm of a list, which takes a few launches for all of them.
Oracle: `reference.squared_norms_reference`.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparseray.kernels.launch import launch_kernel

PIECE, TILE, SMALL = 1 << 16, 8192, 1 << 22
"""Values of a piece, of a step in it, and of a tensor that is one piece."""


@triton.jit
def _pieces_kernel(p_x, p_sums, n, pieces, PIECE: tl.constexpr, TILE: tl.constexpr):
    """One piece of one of the rows, which have n elements each."""
    row = (tl.program_id(0) // pieces).to(tl.int64)
    first = (tl.program_id(0) % pieces).to(tl.int64) * PIECE
    acc = tl.zeros([TILE], tl.float32)
    for start in range(0, PIECE, TILE):
        o = first + start + tl.arange(0, TILE)
        b = tl.load(p_x + row * n + o, mask=o < n, other=0.0).to(tl.float32)
        acc += b * b
    tl.store(p_sums + tl.program_id(0), tl.sum(acc, 0))


@triton.jit
def _totals_kernel(p_sums, p_first, p_totals, TILE: tl.constexpr):
    """The sum of the pieces [first[i], first[i + 1])."""
    i = tl.program_id(0)
    last = tl.load(p_first + i + 1)
    acc = tl.zeros([TILE], tl.float64)
    for start in range(tl.load(p_first + i), last, TILE):
        o = start + tl.arange(0, TILE)
        acc += tl.load(p_sums + o, mask=o < last, other=0.0).to(tl.float64)
    tl.store(p_totals + i, tl.sum(acc, 0).to(tl.float32))


@lru_cache(maxsize=8)
def _first(counts: tuple[int, ...], device: torch.device) -> Tensor:
    """Where each sum's pieces begin, and where they all end; copied to the device once."""
    return torch.tensor([0, *accumulate(counts)], dtype=torch.int32, device=device)


@lru_cache(maxsize=8)
def _places(places: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(places, dtype=torch.int64, device=device)


def _small_tensors(tensors: Sequence[Tensor], places: Sequence[int], sums: Tensor) -> None:
    """Write the squared norm of each tensor, of one dtype, to its place in sums."""
    norms = torch.stack(torch._foreach_norm(list(tensors), 2.0, dtype=torch.float64))
    sums.index_copy_(0, _places(tuple(places), sums.device), norms.square().float())


def _pieces(tensors: Sequence[Tensor], rows: Sequence[int]) -> tuple[Tensor, list[int]]:
    """Sums of all pieces, and how many each of a tensor's rows has."""
    is_small = [r == 1 and 0 < x.numel() <= SMALL for x, r in zip(tensors, rows)]
    counts = [
        1 if small else triton.cdiv(x.numel() // max(1, r), PIECE)
        for x, r, small in zip(tensors, rows, is_small)
    ]
    ends = list(accumulate(count * r for count, r in zip(counts, rows)))
    sums = torch.empty(ends[-1], dtype=torch.float32, device=tensors[0].device)
    together: dict[torch.dtype, list[int]] = {}
    for index, (x, r, count, end) in enumerate(zip(tensors, rows, counts, ends)):
        if not x.is_contiguous():
            raise ValueError(f"squared_norm: {tuple(x.shape)} with strides {x.stride()} is not contiguous")
        if is_small[index]:
            together.setdefault(x.dtype, []).append(index)
        elif x.numel():
            launch_kernel(
                _pieces_kernel, (count * r,), x, sums[end - count * r : end], x.numel() // r, count, PIECE=PIECE, TILE=TILE,
                num_warps=4,
            )  # fmt: skip
    for chosen in together.values():
        _small_tensors([tensors[i] for i in chosen], [ends[i] - 1 for i in chosen], sums)
    return sums, counts


def _totals(sums: Tensor, counts: tuple[int, ...]) -> Tensor:
    totals = torch.empty(len(counts), dtype=torch.float32, device=sums.device)
    first = _first(counts, sums.device)
    launch_kernel(_totals_kernel, (len(counts),), sums, first, totals, TILE=TILE, num_warps=8)
    return totals


@torch.no_grad()
def squared_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Sum of all elements' squares: fp32 scalar on the device, the same bits in every run.

    Args:
        tensors: at least one, contiguous, of one device; bf16, fp16 or fp32.
    """
    sums, _ = _pieces(tensors, [1] * len(tensors))
    return _totals(sums, (sums.numel(),))[0]


@torch.no_grad()
def squared_norms(tensors: Sequence[Tensor], rows: Sequence[int]) -> Tensor:
    """Sums of the squares of every tensor's rows, one after another: fp32, the same bits in every run.

    Args:
        tensors: at least one, contiguous, of one device; bf16, fp16 or fp32.
        rows: into how many equal rows each is cut; 1 for the whole.
    """
    sums, counts = _pieces(tensors, rows)
    return _totals(sums, tuple(count for count, r in zip(counts, rows) for _ in range(r)))


def clip_scale(squared: Tensor, max_norm: float) -> Tensor:
    """What gradients are multiplied with so that their norm is at most max_norm, as torch's clip_grad_norm_.

    Args:
        squared: fp32 scalar of `squared_norm`, or a sum of several.
        max_norm: above 0.
    """
    return (max_norm / (squared.sqrt() + 1e-6)).clamp(max=1.0)
