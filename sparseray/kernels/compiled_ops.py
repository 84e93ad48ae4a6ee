"""`CompiledOps`: the operations of `Ops` as compiled loops on a CPU, fp32; what a server without a GPU runs.

A row's bits depend on its own sequence alone: not on the other rows of a call, nor on how its prompt was cut into
chunks, so that what one engine decoded token by token another one reads as a prompt, to the same bits. Where a
gradient is wanted, training runs `PlainOps`. Shapes as in ops.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparseray.kernels.attention.cpu import full_attention, write_rows
from sparseray.kernels.dense import cpu as dense
from sparseray.kernels.dse.cpu import ngram_hash
from sparseray.kernels.dse.fuse import fuse_rows
from sparseray.kernels.dse.reference import Fusion
from sparseray.kernels.moe import cpu as moe
from sparseray.kernels.moe.reference import NORMALIZE_EPS, scores_of_a_group, weighing
from sparseray.kernels.nsa.cpu import compress, sparse_attention
from sparseray.kernels.nsa.reference import Compression
from sparseray.kernels.paged import History, KeyValues, Pages
from sparseray.kernels.paged_plain_ops import PagedPlainOps
from sparseray.kernels.settings import NSASizes

Array = NDArray[Any]
NO_FLOATS, NO_FLAGS = np.empty(0, np.float32), np.empty(0, np.bool_)


def _array(x: Tensor) -> Array:
    found: Array = (x.detach() if x.requires_grad else x).contiguous().numpy()
    return found


@cache
def _numbers(sizes: NSASizes) -> tuple[int, ...]:
    return astuple(sizes)


def _is_taken(*tensors: Tensor) -> bool:
    """Whether the loops can compute this: fp32, and nobody wants a gradient."""
    return not torch.is_grad_enabled() and all(x.dtype == torch.float32 for x in tensors)


def _places(pages: Pages) -> tuple[Array, Array, Array]:
    """Tables, boundaries of the sequences' rows and tokens of every sequence, which share the tensors' memory."""
    found: tuple[Array, Array, Array] | None = pages.scratch.get("compiled")
    if found is None:
        B = pages.num_sequences
        decoded = np.arange(B + 1, dtype=np.int32) * np.int32(pages.num_new)
        bounds = decoded if pages.cu_seqlens is None else pages.cu_seqlens.numpy()
        found = pages.scratch["compiled"] = pages.table_BW.numpy(), bounds, pages.context_lens_B.numpy()
    return found


class CompiledOps(PagedPlainOps):
    """See `Ops` for what each operation does."""

    chunks_keep_bits = True
    row_padding = 1

    def linear(self, x_RI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, *, invariant: bool) -> Tensor:
        if not invariant or not _is_taken(x_RI, weight_OI):
            return super().linear(x_RI, weight_OI, bias_O, invariant=invariant)
        y = torch.empty(x_RI.shape[0], weight_OI.shape[0])
        dense.linear(
            _array(x_RI), _array(weight_OI), NO_FLOATS if bias_O is None else _array(bias_O), y.numpy()
        )
        return y

    def logits(self, hidden_RH: Tensor, weight_VH: Tensor) -> Tensor:
        if not _is_taken(hidden_RH, weight_VH):
            return super().logits(hidden_RH, weight_VH)
        return self.linear(hidden_RH, weight_VH, None, invariant=True)

    def rms_norm(self, x: Tensor, weight_H: Tensor, eps: float) -> Tensor:
        if not _is_taken(x, weight_H):
            return super().rms_norm(x, weight_H, eps)
        y = torch.empty(x.shape)
        width = x.shape[-1]
        dense.rms_norm(_array(x).reshape(-1, width), _array(weight_H), eps, y.numpy().reshape(-1, width))
        return y

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
        if not _is_taken(fused_RX):
            return super().rotary_split(fused_RX, heads, head_dim, turned, rest, cos_RD, sin_RD)
        rows, (num_q, num_k) = len(fused_RX), heads
        q, k = torch.empty(rows, num_q, head_dim), torch.empty(rows, turned * num_k, head_dim)
        dense.rotate_heads(_array(fused_RX), _array(cos_RD), _array(sin_RD), q.numpy(), k.numpy())
        end = (num_q + turned * num_k) * head_dim
        others = fused_RX[:, end:].split([num_k * width for width in rest], -1)
        return q, *k.split(num_k, 1), *(other.unflatten(-1, (num_k, -1)) for other in others)

    def swiglu(self, gate_up_RI: Tensor) -> Tensor:
        if not _is_taken(gate_up_RI):
            return super().swiglu(gate_up_RI)
        y = torch.empty(gate_up_RI.shape[0], gate_up_RI.shape[1] // 2)
        dense.swiglu(_array(gate_up_RI), y.numpy())
        return y

    def sigmoid(self, x: Tensor) -> Tensor:
        if not _is_taken(x):
            return super().sigmoid(x)
        y = torch.empty(x.shape)
        dense.sigmoid(_array(x).reshape(-1), y.numpy().reshape(-1))
        return y

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
        settings: dict[str, Any] = {
            "top_k": top_k,
            "router": router,
            "num_groups": num_groups,
            "topk_groups": topk_groups,
            "group_scores": group_scores,
        }
        if not _is_taken(logits_TE):
            settings |= {"bias_E": bias_E, "normalize": normalize, "scaling": scaling}
            return super().route(logits_TE, **settings)
        count = scores_of_a_group(router, top_k=top_k, topk_groups=topk_groups, group_scores=group_scores)
        is_divided, factor = weighing(router, normalize=normalize, scaling=scaling)
        ids = torch.empty(len(logits_TE), top_k, dtype=torch.int64)
        weights, scores = torch.empty(len(logits_TE), top_k), torch.empty(logits_TE.shape)
        moe.route(
            _array(logits_TE),
            NO_FLOATS if bias_E is None else _array(bias_E),
            router == "v3",
            num_groups,
            topk_groups,
            count,
            np.float32(NORMALIZE_EPS if is_divided else -1.0),
            np.float32(factor),
            ids.numpy(),
            weights.numpy(),
            scores.numpy(),
        )
        return ids, weights, scores

    def expert_rows(
        self,
        x_UH: Tensor,
        rows_R: Tensor,
        asked: Sequence[tuple[int, int]],
        gate_up_E2IH: Tensor,
        down_EHI: Tensor,
    ) -> Tensor:
        if not _is_taken(x_UH, gate_up_E2IH):
            return super().expert_rows(x_UH, rows_R, asked, gate_up_E2IH, down_EHI)
        y = torch.empty(len(rows_R), x_UH.shape[1])
        asked_E2 = np.array(asked, dtype=np.int64).reshape(-1, 2)
        slabs = _array(gate_up_E2IH), _array(down_EHI)
        moe.expert_rows(_array(x_UH), _array(rows_R), asked_E2, *slabs, y.numpy())
        return y

    def ngram_rows(
        self,
        tokens_BT: Tensor,
        *,
        history_BL: Tensor | None,
        document_starts_BT: Tensor | None,
        **layout: Any,
    ) -> Tensor:
        history = None if history_BL is None else history_BL.numpy()
        starts = None if document_starts_BT is None else document_starts_BT.numpy()
        found = ngram_hash(tokens_BT.numpy(), history_BL=history, document_starts_BT=starts, **layout)
        return torch.from_numpy(found)

    def paged_memory_fusion(
        self,
        h_RH: Tensor,
        key_value_RH: Tensor,
        fusion: Fusion,
        history: History,
        pages: Pages,
        starts_R: Tensor | None,
    ) -> Tensor:
        out = torch.zeros(h_RH.shape)
        norms = (_array(fusion.query_norm_C), _array(fusion.key_norm_C), _array(fusion.value_norm_C))
        fuse_rows(
            _array(h_RH),
            _array(key_value_RH),
            norms,
            _array(fusion.conv_CK),
            fusion.dilation,
            fusion.gate_eps,
            fusion.conv_eps,
            history.rows_SLH.numpy(),
            history.slots_B.numpy(),
            _places(pages)[1],
            NO_FLAGS if starts_R is None else _array(starts_R),
            out.numpy(),
        )
        return out

    def paged_write(self, pool: KeyValues, k_RGD: Tensor, v_RGV: Tensor, places_R: Tensor) -> None:
        keys, values = (cache.numpy() for cache in pool)
        write_rows(k_RGD.numpy(), v_RGV.numpy(), places_R.numpy(), keys, values)

    def paged_attend(self, q_RQD: Tensor, pool: KeyValues, pages: Pages) -> Tensor:
        (R, Q, D), V = q_RQD.shape, pool[1].shape[-1]
        out = torch.empty(R, Q, V)
        keys, values = (cache.numpy() for cache in pool)
        full_attention(D, V)(_array(q_RQD), keys, values, *_places(pages), D**-0.5, out.numpy())
        return out

    def paged_latent_write(self, pool: Tensor, k_R1K: Tensor, pages: Pages) -> None:
        rows, cache = k_R1K.numpy(), pool.numpy()
        write_rows(rows, rows, pages.places_R.numpy(), cache, cache)

    def paged_latent_attend(
        self, q_RQC: Tensor, turned_RQP: Tensor, pool: Tensor, scale: float, pages: Pages
    ) -> Tensor:
        q_RQK, latent = torch.cat([q_RQC, turned_RQP], -1), q_RQC.shape[-1]
        out, cache = torch.empty(q_RQC.shape), pool.numpy()
        attend = full_attention(q_RQK.shape[-1], latent)
        attend(_array(q_RQK), cache, cache, *_places(pages), scale, out.numpy())
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
        weights = [_array(x) for x in (phi.w1, phi.b1, phi.w2, phi.b2, phi.pos)]
        turns = angles is not None
        cos_sin = (angles[0].numpy(), angles[1].numpy()) if angles is not None else (weights[4], weights[4])
        recent_BW, at = pages.of_recent().table_BW.numpy(), _places(pages)
        compress(raw.numpy(), compressed.numpy(), *weights, recent_BW, *at, sizes.stride, cos_sin, turns)

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
        (R, Q, D), V = q_RQD.shape, selected[1].shape[-1]
        out = torch.empty(R, Q, V)
        pools = [cache.numpy() for pool in (compressed, selected, window) for cache in pool]
        attend, recent_BW = sparse_attention(D, V), pages.of_recent().table_BW.numpy()
        rows, at = (_array(q_RQD), _array(gates_RQ3)), _places(pages)
        attend(*rows, *pools, recent_BW, *at, _numbers(sizes), D**-0.5, out.numpy())
        return out


COMPILED = CompiledOps()
