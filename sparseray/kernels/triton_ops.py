"""`TRITON`: the operations of `Ops` by the kernels of dense/, nsa/, moe/ and dse/, in fp32, bf16 or fp16 on one device.

A method that is not here is the plain one of `PlainOps`, because no kernel of ours does it:

| operation | what runs | until |
|---|---|---|
| linear, logits | cuBLAS, with the row's bits as they come | |
| attend | torch's fused attention (a mask for a chunk against longer keys) | |
| rotary_split where head sizes differ | torch | |
| memory_gate, memory_conv | torch: the fused kernel takes whole sequences, these are a chunk's pieces in serving | |
| top_k | torch's, ties in any order: for the balance loss alone | |
| memory_fusion's backward, ngram_rows of orders with gaps | torch | |

Shapes as in ops.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from triton.runtime.jit import JITFunction

from sparseray.errors import ConfigError
from sparseray.kernels.attention.decode import PagedDecodeWorkspace, paged_decode
from sparseray.kernels.attention.paged_write import paged_write
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
from sparseray.kernels.moe.decode import moe_ffn_decode
from sparseray.kernels.moe.ffn import moe_ffn
from sparseray.kernels.moe.router import route
from sparseray.kernels.nsa.attention import nsa_attention, nsa_selection
from sparseray.kernels.nsa.compress import compress
from sparseray.kernels.nsa.compress_step import compress_step
from sparseray.kernels.nsa.decode import DecodeWorkspace, nsa_decode
from sparseray.kernels.nsa.gates import combine_kernel
from sparseray.kernels.nsa.prefill import nsa_prefill, prefill_geometry
from sparseray.kernels.nsa.reference import BranchKeys, Compression
from sparseray.kernels.paged import KeyValues, Pages
from sparseray.kernels.plain_ops import PlainOps
from sparseray.kernels.settings import NSASizes

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LARGEST_HEAD = 192
"""Channels of the widest head that the NSA kernels were run with on a GPU."""
DECODE_ROWS = 512
"""Tokens up to which the experts' kernels for decoding are the faster ones."""


def is_interpreted() -> bool:
    """Whether TRITON_INTERPRET was set before Triton was imported."""
    return not isinstance(combine_kernel, JITFunction)


def _check(what: str, *tensors: Tensor) -> None:
    """See that the tensors are of one dtype that the kernels take, and on a device that runs them.

    Raises:
        ConfigError: they are not.
    """
    dtypes = {t.dtype for t in tensors}
    if len(dtypes) > 1 or not dtypes <= set(DTYPES):
        found = ", ".join(sorted(str(d) for d in dtypes))
        raise ConfigError(
            f"kernels=triton: {what} got {found}; give all of it one of float32, bfloat16 and float16, or use"
            " kernels=reference"
        )
    if not (tensors[0].is_cuda or is_interpreted()):
        raise ConfigError(
            f"kernels=triton: {what} got a tensor on {tensors[0].device}; move the model to a GPU, or use"
            " kernels=reference"
        )


