"""`PagedPlainOps`: all operations of `Ops` in plain PyTorch, which `REFERENCE` is and TritonOps falls back to.

Those over pages take one sequence after another (paged.py); on a CPU its bits are those of contiguous keys. Shapes as in
paged_ops.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from sparseray.kernels import paged
from sparseray.kernels.dse.reference import Fusion
from sparseray.kernels.nsa.reference import BranchKeys, Compression
from sparseray.kernels.paged import NO_TOKEN, DraftDraws, DraftState, Draws, History, KeyValues, Pages
from sparseray.kernels.plain_ops import PlainOps
from sparseray.kernels.settings import NSASizes


class PagedPlainOps(PlainOps):
    """See `Ops` for what each operation does."""

    def paged_memory_fusion(
        self,
        h_RH: Tensor,
        key_value_RH: Tensor,
        fusion: Fusion,
        history: History,
        pages: Pages,
        starts_R: Tensor | None,
    ) -> Tensor:
        key_RH, value_RH = key_value_RH.chunk(2, dim=-1)
        gated_RH = self.memory_gate(h_RH, key_RH, value_RH, fusion)
        normed_RH = self.rms_norm(gated_RH, fusion.value_norm_C, fusion.conv_eps)
        conv_RH = paged.convolve(self.memory_conv, normed_RH, fusion, history, pages, starts_R)
        return F.silu(conv_RH) + gated_RH

    def paged_write(self, pool: KeyValues, k_RGD: Tensor, v_RGV: Tensor, places_R: Tensor) -> None:
        paged.write(pool, k_RGD, v_RGV, places_R)

    def recent_pages(self, pages: Pages) -> None:
        recent, page = pages.recent, pages.page
        if recent is None:
            return
        torch.index_select(recent.recent_P, 0, pages.table_BW.view(-1), out=recent.table_BW.view(-1))
        page_R = recent.recent_P.index_select(0, pages.places_R // page)
        torch.add(pages.places_R % page, page_R, alpha=page, out=recent.places_R)

    def paged_rotary_write(
        self,
        pool: KeyValues,
        fused_RX: Tensor,
        heads: tuple[int, int],
        angles: tuple[Tensor, Tensor],
        pages: Pages,
    ) -> Tensor:
        widths = (pool[1].shape[-1],)
        q, k, v = self.rotary_split(fused_RX, heads, pool[0].shape[-1], 1, widths, *angles)
        self.paged_write(pool, k, v, pages.places_R)
        return q

    def paged_attend(self, q_RQD: Tensor, pool: KeyValues, pages: Pages) -> Tensor:
        out = q_RQD.new_zeros(*q_RQD.shape[:2], pool[1].shape[-1])
        for b, rows, _, context in paged.sequences(pages):
            k, v = (paged.gather(cache, pages.table_BW[b], 0, context)[None] for cache in pool)
            out[rows] = self.attend(q_RQD[rows][None], k, v)[0]
        return out

    def paged_latent_write(self, pool: Tensor, k_R1K: Tensor, pages: Pages) -> None:
        pool.flatten(0, 1).index_copy_(0, pages.places_R.long(), k_R1K.to(pool.dtype))

    def paged_latent_append(
        self,
        pool: Tensor,
        x_RK: Tensor,
        weight_C: Tensor,
        eps: float,
        angles: tuple[Tensor, Tensor],
        pages: Pages,
    ) -> None:
        latent_RC, k_RP = x_RK.tensor_split([weight_C.shape[0]], -1)
        turned_R1P = self.rotary_pairs(k_RP[:, None], 0, *angles)
        rows_R1K = torch.cat([self.rms_norm(latent_RC, weight_C, eps)[:, None], turned_R1P], -1)
        self.paged_latent_write(pool, rows_R1K, pages)

    def paged_latent_attend(
        self, q_RQC: Tensor, turned_RQP: Tensor, pool: Tensor, scale: float, pages: Pages
    ) -> Tensor:
        q_RQK, latent = torch.cat([q_RQC, turned_RQP], -1), q_RQC.shape[-1]
        out = torch.zeros_like(q_RQC)
        # `attend` divides by the root of the width.
        q_RQK = q_RQK * (scale * math.sqrt(q_RQK.shape[-1]))
        for b, rows, _, context in paged.sequences(pages):
            k = paged.gather(pool, pages.table_BW[b], 0, context)[None]
            out[rows] = self.attend(q_RQK[rows][None], k, k[..., :latent])[0]
        return out

    def paged_latents(self, pool: Tensor, pages: Pages) -> Iterator[tuple[slice, Tensor]]:
        for rows, _, context, table_BW in paged.alike(pages):
            yield rows, pool[table_BW].flatten(1, 2)[:, :context]

    def paged_compress(
        self,
        raw: Tensor,
        compressed: Tensor,
        phi: Compression,
        sizes: NSASizes,
        pages: Pages,
        angles: tuple[Tensor, Tensor] | None,
    ) -> None:
        for b, _, before, context in paged.sequences(pages):
            first, last = paged.compressed_range(sizes, before, context)
            if first < last:
                x = paged.gather(raw, pages.of_recent().table_BW[b], first * sizes.stride, context)
                new = self.compress(x[None], phi, sizes)[0]
                if angles is not None:
                    at = slice(first * sizes.stride, (last - 1) * sizes.stride + 1, sizes.stride)
                    new = self.rotary(new, angles[0][at], angles[1][at])
                places = paged.compressed_places(pages.table_BW[b], first, last, compressed.shape[1])
                compressed.flatten(0, 1).index_copy_(0, places, new)

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
        heads, widths = gate_NH.shape[0] // 3, (pools[0][0].shape[-1], pools[0][1].shape[-1])
        q, rows = self.branch_rows(fused_RX, (heads, pools[0][0].shape[2]), widths, angles)
        recent = pages.of_recent().places_R
        for pool, (k_RGD, v_RGV), at in zip(pools[1:], rows, (pages.places_R, recent, recent), strict=True):
            self.paged_write(pool, k_RGD, v_RGV, at)
        for i, turns in enumerate((all_angles, None)):
            self.paged_compress(pools[3][i], pools[0][i], phis[i], sizes, pages, turns)
        gates_RN = self.sigmoid(self.linear(x_RH, gate_NH, None, invariant=True))
        return q, gates_RN.view(-1, heads, 3)

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
        out = q_RQD.new_zeros(*q_RQD.shape[:2], selected[1].shape[-1])
        for b, rows, before, context in paged.sequences(pages):
            start, table_W = max(0, before - sizes.window + 1), pages.table_BW[b]
            recent_W = pages.of_recent().table_BW[b]
            cmp = [paged.gather(c, table_W, 0, sizes.num_compressed(context))[None] for c in compressed]
            slc = [paged.gather(c, table_W, 0, context)[None] for c in selected]
            win = [paged.gather(c, recent_W, start, context)[None] for c in window]
            keys = BranchKeys(
                k_cmp=cmp[0], v_cmp=cmp[1], k_slc=slc[0], v_slc=slc[1], k_win=win[0], v_win=win[1]
            )
            q, gates = q_RQD[rows][None], gates_RQ3[rows][None]
            out[rows] = self.nsa_attention(q, keys, gates, sizes, q_start=before, win_start=start)[0]
        return out

    def side_by_side(
        self, rows: int, one: Callable[[], Tensor], other: Callable[[], Tensor]
    ) -> tuple[Tensor, Tensor]:
        return one(), other()

    def most_probable(self, logits_RV: Tensor) -> Tensor:
        best_R, token_R = logits_RV.max(-1)
        return torch.where(best_R.isfinite(), token_R, NO_TOKEN)

    def draw(self, logits_RV: Tensor, draws: Draws) -> Tensor:
        scores_RV = logits_RV.double()
        best_R, token_R = scores_RV.max(-1)
        is_drawn_R = draws.temperature_R > 0
        divisor_R = torch.where(is_drawn_R, draws.temperature_R, 1.0)
        weights_RV = torch.exp((scores_RV - best_R[:, None]) / divisor_R[:, None])
        total_RV = weights_RV.masked_fill(weights_RV < draws.min_p_R[:, None], 0.0).cumsum(-1)
        wanted_R1 = draws.number_R[:, None] * total_RV[:, -1:]
        drawn_R = torch.searchsorted(total_RV, wanted_R1, right=True)[:, 0].clamp(max=scores_RV.shape[1] - 1)
        is_right_R = torch.where(is_drawn_R, scores_RV.isfinite().all(-1), best_R.isfinite())
        return torch.where(is_right_R, torch.where(is_drawn_R, drawn_R, token_R), NO_TOKEN)

    def draft_rows(
        self,
        state: DraftState,
        slots_B: Tensor,
        table_SW: Tensor,
        pages: Pages,
        tokens_R: Tensor,
        positions_R: Tensor,
    ) -> None:
        count, page = 2 * len(slots_B), pages.page
        lengths_B = state.length_S[slots_B]
        positions_BN = lengths_B[:, None] + torch.arange(2, device=slots_B.device, dtype=torch.int32)
        torch.index_select(table_SW, 0, slots_B, out=pages.table_BW)
        torch.add(lengths_B, 2, out=pages.context_lens_B)
        page_BN = pages.table_BW.gather(1, (positions_BN // page).long())
        pages.places_R[:count] = (page_BN * page + positions_BN % page).flatten()
        tokens_R[:count] = torch.stack([state.latest_S[slots_B], state.draft_S[slots_B]], 1).flatten()
        positions_R[:count] = positions_BN.flatten()

    def judge_drafts(
        self,
        logits_RV: Tensor,
        draws: DraftDraws,
        state: DraftState,
        slots_B: Tensor,
        outcome_B3: Tensor,
        tokens_R: Tensor,
    ) -> None:
        at_B = (state.length_S[slots_B] - draws.least_B).long()
        found_R = self.draw(logits_RV, draws.of(torch.stack([at_B, at_B + 1], 1))).int()
        outcome_B3[:, :2] = found_R.view(-1, 2)
        outcome_B3[:, 2] = outcome_B3[:, 0] == state.draft_S[slots_B]
        tokens_R[: len(found_R)] = found_R.clamp_min(0)

    def next_drafts(
        self, logits_RV: Tensor, draws: DraftDraws, outcome_B3: Tensor, state: DraftState, slots_B: Tensor
    ) -> None:
        first_B, second_B, accepted_B = outcome_B3.unbind(1)
        at_B, stands_B = slots_B.long(), accepted_B > 0
        length_B = state.length_S[slots_B] + 1 + accepted_B
        rows_BV = torch.where(stands_B[:, None], logits_RV[1::2], logits_RV[::2])
        draft_B = self.draw(rows_BV, draws.of((length_B - draws.least_B).long()[:, None]))
        for values_S, value_B in (
            (state.latest_S, torch.where(stands_B, second_B, first_B).clamp_min(0)),
            (state.draft_S, draft_B.clamp_min(0)),
            (state.length_S, torch.where(slots_B > 0, length_B, 0)),
        ):
            values_S.index_copy_(0, at_B, value_B.int())
