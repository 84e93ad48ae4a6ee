"""`PagedTritonOps`: the paged operations of `Ops` by kernels, without a wait for the device; decoding fits a CUDA graph.

Prompts' chunks against pages: full and latent attention gather the pages of chunks of one shape and let torch's fused
attention read them; in a graph full attention reads them where they are, as NSA does anywhere. Shapes as in ops.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from sparseray.kernels.attention.decode import PagedDecodeWorkspace, paged_decode
from sparseray.kernels.attention.latent_decode import LatentDecodeWorkspace, latent_decode
from sparseray.kernels.attention.ordered import ordered_attention
from sparseray.kernels.attention.paged_write import (
    latent_append,
    paged_write,
    rotary_write,
)
from sparseray.kernels.attention.prefill import paged_prefill
from sparseray.kernels.attention.recent_pages import recent_pages
from sparseray.kernels.dense.draw import draw
from sparseray.kernels.dense.most_probable import most_probable
from sparseray.kernels.drafts import draft_rows, judge_drafts, next_drafts
from sparseray.kernels.nsa.append import append_rows, write_rows
from sparseray.kernels.nsa.compress_step import compress_step
from sparseray.kernels.nsa.decode import DecodeWorkspace, nsa_decode
from sparseray.kernels.nsa.prefill import nsa_prefill, prefill_geometry
from sparseray.kernels.nsa.reference import Compression
from sparseray.kernels.paged import KeyValues, Pages, alike
from sparseray.kernels.paged_plain_ops import PagedPlainOps
from sparseray.kernels.settings import NSASizes
from sparseray.kernels.takes import check

SIDE_ROWS = 512
"""Rows up to which a kernel leaves room on the device for another one."""


def _places(pages: Pages) -> tuple[int, int]:
    """Sequences and tokens of each while decoding."""
    return pages.num_sequences, pages.num_new


def _tables(pages: Pages) -> tuple[Tensor, Tensor, Tensor]:
    """Of NSA's compressed, selected and window branch."""
    return pages.table_BW, pages.table_BW, pages.of_recent().table_BW


def _new(rows: Tensor, places: tuple[int, int]) -> Tensor:
    """The rows of the new tokens, by sequence: without padding, contiguous."""
    return rows[: places[0] * places[1]].unflatten(0, places).contiguous()


def _phi(phi: Compression, pages: Pages) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """w1, bias, w2 and b2, the encoding of positions in the bias; weights do not change while something is served."""
    assert phi.b1 is not None and phi.b2 is not None and phi.pos is not None
    key = ("bias", phi.w1.data_ptr())
    bias = pages.scratch.get(key)
    if bias is None:
        bias = pages.scratch[key] = torch.addmv(phi.b1, phi.w1, phi.pos.flatten())
    return phi.w1, bias, phi.w2, phi.b2


