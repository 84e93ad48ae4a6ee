"""Attention of one query to tiles of keys without the tensor cores: where a key/value head has one query head.

Device code of `decode_kernels`. A matrix product would compute 16 rows for one. Here every place of a tile keeps a running
softmax of its own, so that within the loop no thread waits for another; they are put together after it.
"""

import triton
import triton.language as tl

from sparseray.kernels.nsa.tiles import load_tile


@triton.jit
def query_row(p_q, i_row, DQ: tl.constexpr, DP: tl.constexpr):
    """The query, fp32 [1, DP]."""
    o_d = tl.arange(0, DP)[None, :]
    return tl.load(p_q + i_row * DQ + o_d, mask=o_d < DQ, other=0.0).to(tl.float32)


@triton.jit
def attend_places(
    b_acc, b_m, b_l, b_q, p_k, p_v, o_key, m_key, scale2,
    DQ: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr,
):  # fmt: skip
    """One tile of keys into the softmaxes of its places; also the logits, base 2."""
    b_k = load_tile(p_k, o_key, m_key, DQ, 0, DP, True).to(tl.float32)
    b_s = tl.where(m_key, tl.sum(b_k * b_q, 1) * scale2, float("-inf"))
    b_new = tl.maximum(b_m, b_s)
    b_safe = tl.where(b_new == float("-inf"), 0.0, b_new)
    b_p = tl.exp2(b_s - b_safe)
    b_alpha = tl.exp2(b_m - b_safe)
    b_v = load_tile(p_v, o_key, m_key, DV, 0, DVP, True).to(tl.float32)
    return b_acc * b_alpha[:, None] + b_v * b_p[:, None], b_new, b_l * b_alpha + b_p, b_s


@triton.jit
def store_places(p_m, p_l, p_acc, o_part, b_m, b_l, b_acc, DV: tl.constexpr, DVP: tl.constexpr):
    """Put the places' softmaxes together, as part o_part."""
    top = tl.max(b_m, 0)
    b_w = tl.exp2(b_m - tl.where(top == float("-inf"), 0.0, top))
    tl.store(p_m + o_part, top)
    tl.store(p_l + o_part, tl.sum(b_l * b_w, 0))
    o_d = tl.arange(0, DVP)
    tl.store(p_acc + o_part * DV + o_d, tl.sum(b_acc * b_w[:, None], 0), mask=o_d < DV)
