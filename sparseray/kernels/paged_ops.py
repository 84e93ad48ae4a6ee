"""`PagedOps`: the operations of `Ops` whose sequences have their caches in pages; for inference alone.

Shapes: R rows, P tokens of a page, C compressed tokens, Q query heads, G key/value heads, D and V head sizes, K width
of a latent with its rotated key, H hidden; with drafts S slots, B sequences, W pages of one, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from torch import Tensor

from sparseray.kernels.dse.reference import Fusion
from sparseray.kernels.nsa.reference import Compression
from sparseray.kernels.paged import DraftDraws, DraftState, Draws, History, KeyValues, Pages
from sparseray.kernels.settings import NSASizes


class PagedOps(Protocol):
    """What `Ops` has of them; none is differentiable."""

    def paged_memory_fusion(
        self,
        h_RH: Tensor,
        key_value_RH: Tensor,
        fusion: Fusion,
        history: History,
        pages: Pages,
        starts_R: Tensor | None,
    ) -> Tensor:
        """`memory_fusion` of every sequence's rows after its history, which moves on by them.

        Args:
            key_value_RH: [R, 2 H], keys first.
            starts_R: as `starts_BT` there.
        """
        ...

    def recent_pages(self, pages: Pages) -> None:
        """Fill `pages.recent`, if there is one, from the pages' own table and places; these are of the same type in both."""
        ...

    def paged_write(self, pool: KeyValues, k_RGD: Tensor, v_RGV: Tensor, places_R: Tensor) -> None:
        """Put the rows' keys and values at these places of `Pages`."""
        ...

    def paged_rotary_write(
        self,
        pool: KeyValues,
        fused_RX: Tensor,
        heads: tuple[int, int],
        angles: tuple[Tensor, Tensor],
        pages: Pages,
    ) -> Tensor:
        """`rotary_split` of queries, keys and values, and `paged_write` of the latter; the rotated queries [R, Q, D].

        Args:
            pool: written.
            fused_RX: query, key and value heads of every row.
            heads: Q and G.
            angles: fp32 cosines and sines of the rows' positions.
            pages: of the call.
        """
        ...

    def paged_attend(self, q_RQD: Tensor, pool: KeyValues, pages: Pages) -> Tensor:
        """Causal softmax attention of every sequence's rows to its pages, [R, Q, V]; padding rows are undefined.

        Args:
            q_RQD: rotated queries; what they belong to, and how far each sees, is in `pages`.
            pool: with the keys and values of the rows themselves.
        """
        ...

    def paged_latent_append(
        self,
        pool: Tensor,
        x_RK: Tensor,
        weight_C: Tensor,
        eps: float,
        angles: tuple[Tensor, Tensor],
        pages: Pages,
    ) -> None:
        """Norm the rows' latents, rotate their keys as `rotary_pairs` does, and put both into their pages.

        Args:
            pool: [pages, P, 1, K].
            x_RK: latents with the keys behind them, as projected.
            weight_C, eps: of the latents' root-mean-square norm.
            angles: fp32 cosines and sines of each row's position and pair.
        """
        ...

    def paged_latent_attend(
        self, q_RQC: Tensor, turned_RQP: Tensor, pool: Tensor, scale: float, pages: Pages
    ) -> Tensor:
        """`paged_attend` of all heads to one key, whose first C channels are its value, [R, Q, C].

        Args:
            q_RQC, turned_RQP: queries of a key's two parts.
            pool: [pages, P, 1, K], with those of the rows themselves.
            scale: of the scores.

        Source: arXiv 2405.04434 section 2.1.2, the absorbed form.
        """
        ...

    def paged_latents(self, pool: Tensor, pages: Pages) -> Iterator[tuple[slice, Tensor]]:
        """Rows of chunks and what their sequences have in pages, [B, S, 1, K]: where keys are made of it again.

        Args:
            pool: [pages, P, 1, K].
            pages: with chunks; those of B sequences of one shape come together.
        """
        ...

    def paged_compress(
        self,
        raw: Tensor,
        compressed: Tensor,
        phi: Compression,
        sizes: NSASizes,
        pages: Pages,
        angles: tuple[Tensor, Tensor] | None,
    ) -> None:
        """Write the compressed tokens that the rows complete.

        Args:
            raw: keys or values [recent pages, P, G, D], with those of the rows themselves.
            compressed: [pages, P / stride, G, D], written.
            angles: fp32 cosines and sines of all positions, to rotate keys at their blocks' first ones.
        """
        ...

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
        """What NSA does before it attends: rotated queries [R, Q, D], and gates [R, Q, 3] = sigmoid(x @ gate.T).

        The branches' keys and values are written, and the compressed tokens that the rows complete.

        Args:
            pools: of the compressed, the selected and the window branch, and of what is compressed; the last two lie on
                recent pages.
            fused_RX: as of `branch_rows`.
            gate_NH: [3 Q, H].
            phis: of keys and of values.
            angles, all_angles: fp32 cosines and sines of the rows' positions, and of all.
        """
        ...

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
        """`nsa_attention` of every sequence's rows to its pages, [R, Q, V]; padding rows are undefined.

        Of `window`, which lies on recent pages, nothing is read from before the window of a sequence's first row.
        """
        ...

    def side_by_side(
        self, rows: int, one: Callable[[], Tensor], other: Callable[[], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """What both give, neither of which needs the other; of few rows a device computes them at the same time.

        Args:
            rows: that both compute on.
            one, other: launch their work.
        """
        ...

    def most_probable(self, logits_RV: Tensor) -> Tensor:
        """Tokens, int64 [R], the first of equal ones; `NO_TOKEN` where the largest logit is no finite number."""
        ...

    def draw(self, logits_RV: Tensor, draws: Draws) -> Tensor:
        """A token of each row, int64 [R]: the one in whose part of [0, 1) its number lies, tokens in order of their ids.

        Args:
            logits_RV: of the model.
            draws: `most_probable` where the temperature is 0; elsewhere `NO_TOKEN` unless all logits are finite.
        """
        ...

    def draft_rows(
        self,
        state: DraftState,
        slots_B: Tensor,
        table_SW: Tensor,
        pages: Pages,
        tokens_R: Tensor,
        positions_R: Tensor,
    ) -> None:
        """Place the newest token and the draft of some slots, two rows each; beyond these nothing is written.

        Args:
            state: of all slots.
            slots_B: int32.
            table_SW: int32, the pages of every slot.
            pages: its table, lengths (with both tokens) and places are written.
            tokens_R, positions_R: int32, written.
        """
        ...

    def judge_drafts(
        self,
        logits_RV: Tensor,
        draws: DraftDraws,
        state: DraftState,
        slots_B: Tensor,
        outcome_B3: Tensor,
        tokens_R: Tensor,
    ) -> None:
        """`draw` the token after each of the rows, and see whether the first is the draft.

        Args:
            logits_RV: of two rows of each sequence.
            draws: of the sequences.
            state, slots_B: as of `draft_rows`.
            outcome_B3: int32, written: the token after the newest one and that after the draft, `NO_TOKEN` where
                logits are not finite, and whether the draft stands.
            tokens_R: int32, written: what follows each row, 0 for none.
        """
        ...

    def next_drafts(
        self, logits_RV: Tensor, draws: DraftDraws, outcome_B3: Tensor, state: DraftState, slots_B: Tensor
    ) -> None:
        """Move the slots on by one token or two, and draft again: `draw`, by the number of the drafted token's place.

        Args:
            logits_RV: of the module that drafts, of two rows of each sequence; the second counts where the draft stood.
            draws: as of `judge_drafts`.
            outcome_B3: of `judge_drafts`.
            state: written.
            slots_B: of the sequences; slot 0 stays at no tokens.
        """
        ...
