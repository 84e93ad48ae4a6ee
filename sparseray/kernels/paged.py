"""Paged caches in plain PyTorch: what `Ops.paged_*` do, one sequence after another, for any device.

All layers share one table: page p of a sequence is the same number in every pool. Pools that keep the newest tokens of
a sequence alone (`Recent`) have pages, and a table, of their own. A pool of compressed tokens has page / stride rows a
page, so the block of a token lies on the token's own page. On a CPU a
sequence's bits are those of the same operations on contiguous keys.

Shapes: R rows, B sequences, W pages of a sequence, P tokens of a page, Q query heads, G key/value heads, D and V
head sizes, S slots.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparseray.kernels.dse.reference import Fusion
from sparseray.kernels.settings import NSASizes

KeyValues = tuple[Tensor, Tensor]
"""A pool's keys [pages, P, G, D] and values [pages, P, G, V], contiguous."""


@dataclass(frozen=True, kw_only=True)
class Recent:
    """Where a call's rows lie in pools that keep the newest tokens of a sequence alone.

    Args:
        recent_P: int32, for every page the one of its tokens in these pools; 0 where it has none.
        table_BW: int32, as of `Pages`; what it says of pages that were given back is never followed.
        places_R: as of `Pages`.
    """

    recent_P: Tensor
    table_BW: Tensor
    places_R: Tensor

    @classmethod
    def beside(cls, recent_P: Tensor | None, table_BW: Tensor, places_R: Tensor) -> Recent | None:
        """Room beside those of `Pages`; None where no layer has such a pool.

        Args:
            recent_P: as above.
            table_BW, places_R: of `Pages`.
        """
        if recent_P is None:
            return None
        room = torch.zeros_like(table_BW), torch.zeros_like(places_R)
        return cls(recent_P=recent_P, table_BW=room[0], places_R=room[1])


@dataclass(frozen=True, kw_only=True)
class Pages:
    """Whose rows a call has and where their keys and values lie.

    Args:
        page: tokens of a page, P.
        table_BW: int32, the page of every P tokens of a sequence.
        context_lens_B: int32, tokens of every sequence, those of this call included.
        places_R: integers, where each row's keys and values go: page * P + position in the page.
        chunks: (first row, last row + 1, tokens with the chunk) of every sequence, known to the host; None in what a
            graph holds, where nothing is known to the host.
        num_new: tokens of every sequence while decoding, whose rows follow one another.
        cu_seqlens: int32 [B + 1], boundaries of the chunks, after the last of which rows are padding; None while
            decoding.
        recent: the same in pools of the newest tokens; None where no layer has one.
        scratch: what the operations keep for all layers of a call, and of calls with the same buffers.
    """

    page: int
    table_BW: Tensor
    context_lens_B: Tensor
    places_R: Tensor
    chunks: tuple[tuple[int, int, int], ...] | None = None
    num_new: int = 1
    cu_seqlens: Tensor | None = None
    recent: Recent | None = None
    scratch: dict[Any, Any] = field(default_factory=dict)

    @property
    def num_sequences(self) -> int:
        """B."""
        return self.table_BW.shape[0]

    def of_recent(self) -> Recent:
        """`recent`, for a layer that has such a pool."""
        assert self.recent is not None
        return self.recent

    def spans(self) -> tuple[tuple[int, int, int], ...]:
        """The chunks; read from the device where the host does not know them."""
        if self.chunks is not None:
            return self.chunks
        new, contexts = self.num_new, self.context_lens_B.tolist()
        if self.cu_seqlens is not None:
            return tuple((a, b, n) for (a, b), n in zip(pairwise(self.cu_seqlens.tolist()), contexts))
        return tuple((b * new, (b + 1) * new, context) for b, context in enumerate(contexts))


@dataclass(frozen=True)
class History:
    """The newest inputs of a memory layer's convolution.

    Args:
        rows_SLH: fp32, of every slot; moved on in place.
        slots_B: integers, which slot each sequence has; read while decoding.
        slots: the same, known to the host; read with chunks.
    """

    rows_SLH: Tensor
    slots_B: Tensor
    slots: tuple[int, ...]


