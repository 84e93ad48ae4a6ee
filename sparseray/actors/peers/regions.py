"""What lies where in the buffer that a slot lays open: all slots of a generation cut all buffers in the same way.

A region is written by others and read by its owner. It is free again when its owner has answered: the next thing that a
source writes there it sends after that answer has come (across.py), so no region needs a second one.

Shapes: S slots, T tokens of a part, K experts per token, H hidden, P dense parameters, N nodes of the tree of parts.
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

_ALIGNMENT = 256


@dataclass(frozen=True, kw_only=True)
class Regions:
    """One slot's buffer, cut.

    Args:
        flags_S: int64, how far each source has come.
        x_STH: a source's tokens, or the gradients of their outputs.
        ids_STK: int32, their experts.
        weights_STK: fp32, their routing weights.
        rows_RH: outputs, or input gradients, of the own tokens: a row for each (token, k), or, where holders sum theirs, for
            each (token, holder).
        row_weights_R: fp32, gradients of the routing weights, of each (token, k).
        nodes_NP: fp32, the own slice of dense gradients of others' parts.
        dense_P: fp32, the sum over all parts.
        shares_N: gradients of experts that are backed up here; room for fp32, whatever their dtype.
    """

    flags_S: Tensor
    x_STH: Tensor
    ids_STK: Tensor
    weights_STK: Tensor
    rows_RH: Tensor
    row_weights_R: Tensor
    nodes_NP: Tensor
    dense_P: Tensor
    shares_N: Tensor

    def of_sources(self, name: str, tokens: int) -> Tensor:
        """What sources write, [S, T, ...], where they have fewer tokens than a part.

        Each source's lies together, and begins as far on as `room_for` leaves it room.

        Args:
            name: of the region.
            tokens: of each source.
        """
        region: Tensor = getattr(self, name)
        (S, _, width), room = region.shape, room_for(tokens)
        return region.view(-1)[: S * room * width].view(S, room, width)[:, :tokens]


def room_for(tokens: int) -> int:
    """Tokens of each source that a region has room for: what is written for one of them begins at a multiple of 16 bytes.

    Args:
        tokens: T; numbers of a token have four bytes, or are many.
    """
    return -(-tokens // 4) * 4


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What the regions' shapes follow from.

    Args:
        slots: S.
        tokens, top_k, hidden: T, K and H.
        returned: rows that come back for a token; None for one for each of its k.
        dtype: of tokens and rows.
        nodes: N.
        dense: P.
        dense_slice: parameters that one holder sums, at most.
        shares: numbers of the experts that one slot backs up, at most.
    """

    slots: int
    tokens: int
    top_k: int
    hidden: int
    returned: int | None = None
    dtype: torch.dtype
    nodes: int
    dense: int
    dense_slice: int
    shares: int

    def _shapes(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        S, T, K, H = self.slots, self.tokens, self.top_k, self.hidden
        return {
            "flags_S": (torch.int64, (S,)),
            "x_STH": (self.dtype, (S, T, H)),
            "ids_STK": (torch.int32, (S, T, K)),
            "weights_STK": (torch.float32, (S, T, K)),
            "rows_RH": (self.dtype, (T * (self.returned or K), H)),
            "row_weights_R": (torch.float32, (T * K,)),
            "nodes_NP": (torch.float32, (self.nodes, self.dense_slice)),
            "dense_P": (torch.float32, (self.dense,)),
            "shares_N": (torch.float32, (self.shares,)),
        }

    @property
    def num_bytes(self) -> int:
        """Bytes of a buffer."""
        return sum(_padded(dtype, shape) for dtype, shape in self._shapes().values())

    def cut(self, buffer: Tensor) -> Regions:
        """Name the regions of a buffer's bytes."""
        found, start = {}, 0
        for name, (dtype, shape) in self._shapes().items():
            size = torch.Size(shape).numel() * dtype.itemsize
            found[name] = buffer[start : start + size].view(dtype).view(shape)
            start += _padded(dtype, shape)
        assert set(found) == {field.name for field in fields(Regions)}
        return Regions(**found)


def _padded(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    return -(-torch.Size(shape).numel() * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
