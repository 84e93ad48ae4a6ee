"""Compression of keys or values: an MLP over overlapping blocks, differentiable (compress_backward.py).

The first layer reads every block as `block` strided slices of the packed tensor, so blocks that overlap are
not copied out. The position encoding enters before the nonlinearity as a bias, w1 (x + pos) = w1 x + w1 pos.
Source: arXiv 2502.11089 eq. 7.
"""

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparseray.errors import ConfigError
from sparseray.kernels.launch import launch_kernel
from sparseray.kernels.nsa.compress_backward import compress_backward
from sparseray.kernels.nsa.tiles import load_tile, next_power_of_2, precision, split_width
from sparseray.kernels.settings import num_compressed

FEW_PROGRAMS = 128
"""So many leave multiprocessors of an H100 idle."""


@triton.jit(do_not_specialize=["num_rows"])
def first_layer_kernel(
    p_x, p_w, p_bias, p_starts, p_pre, p_hidden, num_rows,
    H: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, F: tl.constexpr, BF: tl.constexpr,
    BC: tl.constexpr, LEN: tl.constexpr, BIAS: tl.constexpr, IP: tl.constexpr,
):  # fmt: skip
    """pre[c, h, f] = bias[f] + sum over i < LEN of x[start[c] + i, h] . w[f, i]; hidden = gelu(pre)."""
    o_r = tl.program_id(0) * BC + tl.arange(0, BC)
    m_r = o_r < num_rows
    o_f = tl.program_id(1) * BF + tl.arange(0, BF)
    m_f = o_f < F
    b_start = tl.load(p_starts + o_r // H, mask=m_r, other=0)
    o_x = b_start * H + o_r % H
    o_w = o_f.to(tl.int64) * LEN
    b_acc = tl.zeros([BC, BF], tl.float32)
    for i in range(0, LEN):
        b_x = load_tile(p_x, o_x + i * H, m_r, D, 0, D0, True)
        b_w = load_tile(p_w, o_w + i, m_f, D, 0, D0, True)
        b_acc = tl.dot(b_x, tl.trans(b_w), b_acc, input_precision=IP)
        if D1 > 0:
            b_x1 = load_tile(p_x, o_x + i * H, m_r, D, D0, D1, True)
            b_w1 = load_tile(p_w, o_w + i, m_f, D, D0, D1, True)
            b_acc = tl.dot(b_x1, tl.trans(b_w1), b_acc, input_precision=IP)
    if BIAS:
        b_acc += tl.load(p_bias + o_f, mask=m_f, other=0.0)[None, :]
    o_out = o_r.to(tl.int64)[:, None] * F + o_f[None, :]
    m_out = m_r[:, None] & m_f[None, :]
    b_pre = b_acc.to(p_pre.dtype.element_ty)
    tl.store(p_pre + o_out, b_pre, mask=m_out)
    # Of the rounded value, which is what the backward sees.
    b_pre = b_pre.to(tl.float32)
    b_hidden = 0.5 * b_pre * (1.0 + tl.math.erf(b_pre * 0.7071067811865476))
    tl.store(p_hidden + o_out, b_hidden.to(p_pre.dtype.element_ty), mask=m_out)


def _tables(
    first: Tensor, ends: Tensor, counts: Tensor, tokens: int, count: int, stride: int
) -> tuple[Tensor, ...]:
    """First token of every compressed block [C], and every stride of tokens: int64 [slots, 5], its first token,
    how many tokens it has (0 for slots beyond the last), the block that starts there, and the first block and
    the number of blocks of its sequence."""
    total = counts.cumsum(0)
    offsets = total - counts
    ids = torch.arange(count, device=first.device)
    seq_c = torch.searchsorted(total, ids, right=True).clamp(max=first.shape[0] - 1)
    starts = first[seq_c] + (ids - offsets[seq_c]) * stride
    slots = (ends - first + stride - 1) // stride
    slot_ends = slots.cumsum(0)
    ids = torch.arange(tokens // stride + first.shape[0], device=first.device)
    seq = torch.searchsorted(slot_ends, ids, right=True).clamp(max=first.shape[0] - 1)
    local = ids - (slot_ends - slots)[seq]
    token = first[seq] + local * stride
    columns = [token, (ends[seq] - token).clamp(min=0, max=stride), local, offsets[seq], counts[seq]]
    return starts, torch.stack(columns, 1).contiguous()


@lru_cache(maxsize=64)
def _uniform_tables(
    batch: int, length: int, block: int, stride: int, device: torch.device
) -> tuple[Tensor, ...]:
    first = torch.arange(batch, device=device) * length
    count = num_compressed(length, block, stride)
    counts = torch.full_like(first, count)
    return _tables(first, first + length, counts, batch * length, batch * count, stride)


def _packed_tables(
    cu_seqlens: Tensor, tokens: int, count: int, block: int, stride: int
) -> tuple[Tensor, ...]:
    cu = cu_seqlens.long()
    first, ends = cu[:-1].contiguous(), cu[1:].contiguous()
    lengths = ends - first
    counts = torch.where(lengths >= block, (lengths - block) // stride + 1, torch.zeros_like(lengths))
    return _tables(first, ends, counts, tokens, count, stride)


def _first_layer(
    x: Tensor, w1: Tensor, bias: Tensor | None, starts: Tensor, block: int
) -> tuple[Tensor, Tensor]:
    """Packed x [T, H, D] and first tokens [C] to the hidden layer before and after GELU, [C * H, F]."""
    heads, width = x.shape[1:]
    rows, hidden = starts.shape[0] * heads, w1.shape[0]
    pre = x.new_empty(rows, hidden)
    after = torch.empty_like(pre)
    if rows == 0:
        return pre, after
    d0, d1 = split_width(width)
    # Narrower tiles where wide ones would leave multiprocessors without a program.
    wide = 128 if rows * hidden > FEW_PROGRAMS * 64 * 128 else 64
    bf = min(wide, max(16, next_power_of_2(hidden)))
    launch_kernel(
        first_layer_kernel, (triton.cdiv(rows, 64), triton.cdiv(hidden, bf)),
        x, w1, bias, starts, pre, after, rows, H=heads, D=width, D0=d0, D1=d1, F=hidden, BF=bf, BC=64, LEN=block, BIAS=bias is not None,
        IP=precision(x.dtype), num_warps=4, num_stages=3,
    )  # fmt: skip
    return pre, after


def _forward(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, pos: Tensor | None, starts: Tensor, block: int
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Compressed tokens [C, H, D_out] of packed x [T, H, D], and the hidden layer before GELU."""
    bias = b1
    if pos is not None:
        encoded = w1 @ pos.reshape(-1)
        bias = encoded if b1 is None else b1 + encoded
    pre, hidden = _first_layer(x, w1, bias, starts, block)
    out = torch.nn.functional.linear(hidden, w2, b2)
    return out.view(starts.shape[0], x.shape[1], w2.shape[0]), pre


class _Compress(torch.autograd.Function):
    """Packed x [T, H, D] to [C, H, D_out]."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, pos: Tensor | None,
        tables: tuple[Tensor, ...], block: int, stride: int,
    ) -> Tensor:  # fmt: skip
        out, pre = _forward(x, w1, b1, w2, b2, pos, tables[0], block)
        ctx.save_for_backward(x, w1, w2, pos, pre)
        # The cached tables may come from inference mode, which autograd refuses to save.
        ctx.tables, ctx.block, ctx.stride = tables, block, stride
        ctx.has_biases = b1 is not None, b2 is not None
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, w1, w2, pos, pre = ctx.saved_tensors
        dy = grads[0].reshape(-1, grads[0].shape[-1]).contiguous()
        dx, dw1, db1, dw2, db2, dpos = compress_backward(
            dy, x, w1, w2, pos, pre, ctx.tables, block=ctx.block, stride=ctx.stride
        )
        has_b1, has_b2 = ctx.has_biases
        return dx, dw1, db1 if has_b1 else None, dw2, db2 if has_b2 else None, dpos, None, None, None


def num_packed(cu_seqlens: Tensor, block: int, stride: int) -> int:
    """Compressed tokens of packed sequences; reads their boundaries back to the host."""
    lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).tolist()
    return sum(num_compressed(length, block, stride) for length in lengths)


def block_tables(
    batch: int, tokens: int, block: int, stride: int, device: torch.device, *, cu_seqlens: Tensor | None,
    num_blocks: int | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """What `compress` makes of the lengths, for the keys and the values of a layer to share.

    Args:
        batch, tokens: of x; the others as in `compress`.
    """
    if cu_seqlens is None:
        return _uniform_tables(batch, tokens, block, stride, device)
    count = num_packed(cu_seqlens, block, stride) if num_blocks is None else num_blocks
    return _packed_tables(cu_seqlens, tokens, count, block, stride)


def compress(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    pos: Tensor | None,
    block: int,
    stride: int,
    *,
    cu_seqlens: Tensor | None = None,
    num_blocks: int | None = None,
    tables: tuple[Tensor, ...] | None = None,
) -> Tensor:
    """Compress overlapping blocks of keys or values to one token each, differentiable.

    Args:
        x: [B, T, H, D], fp16, bf16 or fp32; w1, w2, b1, b2 and pos in the same dtype.
        w1: [F, block * D]; b1: [F] or None; w2: [D_out, F]; b2: [D_out] or None; pos: [block, D] or None.
        block, stride: l and d in tokens; stride divides block.
        cu_seqlens: int [N + 1] with B = 1: boundaries of packed sequences.
        num_blocks: compressed tokens of all packed sequences together; with cu_seqlens only, where it saves
            reading the boundaries back to the host.
        tables: what `block_tables` made of the same lengths, instead of cu_seqlens and num_blocks.

    Returns:
        [B, C, H, D_out]; packed sequences follow each other.

    Raises:
        ConfigError: stride does not divide block, or w1 does not fit block and D.

    Source: arXiv 2502.11089 eq. 7; see `compress_reference`.
    """
    batch, tokens, heads, width = x.shape
    if block % stride or w1.shape[1] != block * width:
        raise ConfigError(
            f"nsa: compress needs stride={stride} to divide block={block} and w1 {tuple(w1.shape)} of"
            f" block * D = {block * width} columns"
        )
    if tables is None:
        tables = block_tables(
            batch, tokens, block, stride, x.device, cu_seqlens=cu_seqlens, num_blocks=num_blocks
        )
    flat = x.flatten(0, 1).contiguous()
    weights = (w1.contiguous(), b1, w2.contiguous(), b2, pos)
    if torch.is_grad_enabled():
        out: Tensor = _Compress.apply(flat, *weights, tables, block, stride)
    else:
        # Without the graph's node, which takes the host time.
        out, _ = _forward(flat, *weights, tables[0], block)
    return out.view(batch, out.shape[0] // batch, heads, w2.shape[0])