NO_TOKEN = -1
"""Instead of a token where the logits are not finite."""


@dataclass(frozen=True, kw_only=True)
class DraftState:
    """What a step goes on from, int32 [S] each; slot 0 is nobody's.

    Args:
        latest_S: newest token of every slot, which no page has yet.
        draft_S: what probably follows it.
        length_S: tokens in pages.
    """

    latest_S: Tensor
    draft_S: Tensor
    length_S: Tensor


@dataclass(frozen=True, kw_only=True)
class Draws:
    """How tokens are drawn, float64 [R] each.

    Args:
        temperature_R: 0 for the most probable token.
        min_p_R: only tokens at least this share as probable as the best one are drawn.
        number_R: random, in [0, 1).
    """

    temperature_R: Tensor
    min_p_R: Tensor
    number_R: Tensor


@dataclass(frozen=True, kw_only=True)
class DraftDraws:
    """How the tokens of sequences that draft are drawn, of which the device alone knows how long they are.

    Args:
        least_B: int32, tokens that a sequence has in pages at least; at most one fewer than it has.
        temperature_B, min_p_B: float64, as of `Draws`.
        numbers_B4: float64, of the places `least_B` + 1, + 2, + 3 and + 4 of a sequence.
    """

    least_B: Tensor
    temperature_B: Tensor
    min_p_B: Tensor
    numbers_B4: Tensor

    def of(self, at_BN: Tensor) -> Draws:
        """How to draw N tokens of each sequence, one after another.

        Args:
            at_BN: int64, which of its numbers.
        """
        count = at_BN.shape[1]
        return Draws(
            temperature_R=self.temperature_B.repeat_interleave(count),
            min_p_R=self.min_p_B.repeat_interleave(count),
            number_R=self.numbers_B4.gather(1, at_BN).flatten(),
        )


def write(pool: KeyValues, k_RGD: Tensor, v_RGV: Tensor, places_R: Tensor) -> None:
    """Put the rows' keys and values where they belong."""
    at = places_R.long()
    for cache, rows in zip(pool, (k_RGD, v_RGV)):
        cache.flatten(0, 1).index_copy_(0, at, rows.to(cache.dtype))


