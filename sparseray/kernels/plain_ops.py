"""`PlainOps`: the operations of `Ops` in plain PyTorch but for those over pages (paged_plain_ops.py).

What a sequence computes in serving has the same bits whatever else is in the call: products run on blocks of 32 to 128
rows, which CPU libraries sum in one order; the rest is per row, without scalar remainders of vector loops; shapes as in ops.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sparseray.errors import ConfigError
from sparseray.kernels.dense.reference import adamw_reference, squared_norms_reference
from sparseray.kernels.dse.reference import Fusion, context_gate, ngram_hash, short_conv
from sparseray.kernels.held_ops import PlainHeldOps
from sparseray.kernels.moe.expert_sum import expert_sum
from sparseray.kernels.moe.reference import expert_rows, route, shares_and_means, stable_topk
from sparseray.kernels.nsa.masked import nsa_attention_masked
from sparseray.kernels.nsa.reference import BranchKeys, Compression, compress_reference, select_reference
from sparseray.kernels.row_ops import PlainRowOps
from sparseray.kernels.settings import ROW_BLOCK, ROW_PADDING, NSASizes, padded


class PlainOps(PlainRowOps, PlainHeldOps):
    """See `Ops` for what each operation does."""

    chunks_keep_bits = False
    row_padding = ROW_PADDING
    expands_latents = False

    def linear(self, x_RI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, *, invariant: bool) -> Tensor:
        if not invariant or x_RI.shape[0] <= ROW_BLOCK or x_RI.is_cuda:
            return F.linear(x_RI, weight_OI, bias_O)
        return torch.cat([F.linear(block, weight_OI, bias_O) for block in torch.split(x_RI, ROW_BLOCK)])

    def add_linear(self, y_RO: Tensor, x_RI: Tensor, weight_OI: Tensor, *, invariant: bool) -> Tensor:
        return y_RO + self.linear(x_RI, weight_OI, None, invariant=invariant)

    def linear_by_head(self, x_RQI: Tensor, weight_QOI: Tensor) -> Tensor:
        heads = zip(x_RQI.unbind(1), weight_QOI.unbind(0))
        return torch.stack([self.linear(x, weight, None, invariant=True) for x, weight in heads], 1)

    def embedding(self, tokens_R: Tensor, weight_VH: Tensor) -> Tensor:
        return F.embedding(tokens_R, weight_VH)

    def rms_norm(self, x: Tensor, weight_H: Tensor, eps: float) -> Tensor:
        return F.rms_norm(x.float(), weight_H.shape, weight_H.float(), eps).to(x.dtype)

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight_H: Tensor, eps: float, readers: int = 1
    ) -> tuple[Tensor, ...]:
        total = residual + x
        return *(self.rms_norm(total, weight_H, eps),) * readers, total

    def rotary(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        first, second = x.float().chunk(2, dim=-1)
        cos, sin = cos[:, None, :], sin[:, None, :]
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)

    def rotary_pairs(self, x_RQD: Tensor, start: int, cos_RP: Tensor, sin_RP: Tensor) -> Tensor:
        # Channels 0, 2, 4, ... before 1, 3, 5, ...
        halves = x_RQD[..., start:].unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
        return torch.cat([x_RQD[..., :start], self.rotary(halves, cos_RP, sin_RP)], -1)

    def rotary_split(
        self,
        fused_RX: Tensor,
        heads: tuple[int, int],
        head_dim: int,
        turned: int,
        rest: Sequence[int],
        cos_RD: Tensor,
        sin_RD: Tensor,
    ) -> tuple[Tensor, ...]:
        Q, G = heads
        count = Q + turned * G
        end = count * head_dim
        qk = self.rotary(fused_RX[:, :end].unflatten(-1, (count, head_dim)), cos_RD, sin_RD)
        others = fused_RX[:, end:].split([G * width for width in rest], -1)
        return *qk.split([Q] + [G] * turned, 1), *(other.unflatten(-1, (G, -1)) for other in others)

    def branch_rows(
        self, fused_RX: Tensor, heads: tuple[int, int], widths: tuple[int, int], angles: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, tuple[tuple[Tensor, Tensor], ...]]:
        (Q, G), (D, V) = heads, widths
        branches = (fused_RX.shape[1] - Q * D) // (G * (D + V))
        turned = min(2, branches)
        rest = (D,) * (branches - turned) + (V,) * branches
        q, *parts = self.rotary_split(fused_RX, heads, D, turned, rest, *angles)
        values = parts[-branches:]
        if branches == 3:
            return q, tuple(zip(parts[:3], values))
        # Shared keys are read raw too, where they were rotated.
        raw_RGD = fused_RX[:, Q * D : (Q + G) * D].unflatten(-1, (G, D))
        return q, tuple((k, values[0]) for k in (parts[0], parts[0], raw_RGD))

    def swiglu(self, gate_up_RI: Tensor) -> Tensor:
        gate, up = gate_up_RI.chunk(2, dim=-1)
        return F.silu(gate) * up

    def attend(self, q_BTQD: Tensor, k_BSGD: Tensor, v_BSGV: Tensor) -> Tensor:
        T, S = q_BTQD.shape[1], k_BSGD.shape[1]
        if T > S:
            raise ConfigError(f"attend: {T} queries end at the last of {S} keys; pass at least as many keys")
        mask = None
        if T != S:
            mask = torch.ones(T, S, dtype=torch.bool, device=q_BTQD.device).tril(S - T)
        q, k, v = (x.transpose(1, 2) for x in (q_BTQD, k_BSGD, v_BSGV))
        # Torch's fused ones on a GPU add gradients up in any order.
        is_ordered = q.is_cuda and torch.are_deterministic_algorithms_enabled()
        with sdpa_kernel(SDPBackend.MATH) if is_ordered else nullcontext():
            out: Tensor = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=T == S, enable_gqa=True
            )
        return out.transpose(1, 2)

    def compress(self, x_BTGD: Tensor, phi: Compression, sizes: NSASizes) -> Tensor:
        return compress_reference(x_BTGD, phi.w1, phi.b1, phi.w2, phi.b2, phi.pos, sizes.block, sizes.stride)

    def nsa_attention(
        self,
        q_BTQD: Tensor,
        keys: BranchKeys,
        gates_BTQ3: Tensor,
        sizes: NSASizes,
        *,
        q_start: int = 0,
        win_start: int = 0,
    ) -> Tensor:
        return nsa_attention_masked(q_BTQD, keys, gates_BTQ3, sizes, q_start=q_start, win_start=win_start)

    @torch.no_grad()
    def nsa_selection(
        self, q_BTQD: Tensor, k_cmp: Tensor, num_keys: int, sizes: NSASizes, *, q_start: int = 0
    ) -> Tensor:
        return select_reference(q_BTQD, k_cmp, k_cmp, num_keys, sizes, q_start=q_start)[1]

    def balance(self, scores_TE: Tensor, choices: Tensor | int, groups: int) -> tuple[Tensor, Tensor]:
        if isinstance(choices, Tensor):
            return shares_and_means(scores_TE, choices, groups)
        ids_TK = stable_topk(scores_TE.detach(), choices)
        return shares_and_means(scores_TE / scores_TE.sum(-1, keepdim=True), ids_TK, groups)

    def router_logits(self, x_RH: Tensor, weight_EH: Tensor, *, invariant: bool) -> Tensor:
        return self.linear(x_RH.float(), weight_EH.float(), None, invariant=invariant)

    def route(
        self,
        logits_TE: Tensor,
        *,
        top_k: int,
        router: str,
        bias_E: Tensor | None,
        num_groups: int,
        topk_groups: int,
        group_scores: int,
        normalize: bool | None,
        scaling: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return route(
            logits_TE,
            top_k=top_k,
            router=router,
            bias_E=bias_E,
            num_groups=num_groups,
            topk_groups=topk_groups,
            group_scores=group_scores,
            normalize=normalize,
            scaling=scaling,
        )

    def experts(
        self,
        x_TH: Tensor,
        topk_ids_TK: Tensor,
        topk_weights_TK: Tensor,
        gate_up_E2IH: Tensor,
        down_EHI: Tensor,
    ) -> Tensor:
        return expert_sum(x_TH, topk_ids_TK, topk_weights_TK, gate_up_E2IH, down_EHI)

    def ngram_rows(
        self,
        tokens_BT: Tensor,
        *,
        multipliers: Sequence[int],
        orders: Sequence[int],
        primes: Sequence[Sequence[int]],
        offsets: Sequence[Sequence[int]],
        pad: int,
        history_BL: Tensor | None,
        document_starts_BT: Tensor | None,
    ) -> Tensor:
        return ngram_hash(
            tokens_BT,
            multipliers=multipliers,
            orders=orders,
            primes=primes,
            offsets=offsets,
            pad=pad,
            history_BL=history_BL,
            document_starts_BT=document_starts_BT,
        )

    def memory_fusion(
        self,
        h_RH: Tensor,
        key_value_RH: Tensor,
        fusion: Fusion,
        shape: tuple[int, int],
        starts_BT: Tensor | None,
    ) -> Tensor:
        # Without a view of h in between: autograd would add up its gradients in another order.
        key_RH, value_RH = key_value_RH.chunk(2, dim=-1)
        gated_RH = self.memory_gate(h_RH, key_RH, value_RH, fusion)
        normed_RH = self.rms_norm(gated_RH, fusion.value_norm_C, fusion.conv_eps)
        conv_BTH = short_conv(
            normed_RH.unflatten(0, shape),
            fusion.conv_CK,
            dilation=fusion.dilation,
            document_starts_BT=starts_BT,
        )
        return F.silu(conv_BTH.flatten(0, 1)) + gated_RH

    def memory_gate(self, h_RH: Tensor, key_RH: Tensor, value_RH: Tensor, fusion: Fusion) -> Tensor:
        return context_gate(
            h_RH, key_RH, value_RH, fusion.query_norm_C, fusion.key_norm_C, eps=fusion.gate_eps
        )

    def memory_conv(
        self, x_BTH: Tensor, fusion: Fusion, starts_BT: Tensor | None, history_BLH: Tensor | None
    ) -> Tensor:
        return short_conv(
            x_BTH,
            fusion.conv_CK,
            dilation=fusion.dilation,
            history_BLC=history_BLH,
            document_starts_BT=starts_BT,
        )

    def logits(self, hidden_RH: Tensor, weight_VH: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return F.linear(hidden_RH, weight_VH)
        count = hidden_RH.shape[0]
        rows_RH = F.pad(hidden_RH, (0, 0, 0, padded(count) - count))
        return self.linear(rows_RH, weight_VH, None, invariant=True)[:count]

    def expert_counts(self, topk_ids_TK: Tensor, num_experts: int) -> Tensor:
        return torch.bincount(topk_ids_TK.reshape(-1), minlength=num_experts)

    def head_loss(
        self, hidden_RH: Tensor, weight_VH: Tensor, targets_R: Tensor, weights_R: Tensor | None = None
    ) -> Tensor:
        logits_RV = self.logits(hidden_RH, weight_VH).float()
        if weights_R is None:
            return F.cross_entropy(logits_RV, targets_R, ignore_index=-1, reduction="sum")
        losses_R = F.cross_entropy(logits_RV, targets_R, ignore_index=-1, reduction="none")
        return (losses_R * weights_R).sum()

    @torch.no_grad()
    def squared_norms(self, tensors: Sequence[Tensor], rows: Sequence[int]) -> Tensor:
        return squared_norms_reference(tensors, rows)

    @torch.no_grad()
    def adamw_step(
        self,
        master: Tensor,
        first: Tensor,
        second: Tensor,
        gradient: Tensor,
        *,
        copy: Tensor | None,
        scale: Tensor,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        step: int,
    ) -> None:
        adamw_reference(
            master,
            first,
            second,
            gradient.view_as(master),
            scale=scale,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            step=step,
        )
        if copy is not None:
            copy.copy_(master.view_as(copy))

    def sigmoid(self, x: Tensor) -> Tensor:
        return torch.sigmoid(x.float())

    def expert_rows(
        self,
        x_UH: Tensor,
        rows_R: Tensor,
        asked: Sequence[tuple[int, int]],
        gate_up_E2IH: Tensor,
        down_EHI: Tensor,
    ) -> Tensor:
        return expert_rows(x_UH, rows_R, asked, gate_up_E2IH, down_EHI)
