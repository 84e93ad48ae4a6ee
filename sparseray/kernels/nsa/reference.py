"""Native sparse attention in plain PyTorch: the oracle that the kernels and the model are tested against.

Every stage of arXiv 2502.11089 section 3 is one vectorised, differentiable function: compression (eq. 7),
attention over compressed tokens with its log-sum-exp, selection scores (eq. 8-10) and top-n (eq. 11-12),
attention over selected blocks, the sliding window, and the gated sum (eq. 5). Softmax and sums run in fp32,
or in fp64 when the inputs are fp64. Memory grows with Tq x Tk: this is for tests and small models.

Shapes: B batch, T query tokens, S keys, C compressed tokens, N selection blocks, H key/value heads, G query
heads per key/value head, D head size (the size of keys and values may differ).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sparseray.errors import ConfigError
from sparseray.kernels.settings import NSASizes, num_compressed


def _accumulator(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


@dataclass(frozen=True, kw_only=True)
class Compression:
    """Parameters of one compression, as `compress` takes them: the MLP and the position encoding of a block."""

    w1: Tensor
    b1: Tensor | None
    w2: Tensor
    b2: Tensor | None
    pos: Tensor | None


@dataclass(frozen=True, kw_only=True)
class BranchKeys:
    """Keys and values of the three branches, [B, length, H, D | Dv] each; pairs may be the same tensors."""

    k_cmp: Tensor
    v_cmp: Tensor
    k_slc: Tensor
    v_slc: Tensor
    k_win: Tensor
    v_win: Tensor


def compress_reference(
    x_BTHD: Tensor,
    w1_FE: Tensor,
    b1_F: Tensor | None,
    w2_DF: Tensor,
    b2_D: Tensor | None,
    pos_lD: Tensor | None,
    block: int,
    stride: int,
) -> Tensor:
    """Compress overlapping blocks of keys or values to one token each.

    Args:
        x_BTHD: keys or values, [B, T, H, D].
        w1_FE: first layer, [F, block * D]; the input is the block's tokens one after the other.
        b1_F: its bias, [F], or None.
        w2_DF: second layer, [D_out, F].
        b2_D: its bias, [D_out], or None.
        pos_lD: intra-block position encoding, [block, D], added to every block, or None.
        block: tokens per block, l.
        stride: tokens between the starts of neighbouring blocks, d.

    Returns:
        [B, C, H, D_out] with C = max(0, (T - block) // stride + 1), in the dtype of x.

    Source: arXiv 2502.11089 eq. 7; phi is an MLP with exact GELU, shared by the heads.
    """
    B, T, H, D = x_BTHD.shape
    count = num_compressed(T, block, stride)
    if count:
        blocks = x_BTHD.unfold(1, block, stride).permute(0, 1, 2, 4, 3)
    else:
        blocks = x_BTHD[:, :0, :, None, :].expand(B, 0, H, block, D)
    if pos_lD is not None:
        blocks = blocks + pos_lD
    hidden = F.gelu(F.linear(blocks.reshape(B, count, H, block * D), w1_FE, b1_F))
    return F.linear(hidden, w2_DF, b2_D).to(x_BTHD.dtype)


def _grouped(q: Tensor, num_kv_heads: int) -> Tensor:
    B, T, HQ, D = q.shape
    if HQ % num_kv_heads:
        raise ConfigError(f"nsa: {HQ} query heads are not a multiple of {num_kv_heads} key/value heads")
    return q.reshape(B, T, num_kv_heads, HQ // num_kv_heads, D)


def masked_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax attention under a mask; a query that sees nothing gets output 0 and log-sum-exp -inf.

    Args:
        q: [B, T, HQ, D]; k: [B, S, H, D]; v: [B, S, H, Dv].
        mask: bool, broadcastable to [B, T, H, G, S]; True where visible.
        scale: factor of the scores.

    Returns:
        Output [B, T, HQ, Dv], log-sum-exp [B, T, HQ] and probabilities [B, T, H, G, S], all fp32 or fp64.
    """
    q5 = _grouped(_accumulator(q), k.shape[2])
    B, T, H, G, _ = q5.shape
    if k.shape[1] == 0:
        out = (q5.sum(-1, keepdim=True) * 0.0).expand(B, T, H, G, v.shape[-1]) + (
            _accumulator(k).sum() + _accumulator(v).sum()
        ) * 0.0
        lse = q5.new_full((B, T, H * G), float("-inf"))
        return out.reshape(B, T, H * G, v.shape[-1]), lse, q5.new_zeros(B, T, H, G, 0)
    scores = torch.einsum("bthgd,bshd->bthgs", q5, _accumulator(k)) * scale
    scores = scores.masked_fill(~mask, float("-inf"))
    top = scores.amax(-1, keepdim=True).detach()
    top = torch.where(torch.isinf(top), torch.zeros_like(top), top)
    weights = torch.exp(scores - top)
    total = weights.sum(-1, keepdim=True)
    empty = total == 0
    safe = torch.where(empty, torch.ones_like(total), total)
    probs = weights / safe
    out = torch.einsum("bthgs,bshd->bthgd", probs, _accumulator(v))
    lse = torch.where(empty, torch.full_like(safe, float("-inf")), top + safe.log())
    return out.reshape(B, T, H * G, v.shape[-1]), lse.reshape(B, T, H * G), probs


def _positions(length: int, start: int, device: torch.device) -> Tensor:
    return torch.arange(start, start + length, device=device)


def compressed_attention_reference(
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    *,
    block: int,
    stride: int,
    scale: float | None = None,
    q_start: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention over compressed tokens: block i is visible to position t iff i * stride + block - 1 <= t.

    Returns:
        Output [B, T, HQ, Dv], log-sum-exp [B, T, HQ] and probabilities [B, T, H, G, C].

    Source: arXiv 2502.11089 eq. 7-8.
    """
    t = _positions(q.shape[1], q_start, q.device)
    last = torch.arange(k_cmp.shape[1], device=q.device) * stride + block - 1
    mask = (last[None, :] <= t[:, None])[None, :, None, None, :]
    return masked_attention(q, k_cmp, v_cmp, mask, q.shape[-1] ** -0.5 if scale is None else scale)


@torch.no_grad()
def selection_scores_reference(
    probs: Tensor, *, block: int, stride: int, select_block: int, num_blocks: int
) -> Tensor:
    """Importance of every selection block, summed over the query heads of a group.

    With 0-based j: p_slc[j] = sum over m < l'/d and n < l/d of p_cmp[(l'/d) j + m - n], 0 out of range.

    Args:
        probs: compressed probabilities, [B, T, H, G, C].
        num_blocks: number of selection blocks N, ceil(S / select_block).

    Returns:
        [B, T, H, N].

    Source: arXiv 2502.11089 eq. 9-10 (the paper's printed index is 1-based).
    """
    per_block, overlap = select_block // stride, block // stride
    grouped = probs.sum(3)
    right = max(0, per_block * num_blocks - grouped.shape[-1])
    padded = F.pad(grouped, (overlap - 1, right))
    scores = grouped.new_zeros(*grouped.shape[:-1], num_blocks)
    for m in range(per_block):
        for n in range(overlap):
            first = m - n + overlap - 1
            scores += padded[..., first : first + per_block * (num_blocks - 1) + 1 : per_block]
    return scores


@torch.no_grad()
def top_n_reference(
    scores: Tensor,
    *,
    select_block: int,
    num_selected: int,
    num_initial: int = 1,
    num_local: int = 2,
    q_start: int = 0,
) -> Tensor:
    """Select n blocks for every query and key/value head, the first and the local blocks always among them.

    Only blocks that hold a position <= t compete. Ties go to the lower block index.

    Args:
        scores: [B, T, H, N].

    Returns:
        int32 [B, T, H, num_selected]: block indices ascending, padded with -1 where fewer blocks are visible.

    Source: arXiv 2502.11089 eq. 11-12 and section 4.1 (1 initial and 2 local blocks).
    """
    T, N = scores.shape[1], scores.shape[3]
    current = _positions(T, q_start, scores.device)[:, None] // select_block
    j = torch.arange(N, device=scores.device)[None, :]
    visible = j <= current
    forced = visible & ((j < num_initial) | (j > current - num_local))
    keys = scores.masked_fill(forced[None, :, None, :], float("inf"))
    keys = keys.masked_fill(~visible[None, :, None, :], -1.0)
    values, order = keys.sort(dim=-1, descending=True, stable=True)
    kept = order[..., :num_selected].masked_fill(values[..., :num_selected] < 0, N)
    if kept.shape[-1] < num_selected:
        kept = F.pad(kept, (0, num_selected - kept.shape[-1]), value=N)
    kept = kept.sort(dim=-1).values
    return kept.masked_fill(kept >= N, -1).int()


def selected_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    *,
    select_block: int,
    scale: float | None = None,
    q_start: int = 0,
) -> tuple[Tensor, Tensor]:
    """Attention over the selected blocks, causal inside a block.

    Args:
        indices: int32 [B, T, H, n], -1 for an unused slot.

    Returns:
        Output [B, T, HQ, Dv] and log-sum-exp [B, T, HQ].
    """
    B, T, H, _ = indices.shape
    S = k.shape[1]
    num_blocks = -(-S // select_block)
    slot = torch.where(indices < 0, torch.full_like(indices, num_blocks), indices).long()
    chosen = torch.zeros(B, T, H, num_blocks + 1, dtype=torch.bool, device=q.device).scatter_(-1, slot, True)
    keys = torch.arange(S, device=q.device)
    mask = chosen[..., keys // select_block]
    mask = mask & (keys[None, :] <= _positions(T, q_start, q.device)[:, None])[None, :, None, :]
    out, lse, _ = masked_attention(
        q, k, v, mask[:, :, :, None, :], q.shape[-1] ** -0.5 if scale is None else scale
    )
    return out, lse


def window_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    scale: float | None = None,
    q_start: int = 0,
    win_start: int = 0,
) -> tuple[Tensor, Tensor]:
    """Attention over positions [t - window + 1, t]; the first key of k has position win_start.

    Returns:
        Output [B, T, HQ, Dv] and log-sum-exp [B, T, HQ].
    """
    t = _positions(q.shape[1], q_start, q.device)[:, None]
    s = _positions(k.shape[1], win_start, q.device)[None, :]
    mask = ((s <= t) & (s > t - window))[None, :, None, None, :]
    out, lse, _ = masked_attention(q, k, v, mask, q.shape[-1] ** -0.5 if scale is None else scale)
    return out, lse


def select_reference(
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    num_keys: int,
    sizes: NSASizes,
    *,
    scale: float | None = None,
    q_start: int = 0,
) -> tuple[Tensor, Tensor]:
    """Compressed attention and the block indices it selects.

    Args:
        q: queries [B, Tq, HQ, D] at positions q_start .. q_start + Tq - 1.
        k_cmp, v_cmp: compressed tokens [B, C, H, D | Dv].
        num_keys: keys of the selection branch.
        scale: factor of the scores; D ** -0.5 by default.

    Returns:
        Output of the compressed branch [B, T, HQ, Dv] and indices int32 [B, T, H, num_selected].
    """
    out, _, probs = compressed_attention_reference(
        q, k_cmp, v_cmp, block=sizes.block, stride=sizes.stride, scale=scale, q_start=q_start
    )
    scores = selection_scores_reference(
        probs.detach(),
        block=sizes.block,
        stride=sizes.stride,
        select_block=sizes.select_block,
        num_blocks=-(-num_keys // sizes.select_block),
    )
    indices = top_n_reference(
        scores,
        select_block=sizes.select_block,
        num_selected=sizes.num_selected,
        num_initial=sizes.num_initial,
        num_local=sizes.num_local,
        q_start=q_start,
    )
    return out, indices


def nsa_attention_reference(
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
    scale: float | None = None,
    q_start: int = 0,
    win_start: int = 0,
) -> Tensor:
    """Native sparse attention: the gated sum of the compressed, selected and window branches.

    Args:
        q: queries [B, Tq, HQ, D] at positions q_start .. q_start + Tq - 1.
        k_cmp, v_cmp: compressed tokens [B, C, H, D | Dv], from position 0 (`compress_reference`).
        k_slc, v_slc: keys and values of the selection branch [B, S, H, D | Dv], S >= q_start + Tq.
        k_win, v_win: keys and values of the window branch; the first has position win_start.
        gates: [B, Tq, HQ, 3] in [0, 1], in the order compressed, selected, window.
        scale: factor of the scores; D ** -0.5 by default.

    Returns:
        [B, Tq, HQ, Dv] in the dtype of q.

    Source: arXiv 2502.11089 eq. 5 and sections 3.3.1 to 3.3.3.
    """
    out_cmp, indices = select_reference(q, k_cmp, v_cmp, k_slc.shape[1], sizes, scale=scale, q_start=q_start)
    out_slc, _ = selected_attention_reference(
        q, k_slc, v_slc, indices, select_block=sizes.select_block, scale=scale, q_start=q_start
    )
    out_win, _ = window_attention_reference(
        q, k_win, v_win, window=sizes.window, scale=scale, q_start=q_start, win_start=win_start
    )
    g = _accumulator(gates)
    out = g[..., 0:1] * out_cmp + g[..., 1:2] * out_slc + g[..., 2:3] * out_win
    return out.to(q.dtype)
