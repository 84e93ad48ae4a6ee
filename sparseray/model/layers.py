"""Position-wise layers, rotary encoding, and the `Batch` that says which rows belong to which sequence.

The network works on rows: all tokens of a call in one [R, H] matrix. In training these are B sequences of
equal length; in inference they are chunks of any length whose caches lie in pages, padded at the end to a multiple
of `Ops.row_padding` rows. On a CPU a row's bits then do not depend on what else is in the call.

Shapes: R rows, H hidden, B sequences, T tokens, I inner width, D head size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sparseray.kernels.ops import Ops
from sparseray.model.config import ModelConfig, RopeConfig
from sparseray.model.yarn import frequencies, rotary_scale, score_scale

if TYPE_CHECKING:
    from sparseray.model.paged import Paged


UNSCALED = RopeConfig()


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Which sequence and position each row has.

    Args:
        shape: (B, T) in training; (1, rows) in inference.
        positions_R: int64 position of each row in its sequence.
        rows: rows that hold tokens; the rest is padding.
        starts_BT: bool, documents' first tokens; None when nothing resets there.
        paged: pages and pools of a call in inference; None in training.
    """

    shape: tuple[int, int]
    positions_R: Tensor
    rows: int
    starts_BT: Tensor | None = None
    paged: Paged | None = None

    @property
    def invariant(self) -> bool:
        """Whether a row's bits must not depend on the other rows."""
        return self.paged is not None


Run = Callable[..., Any]
"""Calls a stretch of a layer with its arguments, as `at_once` or `recomputed`."""


def at_once(stretch: Callable[..., Any], *arguments: Any) -> Any:
    """Call it; everything that its backward pass reads is kept."""
    return stretch(*arguments)


def recomputed(stretch: Callable[..., Any], *arguments: Any) -> Any:
    """Call it and keep the arguments only; the backward pass calls it again."""
    return checkpoint(stretch, *arguments, use_reentrant=False, preserve_rng_state=False)


class Linear(nn.Module):
    """A matrix and an optional bias, applied to the rows of a batch."""

    def __init__(self, inputs: int, outputs: int, ops: Ops, *, bias: bool = False) -> None:
        super().__init__()
        self.ops = ops
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None

    def forward(self, x_RI: Tensor, batch: Batch) -> Tensor:
        """Return [R, outputs]."""
        return self.ops.linear(x_RI, self.weight, self.bias, invariant=batch.invariant)


class RMSNorm(nn.Module):
    """Root-mean-square norm, computed in fp32 and returned in the input's dtype."""

    def __init__(self, width: int, eps: float, ops: Ops) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps, self.ops = eps, ops

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last axis."""
        return self.ops.rms_norm(x, self.weight, self.eps)

    def add(self, x: Tensor, residual: Tensor, readers: int = 1) -> tuple[Tensor, ...]:
        """(norm of residual + x, once for each of its readers, residual + x)."""
        return self.ops.add_rms_norm(x, residual, self.weight, self.eps, readers)


class SwiGLU(nn.Module):
    """down(silu(gate x) * (up x)); gate and up are one matrix, gate first."""

    def __init__(self, hidden: int, inner: int, ops: Ops) -> None:
        super().__init__()
        self.ops = ops
        self.gate_up = Linear(hidden, 2 * inner, ops)
        self.down = Linear(inner, hidden, ops)

    def _inner(self, x_RH: Tensor, batch: Batch) -> Tensor:
        return self.ops.swiglu(self.gate_up(x_RH, batch))

    def forward(self, x_RH: Tensor, batch: Batch) -> Tensor:
        """Return [R, H]."""
        out: Tensor = self.down(self._inner(x_RH, batch), batch)
        return out

    def add_to(self, y_RH: Tensor, x_RH: Tensor, batch: Batch) -> Tensor:
        """Return y, which is given away, with the result added."""
        inner_RI = self._inner(x_RH, batch)
        return self.ops.add_linear(y_RH, inner_RI, self.down.weight, invariant=batch.invariant)


def rope_tables(
    length: int, head_dim: int, theta: float, rope: RopeConfig = UNSCALED, *, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Cosines and sines [length, head_dim / 2], fp32, of the angles position * theta^(-2i/D).

    Args:
        length: positions.
        head_dim: channels that are turned, D.
        theta: base.
        rope: how the frequencies are changed for long sequences.
        scale: factor on both tables.
    """
    angles = torch.arange(length, dtype=torch.float64)[:, None] * frequencies(rope, theta, head_dim)
    return (angles.cos() * scale).float(), (angles.sin() * scale).float()


@dataclass(frozen=True, kw_only=True)
class Angles:
    """Cosines and sines, fp32: of each row's position [R, D / 2], and of all positions [P, D / 2].

    `latent` has those of latent attention, in a model with such layers.
    """

    cos_RD: Tensor
    sin_RD: Tensor
    cos_PD: Tensor
    sin_PD: Tensor
    latent: Angles | None = None


class Rope(nn.Module):
    """Cosines and sines for every position, shared by the layers; not part of the state.

    Where whole heads are turned, the factor of the scores is in the tables: its root on queries and on keys.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        rope, length, theta = config.rope, config.max_seq_len, config.rope_theta
        scale = rotary_scale(rope)
        whole = scale * math.sqrt(score_scale(rope))
        self._add("", rope_tables(length, config.head_dim, theta, rope, scale=whole))
        self.has_latent = config.has_latent_layers
        if self.has_latent:
            width = config.mla.qk_rope_head_dim
            self._add("latent_", rope_tables(length, width, theta, rope, scale=scale))

    def _add(self, prefix: str, tables: tuple[Tensor, Tensor]) -> None:
        for name, table in zip(("cos", "sin"), tables):
            self.register_buffer(prefix + name, table, persistent=False)

    def at(self, positions_R: Tensor) -> Angles:
        """The angles of rows at these positions."""
        latent = None
        if self.has_latent:
            cos, sin = self.get_buffer("latent_cos"), self.get_buffer("latent_sin")
            latent = Angles(cos_RD=cos[positions_R], sin_RD=sin[positions_R], cos_PD=cos, sin_PD=sin)
        cos_RD, sin_RD = self.cos[positions_R], self.sin[positions_R]
        return Angles(cos_RD=cos_RD, sin_RD=sin_RD, cos_PD=self.cos, sin_PD=self.sin, latent=latent)
