"""`TRITON`: the operations of `Ops` by the kernels of dense/, nsa/, moe/ and dse/, in fp32, bf16 or fp16 on one device.

Paged caches are in paged_triton_ops.py. A method that is in neither is the plain one of `PagedPlainOps`, because no kernel of ours does it:

| operation | what runs | until |
|---|---|---|
| linear, linear_by_head, logits | cuBLAS, with the row's bits as they come | |
| attend | torch's fused attention, but where gradients must have an order; values narrower than keys are padded | |
| rotary_split where head sizes differ | torch | |
| memory_gate, memory_conv | torch: the fused kernel takes whole sequences, these are a chunk's pieces in serving | |
| ngram_rows of orders with gaps | torch | |

Shapes as in ops.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

from sparseray.errors import ConfigError
from sparseray.kernels import peer_rows
from sparseray.kernels.dense.adamw import adamw_step
from sparseray.kernels.dense.embedding import embedding_grad_
from sparseray.kernels.dense.head_loss import head_loss
from sparseray.kernels.dense.rms_norm import add_rms_norm, rms_norm
from sparseray.kernels.dense.rope import rope
from sparseray.kernels.dense.squared_norm import squared_norms
from sparseray.kernels.dense.swiglu import swiglu
from sparseray.kernels.dse import fusion as dse_fusion
from sparseray.kernels.dse import rows as dse_rows
from sparseray.kernels.dse.reference import Fusion
from sparseray.kernels.dse.row_update import range_norms, row_adam
from sparseray.kernels.dse.staged_rows import take_newer, take_rows
from sparseray.kernels.held_ops import HeldRows
from sparseray.kernels.moe import held
from sparseray.kernels.moe.balance import balance_of_best
from sparseray.kernels.moe.decode import moe_ffn_decode
from sparseray.kernels.moe.expert_map import count_experts
from sparseray.kernels.moe.expert_sum import HeldGradients
from sparseray.kernels.moe.ffn import combine_rows, moe_ffn
from sparseray.kernels.moe.router import route
from sparseray.kernels.moe.router_logits import router_logits
from sparseray.kernels.nsa.attention import nsa_attention, nsa_selection
from sparseray.kernels.nsa.compress import compress
from sparseray.kernels.nsa.reference import BranchKeys, Compression
from sparseray.kernels.paged_triton_ops import PagedTritonOps
from sparseray.kernels.settings import NSASizes, nsa_complaint
from sparseray.kernels.takes import check

DECODE_ROWS = 512
"""Tokens up to which the experts' kernels for decoding are the faster ones."""


