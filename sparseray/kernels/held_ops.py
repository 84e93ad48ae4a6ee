"""`HeldOps`: the operations of `Ops` on the experts of a layer that one of several devices holds; and their plain form.

A slot gives its tokens to all that hold experts; each computes the rows of those that it holds, and gives them back.
Rows are sorted by group: an expert, or, where gradients of several sets of tokens are kept apart, an expert of one set.
`group_held`, `held_forward` and `combine_slots` together have the bits of `experts`, wherever experts are.

Shapes: T tokens, K experts per token, E experts held, G sets, R rows of those, H hidden, I inner.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from sparseray.kernels.moe import expert_sum as sums
from sparseray.kernels.moe.expert_sum import HeldGradients
from sparseray.kernels.moe.reference import group_by_expert


@dataclass(frozen=True, kw_only=True)
class HeldRows:
    """Which rows of some tokens have their expert here.

    Attributes:
        order_R: integers, t * K + k of every pair, by group; pairs whose expert is elsewhere come last.
        inverse_R: where each pair's row lies.
        counts_E: rows of each group, and after them those that are elsewhere: G * E + 1.
        held: scalar, the number of rows that are here.
        num_sets: G.
        plan: what the operation itself needs.
    """

    order_R: Tensor
    inverse_R: Tensor
    counts_E: Tensor
    held: Tensor
    num_sets: int
    plan: Any


class HeldOps(Protocol):
    """What `Ops` has of them; gradients are asked for, not recorded."""

    def group_held(self, groups_TK: Tensor, num_sets: int, num_held: int, like: Tensor) -> HeldRows:
        """Sort the (token, k) pairs by group, stably; nothing is brought to the host.

        Args:
            groups_TK: integers, set * E + the expert's row of the slabs; G * E where it is not here.
            num_sets: G.
            num_held: E.
            like: of the tokens' dtype and device.
        """
        ...

    def held_forward(
        self,
        x_TH: Tensor,
        rows: HeldRows,
        counts: Sequence[int] | None,
        gate_up_E2IH: Tensor,
        down_EHI: Tensor,
    ) -> tuple[Tensor, Any]:
        """Outputs [R, H] of the rows that are here, unweighted, and what their backward pass needs.

        Args:
            x_TH: tokens; kept for the backward pass.
            rows: of `group_held`.
            counts: of each group, on the host; None where a device does without: then R is the number of all pairs, and
                rows from `held` on are not written.
            gate_up_E2IH, down_EHI: slabs in the dtype of x.
        """
        ...

    def held_backward(
        self,
        dout_TH: Tensor,
        weights_TK: Tensor,
        rows: HeldRows,
        counts: Sequence[int] | None,
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

    def owners_of(self, ids_TK: Tensor, bits_E: Tensor) -> Tensor:
        """Which owners the experts of each token have, as bits, int64 [T].

        Args:
            ids_TK: int32, experts of each token.
            bits_E: int64, of each expert the bit of its owner.
        """
        ...

    def sum_of_owners(self, rows_TOH: Tensor, owners_T: Tensor) -> Tensor:
        """Sum of what each token's owners have for it, in their order, [T, H].

        Args:
            rows_TOH: of every owner; what belongs to none of a token may be anything.
            owners_T: of `owners_of`.
        """
        ...


class PlainHeldOps:
    """See `HeldOps`."""

    def group_held(self, groups_TK: Tensor, num_sets: int, num_held: int, like: Tensor) -> HeldRows:
        order_R, counts_E = group_by_expert(groups_TK.long(), num_sets * num_held + 1)
        inverse_R = torch.empty_like(order_R).scatter_(0, order_R, torch.arange(len(order_R)))
        held, top_k = counts_E[:-1].sum(), groups_TK.shape[-1]
        return HeldRows(
            order_R=order_R,
            inverse_R=inverse_R,
            counts_E=counts_E,
            held=held,
            num_sets=num_sets,
            plan=top_k,
        )

    def held_forward(
        self,
        x_TH: Tensor,
        rows: HeldRows,
        counts: Sequence[int] | None,
        gate_up_E2IH: Tensor,
        down_EHI: Tensor,
    ) -> tuple[Tensor, Any]:
        counts = rows.counts_E[:-1].tolist() if counts is None else counts
        order_R = rows.order_R[: sum(counts)]
        return sums.held_forward(x_TH, order_R, counts, rows.plan, gate_up_E2IH, down_EHI)

    def held_backward(
        self,
        dout_TH: Tensor,
        weights_TK: Tensor,
        rows: HeldRows,
        counts: Sequence[int] | None,
        saved: Any,
        gate_up_E2IH: Tensor,
        down_EHI: Tensor,
    ) -> HeldGradients:
        counts = rows.counts_E[:-1].tolist() if counts is None else counts
        order_R = rows.order_R[: sum(counts)]
        slabs = gate_up_E2IH, down_EHI
        return sums.held_backward(dout_TH, weights_TK, order_R, counts, saved, *slabs, rows.num_sets)

    def combine_slots(self, rows_TKH: Tensor, weights_TK: Tensor | None) -> Tensor:
        return sums.combine_slots(rows_TKH, weights_TK)

    def owners_of(self, ids_TK: Tensor, bits_E: Tensor) -> Tensor:
        bits_TK = bits_E[ids_TK.long()]
        found_T = bits_TK[:, 0]
        for k in range(1, bits_TK.shape[1]):
            found_T = found_T | bits_TK[:, k]
        return found_T

    def sum_of_owners(self, rows_TOH: Tensor, owners_T: Tensor) -> Tensor:
        numbers_O = torch.arange(rows_TOH.shape[1], device=rows_TOH.device)
        is_owner_TO = (owners_T[:, None] >> numbers_O & 1).bool()
        return rows_TOH.where(is_owner_TO[..., None], 0).sum(1)
