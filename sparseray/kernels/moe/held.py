"""Some experts of a layer on a GPU, for tokens of any slot: the products of ffn.py over the rows whose experts are here.

All tokens of a slot come as they lie there; which (token, k) pairs have their expert here, and in which order, is found
on the device (`group_held`). Rows leave unweighted, and the slot that the tokens are of combines them, so a token's bits
do not depend on where its experts are. Oracle: `expert_sum.py`.

Shapes: T tokens, K experts per token, E experts here, R rows here, H hidden, I inner.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from sparseray.kernels.moe.expert_map import ExpertPlan, plan_experts
from sparseray.kernels.moe.expert_sum import HeldGradients
from sparseray.kernels.moe.ffn import (
    activation_grad,
    clear_behind,
    default_config,
    project_rows,
    up_project,
    weight_grad,
)


def group_held(groups_TK: Tensor, num_groups: int, num_held: int, like: Tensor) -> ExpertPlan:
    """Sort the (token, k) pairs by group, those whose expert is elsewhere last and without a tile.

    Args:
        groups_TK: of each pair; a multiple of E plus the row of the slabs, or `num_groups` where the expert is elsewhere.
        num_groups: a multiple of E.
        num_held: E.
        like: tokens, whose dtype and device choose the tiles.
    """
    plan = plan_experts(groups_TK, num_groups + 1, tile_rows=default_config(like).m)
    is_none = (plan.tile_expert_M < 0) | (plan.tile_expert_M >= num_groups)
    return replace(plan, tile_expert_M=(plan.tile_expert_M % max(1, num_held)).masked_fill_(is_none, -1))


def _held(plan: ExpertPlan, counts: Sequence[int] | None) -> ExpertPlan:
    """The part of the map that is of experts here; where its rows are not counted, room for all."""
    groups = plan.counts_E.shape[0] - 1
    rows, tiles = plan.order_R.shape[0], plan.tile_expert_M.shape[0]
    if counts is not None:
        rows, tiles = sum(counts), sum(-(-count // plan.tile_rows) for count in counts)
    return replace(
        plan,
        order_R=plan.order_R[:rows],
        counts_E=plan.counts_E[:groups],
        offsets_E=plan.offsets_E[:groups],
        tile_expert_M=plan.tile_expert_M[:tiles],
        tile_row_M=plan.tile_row_M[:tiles],
        tile_end_M=plan.tile_end_M[:tiles],
    )


def held_forward(
    x_TH: Tensor, plan: ExpertPlan, counts: Sequence[int] | None, gate_up_E2IH: Tensor, down_EHI: Tensor
) -> tuple[Tensor, Any]:
    """Outputs of the rows whose experts are here, [R, H], and what the backward pass needs.

    Args:
        x_TH: tokens.
        plan: of `group_held`.
        counts: its counts of the groups here, on the host; None leaves room for every row.
        gate_up_E2IH, down_EHI: slabs.
    """
    is_empty = not plan.order_R.shape[0] or not down_EHI.shape[0]
    if is_empty or (counts is not None and not sum(counts)):
        return x_TH.new_empty(0, x_TH.shape[1]), None
    held, config = _held(plan, counts), default_config(x_TH)
    act_RI, pre_RP = up_project(x_TH, gate_up_E2IH, held, config, save=True)
    # Where rows are not counted, those behind the last one have never been written.
    end = None if counts is not None else plan.offsets_E[held.counts_E.shape[0]]
    y_RH = project_rows(act_RI, down_EHI, held, config, config.down, transposed=True)
    return y_RH, (x_TH, pre_RP, held, end)


def held_backward(
    dout_TH: Tensor,
    weights_TK: Tensor,
    saved: Any,
    gate_up_E2IH: Tensor,
    down_EHI: Tensor,
    num_sets: int,
) -> HeldGradients:
    """Backward of `held_forward` and of the weighted sum over k.

    Args:
        dout_TH: gradient of the layer's output.
        weights_TK: fp32.
        saved: of the forward pass.
        gate_up_E2IH, down_EHI: slabs.
        num_sets: groups of each expert.
    """
    if saved is None:
        return HeldGradients(
            dx_RH=dout_TH.new_empty(0, dout_TH.shape[1]),
            dweights_R=weights_TK.new_empty(0),
            dgate_up_GE2IH=gate_up_E2IH.new_zeros(num_sets, *gate_up_E2IH.shape),
            ddown_GEHI=down_EHI.new_zeros(num_sets, *down_EHI.shape),
        )
    x_TH, pre_RP, held, end = saved
    config = default_config(x_TH)
    dpre_RP, weighted_RI, dweights_R = activation_grad(dout_TH, pre_RP, down_EHI, weights_TK, held, config)
    if end is not None:
        clear_behind(weighted_RI, end, config.down_weights)
        clear_behind(dpre_RP, end, config.up_weights)
    ddown_EHI = weight_grad(weighted_RI, dout_TH, held, config, rows_first=False)
    del weighted_RI
    dgate_up_E2IH = weight_grad(dpre_RP, x_TH, held, config, rows_first=True)
    dx_RH = project_rows(dpre_RP, gate_up_E2IH, held, config, config.input_grad, transposed=False)
    return HeldGradients(
        dx_RH=dx_RH,
        dweights_R=dweights_R,
        dgate_up_GE2IH=dgate_up_E2IH.view(num_sets, *gate_up_E2IH.shape),
        ddown_GEHI=ddown_EHI.view(num_sets, *down_EHI.shape),
    )
