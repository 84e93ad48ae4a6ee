"""Tables of other slots on this host, read without asking: what a reply names once is gathered from memory from then on.

Of one generation, as its exchange (by_message.py) is. A table says of which generation and step its rows are; while
they are others than a step wants, because its owner has a commit to apply still or is in another generation, the owner
is asked as before.
"""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from sparseray.actors.state.memory import as_tensor
from sparseray.actors.state.tables import ROW_TYPES, TableView
from sparseray.actors.wire.messages import TableHandle


class NeighbourTables:
    """Views of the tables of slots on the same host.

    Args:
        generation: of the plan that says who holds which rows.
    """

    def __init__(self, generation: int) -> None:
        self.generation = generation
        self._views: dict[int, list[TableView]] = {}

    def introduce(self, slot: int, handles: Sequence[TableHandle]) -> None:
        """Open a slot's tables the first time it says where they are; no view of what lies on another host.

        Args:
            slot: their owner.
            handles: one for each memory layer.
        """
        if slot not in self._views:
            views = [view for handle in handles if (view := TableView.open(handle)) is not None]
            self._views[slot] = views if len(views) == len(handles) else []

    def gather(self, slot: int, rows_LN: Sequence[Tensor], step: int) -> tuple[Tensor, ...] | None:
        """Gather rows as they are after a step's commit.

        Args:
            slot: their owner.
            rows_LN: int64 [N] of each memory layer.
            step: whose commit is the last one that they have seen.

        Returns:
            [N, D] of each layer, in the rows' dtype; None where the owner is to be asked.
        """
        views = self._views.get(slot)
        if not views:
            return None
        found = []
        for view, rows_N in zip(views, rows_LN, strict=True):
            rows_ND = np.empty((len(rows_N), view.handle.width), ROW_TYPES[view.handle.row_dtype])
            if not view.gather(rows_N.numpy(), rows_ND, generation=self.generation, step=step):
                return None
            found.append(as_tensor(rows_ND))
        return tuple(found)