@cache
def _side_stream(device: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


class PagedTritonOps(PagedPlainOps):
    """See `Ops` for what each operation does."""

    expands_latents = True

    most_probable = staticmethod(most_probable)
    draw = staticmethod(draw)
    draft_rows = staticmethod(draft_rows)
    judge_drafts = staticmethod(judge_drafts)
    next_drafts = staticmethod(next_drafts)

    def side_by_side(
        self, rows: int, one: Callable[[], Tensor], other: Callable[[], Tensor]
    ) -> tuple[Tensor, Tensor]:
        if rows > SIDE_ROWS or not torch.cuda.is_available():
            return one(), other()
        # Whatever the side stream allocates is used again only by what waits for this stream first.
        here, side = torch.cuda.current_stream(), _side_stream(torch.cuda.current_device())
        side.wait_stream(here)
        with torch.cuda.stream(side):
            second = other()
        first = one()
        here.wait_stream(side)
        return first, second

    def recent_pages(self, pages: Pages) -> None:
        if (own := pages.recent) is not None:
            recent_pages(own.recent_P, pages.table_BW, pages.places_R, own.table_BW, own.places_R, pages.page)

    def paged_write(self, pool: KeyValues, k_RGD: Tensor, v_RGV: Tensor, places_R: Tensor) -> None:
        check("the paged cache", k_RGD, *pool)
        paged_write(k_RGD, v_RGV, places_R, *pool)

    def paged_rotary_write(
        self,
        pool: KeyValues,
        fused_RX: Tensor,
        heads: tuple[int, int],
        angles: tuple[Tensor, Tensor],
        pages: Pages,
    ) -> Tensor:
        check("the paged cache", fused_RX, *pool)
        return rotary_write(fused_RX, heads[0], *angles, pages.places_R, *pool)

    def paged_attend(self, q_RQD: Tensor, pool: KeyValues, pages: Pages) -> Tensor:
        if pages.chunks is not None:
            return self._attend_chunks(q_RQD, pool, pages)
        if pages.cu_seqlens is not None:
            # Rows of padding go on to the experts, so they must be numbers.
            out = q_RQD.new_zeros(*q_RQD.shape[:2], pool[1].shape[-1])
            return paged_prefill(q_RQD, *pool, pages.table_BW, pages.cu_seqlens, pages.context_lens_B, out)
        heads, width, places = q_RQD.shape[1], pool[1].shape[-1], _places(pages)
        workspace = pages.scratch.get("attend")
        if workspace is None:
            longest = pages.table_BW.shape[1] * pages.page
            workspace = PagedDecodeWorkspace.create(*places, heads, width, longest, q_RQD.device)
            pages.scratch["attend"] = workspace
        out = q_RQD.new_empty(len(q_RQD), heads, width)
        paged_decode(
            _new(q_RQD, places), *pool, pages.table_BW, pages.context_lens_B, workspace, _new(out, places)
        )
        return out

    def _attend_chunks(self, q_RQD: Tensor, pool: KeyValues, pages: Pages) -> Tensor:
        """Chunks of one length and context that follow one another go through together."""
        out = q_RQD.new_empty(*q_RQD.shape[:2], pool[1].shape[-1])
        for rows, count, context, table in alike(pages):
            k, v = (cache[table].flatten(1, 2)[:, :context] for cache in pool)
            out[rows] = self.attend(q_RQD[rows].unflatten(0, (count, -1)), k, v).flatten(0, 1)
        return out

    def paged_latent_append(
        self,
        pool: Tensor,
        x_RK: Tensor,
        weight_C: Tensor,
        eps: float,
        angles: tuple[Tensor, Tensor],
        pages: Pages,
    ) -> None:
        check("the paged cache of latents", x_RK, pool)
        latent_append(x_RK, weight_C, eps, *angles, pages.places_R, pool)

    def paged_latent_attend(
        self, q_RQC: Tensor, turned_RQP: Tensor, pool: Tensor, scale: float, pages: Pages
    ) -> Tensor:
        if pages.chunks is not None:
            return super().paged_latent_attend(q_RQC, turned_RQP, pool, scale, pages)
        check("latent attention over pages", q_RQC, turned_RQP, pool)
        places = _places(pages)
        q, turned = (x[: places[0] * places[1]].unflatten(0, places) for x in (q_RQC, turned_RQP))
        workspace = pages.scratch.get("latent")
        if workspace is None:
            longest = pages.table_BW.shape[1] * pages.page
            workspace = LatentDecodeWorkspace.create(q, pool, max_context=longest)
            pages.scratch["latent"] = workspace
        out = q_RQC.new_empty(q_RQC.shape)
        at = (pages.table_BW, pages.context_lens_B)
        latent_decode(q, turned, pool, *at, workspace, _new(out, places), scale=scale)
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
        w1, bias, w2, b2 = _phi(phi, pages)
        assert pages.chunks is not None and pages.cu_seqlens is not None, (
            "single tokens go through paged_nsa_append"
        )
        compress_step(
            raw,
            pages.of_recent().table_BW,
            compressed,
            pages.table_BW,
            pages.context_lens_B,
            pages.cu_seqlens,
            w1,
            bias,
            w2,
            b2,
            block=sizes.block,
            stride=sizes.stride,
            query_len=max(stop - start for start, stop, _ in pages.chunks),
            angles=angles,
        )

    def paged_nsa_append(
        self,
        pools: Sequence[KeyValues],
        fused_RX: Tensor,
        x_RH: Tensor,
        gate_NH: Tensor,
        phis: tuple[Compression, Compression],
        sizes: NSASizes,
        angles: tuple[Tensor, Tensor],
        all_angles: tuple[Tensor, Tensor],
        pages: Pages,
    ) -> tuple[Tensor, Tensor]:
        check("native sparse attention over pages", fused_RX, x_RH, *(x for pool in pools for x in pool))
        recent = pages.of_recent()
        places = pages.places_R, recent.places_R
        if pages.chunks is not None:
            queries = gate_NH.shape[0] // 3
            q = write_rows(fused_RX, queries, pools, angles, places)
            for i, turns in enumerate((all_angles, None)):
                self.paged_compress(pools[3][i], pools[0][i], phis[i], sizes, pages, turns)
            gates_RN = self.sigmoid(self.linear(x_RH, gate_NH, None, invariant=True))
            return q, gates_RN.view(-1, queries, 3)
        return append_rows(
            fused_RX,
            x_RH,
            gate_NH,
            pools,
            [_phi(phi, pages) for phi in phis],
            angles,
            all_angles,
            places,
            (pages.table_BW, recent.table_BW),
            pages.context_lens_B,
            query_len=pages.num_new,
            block=sizes.block,
            stride=sizes.stride,
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
        check("native sparse attention over pages", q_RQD, *compressed, *selected, *window)
        heads, places, table = q_RQD.shape[1], _places(pages), pages.table_BW
        num_kv, width = selected[1].shape[2:]
        out = q_RQD.new_empty(len(q_RQD), heads, width)
        if pages.chunks is not None:
            rows = pages.chunks[-1][1]
            branches = (compressed, selected, window)
            out[:rows] = self._nsa_chunks(q_RQD[:rows], gates_RQ3[:rows], branches, sizes, pages)
            return out
        workspace = pages.scratch.get("nsa")
        if workspace is None:
            longest = table.shape[1] * pages.page
            workspace = DecodeWorkspace.create(
                *places, heads, num_kv, width, longest, sizes, device=q_RQD.device
            )
            pages.scratch["nsa"] = workspace
        nsa_decode(
            _new(q_RQD, places),
            _new(gates_RQ3, places),
            compressed,
            selected,
            window,
            *_tables(pages),
            pages.context_lens_B,
            workspace,
            _new(out, places),
            sizes,
        )
        return out

    def _nsa_chunks(
        self,
        q_RQD: Tensor,
        gates_RQ3: Tensor,
        branches: tuple[KeyValues, KeyValues, KeyValues],
        sizes: NSASizes,
        pages: Pages,
    ) -> Tensor:
        """Chunks of prompts, all at once; `branches` are compressed, selected and window."""
        assert pages.cu_seqlens is not None
        tables, geometry = _tables(pages), pages.scratch.get("nsa")
        if geometry is None:
            geometry = prefill_geometry(
                pages.cu_seqlens,
                pages.context_lens_B,
                tables,
                tokens=len(q_RQD),
                page=pages.page,
                sizes=sizes,
            )
            pages.scratch["nsa"] = geometry
        return nsa_prefill(
            q_RQD,
            gates_RQ3,
            *branches,
            *tables,
            pages.cu_seqlens,
            pages.context_lens_B,
            sizes,
            geometry=geometry,
        )

    def attend(self, q_BTQD: Tensor, k_BSGD: Tensor, v_BSGV: Tensor) -> Tensor:
        T, S, narrow = q_BTQD.shape[1], k_BSGD.shape[1], v_BSGV.shape[-1]
        if torch.are_deterministic_algorithms_enabled() and T <= S:
            return ordered_attention(q_BTQD, k_BSGD, v_BSGV)
        if q_BTQD.is_cuda and narrow < q_BTQD.shape[-1]:
            # FlashAttention takes heads of one size; for others torch may keep all scores.
            wide_BSGD = F.pad(v_BSGV, (0, q_BTQD.shape[-1] - narrow))
            return self.attend(q_BTQD, k_BSGD, wide_BSGD)[..., :narrow]
        if not 1 < T < S or not q_BTQD.is_cuda or torch.is_grad_enabled():
            return super().attend(q_BTQD, k_BSGD, v_BSGV)
        # A chunk after earlier keys: this mask is known to the fused attention and is not built.
        q, k, v = (x.transpose(1, 2) for x in (q_BTQD, k_BSGD, v_BSGV))
        if k.shape[1] != q.shape[1]:
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=causal_lower_right(T, S))
        return out.transpose(1, 2)
