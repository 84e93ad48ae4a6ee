"""`nsa_attention`: native sparse attention by Triton kernels, differentiable; `nsa_layer`: with the compression.

One call runs the compressed branch, scores and selects blocks, reads the selected blocks and the window, and
adds the three under their gates. Everything is packed [tokens, heads, D] inside; a batch of equal lengths,
packed sequences and a chunk of queries against longer keys share the kernels. No host synchronisation, no
atomics: the same inputs give the same bits. Source: arXiv 2502.11089 section 3.
"""

from typing import Any

import torch
from torch import Tensor

from sparseray.errors import ConfigError
from sparseray.kernels.nsa.branches import Blocks, Window, forced_blocks, forward_branches, window_branch
from sparseray.kernels.nsa.compress import block_tables, compress, num_packed
from sparseray.kernels.nsa.gates import prepare_backward
from sparseray.kernels.nsa.geometry import (
    COMPRESSED,
    KEYS,
    WINDOW,
    Geometry,
    packed,
    query_positions,
    uniform,
)
from sparseray.kernels.nsa.inverse import pays_by_block
from sparseray.kernels.nsa.range_backward import range_backward
from sparseray.kernels.nsa.range_forward import range_forward
from sparseray.kernels.nsa.reference import Compression
from sparseray.kernels.nsa.selected_backward import selected_backward
from sparseray.kernels.nsa.top_n import select_blocks
from sparseray.kernels.settings import NSASizes


def _forward(
    q: Tensor, k_cmp: Tensor, v_cmp: Tensor, k_slc: Tensor, v_slc: Tensor, k_win: Tensor, v_win: Tensor,
    gates: Tensor, geometry: Geometry, sizes: Blocks, won: Window | None, *, keep: bool,
) -> tuple[Tensor, tuple[Tensor | None, ...]]:  # fmt: skip
    """Output, and what the backward needs."""
    shape = q.shape
    q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates = (
        _packed(x) for x in (q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates)
    )
    if won is None:
        won = window_branch(q, (k_win, v_win), (k_slc, v_slc), geometry, sizes)
    found = forward_branches(q, (k_cmp, v_cmp), (k_slc, v_slc), gates, won, geometry, sizes, keep=keep)
    saved = (q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates, *found.outs, *found.lses, found.index)
    return found.sum.view(*shape[:3], -1), saved


