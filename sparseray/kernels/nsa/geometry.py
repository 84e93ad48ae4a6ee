"""Where every sequence of a call lies in the packed tensors, as tables that the kernels read.

All NSA kernels see packed tensors [tokens, heads, D]; a batch of equal lengths, packed sequences of different
lengths and a chunk against a cache differ only in the table built here. The tables are made on the device,
without a host synchronisation; those of equal lengths are kept for the next call.
"""

from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

QUERY, COMPRESSED, KEYS, WINDOW = 0, 3, 6, 9
"""First of the three columns (offset, length, position of the first token) of each kind of token."""


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """Sequences of one call.

    Attributes:
        meta: int64 [num_seqs, 12], offset, length and first position of queries, compressed tokens,
            selection keys and window keys.
        totals: tokens of each kind in the packed tensors, by column.
        max_keys: an upper bound of one sequence's length.
    """

    meta: Tensor
    totals: dict[int, int]
    max_keys: int
    cache: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    @property
    def num_seqs(self) -> int:
        return self.meta.shape[0]

    def num_tiles(self, kind: int, size: int) -> int:
        """Upper bound of the tiles of `size` tokens of one kind, over all sequences."""
        return self.totals[kind] // size + self.num_seqs

    def tiles(self, kind: int, size: int) -> Tensor:
        """int32 [num_tiles, 2]: sequence (-1: none) and tile inside the sequence."""
        key = (kind, size)
        if key not in self.cache:
            self.cache[key] = _tile_table(self.meta[:, kind + 1], size, self.num_tiles(kind, size))
        return self.cache[key]


def _tile_table(lengths: Tensor, size: int, count: int) -> Tensor:
    tiles = (lengths + size - 1) // size
    ends = tiles.cumsum(0)
    ids = torch.arange(count, device=lengths.device)
    seq = torch.searchsorted(ends, ids, right=True)
    known = seq.clamp(max=lengths.shape[0] - 1)
    local = ids - (ends - tiles)[known]
    seq = torch.where(seq < lengths.shape[0], seq, torch.full_like(seq, -1))
    return torch.stack([seq, local], 1).int().contiguous()


def query_sequences(geometry: Geometry) -> Tensor:
    """int32 [T]: sequence of every packed query."""
    key = (QUERY, -2)
    if key not in geometry.cache:
        meta = geometry.meta
        rows = torch.arange(geometry.totals[QUERY], device=meta.device)
        seq = torch.searchsorted(meta[:, 0] + meta[:, 1], rows, right=True).clamp(max=meta.shape[0] - 1)
        geometry.cache[key] = seq.int()
    return geometry.cache[key]


def query_positions(geometry: Geometry) -> Tensor:
    """int32 [T]: position of every packed query in its sequence."""
    key = (QUERY, -1)
    if key not in geometry.cache:
        meta, seq = geometry.meta, query_sequences(geometry).long()
        rows = torch.arange(geometry.totals[QUERY], device=meta.device)
        geometry.cache[key] = (rows - meta[seq, 0] + meta[seq, 2]).int()
    return geometry.cache[key]


@lru_cache(maxsize=64)
def uniform(
    batch: int,
    queries: int,
    compressed: int,
    keys: int,
    win: int,
    q_start: int,
    win_start: int,
    device: torch.device,
) -> Geometry:
    """Equal lengths, [batch, tokens, heads, D] tensors flattened."""
    seq = torch.arange(batch, device=device)
    one = torch.ones_like(seq)
    zero = torch.zeros_like(seq)
    columns = [seq * queries, one * queries, one * q_start, seq * compressed, one * compressed, zero]
    columns += [seq * keys, one * keys, zero, seq * win, one * win, one * win_start]
    totals = {QUERY: batch * queries, COMPRESSED: batch * compressed, KEYS: batch * keys, WINDOW: batch * win}
    return Geometry(meta=torch.stack(columns, 1), totals=totals, max_keys=max(keys, q_start + queries))


def packed(cu_seqlens: Tensor, tokens: int, compressed: int, block: int, stride: int) -> Geometry:
    """Packed sequences of different lengths; the compressed tokens are packed in the same order."""
    cu = cu_seqlens.long()
    start, length = cu[:-1], cu[1:] - cu[:-1]
    count = torch.where(length >= block, (length - block) // stride + 1, torch.zeros_like(length))
    first = count.cumsum(0) - count
    zero = torch.zeros_like(start)
    columns = [start, length, zero, first, count, zero, start, length, zero, start, length, zero]
    totals = {QUERY: tokens, COMPRESSED: compressed, KEYS: tokens, WINDOW: tokens}
    return Geometry(meta=torch.stack(columns, 1), totals=totals, max_keys=tokens)


def paged(
    cu_seqlens: Tensor, context_lens: Tensor, tokens: int, longest: int, widths: tuple[int, int, int],
    block: int, stride: int,
) -> Geometry:  # fmt: skip
    """Packed chunks of queries against pages; the offset of keys is their sequence's row in the flat table.

    Args:
        cu_seqlens: [B + 1], boundaries of the chunks among `tokens` queries.
        context_lens: [B], tokens of every sequence, its chunk included, at most `longest`.
        widths: columns of the tables of compressed tokens, selection keys and window keys.
    """
    cu, context = cu_seqlens.long(), context_lens.long()
    start, length = cu[:-1], cu[1:] - cu[:-1]
    zero = torch.zeros_like(start)
    row = torch.arange(start.shape[0], device=start.device)
    count = torch.where(context >= block, (context - block) // stride + 1, zero)
    columns = [start, length, context - length, row * widths[0], count, zero]
    columns += [row * widths[1], context, zero, row * widths[2], context, zero]
    return Geometry(meta=torch.stack(columns, 1), totals={QUERY: tokens}, max_keys=longest)
