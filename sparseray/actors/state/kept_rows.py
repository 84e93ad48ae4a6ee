"""Rows of memory tables as they were before they were written over, kept while the tables are copied for a checkpoint.

Tables of many gigabytes take longer to copy than a step, and no step waits for that: a row that changes meanwhile is kept
first, once, unless its bucket has been copied. The copy of such a row may be old, new or half of each; what was kept is put over it.

Shapes: R rows of a layer's table, U distinct rows of a step.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sparseray.kernels.dse.staging import Move, gather_fields


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """Rows [start, stop) of a layer's table, and the logical names of its fields there, in order."""

    layer: int
    start: int
    stop: int
    names: Sequence[str]


class KeptRows:
    """What one copy needs of rows that change while it is made.

    Args:
        buckets: that may be copied.
        table_rows: R of each layer.
    """

    def __init__(self, buckets: Sequence[Bucket], table_rows: Sequence[int]) -> None:
        self._buckets, self.is_open = buckets, True
        self.names = {name for bucket in buckets for name in bucket.names}
        self._is_safe = [np.zeros(rows, np.bool_) for rows in table_rows]
        """Rows that are kept, or copied as they were."""
        self._kept: list[list[tuple[np.ndarray, list[np.ndarray]]]] = [[] for _ in table_rows]

    def keep(self, moves: Sequence[tuple[int, Move]], threads: int, pool: Executor) -> None:
        """Keep rows as they are; called before they are written over, by one thread at a time.

        Args:
            moves: what will be written, by index of the memory layer; rows are rising.
            threads, pool: as in `gather_fields`.
        """
        found = []
        for layer, (ids_U, columns, _) in moves:
            ids_U = ids_U[~self._is_safe[layer][ids_U]]
            found.append((ids_U, columns, [np.empty((len(ids_U), c.shape[1]), c.dtype) for c in columns]))
        gather_fields(found, threads=threads, pool=pool)
        for (layer, _), (ids_U, _, fields) in zip(moves, found):
            # Not before the rows are here: from now on they may be put over a copy.
            self._kept[layer].append((ids_U, fields))
            self._is_safe[layer][ids_U] = True

    def copy(self, tensors: Mapping[str, Tensor], into: Mapping[str, Tensor]) -> None:
        """Copy what lies in tables as it was at the beginning, while others go on writing.

        Args:
            tensors: by logical name: of each bucket none, or all that shall be copied of it.
            into: room for these.
        """
        for bucket in self._buckets:
            fields = [
                (i, tensors[name], into[name]) for i, name in enumerate(bucket.names) if name in tensors
            ]
            if not fields:
                continue
            for _, tensor, own in fields:
                own.copy_(tensor)
            # Whatever has changed by now was kept before; what is kept from here on is copied already.
            for ids_U, kept in self._kept[bucket.layer]:
                first, last = np.searchsorted(ids_U, (bucket.start, bucket.stop))
                places = torch.from_numpy(ids_U[first:last] - bucket.start)
                for i, _, own in fields:
                    rows = torch.from_numpy(kept[i][first:last]).view(own.dtype)
                    own.index_copy_(0, places, rows.view(-1, *own.shape[1:]))
            self._is_safe[bucket.layer][bucket.start : bucket.stop] = True

    def end(self) -> None:
        """Keep no more rows."""
        self.is_open = False
        self._kept = [[] for _ in self._kept]
