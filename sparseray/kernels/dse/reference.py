"""Plain PyTorch ops of DSE (Deep Sparse Embedding, released as Engram): the oracle of its kernels.

Token n-grams are hashed to table rows, the rows pass a gate controlled by the hidden state and a
short causal convolution; row gradients are summed per row and applied by a row-wise Adam.
Follows arXiv 2601.07372 sections 2.2 and 2.3 and, where they differ, its released code.

Shapes: B sequences, T tokens, N rows per token (orders x heads), C channels, R rows, D row width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

SIGNED_SQRT_FLOOR = 1e-6


def _previous(tokens_BT: Tensor, history_BL: Tensor, distance: int) -> Tensor:
    """The tokens `distance` positions earlier, taken from the history where they precede the chunk."""
    T = tokens_BT.shape[1]
    return torch.cat([history_BL, tokens_BT], dim=1)[:, history_BL.shape[1] - distance :][:, :T]


def ngram_hash(
    tokens_BT: Tensor,
    *,
    multipliers: Sequence[int],
    orders: Sequence[int],
    primes: Sequence[Sequence[int]],
    offsets: Sequence[Sequence[int]],
    pad: int,
    history_BL: Tensor | None = None,
    document_starts_BT: Tensor | None = None,
) -> Tensor:
    """Address the table rows of every token's suffix n-grams, for one DSE layer.

    mix_n = x_t * m_0 XOR x_{t-1} * m_1 XOR ... (n terms, int64, never negative);
    row = mix_n mod prime[n][head] + offset[n][head].

    Args:
        tokens_BT: int64 compressed token ids, 0 <= id < V' (the layout bounds id * multiplier by 2^63).
        multipliers: odd, one per look-back distance, max(orders) of them.
        orders: n-gram lengths, rising, for instance (2, 3).
        primes: [orders][heads], rows of each head's table.
        offsets: [orders][heads], first row of each head's table in the layer's table.
        pad: compressed pad id, read where an n-gram would reach before its sequence or document.
        history_BL: the max(orders)-1 compressed tokens before the chunk; positions that belong to an
            earlier document hold `pad`. None at a sequence's start.
        document_starts_BT: bool, True at a document's first token; look-back stops there. None: never.

    Returns:
        int64 rows [B, T, N] in (order, head) order.

    Source: arXiv 2601.07372 section 2.2; multipliers and primes as in the released code.
    """
    longest = max(orders)
    B, T = tokens_BT.shape
    if history_BL is None:
        history_BL = torch.full((B, longest - 1), pad, dtype=torch.int64, device=tokens_BT.device)
    history_BL = history_BL[:, history_BL.shape[1] - (longest - 1) :]
    blocked_BT = torch.zeros(B, T, dtype=torch.bool, device=tokens_BT.device)
    mix_BT = tokens_BT * multipliers[0]
    rows: list[Tensor] = []
    for distance in range(1, longest):
        if document_starts_BT is not None:
            shift = distance - 1
            blocked_BT = blocked_BT | F.pad(document_starts_BT, (shift, 0))[:, :T]
        previous_BT = _previous(tokens_BT, history_BL, distance).masked_fill(blocked_BT, pad)
        mix_BT = mix_BT ^ (previous_BT * multipliers[distance])
        if distance + 1 in orders:
            index = list(orders).index(distance + 1)
            rows += [mix_BT % p + o for p, o in zip(primes[index], offsets[index])]
    return torch.stack(rows, dim=-1)


def rms_norm(x: Tensor, weight_C: Tensor | None, eps: float) -> Tensor:
    """Root-mean-square norm over the last axis, computed and returned in fp32."""
    x = x.float()
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return x if weight_C is None else x * weight_C.float()


def signed_sqrt(x: Tensor) -> Tensor:
    """sign(x) * sqrt(max(|x|, 1e-6)); its gradient is zero inside the clamp, as in the released code."""
    return x.abs().clamp_min(SIGNED_SQRT_FLOOR).sqrt() * x.sign()


def context_gate(
    h_BTC: Tensor,
    k_BTC: Tensor,
    v_BTC: Tensor,
    h_norm_C: Tensor | None = None,
    k_norm_C: Tensor | None = None,
    *,
    eps: float,
) -> Tensor:
    """Gate the memory's value by how well its key matches the hidden state.

    Args:
        h_BTC: hidden states before the layer.
        k_BTC: keys, projected from the rows.
        v_BTC: values, projected from the rows.
        h_norm_C, k_norm_C: RMSNorm weights; None means ones.
        eps: of both norms.

    Returns:
        sigmoid(signed_sqrt(norm(h) . norm(k) / sqrt(C))) * v, in v's dtype, computed in fp32.

    Source: arXiv 2601.07372 eq. 4, with the signed square root of the released code.
    """
    score_BT1 = (rms_norm(h_BTC, h_norm_C, eps) * rms_norm(k_BTC, k_norm_C, eps)).sum(-1, keepdim=True)
    gate_BT1 = torch.sigmoid(signed_sqrt(score_BT1 * h_BTC.shape[-1] ** -0.5))
    return (gate_BT1 * v_BTC.float()).to(v_BTC.dtype)


def short_conv(
    x_BTC: Tensor,
    weight_CK: Tensor,
    *,
    dilation: int = 1,
    history_BLC: Tensor | None = None,
    document_starts_BT: Tensor | None = None,
) -> Tensor:
    """Depthwise causal convolution: y_t = sum_j weight[:, K-1-j] * x_{t - j*dilation}.

    Args:
        x_BTC: input; weight_CK: one kernel per channel, the last tap at the current token.
        dilation: distance between taps.
        history_BLC: the (K-1)*dilation inputs before the chunk, zero where they belong to an earlier
            document; None means zeros (a sequence's start).
        document_starts_BT: bool; taps do not reach before a document's first token. None: they do.

    Returns:
        y_BTC in x's dtype; summed in fp32 from the nearest tap to the farthest.

    Source: arXiv 2601.07372 section 2.3.
    """
    B, T, C = x_BTC.shape
    K = weight_CK.shape[1]
    reach = (K - 1) * dilation
    if history_BLC is None:
        history_BLC = x_BTC.new_zeros(B, reach, C)
    padded = torch.cat([history_BLC[:, history_BLC.shape[1] - reach :].to(x_BTC.dtype), x_BTC], dim=1).float()
    segment_BP = None
    if document_starts_BT is not None:
        segment_BP = F.pad(document_starts_BT.long().cumsum(1), (reach, 0))
    y_BTC = torch.zeros(B, T, C, dtype=torch.float32, device=x_BTC.device)
    for j in range(K):
        start = reach - j * dilation
        tap_BTC = padded[:, start : start + T]
        if segment_BP is not None:
            same_BT = segment_BP[:, start : start + T] == segment_BP[:, reach:]
            tap_BTC = tap_BTC.masked_fill(~same_BT[..., None], 0.0)
        y_BTC = y_BTC + tap_BTC * weight_CK[:, K - 1 - j].float()
    return y_BTC.to(x_BTC.dtype)


@dataclass(frozen=True, kw_only=True)
class Fusion:
    """What a memory layer learns besides its projections, and the constants of its fusion.

    Attributes:
        query_norm_C, key_norm_C, value_norm_C: weights of the norms of the hidden state, of the key, and of the
            gated value before the convolution.
        conv_CK: one kernel per channel, the last tap at the current token; `dilation` between taps.
        gate_eps: of the norms of hidden state and key; conv_eps: of the convolution's norm.
    """

    query_norm_C: Tensor
    key_norm_C: Tensor
    value_norm_C: Tensor
    conv_CK: Tensor
    dilation: int
    gate_eps: float
    conv_eps: float


def memory_output(
    h_BTC: Tensor,
    k_BTC: Tensor,
    v_BTC: Tensor,
    fusion: Fusion,
    *,
    document_starts_BT: Tensor | None = None,
) -> Tensor:
    """The whole memory branch: v~ = gate * v; returns SiLU(conv(norm(v~))) + v~ (to be added to h).

    Args:
        h_BTC: hidden states before the layer.
        k_BTC, v_BTC: keys and values, projected from the rows.
        fusion: weights and constants.
        document_starts_BT: bool; the convolution does not reach before a document's first token. None: it does.

    Source: arXiv 2601.07372 eq. 4 and 5.
    """
    norm_C = fusion.value_norm_C.float()
    gated_BTC = context_gate(h_BTC, k_BTC, v_BTC, fusion.query_norm_C, fusion.key_norm_C, eps=fusion.gate_eps)
    normed_BTC = F.rms_norm(gated_BTC.float(), norm_C.shape, norm_C, fusion.conv_eps)
    conv_BTC = short_conv(
        normed_BTC, fusion.conv_CK, dilation=fusion.dilation, document_starts_BT=document_starts_BT
    )
    return (F.silu(conv_BTC) + gated_BTC.float()).to(v_BTC.dtype)


def segment_sum_rows(rows_N: Tensor, grads_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Sum the gradients of equal rows, each row's terms in order of position.

    Args:
        rows_N: int64 row of each gradient, any order, with repeats.
        grads_ND: fp32.

    Returns:
        (unique rows int64, rising; their sums fp32 [U, D]).
    """
    unique_U, inverse_N = torch.unique(rows_N, sorted=True, return_inverse=True)
    sums_UD = torch.zeros(unique_U.numel(), grads_ND.shape[1], dtype=torch.float32, device=grads_ND.device)
    order_N = torch.sort(inverse_N, stable=True).indices
    counts_U = torch.bincount(inverse_N, minlength=unique_U.numel())
    first_U = counts_U.cumsum(0) - counts_U
    for step in range(int(counts_U.max()) if counts_U.numel() else 0):
        live_L = torch.nonzero(counts_U > step).squeeze(1)
        terms_LD = grads_ND[order_N[first_U[live_L] + step]].float()
        sums_UD[live_L] = sums_UD[live_L] + terms_LD if step else terms_LD
    return unique_U, sums_UD


def rowwise_adam_(
    weight_RD: Tensor,
    m_RD: Tensor,
    v_R: Tensor,
    t_R: Tensor,
    rows_U: Tensor,
    grads_UD: Tensor,
    *,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.95,
    eps: float = 1e-8,
) -> None:
    """Apply Adam with one second moment per row, in place, to the given rows only.

    Args:
        weight_RD, m_RD: fp32 table and first moment.
        v_R: fp32, decayed mean of the row's mean squared gradient.
        t_R: int64 (or int32) updates seen by each row; bias correction uses it.
        rows_U: int64 unique rows; grads_UD: fp32 summed gradients of these rows.
        lr, beta1, beta2, eps: as in Adam; no weight decay.

    Source: row-wise Adam with full first moment; the paper trains its tables with Adam without decay.
    """
    step_U = t_R[rows_U] + 1
    t_R[rows_U] = step_U
    m_UD = m_RD[rows_U] * beta1 + grads_UD * (1 - beta1)
    v_U = v_R[rows_U] * beta2 + grads_UD.square().mean(1) * (1 - beta2)
    m_RD[rows_U] = m_UD
    v_R[rows_U] = v_U
    correction1_U = 1 - beta1 ** step_U.double()
    correction2_U = 1 - beta2 ** step_U.double()
    denominator_U = (v_U.double() / correction2_U).sqrt() + eps
    rate_U = (lr / correction1_U / denominator_U).float()
    weight_RD[rows_U] = weight_RD[rows_U] - rate_U[:, None] * m_UD
