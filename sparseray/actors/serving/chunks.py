"""The tokens that sequences compute in a step, where they lie, and the memory rows that these address.

Between the engine, which says how many of a sequence's tokens are next, and paged_model.py, which runs them.

Shapes: R rows of a call, B sequences, P tokens with those that they look back to, N table rows per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparseray.actors.serving.cache_pool import Lease
from sparseray.kernels.ops import Ops, ops_for
from sparseray.model.dse_layout import NO_TOKEN, DSELayout


@cache
def _hashing() -> Ops:
    """What the host hashes with, whatever the model computes with."""
    return ops_for("auto", torch.device("cpu"))


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


def resets(layout: DSELayout | None) -> bool:
    """Whether a memory looks back to the beginning of a document and no further."""
    return layout is not None and layout.config.reset_at_document and layout.config.document_end_id >= 0


def document_starts(chunks: Sequence[Chunk], layout: DSELayout | None) -> NDArray[np.bool_]:
    """Which of the chunks' tokens are the first of a document; the newest of all need not be known.

    Args:
        chunks: of one call of the network.
        layout: of the memory; None for a model without.
    """
    if layout is None or not resets(layout):
        return np.zeros(sum(chunk.count for chunk in chunks), dtype=np.bool_)
    before: list[int] = []
    for chunk in chunks:
        start = chunk.lease.length
        before += [NO_TOKEN] if start == 0 else []
        before += chunk.known[max(start - 1, 0) : start + chunk.count - 1]
    starts: NDArray[np.bool_] = np.array(before) == layout.config.document_end_id
    return starts


def _look_back(chunk: Chunk, layout: DSELayout) -> list[int]:
    """The tokens before a chunk that n-grams reach, of the same document."""
    look_back, end = max(layout.config.orders) - 1, layout.config.document_end_id
    history = chunk.before(look_back)
    if resets(layout) and end in history:
        # What comes before a document's end is not seen after it; nor is the end itself.
        history = history[len(history) - history[::-1].index(end) :]
    return [NO_TOKEN] * (look_back - len(history)) + history


def memory_rows(chunks: Sequence[Chunk], layout: DSELayout | None) -> dict[int, Tensor]:
    """Addresses of the chunks' table rows by memory layer, on the host.

    Args:
        chunks: of one call of the network.
        layout: of the memory; None for a model without.
    """
    if layout is None:
        return {}
    look_back = max(layout.config.orders) - 1
    known: list[int] = []
    keep: list[bool] = []
    for chunk in chunks:
        known += [*_look_back(chunk, layout), *chunk.tokens]
        keep += [False] * look_back + [True] * chunk.count
    kept = np.array(keep)
    begins = np.zeros(len(kept), dtype=np.bool_)
    begins[kept] = document_starts(chunks, layout)
    tokens_1P, begins_1P, keep_P = (
        torch.tensor(known)[None],
        torch.from_numpy(begins)[None],
        torch.from_numpy(kept),
    )
    return {
        layer: layout.rows(layer, tokens_1P, document_starts=begins_1P, ops=_hashing())[0, keep_P]
        for layer in layout.config.layers
    }


def looked_back(chunks: Sequence[Chunk], layout: DSELayout) -> NDArray[np.int64]:
    """The tokens before the newest ones, and a last column for these.

    Args:
        chunks: of one token each, which need not be known.
        layout: of the memory.
    """
    return np.array([[*_look_back(chunk, layout), NO_TOKEN] for chunk in chunks], dtype=np.int64)


def newest_rows(chunks: Sequence[Chunk], known_BP: NDArray[np.int64], layout: DSELayout) -> dict[int, Tensor]:
    """Addresses [B, N] of the newest tokens' table rows by memory layer, on the host: as of `memory_rows`.

    Args:
        chunks: of one token each. One that turned out to be none has some rows or other.
        known_BP: of `looked_back`, whose last column is filled here.
        layout: of the memory.
    """
    lengths = [chunk.lease.length for chunk in chunks]
    known_BP[:, -1] = [c.known[n] if n < len(c.known) else NO_TOKEN for c, n in zip(chunks, lengths)]
    tokens_BP = torch.from_numpy(known_BP)
    return {
        layer: layout.rows(layer, tokens_BP, ops=_hashing())[:, -1].contiguous()
        for layer in layout.config.layers
    }
