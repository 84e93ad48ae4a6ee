"""AdamW over slabs: one launch updates master weights, both moments and the copy that the next step computes with.

Equations as torch's `adamw` (decoupled decay, arXiv 1711.05101). The arithmetic is fp32 whatever the moments are
kept in; bf16 moments are rounded to nearest, without noise, after the update has used their fp32 values. Then a
change below half a unit in the last place is lost: the second moment still follows the gradients with beta2 up to
0.99, but hardly falls any more with 0.999. Oracle: `reference.adamw_reference`.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparseray.kernels.launch import launch_kernel

TILE = 2048


@triton.jit
def _adamw_kernel(
    p_master, p_first, p_second, p_gradient, p_copy, p_scale, n,
    kept, beta1, rest1, beta2, rest2, step_size, root, eps, TILE: tl.constexpr,
):  # fmt: skip
    o = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    m = o < n
    b_g = tl.load(p_gradient + o, mask=m, other=0.0).to(tl.float32)
    if p_scale is not None:
        b_g *= tl.load(p_scale)
    b_m = beta1 * tl.load(p_first + o, mask=m, other=0.0).to(tl.float32) + rest1 * b_g
    b_v = beta2 * tl.load(p_second + o, mask=m, other=0.0).to(tl.float32) + rest2 * b_g * b_g
    b_w = tl.load(p_master + o, mask=m, other=0.0) * kept
    b_w -= step_size * tl.div_rn(b_m, tl.div_rn(tl.sqrt_rn(b_v), root) + eps)
    tl.store(p_master + o, b_w, mask=m)
    tl.store(p_first + o, b_m.to(p_first.dtype.element_ty), mask=m)
    tl.store(p_second + o, b_v.to(p_second.dtype.element_ty), mask=m)
    if p_copy is not None:
        tl.store(p_copy + o, b_w.to(p_copy.dtype.element_ty), mask=m)


@torch.no_grad()
def adamw_step(
    master: Tensor,
    first: Tensor,
    second: Tensor,
    gradient: Tensor,
    *,
    copy: Tensor | None = None,
    scale: Tensor | None = None,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    step: int,
) -> None:
    """Update a slab in place, without copying anything to the host.

    Args:
        master: fp32, contiguous, any shape; the other tensors have its number of elements and are contiguous.
        first, second: fp32 or bf16 moments, zeros before the first step.
        gradient: fp32 or bf16.
        copy: bf16 or fp16, overwritten with the new weights; None keeps none.
        scale: fp32 scalar on the device that the gradient is multiplied with (`squared_norm.clip_scale`).
        lr, betas, eps, weight_decay: as torch's.
        step: of this update, from 1 on.

    Raises:
        ValueError: a tensor of another size, or not contiguous.
    """
    for name, x in (("first", first), ("second", second), ("gradient", gradient), ("copy", copy)):
        if x is not None and (x.numel() != master.numel() or not x.is_contiguous()):
            raise ValueError(f"adamw: {name} {tuple(x.shape)} is no contiguous twin of {tuple(master.shape)}")
    n = master.numel()
    launch_kernel(
        _adamw_kernel, (triton.cdiv(n, TILE),), master, first, second, gradient, copy, scale, n,
        1.0 - lr * weight_decay, float(betas[0]), 1.0 - betas[0], float(betas[1]), 1.0 - betas[1],
        lr / (1.0 - betas[0] ** step), math.sqrt(1.0 - betas[1] ** step), float(eps), TILE=TILE, num_warps=4,
    )  # fmt: skip
