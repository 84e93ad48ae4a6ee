"""Compression over pages: the compressed tokens that the newest tokens complete, straight into the pages.

Block c is complete once position c * stride + block - 1 is cached. A step of Lq new tokens completes at most
(Lq - 1) // stride + 1 blocks; whether it completes one at all is decided on the device, so a captured graph
serves every step. The keys of the block, which may lie on two pages, are read from the paged cache.
Source: arXiv 2502.11089 eq. 7.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparseray.errors import ConfigError
from sparseray.kernels.launch import launch_kernel
from sparseray.kernels.nsa.tiles import (
    load_tile,
    next_power_of_2,
    num_visible,
    page_rows,
    precision,
    split_width,
)


@triton.jit
def compress_block(
    i_c, p_x, p_table, p_w1, p_bias, p_w2, p_b2, p_out, p_out_table, p_cos, p_sin,
    H: tl.constexpr, HP: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, DO: tl.constexpr,
    DOP: tl.constexpr, F: tl.constexpr, BF: tl.constexpr, LEN: tl.constexpr, STRIDE: tl.constexpr,
    PAGE: tl.constexpr, OUT_PAGE: tl.constexpr, IP: tl.constexpr, ROTATE: tl.constexpr,
):  # fmt: skip
    """Block i_c of a sequence with these tables; rows are the key/value heads, padded."""
    o_h = tl.arange(0, HP)
    m_h = o_h < H
    o_d = tl.arange(0, DOP)
    o_pair = (o_d + DO // 2) % DO
    b_out = tl.zeros([HP, DOP], tl.float32)
    # The other channel of each pair that turns together.
    b_pair = tl.zeros([HP, DOP], tl.float32)
    # A block lies on two pages at most: a look-up inside the loop would wait for memory in every turn.
    i_page = i_c * STRIDE // PAGE
    page = tl.load(p_table + i_page).to(tl.int64)
    page_after = tl.load(p_table + (i_c * STRIDE + LEN - 1) // PAGE).to(tl.int64)
    for f in range(0, F, BF):
        o_f = f + tl.arange(0, BF)
        m_f = o_f < F
        o_w = o_f.to(tl.int64) * LEN
        b_pre = tl.zeros([HP, BF], tl.float32)
        for i in range(0, LEN):
            t = i_c * STRIDE + i
            if LEN <= PAGE:
                row = tl.where(t // PAGE == i_page, page, page_after) * PAGE + t % PAGE
            else:
                row = page_rows(p_table, t, t >= 0, PAGE)
            b_x = load_tile(p_x, row * H + o_h, m_h, D, 0, D0, True)
            b_w = load_tile(p_w1, o_w + i, m_f, D, 0, D0, True)
            b_pre = tl.dot(b_x, tl.trans(b_w), b_pre, input_precision=IP)
            if D1 > 0:
                b_x1 = load_tile(p_x, row * H + o_h, m_h, D, D0, D1, True)
                b_w1 = load_tile(p_w1, o_w + i, m_f, D, D0, D1, True)
                b_pre = tl.dot(b_x1, tl.trans(b_w1), b_pre, input_precision=IP)
        b_pre += tl.load(p_bias + o_f, mask=m_f, other=0.0).to(tl.float32)[None, :]
        # Rounded where the batched form rounds, so that both write the same compressed token.
        b_pre = b_pre.to(p_x.dtype.element_ty).to(tl.float32)
        b_hidden = 0.5 * b_pre * (1.0 + tl.math.erf(b_pre * 0.7071067811865476))
        m_w2 = (o_d < DO)[:, None] & m_f[None, :]
        b_w2 = tl.load(p_w2 + o_d[:, None] * F + o_f[None, :], mask=m_w2, other=0.0)
        b_out = tl.dot(b_hidden.to(b_w2.dtype), tl.trans(b_w2), b_out, input_precision=IP)
        if ROTATE:
            b_w2 = tl.load(p_w2 + o_pair[:, None] * F + o_f[None, :], mask=m_w2, other=0.0)
            b_pair = tl.dot(b_hidden.to(b_w2.dtype), tl.trans(b_w2), b_pair, input_precision=IP)
    b_out += tl.load(p_b2 + o_d, mask=o_d < DO, other=0.0).to(tl.float32)[None, :]
    if ROTATE:
        b_pair += tl.load(p_b2 + o_pair, mask=o_d < DO, other=0.0).to(tl.float32)[None, :]
        b_out = b_out.to(p_out.dtype.element_ty).to(tl.float32)
        b_pair = b_pair.to(p_out.dtype.element_ty).to(tl.float32)
        o_angle = i_c * STRIDE * (DO // 2) + o_d % (DO // 2)
        b_cos = tl.load(p_cos + o_angle, mask=o_d < DO, other=0.0)[None, :]
        b_sin = tl.load(p_sin + o_angle, mask=o_d < DO, other=0.0)[None, :]
        b_out = b_out * b_cos + tl.where(o_d < DO // 2, -1.0, 1.0)[None, :] * b_pair * b_sin
    slot = page_rows(p_out_table, i_c, i_c >= 0, OUT_PAGE)
    p_tile = p_out + (slot * H + o_h)[:, None] * DO + o_d[None, :]
    tl.store(p_tile, b_out.to(p_out.dtype.element_ty), mask=m_h[:, None] & (o_d < DO)[None, :])


@triton.jit
def compress_step_kernel(
    p_x, p_table, p_lens, p_bounds, p_w1, p_bias, p_w2, p_b2, p_out, p_out_table, p_cos, p_sin, table_width, out_width,
    H: tl.constexpr, HP: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, DO: tl.constexpr,
    DOP: tl.constexpr, F: tl.constexpr, BF: tl.constexpr, LEN: tl.constexpr, STRIDE: tl.constexpr,
    PAGE: tl.constexpr, OUT_PAGE: tl.constexpr, IP: tl.constexpr, ROTATE: tl.constexpr,
):  # fmt: skip
    """One program per sequence and block that the longest one may complete."""
    i_b = tl.program_id(0).to(tl.int64)
    n_ctx = tl.load(p_lens + i_b)
    # Of its own new tokens alone: pages before what they need may be gone.
    n_new = (tl.load(p_bounds + i_b + 1) - tl.load(p_bounds + i_b)).to(tl.int32)
    i_c = num_visible(n_ctx - n_new - 1, 0, LEN, STRIDE) + tl.program_id(1)
    if i_c < num_visible(n_ctx - 1, 0, LEN, STRIDE):
        compress_block(
            i_c, p_x, p_table + i_b * table_width, p_w1, p_bias, p_w2, p_b2, p_out, p_out_table + i_b * out_width, p_cos,
            p_sin, H, HP, D, D0, D1, DO, DOP, F, BF, LEN, STRIDE, PAGE, OUT_PAGE, IP, ROTATE,
        )  # fmt: skip


def tile_of(dtype: torch.dtype, width: int) -> tuple[int, int]:
    """Pipeline stages, and hidden units of a tile: tiles of weights, tokens after tokens, of which several must be on their way.

    Args:
        dtype: of the cache.
        width: channels of a head.
    """
    return (4, 128) if dtype.itemsize == 2 and sum(split_width(width)) <= 128 else (2, 64)


def compress_step(
    cache: Tensor,
    table: Tensor,
    compressed: Tensor,
    compressed_table: Tensor,
    context_lens: Tensor,
    bounds: Tensor,
    w1: Tensor,
    bias: Tensor,
    w2: Tensor,
    b2: Tensor,
    *,
    block: int,
    stride: int,
    query_len: int,
    angles: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Write the compressed tokens that the new tokens of every sequence complete.

    Args:
        cache: keys or values, [pages, page size, H, D]; table: int32 [B, pages of a sequence].
        compressed: their compressed tokens, [pages, page size, H, D_out]; compressed_table: int32, likewise.
        context_lens: int32 [B], tokens of every sequence, the new ones included.
        bounds: integers [B + 1], boundaries of the sequences' new tokens.
        w1: [F, block * D]; w2: [D_out, F]; b2: [D_out], as in `compress`.
        bias: [F], the first layer's bias with the position encoding in it: b1 + w1 @ pos.flatten().
        query_len: the most new tokens of a sequence.
        angles: fp32 cosines and sines [positions, D_out / 2]: keys are rotated at their blocks' first positions.

    Raises:
        ConfigError: stride does not divide block, or w1 does not fit block and D.
    """
    heads, width = cache.shape[2:]
    hidden, out_dim = w1.shape[0], w2.shape[0]
    if block % stride or w1.shape[1] != block * width:
        raise ConfigError(
            f"nsa: compress_step needs stride={stride} to divide block={block} and w1 {tuple(w1.shape)} of"
            f" block * D = {block * width} columns"
        )
    d0, d1 = split_width(width)
    stages, hidden_tile = tile_of(cache.dtype, width)
    launch_kernel(
        compress_step_kernel, (context_lens.shape[0], (query_len - 1) // stride + 1),
        cache, table, context_lens, bounds, w1, bias, w2, b2, compressed, compressed_table, *(angles or (b2, b2)),
        table.shape[1], compressed_table.shape[1], H=heads, HP=max(16, next_power_of_2(heads)), D=width, D0=d0, D1=d1, DO=out_dim,
        DOP=max(16, next_power_of_2(out_dim)), F=hidden, BF=min(hidden_tile, max(16, next_power_of_2(hidden))),
        LEN=block, STRIDE=stride, PAGE=cache.shape[1], OUT_PAGE=compressed.shape[1], IP=precision(cache.dtype),
        ROTATE=angles is not None, num_warps=4, num_stages=stages,
    )  # fmt: skip
