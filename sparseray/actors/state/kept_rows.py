"""Rows of memory tables as they were before they were written over, kept while the tables are copied for a checkpoint.

Tables of many gigabytes take longer to copy than a step, and no step waits for that: a row that changes meanwhile is kept
first. The copy of such a row may be old, new or half of each; in the end all of them are put back.

Shapes: U distinct rows of a step.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from sparseray.kernels.dse.staging import Move, gather_fields
from sparseray.kernels.row_ops import to_numpy


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a logical tensor lies: rows [start, stop) of one field of a layer's table."""

    layer: int
    start: int
    stop: int
    field: int


@dataclass(frozen=True, kw_only=True)
class _Kept:
    """Rows of a layer, rising, with all fields."""

    layer: int
    ids_U: np.ndarray
    fields: list[np.ndarray]


class KeptRows:
    """What one copy needs of rows that change while it is made.

    Args:
        places: of all tensors that may be copied, by logical name.
        end: called once it is over.
    """

    def __init__(self, places: Mapping[str, Place], end: Callable[["KeptRows"], None]) -> None:
        self.places, self._end = places, end
        self._found: list[_Kept] = []

    def keep(self, moves: Sequence[tuple[int, Move]], threads: int, pool: Executor) -> None:
        """Keep rows as they are; called before they are written over.

        Args:
            moves: what will be written, by index of the memory layer; rows are rising.
            threads, pool: as in `gather_fields`.
        """
        found = [
            _Kept(
                layer=layer,
                ids_U=ids_U.copy(),
                fields=[np.empty((len(ids_U), *column.shape[1:]), column.dtype) for column in columns],
            )
            for layer, (ids_U, columns, _) in moves
        ]
        gathered = [(kept.ids_U, columns, kept.fields) for kept, (_, (_, columns, _)) in zip(found, moves)]
        gather_fields(gathered, threads=threads, pool=pool)
        self._found += found

    def put_back(self, copies: Mapping[str, Tensor]) -> None:
        """Make the copies what the tables were at the beginning; nothing of the tables is copied any more.

        Args:
            copies: by logical name.
        """
        # What was kept first is the oldest.
        for kept in reversed(self._found):
            for name, place in self.places.items():
                if place.layer == kept.layer and name in copies:
                    first, last = np.searchsorted(kept.ids_U, (place.start, place.stop))
                    rows = to_numpy(copies[name]).reshape(place.stop - place.start, -1)
                    rows[kept.ids_U[first:last] - place.start] = kept.fields[place.field][first:last]

    def end(self) -> None:
        """Keep no more rows."""
        self._end(self)
