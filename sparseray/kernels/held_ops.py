"""`HeldOps`: the operations of `Ops` on the experts of a layer that one of several devices holds; and their plain form.

A slot gives its tokens to all that hold experts; each computes the rows of those that it holds, and gives them back
unweighted. `group_held`, `held_forward` and `combine_slots` together have the bits of `experts`, wherever experts are.

Shapes: T tokens, K experts per token, E experts held, R rows of those, H hidden, I inner.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from sparseray.kernels.moe import expert_sum as sums
from sparseray.kernels.moe.expert_sum import HeldGradients
from sparseray.kernels.moe.reference import group_by_expert


@dataclass(frozen=True, kw_only=True)
class HeldRows:
    """Which rows of some tokens have their expert here.

    Attributes:
        order_R: integers, t * K + k of every pair, by expert held; pairs whose expert is elsewhere come last.
        counts_E: rows of each expert held, and after them those that are elsewhere: E + 1.
        plan: what the operation itself needs.
    """

    order_R: Tensor
    counts_E: Tensor
    plan: Any


class HeldOps(Protocol):
    """What `Ops` has of them; gradients are asked for, not recorded."""

    def group_held(self, places_TK: Tensor, num_held: int, like: Tensor) -> HeldRows:
        """Sort the (token, k) pairs by the place of their expert, stably; nothing is brought to the host.

        Args:
            places_TK: integers, the expert's row of the slabs; `num_held` where it is not here.
            num_held: E.
            like: of the tokens' dtype and device.
        """
        ...

    def held_forward(
        self, x_TH: Tensor, rows: HeldRows, counts: Sequence[int], gate_up_E2IH: Tensor, down_EHI: Tensor
    ) -> tuple[Tensor, Any]:
        """Outputs [R, H] of the rows that are here, unweighted, and what their backward pass needs.

        Args:
            x_TH: tokens; kept for the backward pass.
            rows: of `group_held`.
            counts: of each expert held, on the host.
            gate_up_E2IH, down_EHI: slabs in the dtype of x.
        """
        ...

    def held_backward(
        self,
        dout_TH: Tensor,
        weights_TK: Tensor,
        rows: HeldRows,
        counts: Sequence[int],
        saved: Any,
        gate_up_E2IH: Tensor,
        down_EHI: Tensor,
    ) -> HeldGradients:
        """Backward of `held_forward` and of the weighted sum.

        Args:
            dout_TH: gradient of the layer's output, in the dtype of x.
            weights_TK: fp32, routing weights.
            rows, counts, saved, gate_up_E2IH, down_EHI: of the forward pass.
        """
        ...

    def combine_slots(self, rows_TKH: Tensor, weights_TK: Tensor | None) -> Tensor:
        """Sum over k, in k order, of the rows, times their weights where there are any, [T, H]."""
        ...


class PlainHeldOps:
    """See `HeldOps`."""

    def group_held(self, places_TK: Tensor, num_held: int, like: Tensor) -> HeldRows:
        order_R, counts_E = group_by_expert(places_TK.long(), num_held + 1)
        return HeldRows(order_R=order_R, counts_E=counts_E, plan=places_TK.shape[1])

    def held_forward(
        self, x_TH: Tensor, rows: HeldRows, counts: Sequence[int], gate_up_E2IH: Tensor, down_EHI: Tensor
    ) -> tuple[Tensor, Any]:
        order_R = rows.order_R[: sum(counts)]
        return sums.held_forward(x_TH, order_R, counts, rows.plan, gate_up_E2IH, down_EHI)

    def held_backward(
        self,
        dout_TH: Tensor,
        weights_TK: Tensor,
        rows: HeldRows,
        counts: Sequence[int],
        saved: Any,
        gate_up_E2IH: Tensor,
        down_EHI: Tensor,
    ) -> HeldGradients:
        order_R = rows.order_R[: sum(counts)]
        slabs = gate_up_E2IH, down_EHI
        return sums.held_backward(dout_TH, weights_TK, order_R, counts, saved, *slabs)

    def combine_slots(self, rows_TKH: Tensor, weights_TK: Tensor | None) -> Tensor:
        return sums.combine_slots(rows_TKH, weights_TK)
