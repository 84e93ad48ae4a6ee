"""The tokens that sequences compute in a step, where they lie, and the memory rows that these address.

Between the engine, which says how many of a sequence's tokens are next, and paged_model.py, which runs them.

Shapes: R rows of a call, B sequences, P tokens with those that they look back to, N table rows per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparseray.actors.serving.cache_pool import Lease
from sparseray.kernels.ops import Ops
from sparseray.model.dse_layout import NO_TOKEN, DSELayout


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """What one sequence computes in a step.

    Args:
        lease: its pages; `length` tokens are there already.
        known: all of its tokens that the host knows; the one after them may be read from `latest`.
        count: how many are next.
    """

    lease: Lease
    known: Sequence[int]
    count: int

    @property
    def tokens(self) -> Sequence[int]:
        """The next tokens."""
        return self.known[self.lease.length : self.lease.length + self.count]

    def before(self, count: int) -> list[int]:
        """The tokens before them, at most so many."""
        return list(self.known[max(0, self.lease.length - count) : self.lease.length])


@dataclass(frozen=True, kw_only=True)
class Placing:
    """Where the rows of a call lie, on the host; integers throughout.

    Args:
        rows_3R: token, position and place (page * page size + position in the page) of every row; zeros after the last.
        slots_B: of the sequences.
        contexts_B: tokens of each, those of the call included.
        bounds: first row of each sequence, and where the last one's end.
    """

    rows_3R: NDArray[np.int64]
    slots_B: NDArray[np.int32]
    contexts_B: NDArray[np.int32]
    bounds: NDArray[np.int32]


def placing(pieces: Sequence[tuple[Lease, int, Sequence[int]]], page: int, rows: int) -> Placing:
    """Place some sequences' next tokens.

    Args:
        pieces: (lease, first position, tokens) of each.
        page: tokens of a page.
        rows: R, with padding.
    """
    sizes = np.array([len(tokens) for _, _, tokens in pieces])
    starts = np.array([start for _, start, _ in pieces])
    bounds = np.concatenate([[0], sizes.cumsum()])
    rows_3R = np.zeros((3, rows), dtype=np.int64)
    for (lease, at, tokens), (start, stop) in zip(pieces, pairwise(bounds)):
        positions = np.arange(stop - start) + at
        rows_3R[0, start:stop] = tokens
        rows_3R[1, start:stop] = positions
        rows_3R[2, start:stop] = np.array(lease.pages)[positions // page] * page + positions % page
    return Placing(
        rows_3R=rows_3R,
        slots_B=np.array([lease.slot for lease, _, _ in pieces], dtype=np.int32),
        contexts_B=(starts + sizes).astype(np.int32),
        bounds=bounds.astype(np.int32),
    )


def memory_rows(
    chunks: Sequence[Chunk], layout: DSELayout | None, ops: Ops
) -> tuple[dict[int, Tensor], NDArray[np.bool_]]:
    """Addresses of the chunks' table rows by memory layer, and where documents start; on the host.

    Args:
        chunks: of one call of the network.
        layout: of the memory; None for a model without.
        ops: of the host.
    """
    starts = np.zeros(sum(chunk.count for chunk in chunks), dtype=np.bool_)
    if layout is None:
        return {}, starts
    look_back, end = max(layout.config.orders) - 1, layout.config.document_end_id
    resets = layout.config.reset_at_document and end >= 0
    known: list[int] = []
    keep: list[bool] = []
    begins: list[bool] = []
    for chunk in chunks:
        history, tokens = chunk.before(look_back), chunk.tokens
        previous = history[-1] if history else NO_TOKEN
        if resets and end in history:
            # What comes before a document's end is not seen after it; the end itself is the last token before.
            at = len(history) - 1 - history[::-1].index(end)
            begun = history[at + 1 :]
            history = [NO_TOKEN] * (len(history) - len(begun)) + begun
        history = [NO_TOKEN] * (look_back - len(history)) + history
        last = [previous, *tokens[:-1]]
        known += [*history, *tokens]
        keep += [False] * look_back + [True] * chunk.count
        begins += [False] * look_back + [resets and token == end for token in last]
    kept = np.array(keep)
    starts = np.array(begins)[kept]
    tokens_1P = torch.tensor(known)[None]
    begins_1P = torch.tensor(begins)[None] if resets else None
    keep_P = torch.from_numpy(kept)
    rows = partial(layout.rows, tokens_BT=tokens_1P, document_starts=begins_1P, ops=ops)
    found = {layer: rows(layer)[0, keep_P] for layer in layout.config.layers}
    return found, starts