def gather(cache: Tensor, table_W: Tensor, first: int, last: int) -> Tensor:
    """Rows [first, last) of one sequence, [last - first, G, D]."""
    page = cache.shape[1]
    start = first // page
    pages = table_W[start : -(-last // page)].long()
    return cache[pages].flatten(0, 1)[first - start * page : last - start * page]


def sequences(pages: Pages) -> Iterator[tuple[int, slice, int, int]]:
    """(index, rows, tokens before the call, tokens with it) of every sequence that has rows."""
    for b, (start, stop, context) in enumerate(pages.spans()):
        if stop > start:
            yield b, slice(start, stop), context - (stop - start), context


def alike(pages: Pages) -> Iterator[tuple[slice, int, int, Tensor]]:
    """(rows, sequences, tokens with the call, pages of each) of chunks of one shape that follow one another."""
    assert pages.chunks is not None
    first = 0
    for (size, context), same in groupby(pages.chunks, lambda chunk: (chunk[1] - chunk[0], chunk[2])):
        count, start = len(list(same)), pages.chunks[first][0]
        table = pages.table_BW[first : first + count, : -(-context // pages.page)].long()
        yield slice(start, start + count * size), count, context, table
        first += count


def compressed_range(sizes: NSASizes, before: int, context: int) -> tuple[int, int]:
    """Indices [first, last) of the compressed tokens that a chunk completes."""
    return sizes.num_compressed(before), sizes.num_compressed(context)


def compressed_places(table_W: Tensor, first: int, last: int, page: int) -> Tensor:
    """Rows of a pool of compressed tokens, `page` of them on a page."""
    index = torch.arange(first, last, device=table_W.device)
    return table_W[index // page].long() * page + index % page


def convolve(
    conv: Callable[[Tensor, Fusion, Tensor | None, Tensor], Tensor],
    x_RH: Tensor,
    fusion: Fusion,
    history: History,
    pages: Pages,
    starts_R: Tensor | None,
) -> Tensor:
    """Convolve every sequence's rows after its history, and keep there what the next ones reach back to.

    Args:
        conv: `Ops.memory_conv`.
        x_RH: its inputs.
        fusion: weights.
        history: moved on; while decoding those of all sequences together.
        pages: which rows are whose. Where a sequence decodes several tokens, of which some may not stand, its history
            stays until `settle`.
        starts_R: documents' first tokens; None when nothing resets there.
    """
    out_RH, rows_SLH = torch.zeros_like(x_RH), history.rows_SLH
    if pages.chunks is None and pages.num_new > 1:
        shape = pages.num_sequences, pages.num_new
        count = shape[0] * shape[1]
        x_BNH = pages.scratch[_unsettled(history)] = x_RH[:count].unflatten(0, shape).contiguous()
        starts_BN = None if starts_R is None else starts_R[:count].view(shape)
        out_RH[:count] = conv(x_BNH, fusion, starts_BN, rows_SLH[history.slots_B]).flatten(0, 1)
        return out_RH
    if pages.chunks is None:
        B, at = pages.num_sequences, history.slots_B
        starts_B1 = None if starts_R is None else starts_R[:B, None]
        old_BLH, x_B1H = rows_SLH[at], x_RH[:B, None]
        out_RH[:B] = conv(x_B1H, fusion, starts_B1, old_BLH)[:, 0]
        if starts_B1 is not None:
            old_BLH = old_BLH.masked_fill(starts_B1[:, :, None], 0.0)
        rows_SLH[at] = torch.cat([old_BLH[:, 1:], x_B1H.float()], 1)
        return out_RH
    for (start, stop, _), slot in zip(pages.chunks, history.slots):
        starts_T = None if starts_R is None else starts_R[start:stop]
        old_LH, x_TH = rows_SLH[slot], x_RH[start:stop]
        starts_1T = None if starts_T is None else starts_T[None]
        out_RH[start:stop] = conv(x_TH[None], fusion, starts_1T, old_LH[None])[0]
        seen = torch.cat([old_LH, x_TH.float()])
        if starts_T is not None:
            document = F.pad(starts_T.long().cumsum(0), (old_LH.shape[0], 0))
            seen = seen * (document == document[-1])[:, None]
        old_LH.copy_(seen[seen.shape[0] - old_LH.shape[0] :])
    return out_RH


def _unsettled(history: History) -> tuple[str, int]:
    """Where `convolve` keeps the inputs of tokens that may not stand."""
    return "unsettled", history.rows_SLH.data_ptr()


def settle(history: History, pages: Pages, starts_R: Tensor | None, accepted_B: Tensor) -> None:
    """Move histories on by the tokens that stand, of several that each sequence decoded.

    Args:
        history: as `convolve` was given it.
        pages: as there.
        starts_R: as there.
        accepted_B: integers, tokens that stand beside the first one.
    """
    at, rows_SLH, x_BNH = history.slots_B, history.rows_SLH, pages.scratch[_unsettled(history)]
    reach, accepted_B1 = rows_SLH.shape[1], accepted_B.long()[:, None]
    seen_BPH = torch.cat([rows_SLH[at], x_BNH.float()], 1)
    if starts_R is not None:
        starts_BN = starts_R[: x_BNH.shape[0] * x_BNH.shape[1]].view(x_BNH.shape[:2])
        document_BP = F.pad(starts_BN.long().cumsum(1), (reach, 0))
        is_same_BP = document_BP == document_BP.gather(1, reach + accepted_B1)
        seen_BPH = seen_BPH * is_same_BP[:, :, None]
    kept_BL = accepted_B1 + 1 + torch.arange(reach, device=at.device)
    rows_SLH[at] = seen_BPH.gather(1, kept_BL[:, :, None].expand(-1, -1, seen_BPH.shape[2]))
