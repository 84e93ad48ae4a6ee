"""Rows of memory tables as they were before they were written over, kept while the tables are copied for a checkpoint.

Tables of many gigabytes take longer to copy than a step, and no step waits for that: a row that changes meanwhile is kept
first, once, unless it has been copied already. The copy of such a row may be old, new or half of each; what was kept is put over it.

Shapes: R rows of a layer's table, U distinct rows of a step.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sparseray.actors.state.reading import PIECE_BYTES, Reading
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

    def copy(self, tensors: Mapping[str, Tensor], into: Mapping[str, Tensor], reading: Reading) -> bool:
        """Copy what lies in tables as it was at the beginning, while others go on writing; False if that was ended.

        Args:
            tensors: by logical name: of each bucket none, or all that shall be copied of it.
            into: room for these.
            reading: leave to read the tables.
        """
        for bucket in self._buckets:
            fields = [
                (i, tensors[name], into[name]) for i, name in enumerate(bucket.names) if name in tensors
            ]
            if not fields:
                continue
            row_bytes = sum(tensor[:1].nbytes for _, tensor, _ in fields)
            step = max(1, PIECE_BYTES // max(1, row_bytes))
            for start in range(bucket.start, bucket.stop, step):
                rows = slice(start - bucket.start, min(start + step, bucket.stop) - bucket.start)
                with reading as may_read:
                    if not may_read:
                        return False
                    self._copy_rows(bucket, start, [(i, tensor[rows], to[rows]) for i, tensor, to in fields])
        return True

    def _copy_rows(self, bucket: Bucket, start: int, fields: Sequence[tuple[int, Tensor, Tensor]]) -> None:
        """Copy a range of a bucket's rows.

        Args:
            bucket: whose rows they are.
            start: of the range.
            fields: which field of the bucket each is, its rows, and room for them.
        """
        stop = start + len(fields[0][1])
        for _, tensor, own in fields:
            own.copy_(tensor)
        # Whatever has changed by now was kept before; what is kept from here on is copied already.
        for ids_U, kept in self._kept[bucket.layer]:
            first, last = np.searchsorted(ids_U, (start, stop))
            places = torch.from_numpy(ids_U[first:last] - start)
            for i, _, own in fields:
                rows = torch.from_numpy(kept[i][first:last]).view(own.dtype)
                own.index_copy_(0, places, rows.view(-1, *own.shape[1:]))
        self._is_safe[bucket.layer][start:stop] = True

    def end(self) -> None:
        """Keep no more rows."""
        self.is_open = False
        self._kept = [[] for _ in self._kept]
