"""Position-wise layers, rotary encoding, and the `Batch` that says which rows belong to which sequence.

The network works on rows: all tokens of a call in one [R, H] matrix. In training these are B sequences of
equal length; in inference they are chunks of any length, each with its cache, padded at the end to a multiple
of `ROW_PADDING` rows. A row's bits then do not depend on what else is in the call: matrix products run on
blocks of 32 to 128 rows, for which CPU libraries sum in one order; everything else is per row, and no element
falls into the scalar remainder of a vector loop, whose exp differs from the vector one (seen in the sigmoid
of the memory's gate, one number per row).

Shapes: R rows, H hidden, B sequences, T tokens, I inner width, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparseray.kernels.moe.reference import ROW_BLOCK

if TYPE_CHECKING:
    from sparseray.model.cache import Cache

ROW_PADDING = 32
"""Two vectors of 16 floats, what one turn of torch's widest elementwise loop takes; divides `ROW_BLOCK`."""


@dataclass(frozen=True, kw_only=True)
class Span:
    """One chunk of a sequence in inference: its rows and the cache of what came before."""

    start: int
    stop: int
    cache: Cache


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Which sequence and position each row has.

    Args:
        shape: (B, T) of a call without caches; (1, rows) otherwise.
        positions_R: int64 position of each row in its sequence.
        rows: rows that hold tokens; the rest is padding.
        starts_BT: bool, documents' first tokens; None when nothing resets there.
        spans: the chunks of a call with caches; None without.
    """

    shape: tuple[int, int]
    positions_R: Tensor
    rows: int
    starts_BT: Tensor | None = None
    spans: tuple[Span, ...] | None = None

    @property
    def invariant(self) -> bool:
        """Whether a row's bits must not depend on the other rows."""
        return self.spans is not None


def padded(rows: int) -> int:
    """Rows after padding to a multiple of `ROW_PADDING`."""
    return -(-rows // ROW_PADDING) * ROW_PADDING


def linear(x_RI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None, *, invariant: bool) -> Tensor:
    """x @ weight.T + bias; with `invariant`, in row blocks whose bits do not depend on the number of rows.

    Args:
        x_RI: input rows; for `invariant` R is a multiple of `ROW_PADDING`.
    """
    if not invariant or x_RI.shape[0] <= ROW_BLOCK or x_RI.is_cuda:
        return F.linear(x_RI, weight_OI, bias_O)
    return torch.cat([F.linear(block, weight_OI, bias_O) for block in torch.split(x_RI, ROW_BLOCK)])


class Linear(nn.Module):
    """A matrix and an optional bias, applied to the rows of a batch."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None

    def forward(self, x_RI: Tensor, batch: Batch) -> Tensor:
        """Return [R, outputs]."""
        return linear(x_RI, self.weight, self.bias, invariant=batch.invariant)


class RMSNorm(nn.Module):
    """Root-mean-square norm, computed in fp32 and returned in the input's dtype."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last axis."""
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)


class SwiGLU(nn.Module):
    """down(silu(gate x) * (up x)); gate and up are one matrix, gate first."""

    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.gate_up = Linear(hidden, 2 * inner)
        self.down = Linear(inner, hidden)

    def forward(self, x_RH: Tensor, batch: Batch) -> Tensor:
        """Return [R, H]."""
        gate_RI, up_RI = self.gate_up(x_RH, batch).chunk(2, dim=-1)
        out: Tensor = self.down(F.silu(gate_RI) * up_RI, batch)
        return out


def rope_tables(length: int, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines [length, head_dim / 2], fp32, of the angles position * theta^(-2i/D)."""
    frequencies = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angles = torch.arange(length, dtype=torch.float64)[:, None] * frequencies
    return angles.cos().float(), angles.sin().float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position encoding; channel i is paired with channel i + D/2.

    Args:
        x: [..., tokens, heads, D].
        cos, sin: [tokens, D / 2] at the tokens' positions.
    """
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = cos[:, None, :], sin[:, None, :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)