@lru_cache(maxsize=256)
def _table(values: tuple[int, ...] | tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    """Constants of a layer's hash on the device, copied once."""
    return torch.tensor(values, dtype=torch.int64, device=device)


@lru_cache(maxsize=16)
def _numbers(count: int, device: torch.device) -> Tensor:
    return torch.arange(count, device=device, dtype=torch.int32)


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
        sums_VH = torch.empty(ctx.like.shape, dtype=torch.float32, device=tokens_R.device)
        return None, embedding_grad_(sums_VH, tokens_R, grads[0]).to(ctx.like.dtype)


class TritonOps(PlainOps):
    """See `Ops` for what each operation does."""

    def embedding(self, tokens_R: Tensor, weight_VH: Tensor) -> Tensor:
        out_RH: Tensor = _Embedding.apply(tokens_R, weight_VH)
        return out_RH

    def rms_norm(self, x: Tensor, weight_H: Tensor, eps: float) -> Tensor:
        return rms_norm(x, weight_H, eps)

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight_H: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        return add_rms_norm(x, residual, weight_H, eps)

    def rotary(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        rows = x.reshape(-1, *x.shape[-2:])
        # Leading axes share the tokens' angles.
        positions_R = _numbers(cos.shape[0], x.device).repeat(rows.shape[0] // max(1, cos.shape[0]))
        return rope(rows, positions_R, cos, sin, heads=(x.shape[-2], 0, 0))[0].view(x.shape)

    def rotary_split(
        self, fused_RX: Tensor, heads: tuple[int, int], head_dim: int, cos_RD: Tensor, sin_RD: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        R, X = fused_RX.shape
        if X % head_dim:
            return super().rotary_split(fused_RX, heads, head_dim, cos_RD, sin_RD)
        rest = X // head_dim - sum(heads)
        q, k, other = rope(
            fused_RX.unflatten(-1, (-1, head_dim)),
            _numbers(R, fused_RX.device),
            cos_RD,
            sin_RD,
            heads=(*heads, rest),
        )
        return q, k, other.flatten(1)

    def swiglu(self, gate_up_RI: Tensor) -> Tensor:
        return swiglu(gate_up_RI)

    def top_k(self, scores_TE: Tensor, k: int) -> Tensor:
        return scores_TE.detach().topk(k).indices

    def expert_counts(self, topk_ids_TK: Tensor, num_experts: int) -> Tensor:
        # Whole numbers: their order is free. bincount would wait for the device.
        ids = topk_ids_TK.reshape(-1).long()
        counts_E = torch.zeros(num_experts, dtype=torch.int64, device=ids.device)
        return counts_E.scatter_add_(0, ids, torch.ones_like(ids))

    def head_loss(
        self, hidden_RH: Tensor, weight_VH: Tensor, targets_R: Tensor, weights_R: Tensor | None = None
    ) -> Tensor:
        if weights_R is None:
            weights_R = torch.ones_like(targets_R, dtype=torch.float32)
        return head_loss(hidden_RH, weight_VH, targets_R, weights_R)

    def compress(self, x_BTGD: Tensor, phi: Compression, sizes: NSASizes) -> Tensor:
        _check("the compression of NSA", x_BTGD, phi.w1, phi.w2)
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
        _check("native sparse attention", q_BTQD, *branches)
        widest = max(q_BTQD.shape[-1], keys.v_slc.shape[-1])
        if widest > LARGEST_HEAD:
            raise ConfigError(
                f"kernels=triton: native sparse attention takes heads of at most {LARGEST_HEAD} channels, not"
                f" {widest}; lower model.head_dim or model.v_head_dim, or use kernels=reference"
            )
        return nsa_attention(q_BTQD, *branches, gates_BTQ3, sizes, q_start=q_start, win_start=win_start)

    @torch.no_grad()
    def nsa_selection(
        self, q_BTQD: Tensor, k_cmp: Tensor, num_keys: int, sizes: NSASizes, *, q_start: int = 0
    ) -> Tensor:
        _check("the selection of NSA", q_BTQD, k_cmp)
        return nsa_selection(q_BTQD, k_cmp, num_keys, sizes, q_start=q_start)

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
        _check("the router", logits_TE)
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
        _check("the experts", x_TH, gate_up_E2IH, down_EHI)
        if x_TH.shape[0] <= DECODE_ROWS and not torch.is_grad_enabled():
            return moe_ffn_decode(
                x_TH.contiguous(),
                topk_ids_TK.contiguous(),
                topk_weights_TK.contiguous(),
                gate_up_E2IH,
                down_EHI,
            )
        return moe_ffn(x_TH, topk_ids_TK, topk_weights_TK, gate_up_E2IH, down_EHI)

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
        key_RH: Tensor,
        value_RH: Tensor,
        fusion: Fusion,
        shape: tuple[int, int],
        starts_BT: Tensor | None,
    ) -> Tensor:
        _check("the memory's fusion", h_RH, key_RH, value_RH)
        h, key, value = (x.unflatten(0, shape) for x in (h_RH, key_RH, value_RH))
        out_BTH = dse_fusion.memory_output(h, key, value, fusion, document_starts_BT=starts_BT)
        return out_BTH.flatten(0, 1)

    def squared_norms(self, tensors: Sequence[Tensor], rows: Sequence[int]) -> Tensor:
        return squared_norms(tensors, rows)

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
        adamw_step(
            master,
            first,
            second,
            gradient,
            copy=copy,
            scale=scale,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            step=step,
        )

    def paged_write(self, pool: KeyValues, k_RGD: Tensor, v_RGV: Tensor, pages: Pages) -> None:
        _check("the paged cache", k_RGD, *pool)
        paged_write(k_RGD, v_RGV, pages.places_R, *pool)

    def paged_attend(self, q_RQD: Tensor, pool: KeyValues, pages: Pages) -> Tensor:
        if pages.chunks is not None:
            return self._attend_chunks(q_RQD, pool, pages, pages.chunks)
        (R, heads, _), B, width = q_RQD.shape, pages.num_sequences, pool[1].shape[-1]
        workspace = pages.scratch.get("attend")
        if workspace is None:
            longest = pages.table_BW.shape[1] * pages.page
            workspace = PagedDecodeWorkspace.create(B, 1, heads, width, longest, q_RQD.device)
            pages.scratch["attend"] = workspace
        out = q_RQD.new_empty(R, heads, width)
        paged_decode(
            q_RQD[:B].unsqueeze(1).contiguous(),
            *pool,
            pages.table_BW,
            pages.context_lens_B,
            workspace,
            out[:B].unsqueeze(1),
        )
        return out

    def _attend_chunks(
        self, q_RQD: Tensor, pool: KeyValues, pages: Pages, chunks: tuple[tuple[int, int, int], ...]
    ) -> Tensor:
        """Chunks of one length and context that follow one another go through together."""
        out, first = q_RQD.new_empty(*q_RQD.shape[:2], pool[1].shape[-1]), 0
        for (size, context), same in groupby(chunks, lambda chunk: (chunk[1] - chunk[0], chunk[2])):
            count = len(list(same))
            rows = slice(chunks[first][0], chunks[first][0] + count * size)
            table = pages.table_BW[first : first + count, : -(-context // pages.page)].long()
            k, v = (cache[table].flatten(1, 2)[:, :context] for cache in pool)
            out[rows] = self.attend(q_RQD[rows].unflatten(0, (count, size)), k, v).flatten(0, 1)
            first += count
        return out

    def paged_compress(
        self,
        raw: Tensor,
        compressed: Tensor,
        phi: Compression,
        sizes: NSASizes,
        pages: Pages,
        angles: tuple[Tensor, Tensor] | None,
    ) -> None:
        assert phi.b1 is not None and phi.b2 is not None and phi.pos is not None
        # Weights do not change while something is served.
        key = ("bias", phi.w1.data_ptr())
        bias = pages.scratch.get(key)
        if bias is None:
            bias = pages.scratch[key] = torch.addmv(phi.b1, phi.w1, phi.pos.flatten())
        chunks = pages.chunks or ((0, 1, 1),)
        compress_step(
            raw,
            pages.table_BW,
            compressed,
            pages.table_BW,
            pages.context_lens_B,
            phi.w1,
            bias,
            phi.w2,
            phi.b2,
            block=sizes.block,
            stride=sizes.stride,
            query_len=max(stop - start for start, stop, _ in chunks),
            angles=angles,
        )

    def paged_nsa_attention(
        self,
        q_RQD: Tensor,
        gates_RQ3: Tensor,
        compressed: KeyValues,
        selected: KeyValues,
        window: KeyValues,
        sizes: NSASizes,
        pages: Pages,
    ) -> Tensor:
        _check("native sparse attention over pages", q_RQD, *compressed, *selected, *window)
        (R, heads, _), B, table = q_RQD.shape, pages.num_sequences, pages.table_BW
        num_kv, width = selected[1].shape[2:]
        out = q_RQD.new_empty(R, heads, width)
        if pages.chunks is None:
            workspace = pages.scratch.get("nsa")
            if workspace is None:
                longest = table.shape[1] * pages.page
                workspace = DecodeWorkspace.create(
                    B, 1, heads, num_kv, width, longest, sizes, device=q_RQD.device
                )
                pages.scratch["nsa"] = workspace
            nsa_decode(
                q_RQD[:B].unsqueeze(1).contiguous(),
                gates_RQ3[:B].unsqueeze(1).contiguous(),
                compressed,
                selected,
                window,
                table,
                table,
                table,
                pages.context_lens_B,
                workspace,
                out[:B].unsqueeze(1),
                sizes,
            )
            return out
        assert pages.cu_seqlens is not None
        rows = pages.chunks[-1][1]
        geometry = pages.scratch.get("nsa")
        if geometry is None:
            geometry = prefill_geometry(
                pages.cu_seqlens,
                pages.context_lens_B,
                (table, table, table),
                tokens=rows,
                page=pages.page,
                sizes=sizes,
            )
            pages.scratch["nsa"] = geometry
        out[:rows] = nsa_prefill(
            q_RQD[:rows],
            gates_RQ3[:rows],
            compressed,
            selected,
            window,
            table,
            table,
            table,
            pages.cu_seqlens,
            pages.context_lens_B,
            sizes,
            geometry=geometry,
        )
        return out

    def attend(self, q_BTQD: Tensor, k_BSGD: Tensor, v_BSGV: Tensor) -> Tensor:
        T, S = q_BTQD.shape[1], k_BSGD.shape[1]
        if not 1 < T < S or not q_BTQD.is_cuda or torch.is_grad_enabled():
            return super().attend(q_BTQD, k_BSGD, v_BSGV)
        # A chunk after earlier keys: this mask is known to the fused attention and is not built.
        q, k, v = (x.transpose(1, 2) for x in (q_BTQD, k_BSGD, v_BSGV))
        if k.shape[1] != q.shape[1]:
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=causal_lower_right(T, S))
        return out.transpose(1, 2)


TRITON = TritonOps()
