"""`latent_decode`: latent attention of one to eight query tokens per sequence to paged latents (MLA, absorbed form).

All heads attend to one key a token, the latent with the rotated key behind it, and its value is the latent, so a tile
of the cache is read once for both products. Rows are the heads of all query tokens of a sequence, `BR` of them a program;
tokens are the long side of both products, so that 16 rows need no padding: scores [BN, BR], outputs [C, BR].

Every sequence is cut into parts of equal length from its start. Programs take the parts of all sequences in turn, so
unequal lengths are shared out evenly; a second launch puts a row's parts together in their order. A row's bits
depend on its own context and on the sizes of the launch (sequences, rows of a sequence, longest context). Lengths are
read on the device and everything a step writes lies in a `LatentDecodeWorkspace`, so a step can be captured in a
CUDA graph. Oracle: `PagedPlainOps.paged_latent_attend`.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparseray.errors import ConfigError
from sparseray.kernels.attention.latent_pipelined import fits, latent_pipelined_kernel, sources_of
from sparseray.kernels.launch import launch_kernel
from sparseray.kernels.nsa.range_forward import LOG2E
from sparseray.kernels.nsa.tiles import next_power_of_2, page_rows, precision


@triton.jit
def _part_length(n_ctx, least, most, BN: tl.constexpr):
    """Tokens of a part of a sequence of n_ctx: `least`, or more where that makes too many parts."""
    return (tl.maximum(least, (n_ctx + most - 1) // most) + BN - 1) // BN * BN


@triton.jit
def _num_parts(n_ctx, least, most, BN: tl.constexpr):
    length = _part_length(n_ctx, least, most, BN)
    return (n_ctx + length - 1) // length


@triton.jit
def _columns(p, o_row, m_row, WIDTH: tl.constexpr, START: tl.constexpr, SIZE: tl.constexpr, BS: tl.constexpr):
    """Columns [START, START + SIZE) of rows of WIDTH values, zeros up to BS of them and in masked rows."""
    o_col = tl.arange(0, BS)
    p_tile = p + o_row[:, None] * WIDTH + START + o_col[None, :]
    if BS > SIZE:
        b = tl.load(p_tile, mask=m_row[:, None] & (o_col < SIZE)[None, :], other=0.0)
    else:
        b = tl.load(p_tile, mask=m_row[:, None], other=0.0)
    return b


@triton.jit
def _parts_kernel(
    p_q, p_turned, p_cache, p_table, p_lens, p_m, p_l, p_acc, token_q, head_q, token_turned, head_turned,
    batch, new, heads, pages, least, most, scale2,
    BB: tl.constexpr, BR: tl.constexpr, BN: tl.constexpr, PAGE: tl.constexpr, C: tl.constexpr, P: tl.constexpr,
    BC: tl.constexpr, BP: tl.constexpr, IP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Every num_programs(0)-th (part of a sequence, tile of its rows): its softmax, not yet divided."""
    tiles = (new * heads + BR - 1) // BR
    o_b = tl.arange(0, BB)
    b_parts = _num_parts(tl.load(p_lens + o_b, mask=o_b < batch, other=0), least, most, BN)
    b_end = tl.cumsum(b_parts, 0)
    o_n = tl.arange(0, BN)
    for item in range(tl.program_id(0), tl.sum(b_parts, 0) * tiles, tl.num_programs(0)):
        # Neighbours read the same part: the second one finds it in the L2 cache.
        i_part = item // tiles
        i_b = tl.sum((b_end <= i_part).to(tl.int32), 0)
        i_s = i_part - tl.sum(tl.where(o_b < i_b, b_parts, 0), 0)
        n_ctx = tl.load(p_lens + i_b)
        length = _part_length(n_ctx, least, most, BN)
        lo, hi = i_s * length, tl.minimum((i_s + 1) * length, n_ctx)
        p_row = p_table + i_b * pages
        o_m = (item % tiles) * BR + tl.arange(0, BR)
        m_m = o_m < new * heads
        b_t = tl.where(m_m, n_ctx - new + o_m // heads, -1)
        o_row = i_b * (new * heads) + o_m
        o_token, o_head = i_b * new + o_m // heads, o_m % heads
        b_qc = _columns(p_q, o_token * token_q + o_head * head_q, m_m, 1, 0, C, BC)
        b_qr = _columns(p_turned, o_token * token_turned + o_head * head_turned, m_m, 1, 0, P, BP)
        b_m = tl.full([BR], float("-inf"), tl.float32)
        b_l = tl.zeros([BN, BR], tl.float32)
        b_acc = tl.zeros([BC, BR], tl.float32)
        page = tl.load(p_row + lo // PAGE)
        for start in tl.range(lo, hi, BN, num_stages=STAGES):
            o_t = start + o_n
            m_t = o_t < n_ctx
            if PAGE % BN == 0:
                o_key = page.to(tl.int64) * PAGE + start % PAGE + o_n
                # Of the next tile, so that no turn waits for it.
                page = tl.load(p_row + tl.minimum(start + BN, hi - 1) // PAGE)
            else:
                o_key = page_rows(p_row, o_t, m_t, PAGE)
            b_c = _columns(p_cache, o_key, m_t, C + P, 0, C, BC)
            b_r = _columns(p_cache, o_key, m_t, C + P, C, P, BP)
            b_s = tl.dot(b_c, tl.trans(b_qc), input_precision=IP)
            b_s = tl.dot(b_r, tl.trans(b_qr), b_s, input_precision=IP)
            b_s = tl.where(o_t[:, None] <= b_t[None, :], b_s * scale2, float("-inf"))
            b_new = tl.maximum(b_m, tl.max(b_s, 0))
            b_safe = tl.where(b_new == float("-inf"), 0.0, b_new)
            b_p = tl.exp2(b_s - b_safe[None, :])
            b_alpha = tl.exp2(b_m - b_safe)
            b_l = b_l * b_alpha[None, :] + b_p
            b_acc = tl.dot(tl.trans(b_c), b_p.to(b_c.dtype), b_acc * b_alpha[None, :], input_precision=IP)
            b_m = b_new
        o_part = o_row.to(tl.int64) * most + i_s
        tl.store(p_m + o_part, b_m, mask=m_m)
        tl.store(p_l + o_part, tl.sum(b_l, 0), mask=m_m)
        o_c = tl.arange(0, BC)
        tl.store(p_acc + o_part[None, :] * C + o_c[:, None], b_acc, mask=m_m[None, :] & (o_c < C)[:, None])


@triton.jit
def _merge_kernel(
    p_m, p_l, p_acc, p_lens, p_o, rows, least, most,
    C: tl.constexpr, BN: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """One query token's head (some columns of it): its parts put together, in order; zeros without a context."""
    i_row = tl.program_id(0).to(tl.int64)
    parts = _num_parts(tl.load(p_lens + i_row // rows), least, most, BN)
    o_s = tl.arange(0, BS)
    m_s = o_s < parts
    o_d = tl.program_id(1) * BD + tl.arange(0, BD)
    m_d = o_d < C
    o_part = i_row * most + o_s
    b_m = tl.load(p_m + o_part, mask=m_s, other=float("-inf"))
    b_l = tl.load(p_l + o_part, mask=m_s, other=0.0)
    b_acc = tl.load(p_acc + o_part[:, None] * C + o_d[None, :], mask=m_s[:, None] & m_d[None, :], other=0.0)
    top = tl.max(b_m, 0)
    b_w = tl.exp2(b_m - tl.where(top == float("-inf"), 0.0, top))
    total = tl.sum(b_w * b_l, 0)
    b_o = tl.sum(b_w[:, None] * b_acc, 0) / tl.where(total == 0.0, 1.0, total)
    tl.store(p_o + i_row * C + o_d, b_o.to(p_o.dtype.element_ty), mask=m_d)


@dataclass(frozen=True, kw_only=True)
class Form:
    """How a launch runs for a number of rows.

    Args:
        rows, tokens: of a tile.
        num_warps, num_stages: of a program.
        programs: on a multiprocessor.
        longest: tokens of a part at most, unless a sequence would have too many of them.
        is_pipelined: by warps of different roles.
    """

    rows: int
    tokens: int
    num_warps: int
    num_stages: int
    programs: int
    longest: int
    is_pipelined: bool = False

    @property
    def num_registers(self) -> int:
        """Of a thread, where one program has them all; the copying warp gives most of its own away."""
        return 232 if self.num_warps == 4 else 168


FORMS: tuple[Form, ...] = (
    Form(rows=16, tokens=32, num_warps=4, num_stages=3, programs=2, longest=1024),
    Form(rows=32, tokens=32, num_warps=4, num_stages=3, programs=2, longest=1024),
    Form(rows=64, tokens=32, num_warps=8, num_stages=3, programs=1, longest=2048),
)
"""For 16-bit numbers, by ascending rows; the last serves any number of them."""
PIPELINED: tuple[Form, ...] = tuple(
    Form(rows=rows, tokens=64, num_warps=warps, num_stages=2, programs=1, longest=longest, is_pipelined=True)
    for rows, warps, longest in ((16, 4, 2048), (32, 4, 2048), (64, 8, 4096))
)
"""The same, where `latent_pipelined.fits`."""
EXACT = Form(rows=16, tokens=16, num_warps=4, num_stages=1, programs=2, longest=1024)
"""For fp32."""
PARTS, MERGE_COLUMNS = 2048, 64
"""Parts of all sequences and tiles of rows together at most, as their results must be kept; columns of a merging
program."""


@lru_cache(maxsize=16)
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


@dataclass(frozen=True, kw_only=True)
class LatentDecodeWorkspace:
    """What a decode step writes besides its output, and how it is shared out.

    Attributes:
        form: of the launch.
        least: tokens of a part at least.
        part_max, part_sum: fp32 [B * Lq * HQ, parts]; part_out: fp32 [B * Lq * HQ, parts, C].
    """

    form: Form
    least: int
    part_max: Tensor
    part_sum: Tensor
    part_out: Tensor

    @classmethod
    def create(cls, q: Tensor, cache: Tensor, *, max_context: int) -> "LatentDecodeWorkspace":
        """Buffers for a batch.

        Args:
            q, cache: like those of the steps.
            max_context: tokens of the longest sequence.
        """
        (batch, query_len, heads, latent), device = q.shape, q.device
        rows, forms = query_len * heads, PIPELINED if fits(cache, latent) else FORMS
        form = next((f for f in forms if f.rows >= rows), forms[-1]) if q.element_size() == 2 else EXACT
        tiles = triton.cdiv(rows, form.rows)
        least = max(64, min(form.longest, 32 * batch * tiles))
        most = min(
            triton.cdiv(max_context, least),
            _multiprocessors(device) * form.programs // tiles,
            PARTS // (batch * tiles),
            128,
        )
        shape = (batch * rows, max(1, most))
        part_max, part_sum = (torch.empty(shape, dtype=torch.float32, device=device) for _ in range(2))
        part_out = torch.empty(*shape, latent, dtype=torch.float32, device=device)
        return cls(form=form, least=least, part_max=part_max, part_sum=part_sum, part_out=part_out)


def _apart(q: Tensor) -> tuple[int, int]:
    """Distances of tokens and heads; that of an axis of one is any number."""
    return q.stride(1 if q.shape[1] > 1 else 0), q.stride(2)


def latent_decode(
    q: Tensor,
    turned: Tensor,
    cache: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    workspace: LatentDecodeWorkspace,
    out: Tensor,
    *,
    scale: float,
) -> Tensor:
    """Attend from the last Lq tokens of every sequence to its pages, causally.

    Args:
        q: [B, Lq, HQ, C], Lq from 1 to 8: queries by the keys' matrix; the B * Lq tokens may be any distance apart, and
            their heads.
        turned: [B, Lq, HQ, P], rotated ones, likewise.
        cache: [pages, page size, 1, C + P], contiguous: latents and rotated keys, those of the Lq tokens among them.
        block_table: int32 [B, pages of a sequence], the page of every page-sized piece of a sequence.
        context_lens: int32 [B], tokens of every sequence, the Lq new ones included; 0 for a place without a
            sequence, whose output is 0. At most what the workspace was made for (unchecked).
        workspace: buffers for this batch, of one step at a time.
        out: [B, Lq, HQ, C], written and returned.
        scale: of the scores.

    Raises:
        ConfigError: Lq outside 1 to 8.
    """
    (batch, query_len, heads, latent), (_, page, _, width) = q.shape, cache.shape
    if not 1 <= query_len <= 8:
        raise ConfigError(f"latent_decode takes 1 to 8 query tokens, got q {tuple(q.shape)}")
    w, form = workspace, workspace.form
    rows, most = query_len * heads, workspace.part_max.shape[1]
    programs = min(_multiprocessors(q.device) * form.programs, batch * most * triton.cdiv(rows, form.rows))
    columns = min(MERGE_COLUMNS, next_power_of_2(latent))
    numbers = (
        block_table, context_lens, w.part_max, w.part_sum, w.part_out,
        *_apart(q), *_apart(turned), batch, query_len, heads, block_table.shape[1], w.least, most,
        scale * LOG2E,
    )  # fmt: skip
    sizes = {
        "BB": max(128, next_power_of_2(batch)), "BR": form.rows, "BN": form.tokens, "PAGE": page, "C": latent,
        "P": width - latent, "STAGES": form.num_stages, "num_warps": form.num_warps,
    }  # fmt: skip
    if form.is_pipelined:
        tiles = sources_of(cache, latent, form.tokens)
        launch_kernel(
            latent_pipelined_kernel, (programs,), q, turned, *tiles, *numbers, W=form.num_warps, maxnreg=form.num_registers, **sizes
        )  # fmt: skip
    else:
        launch_kernel(
            _parts_kernel, (programs,), q, turned, cache, *numbers, BC=max(16, next_power_of_2(latent)),
            BP=max(16, next_power_of_2(width - latent)), IP=precision(q.dtype), **sizes,
        )  # fmt: skip
    launch_kernel(
        _merge_kernel, (batch * rows, triton.cdiv(latent, columns)),
        w.part_max, w.part_sum, w.part_out, context_lens, out, rows, w.least, most,
        C=latent, BN=form.tokens, BS=next_power_of_2(most), BD=columns, num_warps=4 if most > 16 else 1,
    )  # fmt: skip
    return out
