"""`RowOps`: the operations of `Ops` that train a step's memory rows where they are staged; plain form, compiled loops.

Rows of a table lie on the device for the time of a step, each once and rising (state/staged_memory.py). The plain form
runs the loops of a memory shard, so that on a CPU the bits are a shard's.

Shapes: N gradients (repeats allowed), U distinct rows, D row width, B ranges of rows.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparseray.kernels.dse.cpu import rowwise_adam_
from sparseray.kernels.dse.staging import sum_segments


class RowOps(Protocol):
    """What `Ops` has of them; none is differentiable, and of all sums the order is fixed."""

    def take_rows(self, x_UD: Tensor, places_N: Tensor) -> Tensor:
        """x[places], in x's dtype: [N, D].

        Args:
            x_UD: contiguous.
            places_N: int32 or int64, below U.
        """
        ...

    def take_newer(
        self, fields: tuple[Tensor, ...], ids_U: Tensor, newer: tuple[Tensor, ...], newer_ids_V: Tensor
    ) -> None:
        """Overwrite the rows that are in both lists by the other's, in place, without asking a device which they are.

        Args:
            fields: weight [U, D], m [U, D], v [U] and t [U], contiguous.
            ids_U: int64, rising.
            newer: the same of the other list.
            newer_ids_V: int64, rising.
        """
        ...

    def row_sums(self, grads_ND: Tensor, order_N: Tensor, first_U1: Tensor) -> Tensor:
        """Sum the gradients of equal rows in order of position: fp32 [U, D], 0 for a row without any.

        Args:
            grads_ND: fp32 or bf16, contiguous.
            order_N: int32 or int64, positions of the gradients, row after row.
            first_U1: of the same dtype, where in it each row's begin, and where the last one's end.
        """
        ...

    def range_norms(self, x_UD: Tensor, first_B1: Tensor) -> Tensor:
        """Sums of the squares of consecutive ranges of rows, fp32 [B].

        Args:
            x_UD: fp32, contiguous.
            first_B1: int64, each range's first row, and the row after the last one's.
        """
        ...

    def row_adam(
        self,
        weight_UD: Tensor,
        m_UD: Tensor,
        v_U: Tensor,
        t_U: Tensor,
        ids_U: Tensor,
        sums_UD: Tensor,
        *,
        scale: float,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        seed: int,
    ) -> None:
        """Row-wise Adam in place, as `dse.cpu.rowwise_adam_`; bf16 rows are rounded stochastically.

        Args:
            weight_UD: fp32 or bf16. m_UD: fp32. v_U: fp32. t_U: int64 updates seen.
            ids_U: int64, the rows' numbers in their table, for the rounding.
            sums_UD: fp32, summed gradients.
            scale: factor on the gradients.
            lr, betas, eps, seed: as there.
        """
        ...


def to_numpy(tensor: Tensor) -> NDArray[Any]:
    """The memory of a tensor on the host as an array, a copy of one on a device; bfloat16 as uint16."""
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).cpu().numpy().view(np.uint16)
    return tensor.cpu().numpy()


class PlainRowOps:
    """See `RowOps`; what lies on a device comes to the host and goes back for sums and update."""

    def take_rows(self, x_UD: Tensor, places_N: Tensor) -> Tensor:
        return x_UD.index_select(0, places_N)

    def take_newer(
        self, fields: tuple[Tensor, ...], ids_U: Tensor, newer: tuple[Tensor, ...], newer_ids_V: Tensor
    ) -> None:
        at_U = torch.searchsorted(newer_ids_V, ids_U).clamp_(max=len(newer_ids_V) - 1)
        is_newer_U = newer_ids_V.index_select(0, at_U) == ids_U
        for own, other in zip(fields, newer):
            mask = is_newer_U if own.ndim == 1 else is_newer_U[:, None]
            own.copy_(torch.where(mask, other.index_select(0, at_U), own))

    def row_sums(self, grads_ND: Tensor, order_N: Tensor, first_U1: Tensor) -> Tensor:
        sums_UD = sum_segments(to_numpy(grads_ND.float()), to_numpy(order_N), to_numpy(first_U1))
        return torch.from_numpy(sums_UD).to(grads_ND.device)

    def range_norms(self, x_UD: Tensor, first_B1: Tensor) -> Tensor:
        ranges = pairwise(first_B1.tolist())
        return torch.stack([x_UD[first:stop].double().square().sum() for first, stop in ranges]).float()

    def row_adam(
        self,
        weight_UD: Tensor,
        m_UD: Tensor,
        v_U: Tensor,
        t_U: Tensor,
        ids_U: Tensor,
        sums_UD: Tensor,
        *,
        scale: float,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        seed: int,
    ) -> None:
        fields = [weight_UD, m_UD, v_U, t_U]
        weight, m, v, t = host = [field.cpu() for field in fields]
        rowwise_adam_(
            to_numpy(weight),
            to_numpy(m),
            to_numpy(v),
            to_numpy(t),
            np.arange(len(ids_U)),
            to_numpy(sums_UD) * np.float32(scale),
            lr=lr,
            beta1=betas[0],
            beta2=betas[1],
            eps=eps,
            seed=seed,
            ids_U=to_numpy(ids_U),
        )
        for field, new in zip(fields, host):
            field.copy_(new)
