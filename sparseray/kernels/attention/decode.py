"""`paged_decode`: full attention of one to eight query tokens per sequence to paged caches, grouped heads.

Every sequence is cut into at most `SPLITS` spans of a multiple of `SPAN` keys, counted from its start. A program attends to spans of one key/value
head, all query tokens and heads of the group together; a second launch puts a row's spans together in their order.
So a row's bits depend on its own context alone: not on the batch, nor on how many programs share the work. Lengths
are read on the device and everything a step writes lies in a `PagedDecodeWorkspace`, so a step allocates nothing and
can be captured in a CUDA graph. Oracle: `kernels.dense.reference.paged_attention_reference`.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparseray.errors import ConfigError
from sparseray.kernels.launch import launch_kernel
from sparseray.kernels.nsa.decode_kernels import _attend as attend_tile
from sparseray.kernels.nsa.range_forward import LOG2E
from sparseray.kernels.nsa.tiles import (
    load_tile,
    next_power_of_2,
    page_rows,
    precision,
    split_width,
    store_tile,
)

SPLITS, SPAN, TILE = 64, 256, 8192
"""Spans of a sequence at most, what their keys are a multiple of, and values of a tile of at most 128 keys."""
PROGRAMS, STAGES, MERGE_COLUMNS = 4224, 3, 64
"""Programs of a launch at most, if there are fewer heads; then columns of a program of the second launch."""


@triton.jit
def _span(n_ctx, SPLITS: tl.constexpr, SPAN: tl.constexpr):
    """Keys of a span: it depends on the sequence's own length alone."""
    return tl.maximum((n_ctx + SPLITS * SPAN - 1) // (SPLITS * SPAN), 1) * SPAN


@triton.jit
def _spans_kernel(
    p_q, p_k, p_v, p_table, p_lens, p_m, p_l, p_acc, pages, most, scale2,
    H: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, LQ: tl.constexpr, LP: tl.constexpr, SPLITS: tl.constexpr,
    SPAN: tl.constexpr, BN: tl.constexpr, PAGE: tl.constexpr, DQ: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, DV: tl.constexpr,
    DVP: tl.constexpr, IP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Every num_programs(0)-th span of one key/value head of one sequence: its softmax, not yet divided."""
    i_b = tl.program_id(1) // H
    i_kv = tl.program_id(1) % H
    n_ctx = tl.load(p_lens + i_b)
    p_table += i_b * pages
    o_m = tl.arange(0, LP * GP)
    o_q = o_m // GP
    m_q = (o_q < LQ) & (o_m % GP < G)
    o_row = (i_b * LQ + o_q) * (H * G) + i_kv * G + o_m % GP
    b_t = n_ctx - LQ + o_q
    b_q0 = load_tile(p_q, o_row, m_q, DQ, 0, D0, True)
    b_q1 = b_q0
    if D1 > 0:
        b_q1 = load_tile(p_q, o_row, m_q, DQ, D0, D1, True)
    o_c = tl.arange(0, BN)
    span = _span(n_ctx, SPLITS, SPAN)
    for i_s in range(tl.program_id(0), (n_ctx + span - 1) // span, tl.num_programs(0)):
        b_m = tl.full([LP * GP], float("-inf"), tl.float32)
        b_l = tl.zeros([LP * GP], tl.float32)
        b_acc = tl.zeros([LP * GP, DVP], tl.float32)
        for start in tl.range(i_s * span, tl.minimum((i_s + 1) * span, n_ctx), BN, num_stages=STAGES):
            o_t = start + o_c
            m_t = o_t < n_ctx
            if PAGE % BN == 0:
                o_key = tl.load(p_table + start // PAGE).to(tl.int64) * PAGE + start % PAGE + o_c
            else:
                o_key = page_rows(p_table, o_t, m_t, PAGE)
            b_see = m_t[None, :] & (o_t[None, :] <= b_t[:, None])
            b_acc, b_m, b_l, _ = attend_tile(
                b_acc, b_m, b_l, b_q0, b_q1, p_k, p_v, o_key * H + i_kv, m_t, b_see, scale2, DQ, D0, D1, DV, DVP, IP
            )  # fmt: skip
        o_part = o_row.to(tl.int64) * most + i_s
        tl.store(p_m + o_part, b_m, mask=m_q)
        tl.store(p_l + o_part, b_l, mask=m_q)
        store_tile(p_acc, o_part, m_q, b_acc, DV, 0, DVP)


@triton.jit
def _merge_kernel(
    p_m, p_l, p_acc, p_lens, p_o, most,
    ROWS: tl.constexpr, SPLITS: tl.constexpr, SPAN: tl.constexpr, DV: tl.constexpr, BS: tl.constexpr,
    BD: tl.constexpr,
):  # fmt: skip
    """One query token's head (some columns of it): its spans put together, in order; zeros without a context."""
    i_row = tl.program_id(0).to(tl.int64)
    n_ctx = tl.load(p_lens + i_row // ROWS)
    span = _span(n_ctx, SPLITS, SPAN)
    o_s = tl.arange(0, BS)
    m_s = o_s < (n_ctx + span - 1) // span
    o_d = tl.program_id(1) * BD + tl.arange(0, BD)
    m_d = o_d < DV
    o_part = i_row * most + o_s
    b_m = tl.load(p_m + o_part, mask=m_s, other=float("-inf"))
    b_l = tl.load(p_l + o_part, mask=m_s, other=0.0)
    b_acc = tl.load(p_acc + o_part[:, None] * DV + o_d[None, :], mask=m_s[:, None] & m_d[None, :], other=0.0)
    top = tl.max(b_m, 0)
    b_w = tl.exp2(b_m - tl.where(top == float("-inf"), 0.0, top))
    total = tl.sum(b_w * b_l, 0)
    b_o = tl.sum(b_w[:, None] * b_acc, 0) / tl.where(total == 0.0, 1.0, total)
    tl.store(p_o + i_row * DV + o_d, b_o.to(p_o.dtype.element_ty), mask=m_d)


@dataclass(frozen=True, kw_only=True)
class PagedDecodeWorkspace:
    """What a decode step writes besides its output, for a batch, a number of query tokens and a longest context.

    Attributes:
        part_max, part_sum: fp32 [B * Lq * HQ, spans]; part_out: fp32 [B * Lq * HQ, spans, Dv].
    """

    part_max: Tensor
    part_sum: Tensor
    part_out: Tensor

    @classmethod
    def create(
        cls, batch: int, query_len: int, heads: int, value_dim: int, max_context: int, device: torch.device | str
    ) -> "PagedDecodeWorkspace":  # fmt: skip
        """Buffers for `batch` sequences of at most `max_context` tokens."""
        spans = max(1, min(SPLITS, triton.cdiv(max_context, SPAN)))
        shape = (batch * query_len * heads, spans)
        part_max, part_sum = (torch.empty(shape, dtype=torch.float32, device=device) for _ in range(2))
        part_out = torch.empty(*shape, value_dim, dtype=torch.float32, device=device)
        return cls(part_max=part_max, part_sum=part_sum, part_out=part_out)


def paged_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    workspace: PagedDecodeWorkspace,
    out: Tensor,
    *,
    scale: float | None = None,
) -> Tensor:
    """Attend from the last Lq tokens of every sequence to its pages, causally.

    Args:
        q: [B, Lq, HQ, D], Lq from 1 to 8, contiguous.
        k_cache, v_cache: [pages, page size, H, D] and [.., Dv], contiguous; H divides HQ. The keys and values of the
            Lq tokens are already in them.
        block_table: int32 [B, pages of a sequence], the page of every page-sized piece of a sequence.
        context_lens: int32 [B], tokens of every sequence, the Lq new ones included; 0 for a place without a
            sequence, whose output is 0. At most what the workspace was made for (unchecked).
        workspace: buffers for this batch, of one step at a time.
        out: [B, Lq, HQ, Dv], written and returned.
        scale: of the scores; None is D^-0.5.

    Raises:
        ConfigError: Lq outside 1 to 8, or heads that the key/value heads do not divide.
    """
    (batch, query_len, heads, width), (page, num_kv, value_dim) = q.shape, v_cache.shape[1:]
    if not 1 <= query_len <= 8 or heads % num_kv:
        raise ConfigError(
            f"paged_decode takes 1 to 8 query tokens and a multiple of {num_kv} heads, got q {tuple(q.shape)}"
        )
    w, group, most = workspace, heads // num_kv, workspace.part_max.shape[1]
    padded, (d0, d1), columns = (
        next_power_of_2(group),
        split_width(width),
        min(MERGE_COLUMNS, next_power_of_2(value_dim)),
    )
    padded_new = max(next_power_of_2(query_len), 16 // min(padded, 16))
    # A power of two that is no more; widths such as 80 are not.
    keys = max(16, min(128, SPAN, next_power_of_2(TILE // (d0 + d1) + 1) // 2))
    programs = max(1, min(most, PROGRAMS // (batch * num_kv)))
    launch_kernel(
        _spans_kernel, (programs, batch * num_kv), q, k_cache, v_cache, block_table, context_lens,
        w.part_max, w.part_sum, w.part_out, block_table.shape[1], most,
        (width**-0.5 if scale is None else scale) * LOG2E,
        H=num_kv, G=group, GP=padded, LQ=query_len, LP=padded_new,
        SPLITS=SPLITS, SPAN=SPAN, BN=keys, PAGE=page, DQ=width, D0=d0, D1=d1, DV=value_dim,
        DVP=max(16, next_power_of_2(value_dim)), IP=precision(q.dtype), STAGES=STAGES,
        num_warps=4 if padded * padded_new < 128 else 8,
    )  # fmt: skip
    launch_kernel(
        _merge_kernel, (batch * query_len * heads, triton.cdiv(value_dim, columns)),
        w.part_max, w.part_sum, w.part_out, context_lens, out, most,
        ROWS=query_len * heads, SPLITS=SPLITS, SPAN=SPAN, DV=value_dim, BS=next_power_of_2(most), BD=columns,
        num_warps=4 if most > 16 else 1,
    )  # fmt: skip
    return out