class _Nsa(torch.autograd.Function):
    """[B, tokens, heads, D] in and out; packed in here, where views cost no node of the graph."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k_cmp: Tensor, v_cmp: Tensor, k_slc: Tensor, v_slc: Tensor, k_win: Tensor,
        v_win: Tensor, gates: Tensor, geometry: Geometry, sizes: Blocks, won: Window | None,
    ) -> Tensor:  # fmt: skip
        tensors = (q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates)
        out, saved = _forward(*tensors, geometry, sizes, won, keep=True)
        ctx.save_for_backward(*saved)
        ctx.geometry, ctx.sizes, ctx.shapes = geometry, sizes, [x.shape for x in tensors]
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates, *saved = ctx.saved_tensors
        o_cmp, o_slc, o_win, lse_cmp, lse_slc, lse_win, index = saved
        geometry, b = ctx.geometry, ctx.sizes
        do = grads[0].flatten(0, 1).contiguous()
        row_lse, row_dg, dgates = prepare_backward(
            do, (o_cmp, o_slc, o_win), (lse_cmp, lse_slc, lse_win), gates
        )
        del saved, o_cmp, o_slc, o_win
        # By block, the pairs' kernel makes dq with dk and dv, of all blocks.
        by_pair = pays_by_block(q.shape[1] // k_slc.shape[1])
        forced = None if by_pair else forced_blocks(q, (k_win, v_win), (k_slc, v_slc), geometry, b)
        dq = torch.empty_like(q)
        if index is None:
            dk_slc, dv_slc = range_backward(
                q, k_slc, v_slc, do, row_lse[1], row_dg[1], dq, geometry, kind=KEYS, block=1, stride=1, window=0,
                scale=b.scale, add=False,
            )  # fmt: skip
        else:
            dk_slc, dv_slc = selected_backward(
                q, k_slc, v_slc, do, row_lse[1], row_dg[1], dq, index, query_positions(geometry), geometry,
                select_block=b.select_block, scale=b.scale, add=False, forced=forced,
            )  # fmt: skip
        dk_cmp, dv_cmp = range_backward(
            q, k_cmp, v_cmp, do, row_lse[0], row_dg[0], dq, geometry, kind=COMPRESSED, block=b.block,
            stride=b.stride, window=0, scale=b.scale, add=True,
        )  # fmt: skip
        dk_win, dv_win = range_backward(
            q, k_win, v_win, do, row_lse[2], row_dg[2], dq, geometry, kind=WINDOW, block=1, stride=1,
            window=b.window, scale=b.scale, add=True,
            forced=None if forced is None else (forced, row_lse[1], row_dg[1]),
        )  # fmt: skip
        found = (dq, dk_cmp, dv_cmp, dk_slc, dv_slc, dk_win, dv_win, dgates)
        return *(x.view(shape) for x, shape in zip(found, ctx.shapes)), None, None, None


def _run(*args: Any) -> Tensor:
    """`_Nsa`, or only its forward where no gradient is wanted: that takes the host less time."""
    out: Tensor = _Nsa.apply(*args) if torch.is_grad_enabled() else _forward(*args, keep=False)[0]
    return out


def _packed(x: Tensor) -> Tensor:
    return x.flatten(0, 1).contiguous()


def _geometry(
    q: Tensor, num_cmp: int, k_slc: Tensor, k_win: Tensor, cu_seqlens: Tensor | None, sizes: NSASizes, q_start: int,
    win_start: int,
) -> Geometry:  # fmt: skip
    """Check that shapes fit together; num_cmp counts the compressed tokens of a sequence, or of all packed ones
    together."""
    (batch, queries, heads), num_kv = q.shape[:3], k_slc.shape[2]
    reach = q_start + (0 if cu_seqlens is not None else queries)
    if heads % num_kv or heads // num_kv > 64 or k_slc.shape[1] < reach:
        raise ConfigError(
            f"nsa: q {tuple(q.shape)} from position {q_start} does not fit k_slc {tuple(k_slc.shape)}: the"
            " query heads must be 1 to 64 times the key heads, and the keys must reach the last query"
        )
    if cu_seqlens is None:
        return uniform(batch, queries, num_cmp, k_slc.shape[1], k_win.shape[1], q_start, win_start, q.device)
    if batch != 1 or q_start or win_start or not queries == k_slc.shape[1] == k_win.shape[1]:
        raise ConfigError(
            f"nsa: cu_seqlens needs packed tensors of batch 1 and no q_start or win_start, got q"
            f" {tuple(q.shape)}, k_slc {tuple(k_slc.shape)}, k_win {tuple(k_win.shape)}, {q_start=}, {win_start=}"
        )
    return packed(cu_seqlens, queries, num_cmp, sizes.block, sizes.stride)


def nsa_attention(
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    k_slc: Tensor,
    v_slc: Tensor,
    k_win: Tensor,
    v_win: Tensor,
    gates: Tensor,
    sizes: NSASizes,
    *,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
    q_start: int = 0,
    win_start: int = 0,
) -> Tensor:
    """Native sparse attention on a GPU (or in Triton's interpreter).

    Args:
        q: [B, Tq, HQ, D], fp16, bf16 or fp32, on one device with everything else.
        k_cmp, v_cmp: compressed tokens, [B, C, H, D | Dv]; HQ is 1 to 64 times H.
        k_slc, v_slc: keys and values of the selection branch, [B, S, H, D | Dv], S >= q_start + Tq.
        k_win, v_win: keys and values of the window branch; the first has position win_start. The three
            pairs may be the same tensors.
        gates: [B, Tq, HQ, 3], in [0, 1], in the order compressed, selected, window.
        cu_seqlens: int [N + 1] with B = 1: boundaries of packed sequences; the compressed tokens of the
            sequences follow each other too, max(0, (T - block) // stride + 1) for a sequence of T tokens.
        scale: factor of the scores; D ** -0.5 by default.
        q_start: position of the first query, for a chunk against longer keys.

    Returns:
        [B, Tq, HQ, Dv] in the dtype of q.

    Raises:
        ConfigError: shapes that do not fit together.

    Source: arXiv 2502.11089 eq. 5 to 12.
    """
    blocks = Blocks.of(sizes, scale, q.shape[-1])
    geometry = _geometry(q, k_cmp.shape[1], k_slc, k_win, cu_seqlens, sizes, q_start, win_start)
    return _run(q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates, geometry, blocks, None)


def nsa_layer(
    q: Tensor,
    k_raw: Tensor,
    v_raw: Tensor,
    k_slc: Tensor,
    v_slc: Tensor,
    k_win: Tensor,
    v_win: Tensor,
    gates: Tensor,
    sizes: NSASizes,
    *,
    keys: Compression,
    values: Compression,
    cu_seqlens: Tensor | None = None,
    num_blocks: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """Compress keys and values, then `nsa_attention`; equal to the three calls.

    The window, which needs no compressed tokens, is launched first: at short lengths it covers the time that the
    host takes for the compressions' launches.

    Args:
        k_raw, v_raw: [B, T, H, D | Dv], what is compressed.
        keys, values: how.
        num_blocks: compressed tokens of all packed sequences together, as in `compress`.
        others: as in `nsa_attention`.

    Returns:
        [B, T, HQ, Dv] in the dtype of q.

    Raises:
        ConfigError: as `nsa_attention` and `compress`.
    """
    blocks = Blocks.of(sizes, scale, q.shape[-1])
    batch, tokens = k_raw.shape[:2]
    if cu_seqlens is None:
        count = sizes.num_compressed(tokens)
    else:
        count = num_packed(cu_seqlens, sizes.block, sizes.stride) if num_blocks is None else num_blocks
    geometry = _geometry(q, count, k_slc, k_win, cu_seqlens, sizes, 0, 0)
    # What is packed twice, for the window and for the rest, is copied once at most.
    q, k_slc, v_slc, k_win, v_win = (x.contiguous() for x in (q, k_slc, v_slc, k_win, v_win))
    with torch.no_grad():
        win, slc = (_packed(k_win), _packed(v_win)), (_packed(k_slc), _packed(v_slc))
        won = window_branch(_packed(q), win, slc, geometry, blocks)
    tables = block_tables(
        batch, tokens, sizes.block, sizes.stride, q.device, cu_seqlens=cu_seqlens, num_blocks=count
    )
    k_cmp, v_cmp = (
        compress(x, mlp.w1, mlp.b1, mlp.w2, mlp.b2, mlp.pos, sizes.block, sizes.stride, tables=tables)
        for x, mlp in ((k_raw, keys), (v_raw, values))
    )
    return _run(q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates, geometry, blocks, won)


@torch.no_grad()
def nsa_selection(
    q: Tensor, k_cmp: Tensor, num_keys: int, sizes: NSASizes, *, scale: float | None = None, q_start: int = 0
) -> Tensor:
    """The blocks that `nsa_attention` would select, for people who watch.

    Args:
        q: [B, Tq, HQ, D]; k_cmp: [B, C, H, D].
        num_keys: keys of the selection branch, from position 0.
        scale, q_start: as in `nsa_attention`.

    Returns:
        int32 [B, Tq, H, num_selected], ascending, -1 where fewer blocks are visible.
    """
    blocks = Blocks.of(sizes, scale, q.shape[-1])
    batch, queries = q.shape[:2]
    geometry = uniform(batch, queries, k_cmp.shape[1], num_keys, queries, q_start, 0, q.device)
    packed_q, packed_k = _packed(q), _packed(k_cmp)
    _, lse = range_forward(
        packed_q, packed_k, packed_k, geometry, kind=COMPRESSED, block=blocks.block, stride=blocks.stride, window=0,
        scale=blocks.scale,
    )  # fmt: skip
    index = select_blocks(
        packed_q, packed_k, lse, geometry, block=blocks.block, stride=blocks.stride,
        select_block=blocks.select_block, num_selected=blocks.num_selected, num_initial=blocks.num_initial,
        num_local=blocks.num_local, scale=blocks.scale,
    )  # fmt: skip
    return index.view(batch, queries, k_cmp.shape[2], blocks.num_selected)
