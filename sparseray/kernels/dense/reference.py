"""Dense operations in plain PyTorch, any dtype and device: the oracles of the kernels in this folder.

Shapes: R rows (tokens), H hidden, V vocabulary, I inner width, N heads, D channels of a head.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def head_loss_reference(hidden_RH: Tensor, weight_VH: Tensor, targets_R: Tensor, weights_R: Tensor) -> Tensor:
    """Sum over rows of weight * (logsumexp of the logits - the target's logit); targets below 0 do not count.

    Args:
        hidden_RH, weight_VH: one dtype.
        targets_R: int64.
        weights_R: float.
    """
    logits_RV = F.linear(hidden_RH, weight_VH)
    logits_RV = logits_RV.to(torch.promote_types(logits_RV.dtype, torch.float32))
    losses_R = F.cross_entropy(logits_RV, targets_R.clamp(min=-1), ignore_index=-1, reduction="none")
    return (losses_R * weights_R).sum()


def rms_norm_reference(x: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean of x^2 + eps) * weight over the last axis, in at least fp32. Source: arXiv 1910.07467."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * rstd * weight_H.to(wide.dtype)).to(x.dtype)


def rope_reference(x_RND: Tensor, cos_RC: Tensor, sin_RC: Tensor, *, is_interleaved: bool) -> Tensor:
    """Rotary position encoding of all heads. Source: arXiv 2104.09864.

    Args:
        x_RND: D = 2 C.
        cos_RC, sin_RC: at the rows' positions.
        is_interleaved: channel 2i is paired with 2i + 1 (DeepSeek's MLA), otherwise i with i + C.
    """
    wide = x_RND.to(torch.promote_types(x_RND.dtype, torch.float32))
    axis = -1 if is_interleaved else -2
    pairs = wide.unflatten(-1, (-1, 2) if is_interleaved else (2, -1))
    first, second = pairs.unbind(axis)
    cos, sin = cos_RC[:, None].to(wide.dtype), sin_RC[:, None].to(wide.dtype)
    turned = torch.stack([first * cos - second * sin, second * cos + first * sin], dim=axis)
    return turned.flatten(-2).to(x_RND.dtype)


def swiglu_reference(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of [..., 2I], gate first. Source: arXiv 2002.05202."""
    gate, up = gate_up.to(torch.promote_types(gate_up.dtype, torch.float32)).chunk(2, dim=-1)
    return (F.silu(gate) * up).to(gate_up.dtype)


def adamw_reference(
    master: Tensor, first: Tensor, second: Tensor, gradient: Tensor, *, scale: float | Tensor, lr: float,
    betas: tuple[float, float], eps: float, weight_decay: float, step: int,
) -> None:  # fmt: skip
    """One update in place, moments and master in at least fp32. Source: arXiv 1711.05101, algorithm 2.

    Args:
        scale: what the gradient is multiplied with first.
        step: of this update, from 1 on.
    """
    g = gradient.to(master.dtype) * scale
    master.mul_(1.0 - lr * weight_decay)
    m = betas[0] * first.to(master.dtype) + (1.0 - betas[0]) * g
    v = betas[1] * second.to(master.dtype) + (1.0 - betas[1]) * g * g
    root = math.sqrt(1.0 - betas[1] ** step)
    master.sub_(lr / (1.0 - betas[0] ** step) * m / (v.sqrt() / root + eps))
    first.copy_(m)
    second.copy_(v)


def squared_norms_reference(tensors: Sequence[Tensor], rows: Sequence[int]) -> Tensor:
    """Sum of the squares of every tensor's rows, one after another, summed in fp64 and rounded to fp32.

    Args:
        tensors: any shapes.
        rows: into how many equal rows each is cut.
    """
    parts = [x.reshape(r, -1).double().square().sum(1) for x, r in zip(tensors, rows)]
    return torch.cat(parts).float()


def embedding_grad_reference(ids_R: Tensor, grads_RH: Tensor, num_rows: int) -> Tensor:
    """Sum of the gradients of each id, [num_rows, H], added in order of position; ids below 0 do not count."""
    wide = grads_RH.to(torch.promote_types(grads_RH.dtype, torch.float32))
    out = wide.new_zeros(num_rows, wide.shape[1])
    for row, index in enumerate(ids_R.tolist()):
        if index >= 0:
            out[index] += wide[row]
    return out


def paged_attention_reference(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, context_lens: Tensor, *, scale: float
) -> Tensor:
    """Causal attention of the last Lq tokens of each sequence to its pages; zeros where the context is empty.

    Args:
        q: [B, Lq, HQ, D]; k_cache: [pages, page, H, D]; v_cache: [pages, page, H, Dv].
        block_table: int [B, pages of a sequence]; context_lens: int [B], the Lq new tokens included.
    """
    (batch, new, heads, _), num_kv = q.shape, k_cache.shape[2]
    out = q.new_zeros(batch, new, heads, v_cache.shape[3])
    for b, length in enumerate(context_lens.tolist()):
        if length == 0:
            continue
        pages = block_table[b, : -(-length // k_cache.shape[1])].long()
        k, v = (c[pages].flatten(0, 1)[:length] for c in (k_cache, v_cache))
        k, v = (x.repeat_interleave(heads // num_kv, dim=1) for x in (k, v))
        scores = torch.einsum("qhd,thd->hqt", q[b], k) * scale
        positions = length - new + torch.arange(new, device=q.device)
        hidden = torch.arange(length, device=q.device)[None, :] > positions[:, None]
        out[b] = torch.einsum("hqt,thd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)
    return out