@lru_cache(maxsize=256)
def _table(values: tuple[int, ...] | tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    """Constants of a layer's hash on the device, copied once."""
    return torch.tensor(values, dtype=torch.int64, device=device)


@lru_cache(maxsize=32)
def _all_numbers(count: int, step: int, device: torch.device) -> Tensor:
    return torch.arange(0, count * step, step, device=device, dtype=torch.int32)


def _numbers(count: int, device: torch.device, step: int = 1) -> Tensor:
    """0, step, ... (count - 1) step: the beginning of one of a few tensors, which stay, as CUDA graphs read them."""
    return _all_numbers(max(1 << 16, triton.next_power_of_2(count)), step, device)[:count]


def _whole_table(angles_LC: Tensor, step: int) -> Tensor:
    """The rows that every step-th row was taken of."""
    count, C = angles_LC.shape
    return angles_LC if step == 1 else angles_LC.as_strided((1 + (count - 1) * step, C), (C, 1))


class _Embedding(torch.autograd.Function):
    """Rows of a matrix; torch's own backward pass may sum in an order that changes from run to run."""

    @staticmethod
    def forward(ctx: Any, tokens_R: Tensor, weight_VH: Tensor) -> Tensor:
        ctx.save_for_backward(tokens_R)
        ctx.like = weight_VH
        return weight_VH[tokens_R]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        (tokens_R,) = ctx.saved_tensors
        return None, embedding_grad_(torch.empty_like(ctx.like), tokens_R, grads[0])


class TritonOps(PagedTritonOps):
    """See `Ops` for what each operation does."""

    def add_linear(self, y_RO: Tensor, x_RI: Tensor, weight_OI: Tensor, *, invariant: bool) -> Tensor:
        return y_RO.addmm_(x_RI, weight_OI.t())

    def linear_by_head(self, x_RQI: Tensor, weight_QOI: Tensor) -> Tensor:
        return torch.bmm(x_RQI.transpose(0, 1), weight_QOI.transpose(1, 2)).transpose(0, 1)

    def embedding(self, tokens_R: Tensor, weight_VH: Tensor) -> Tensor:
        out_RH: Tensor = _Embedding.apply(tokens_R, weight_VH)
        return out_RH

    rms_norm = staticmethod(rms_norm)
    add_rms_norm = staticmethod(add_rms_norm)

    def rotary(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        rows = x.reshape(-1, *x.shape[-2:])
        # Of every so many positions the angles are read where they lie.
        count, (step, rest) = cos.shape[0], divmod(cos.stride(0), cos.shape[1])
        if count == 0 or rest or step == 0 or cos.stride(1) != 1 or cos.stride() != sin.stride():
            step, cos, sin = 1, cos.contiguous(), sin.contiguous()
        tables = _whole_table(cos, step), _whole_table(sin, step)
        # Leading axes share the tokens' angles.
        positions_R = _numbers(count, x.device, step)
        if rows.shape[0] > count:
            positions_R = positions_R.repeat(rows.shape[0] // max(1, count))
        return rope(rows, positions_R, *tables, heads=(x.shape[-2], 0, 0))[0].view(x.shape)

    def rotary_pairs(self, x_RQD: Tensor, start: int, cos_RP: Tensor, sin_RP: Tensor) -> Tensor:
        rows, heads = x_RQD.shape[:2]
        at = _numbers(rows, x_RQD.device)
        return rope(x_RQD, at, cos_RP, sin_RP, heads=(heads, 0, 0), start=start, is_interleaved=True)[0]

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
        if any(width != head_dim for width in rest):
            return super().rotary_split(fused_RX, heads, head_dim, turned, rest, cos_RD, sin_RD)
        R, (Q, G) = fused_RX.shape[0], heads
        fused_RND, numbers_R = fused_RX.unflatten(-1, (-1, head_dim)), _numbers(R, fused_RX.device)
        counts = (Q, turned * G, len(rest) * G)
        return rope(fused_RND, numbers_R, cos_RD, sin_RD, heads=counts, group=G)

    def swiglu(self, gate_up_RI: Tensor) -> Tensor:
        return swiglu(gate_up_RI)

    def balance(self, scores_TE: Tensor, choices: Tensor | int, groups: int) -> tuple[Tensor, Tensor]:
        if isinstance(choices, Tensor):
            return super().balance(scores_TE, choices, groups)
        return balance_of_best(scores_TE, choices, groups)

    def expert_counts(self, topk_ids_TK: Tensor, num_experts: int) -> Tensor:
        return count_experts(topk_ids_TK, num_experts)

    def head_loss(
        self, hidden_RH: Tensor, weight_VH: Tensor, targets_R: Tensor, weights_R: Tensor | None = None
    ) -> Tensor:
        if weights_R is None:
            weights_R = torch.ones_like(targets_R, dtype=torch.float32)
        return head_loss(hidden_RH, weight_VH, targets_R, weights_R)

    def compress(self, x_BTGD: Tensor, phi: Compression, sizes: NSASizes) -> Tensor:
        check("the compression of NSA", x_BTGD, phi.w1, phi.w2)
        if x_BTGD.shape[1] < sizes.block:
            return super().compress(
                x_BTGD, phi, sizes
            )  # No block is complete: an empty result, with its graph.
        return compress(x_BTGD, phi.w1, phi.b1, phi.w2, phi.b2, phi.pos, sizes.block, sizes.stride)

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
        branches = (keys.k_cmp, keys.v_cmp, keys.k_slc, keys.v_slc, keys.k_win, keys.v_win)
        check("native sparse attention", q_BTQD, *branches)
        heads, widths = (q_BTQD.shape[2], keys.k_slc.shape[2]), (q_BTQD.shape[3], keys.v_slc.shape[3])
        if complaint := nsa_complaint(heads, widths, sizes.select_block):
            raise ConfigError(
                f"kernels=triton: native sparse attention takes {complaint}, or use kernels=reference"
            )
        return nsa_attention(q_BTQD, *branches, gates_BTQ3, sizes, q_start=q_start, win_start=win_start)

    @torch.no_grad()
    def nsa_selection(
        self, q_BTQD: Tensor, k_cmp: Tensor, num_keys: int, sizes: NSASizes, *, q_start: int = 0
    ) -> Tensor:
        check("the selection of NSA", q_BTQD, k_cmp)
        return nsa_selection(q_BTQD, k_cmp, num_keys, sizes, q_start=q_start)

    def router_logits(self, x_RH: Tensor, weight_EH: Tensor, *, invariant: bool) -> Tensor:
        if (x_RH.dtype, weight_EH.dtype) != (torch.bfloat16, torch.float32):
            return super().router_logits(x_RH, weight_EH, invariant=invariant)
        return router_logits(x_RH, weight_EH)

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
        check("the router", logits_TE)
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
        check("the experts", x_TH, gate_up_E2IH, down_EHI)
        if x_TH.shape[0] <= DECODE_ROWS and not torch.is_grad_enabled():
            return moe_ffn_decode(
                x_TH.contiguous(),
                topk_ids_TK.contiguous(),
                topk_weights_TK.contiguous(),
                gate_up_E2IH,
                down_EHI,
            )
        return moe_ffn(x_TH, topk_ids_TK, topk_weights_TK, gate_up_E2IH, down_EHI)

    def group_held(self, groups_TK: Tensor, num_sets: int, num_held: int, like: Tensor) -> HeldRows:
        plan = held.group_held(groups_TK, num_sets * num_held, num_held, like)
        return HeldRows(
            order_R=plan.order_R,
            inverse_R=plan.inverse_R,
            counts_E=plan.counts_E,
            held=plan.offsets_E[num_sets * num_held],
            num_sets=num_sets,
            plan=plan,
        )

    def held_forward(
        self,
        x_TH: Tensor,
        rows: HeldRows,
        counts: Sequence[int] | None,
        gate_up_E2IH: Tensor,
        down_EHI: Tensor,
    ) -> tuple[Tensor, Any]:
        check("the experts", x_TH, gate_up_E2IH, down_EHI)
        return held.held_forward(x_TH, rows.plan, counts, gate_up_E2IH, down_EHI)

    def held_backward(
        self,
        dout_TH: Tensor,
        weights_TK: Tensor,
        rows: HeldRows,
        counts: Sequence[int] | None,
        saved: Any,
        gate_up_E2IH: Tensor,
        down_EHI: Tensor,
    ) -> HeldGradients:
        slabs = gate_up_E2IH, down_EHI
        return held.held_backward(dout_TH, weights_TK, saved, *slabs, rows.num_sets)

    def combine_slots(self, rows_TKH: Tensor, weights_TK: Tensor | None) -> Tensor:
        T, K, H = rows_TKH.shape
        return combine_rows(rows_TKH.reshape(T * K, H), _numbers(T * K, rows_TKH.device), K, weights_TK)

    def owners_of(self, ids_TK: Tensor, bits_E: Tensor) -> Tensor:
        return peer_rows.owners_of(ids_TK, bits_E)

    def sum_of_owners(self, rows_TOH: Tensor, owners_T: Tensor) -> Tensor:
        return peer_rows.sum_of_owners(rows_TOH, owners_T)

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
        device = tokens_BT.device
        if list(orders) != list(range(orders[0], orders[-1] + 1)):
            return super().ngram_rows(
                tokens_BT,
                multipliers=multipliers,
                orders=orders,
                primes=primes,
                offsets=offsets,
                pad=pad,
                history_BL=history_BL,
                document_starts_BT=document_starts_BT,
            )
        return dse_rows.ngram_hash(
            tokens_BT,
            multipliers=_table(tuple(multipliers), device),
            orders=tuple(orders),
            primes_OH=_table(tuple(map(tuple, primes)), device),
            offsets_OH=_table(tuple(map(tuple, offsets)), device),
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
        check("the memory's fusion", h_RH, key_value_RH)
        h, key_value = (x.unflatten(0, shape) for x in (h_RH, key_value_RH))
        out_BTH = dse_fusion.memory_output(h, key_value, fusion, document_starts_BT=starts_BT)
        return out_BTH.flatten(0, 1)

    def row_sums(self, grads_ND: Tensor, order_N: Tensor, first_U1: Tensor) -> Tensor:
        return dse_rows.sum_segments(grads_ND, order_N, first_U1)

    take_rows = staticmethod(take_rows)
    take_newer = staticmethod(take_newer)
    range_norms = staticmethod(range_norms)
    row_adam = staticmethod(row_adam)

    squared_norms = staticmethod(squared_norms)
    adamw_step = staticmethod(adamw_step)


TRITON = TritonOps()
