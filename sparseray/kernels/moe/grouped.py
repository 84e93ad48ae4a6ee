"""Experts of one layer on all their rows at once: the fast twin of `swiglu_forward` and `swiglu_backward`.

Only the matrix products are one call for each expert; everything between them runs on the rows of all experts, which
lie one expert after another, each padded with rows of zeros. Every number has the bits that the reference gives it.

Shapes: E experts, R rows, P rows with padding, H hidden, I inner.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from sparseray.kernels.moe.reference import ROW_MULTIPLE
from sparseray.kernels.settings import ROW_BLOCK

Matrices = tuple[Tensor, Tensor, Tensor]
"""gate [I, H], up [I, H] and down [H, I] of one expert."""

SERIAL = 32768
"""Most elements that torch computes in one thread: at a thread's border it changes to another exp."""


@dataclass(frozen=True)
class Rows:
    """Where the rows of each expert lie.

    Args:
        sizes: rows of each expert that has any, padding included.
        blocks: sizes of the blocks that go through a matrix product at once; none is of two experts.
        owners: index in `sizes` of each block's expert.
        places_R: int64, place of each row among those with padding.
    """

    sizes: list[int]
    blocks: list[int]
    owners: list[int]
    places_R: Tensor

    @classmethod
    def of(cls, counts: Sequence[int], device: torch.device) -> Rows:
        """Rows of experts that have so many each, none of them 0.

        Args:
            counts: of each expert.
            device: of the rows.
        """
        missing = [-count % ROW_MULTIPLE for count in counts]
        shifts_E = torch.tensor([0, *accumulate(missing[:-1])])
        sizes = [count + more for count, more in zip(counts, missing)]
        cut = [
            (min(ROW_BLOCK, size - start), owner)
            for owner, size in enumerate(sizes)
            for start in range(0, size, ROW_BLOCK)
        ]
        return cls(
            sizes,
            [size for size, _ in cut],
            [owner for _, owner in cut],
            torch.arange(sum(counts)).add_(shifts_E.repeat_interleave(torch.tensor(counts))).to(device),
        )

    def spread(self, values_R: Tensor, padding: int | float) -> Tensor:
        """One value a row, in the rows' places, and another in the padding; [P].

        Args:
            values_R: of the rows.
            padding: what stands between them.
        """
        values_P = values_R.new_full((sum(self.sizes),), padding)
        return values_P.index_copy_(0, self.places_R, values_R)

    def gather(self, x_UH: Tensor, from_R: Tensor) -> Tensor:
        """One row of x for each of ours, zeros in the padding; [P, H].

        Args:
            x_UH: rows.
            from_R: int64, which of them.
        """
        padded = F.pad(x_UH, (0, 0, 0, 1))
        return padded.index_select(0, self.spread(from_R, x_UH.shape[0]))

    def split(self, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Each expert's rows of every tensor."""
        return zip(*(tensor.split(self.sizes) for tensor in tensors))

    def multiply(self, x_PK: Tensor, weights: Sequence[Tensor], out_PN: Tensor | None = None) -> Tensor:
        """Each expert's rows times its matrix, in blocks of rows that have the bits of any other number of rows.

        Args:
            x_PK: rows.
            weights: [K, N] of each expert.
            out_PN: what the products are added to; None for nothing.
        """
        beta = 0.0 if out_PN is None else 1.0
        out_PN = x_PK.new_empty(x_PK.shape[0], weights[0].shape[1]) if out_PN is None else out_PN
        for owner, x, out in zip(self.owners, x_PK.split(self.blocks), out_PN.split(self.blocks)):
            out.addmm_(x, weights[owner], beta=beta)
        return out_PN


def _in_blocks(function: Callable[[Tensor], Tensor], x_PI: Tensor) -> Tensor:
    """An elementwise function whose vector and scalar loops differ, where no block has a scalar remainder."""
    return torch.cat([function(block) for block in x_PI.view(-1).split(SERIAL)]).view_as(x_PI)


def forward(x_PH: Tensor, rows: Rows, experts: Sequence[Matrices]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Run every expert on its rows: down(silu(gate x) * (up x)).

    Args:
        x_PH: rows in their places.
        rows: where each expert's are.
        experts: weights of those that have any.

    Returns:
        (y_PH, (g_PI, u_PI)): the outputs and the two pre-activations that backward needs.
    """
    gate, up, down = zip(*experts)
    g_PI, u_PI = (rows.multiply(x_PH, [matrix.T for matrix in part]) for part in (gate, up))
    a_PI = _in_blocks(F.silu, g_PI).mul_(u_PI)
    return rows.multiply(a_PI, [matrix.T for matrix in down]), (g_PI, u_PI)


def backward(
    dy_PH: Tensor,
    x_PH: Tensor,
    saved: tuple[Tensor, Tensor],
    rows: Rows,
    experts: Sequence[Matrices],
    gradients: Sequence[Matrices],
) -> Tensor:
    """Gradients of `forward`; those of the experts are written to where they belong.

    Args:
        dy_PH: gradient of the outputs, zeros in the padding.
        x_PH, saved, rows, experts: of the forward.
        gradients: of the weights of each expert; overwritten.

    Returns:
        dx_PH.
    """
    (g_PI, u_PI), (gate, up, down) = saved, zip(*experts)
    sig_PI = _in_blocks(torch.sigmoid, g_PI)
    silu_PI = g_PI * sig_PI
    da_PI = rows.multiply(dy_PH, down)
    # sig * (1 + g * (1 - sig)), the slope of silu, in the memory of its factors.
    slope_PI = (1 - sig_PI).mul_(g_PI).add_(1).mul_(sig_PI)
    dg_PI = slope_PI.mul_(da_PI * u_PI)
    du_PI = da_PI.mul_(silu_PI)
    dx_PH = rows.multiply(dg_PI, gate)
    rows.multiply(du_PI, up, dx_PH)
    a_PI = silu_PI.mul_(u_PI)
    for into, (x, dy, dg, du, a) in zip(gradients, rows.split(x_PH, dy_PH, dg_PI, du_PI, a_PI)):
        for gradient, left, right in zip(into, (dg, du, dy), (x, x, a)):
            if gradient.dtype == left.dtype:
                torch.mm(left.T, right, out=gradient)
            else:
                gradient.copy_(left.T @ right)
    return dx_PH
