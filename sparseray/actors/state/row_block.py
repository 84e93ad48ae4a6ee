"""One layer's rows of a step in one block of memory, so that one copy brings all of them to a device or back.

Shapes: U distinct rows of a step, N addresses of a part, B buckets, D row width.
"""

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

ALIGNMENT = 256
FIELDS = 4
"""Weight and moments come first: they alone come back."""


@dataclass(frozen=True, kw_only=True)
class RowLayout:
    """What a block holds, and where.

    Args:
        num_rows: U.
        width: D.
        row_dtype: of the weights.
        addresses: N of each part.
        num_buckets: B.
    """

    num_rows: int
    width: int
    row_dtype: torch.dtype
    addresses: tuple[int, ...]
    num_buckets: int

    def _sections(self) -> list[tuple[torch.dtype, tuple[int, ...]]]:
        U, D = self.num_rows, self.width
        fields = [
            (self.row_dtype, (U, D)),
            (torch.float32, (U, D)),
            (torch.float32, (U,)),
            (torch.int64, (U,)),
        ]
        of_parts = [(torch.int32, (count,)) for count in self.addresses]
        firsts = [(torch.int32, (U + 1,)) for _ in self.addresses]
        last = (torch.int64, (self.num_buckets + 1,))
        return [*fields, (torch.int64, (U,)), *of_parts, *of_parts, *firsts, last]

    def _starts(self) -> list[int]:
        starts = [0]
        for dtype, shape in self._sections():
            size = dtype.itemsize * prod(shape)
            starts.append(starts[-1] + -(-size // ALIGNMENT) * ALIGNMENT)
        return starts

    @property
    def num_bytes(self) -> int:
        """Of a block."""
        return self._starts()[-1]

    @property
    def field_bytes(self) -> int:
        """Of its beginning, which the fields take."""
        return self._starts()[FIELDS]

    def rows(self, block: Tensor) -> "LayerRows":
        """The rows that lie in a block.

        Args:
            block: uint8 [num_bytes].
        """
        views = [
            block[start : start + dtype.itemsize * prod(shape)].view(dtype).view(shape)
            for start, (dtype, shape) in zip(self._starts(), self._sections())
        ]
        weight_UD, m_UD, v_U, t_U, ids_U, *of_parts, buckets_B1 = views
        parts = len(self.addresses)
        return LayerRows(
            layout=self,
            block=block,
            ids_U=ids_U,
            weight_UD=weight_UD,
            m_UD=m_UD,
            v_U=v_U,
            t_U=t_U,
            places=tuple(of_parts[:parts]),
            orders=tuple(of_parts[parts : 2 * parts]),
            firsts=tuple(of_parts[2 * parts :]),
            buckets_B1=buckets_B1,
        )


@dataclass(frozen=True, kw_only=True)
class LayerRows:
    """One layer's rows of a step, in host memory or on a device.

    Args:
        layout, block: where the others lie.
        ids_U: int64, rising; where the rows lie in the table.
        weight_UD, m_UD, v_U, t_U: the rows with their moments and updates.
        places: int32 [N] of each part, the row of each address.
        orders, firsts: int32, of each part, the order of its gradients' sums (`Ops.row_sums`).
        buckets_B1: int64, the first row of each bucket, and their number.
    """

    layout: RowLayout
    block: Tensor
    ids_U: Tensor
    weight_UD: Tensor
    m_UD: Tensor
    v_U: Tensor
    t_U: Tensor
    places: tuple[Tensor, ...]
    orders: tuple[Tensor, ...]
    firsts: tuple[Tensor, ...]
    buckets_B1: Tensor

    @property
    def fields(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What an update changes, in the table's order."""
        return self.weight_UD, self.m_UD, self.v_U, self.t_U

    def to(self, device: torch.device) -> "LayerRows":
        """Send all of it on its way."""
        return self.layout.rows(self.block.to(device, non_blocking=True))

    def fetch_fields(self, device_rows: "LayerRows") -> None:
        """Bring what an update changed from where it lies now.

        Args:
            device_rows: of the same layout.
        """
        size = self.layout.field_bytes
        self.block[:size].copy_(device_rows.block[:size], non_blocking=True)
