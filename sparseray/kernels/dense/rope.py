"""Rotary position encoding of the queries and keys of a fused projection, in one pass over memory.

The pass that rotates also cuts [R, q + k + v heads, D] into contiguous queries, keys and values, of which the keys and
values may be several parts of `group` heads (the branches of NSA); its backward turns the other way and puts the
gradients together. A part of each head's channels may be rotated (MLA).
Oracle: `reference.rope_reference`.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparseray.kernels.launch import launch_kernel

TILE = 4096


@triton.jit
def _copy(p_from, o_from, p_to, o_to, m):
    tl.store(p_to + o_to, tl.load(p_from + o_from, mask=m, other=0.0), mask=m)


@triton.jit
def _rope_kernel(
    p_fused, p_q, p_k, p_v, p_positions, p_cos, p_sin, R,
    NQ: tl.constexpr, NK: tl.constexpr, NV: tl.constexpr, GK: tl.constexpr, GV: tl.constexpr, D: tl.constexpr,
    C: tl.constexpr, START: tl.constexpr,
    INTERLEAVED: tl.constexpr, BACKWARD: tl.constexpr, BR: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
    BC: tl.constexpr,
):  # fmt: skip
    """BR rows by BN heads of queries, keys or values; channels START to START + 2C of queries and keys turn.

    Keys lie in parts of GK heads, one part after another, values in parts of GV.
    BACKWARD: from the parts' gradients to the fused one, by the opposite angles.
    """
    tiles_q: tl.constexpr = (NQ + BN - 1) // BN
    tiles_k: tl.constexpr = (NK + BN - 1) // BN
    i_n = tl.program_id(1)
    is_v = i_n >= tiles_q + tiles_k
    is_k = (i_n >= tiles_q) & (is_v == 0)
    # Selected, not branched over: the compiler then still knows how the addresses are aligned.
    p_part = tl.where(is_v, p_v, tl.where(is_k, p_k, p_q))
    first = tl.where(is_v, NQ + NK, tl.where(is_k, NQ, 0))
    count = tl.where(is_v, NV, tl.where(is_k, NK, NQ))
    group = tl.where(is_v, GV, tl.where(is_k, GK, NQ))
    i_n -= tl.where(is_v, tiles_q + tiles_k, tl.where(is_k, tiles_q, 0))
    o_r = tl.program_id(0) * BR + tl.arange(0, BR)
    o_n = i_n * BN + tl.arange(0, BN)
    m = ((o_r < R)[:, None] & (o_n < count)[None, :])[:, :, None]
    o_row = o_r[:, None].to(tl.int64)
    o_first = (o_n // group)[None, :].to(tl.int64) * R
    o_part = (((o_first + o_row) * group + (o_n % group)[None, :]) * D)[:, :, None]
    o_fused = ((o_row * (NQ + NK + NV) + first + o_n[None, :]) * D)[:, :, None]
    p_from, o_from, p_to, o_to = p_fused, o_fused, p_part, o_part
    if BACKWARD:
        p_from, o_from, p_to, o_to = p_part, o_part, p_fused, o_fused
    if is_v == 0:
        if 2 * C < D:
            o_d = tl.arange(0, BD)[None, None, :]
            m_d = m & (o_d < D) & ((o_d < START) | (o_d >= START + 2 * C))
            _copy(p_from, o_from + o_d, p_to, o_to + o_d, m_d)
        o_c = tl.arange(0, BC)
        position = tl.load(p_positions + o_r, mask=o_r < R, other=0)
        o_angle = position[:, None] * C + o_c[None, :]
        m_angle = (o_r < R)[:, None] & (o_c < C)[None, :]
        b_cos = tl.load(p_cos + o_angle, mask=m_angle, other=0.0)[:, None, :]
        b_sin = tl.load(p_sin + o_angle, mask=m_angle, other=0.0)[:, None, :]
        if BACKWARD:
            b_sin = -b_sin
        m_c = m & (o_c < C)[None, None, :]
        element = p_to.dtype.element_ty
        if INTERLEAVED:
            o_2 = (START + o_c[:, None] * 2 + tl.arange(0, 2)[None, :])[None, None, :, :]
            b = tl.load(p_from + o_from[:, :, :, None] + o_2, mask=m_c[:, :, :, None], other=0.0)
            first_c, second_c = tl.split(b.to(tl.float32))
            b = tl.join(first_c * b_cos - second_c * b_sin, second_c * b_cos + first_c * b_sin)
            tl.store(p_to + o_to[:, :, :, None] + o_2, b.to(element), mask=m_c[:, :, :, None])
        else:
            o_1 = (START + o_c)[None, None, :]
            first_c = tl.load(p_from + o_from + o_1, mask=m_c, other=0.0).to(tl.float32)
            second_c = tl.load(p_from + o_from + o_1 + C, mask=m_c, other=0.0).to(tl.float32)
            tl.store(p_to + o_to + o_1, (first_c * b_cos - second_c * b_sin).to(element), mask=m_c)
            tl.store(p_to + o_to + o_1 + C, (second_c * b_cos + first_c * b_sin).to(element), mask=m_c)
    else:
        o_d = tl.arange(0, BD)[None, None, :]
        _copy(p_from, o_from + o_d, p_to, o_to + o_d, m & (o_d < D))


def _launch(
    fused_RND: Tensor, parts: tuple[Tensor, Tensor, Tensor], angles: tuple[Tensor, Tensor, Tensor],
    start: int, is_interleaved: bool, is_backward: bool,
) -> None:  # fmt: skip
    """Parts are [P, R, heads of one, D]."""
    R, _, D = fused_RND.shape
    counts = [part.shape[0] * part.shape[2] for part in parts]
    columns = triton.next_power_of_2(D)
    heads = min(16, triton.next_power_of_2(max(counts)), max(1, TILE // columns))
    half = angles[1].shape[1]
    rows = max(1, TILE // (columns * heads))
    launch_kernel(
        _rope_kernel, (triton.cdiv(R, rows), sum(triton.cdiv(n, heads) for n in counts)),
        fused_RND, *parts, *angles, R,
        NQ=counts[0], NK=counts[1], NV=counts[2], GK=max(1, parts[1].shape[2]), GV=max(1, parts[2].shape[2]), D=D,
        C=half, START=start, INTERLEAVED=is_interleaved, BACKWARD=is_backward, BR=rows, BN=heads, BD=columns,
        BC=triton.next_power_of_2(half), num_warps=4,
    )  # fmt: skip


def _joined(gradients: tuple[Tensor, ...]) -> Tensor:
    return gradients[0].contiguous()[None] if len(gradients) == 1 else torch.stack(gradients)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, fused_RND: Tensor, angles: tuple[Tensor, Tensor, Tensor], heads: tuple[int, int, int],
        groups: tuple[int, int], start: int, is_interleaved: bool,
    ) -> Any:  # fmt: skip
        ctx.angles, ctx.start, ctx.is_interleaved = angles, start, is_interleaved
        R, _, D = fused_RND.shape
        q = fused_RND.new_empty(1, R, heads[0], D)
        k, v = (fused_RND.new_empty(max(1, n // max(1, g)), R, g, D) for n, g in zip(heads[1:], groups))
        _launch(fused_RND, (q, k, v), angles, start, is_interleaved, False)
        ctx.keys = len(k)
        return q[0], *k.unbind(0), *v.unbind(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        keys = ctx.keys + 1
        parts = (_joined(grads[:1]), _joined(grads[1:keys]), _joined(grads[keys:]))
        heads = sum(part.shape[0] * part.shape[2] for part in parts)
        dfused = grads[0].new_empty(grads[0].shape[0], heads, grads[0].shape[2])
        _launch(dfused, parts, ctx.angles, ctx.start, ctx.is_interleaved, True)
        return dfused, None, None, None, None, None


def rope(
    fused_RND: Tensor,
    positions_R: Tensor,
    cos_LC: Tensor,
    sin_LC: Tensor,
    *,
    heads: tuple[int, int, int],
    group: int | None = None,
    start: int = 0,
    is_interleaved: bool = False,
) -> tuple[Tensor, ...]:
    """Rotate the queries and keys of a fused projection; return contiguous (q, k, v), differentiable.

    Args:
        fused_RND: rows of q, k and v heads, in this order.
        positions_R: integer rows of the tables, below L (unchecked).
        cos_LC, sin_LC: fp32 tables; 2C channels of a head turn.
        heads: how many of each; keys and values may be 0 (a part without its own rotation, as in MLA).
        group: heads of each part that keys and values are cut into; None for one part of each.
        start: first channel that turns; the others are copied.
        is_interleaved: channel 2i is paired with 2i + 1 (MLA), otherwise i with i + C (`ops.Ops.rotary`).

    Returns:
        q, k, v: [R, heads of each, D]; with `group` q, every part of k, and every part of v.
    """
    if sum(heads) != fused_RND.shape[1] or start + 2 * cos_LC.shape[1] > fused_RND.shape[2]:
        raise ValueError(
            f"rope: heads={heads} and channels {start} to {start + 2 * cos_LC.shape[1]} do not fit {tuple(fused_RND.shape)}"
        )
    groups = heads[1:] if group is None else (group, group)
    angles = (positions_R.contiguous(), cos_LC.contiguous(), sin_LC.contiguous())
    out: tuple[Tensor, ...] = _Rope.apply(
        fused_RND.contiguous(), angles, heads, groups, start, is_interleaved
    )
    return out
