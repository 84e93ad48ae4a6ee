"""Some experts of a layer on a GPU, for tokens of any slot: the products of ffn.py over the rows whose experts are here.

All tokens of a slot come as they lie there; which (token, k) pairs have their expert here, and in which order, is found
on the device (`group_held`). Rows leave unweighted, and the slot that the tokens are of combines them, so a token's bits
do not depend on where its experts are. Oracle: `expert_sum.py`.

Shapes: T tokens, K experts per token, E experts here, R rows here, H hidden, I inner.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparseray.kernels.moe.expert_map import ExpertPlan, plan_experts
from sparseray.kernels.moe.expert_sum import HeldGradients
from sparseray.kernels.moe.ffn import (
    activation_grad,
    default_config,
    project_rows,
    up_project,
    weight_grad,
)


def group_held(places_TK: Tensor, num_held: int, like: Tensor) -> ExpertPlan:
    """Sort the (token, k) pairs by expert, those whose expert is elsewhere last.

    Args:
        places_TK: row of the slabs that each pair's expert has; `num_held` where it is elsewhere.
        num_held: E.
        like: tokens, whose dtype and device choose the tiles.
    """
    return plan_experts(places_TK, num_held + 1, tile_rows=default_config(like).m)


def _held(plan: ExpertPlan, counts: Sequence[int]) -> ExpertPlan:
    """The part of the map that is of experts here."""
    tiles, rows = sum(-(-count // plan.tile_rows) for count in counts), sum(counts)
    return ExpertPlan(
        order_R=plan.order_R[:rows],
        inverse_R=plan.inverse_R,
        counts_E=plan.counts_E[: len(counts)],
        offsets_E=plan.offsets_E[: len(counts)],
        tile_expert_M=plan.tile_expert_M[:tiles],
        tile_row_M=plan.tile_row_M[:tiles],
        tile_end_M=plan.tile_end_M[:tiles],
        top_k=plan.top_k,
        tile_rows=plan.tile_rows,
    )


def held_forward(
    x_TH: Tensor, plan: ExpertPlan, counts: Sequence[int], gate_up_E2IH: Tensor, down_EHI: Tensor
) -> tuple[Tensor, Any]:
    """Outputs of the rows whose experts are here, [R, H], and what the backward pass needs.

    Args:
        x_TH: tokens.
        plan: of `group_held`.
        counts: its counts of the experts here, on the host.
        gate_up_E2IH, down_EHI: slabs.
    """
    if not sum(counts):
        return x_TH.new_empty(0, x_TH.shape[1]), None
    held, config = _held(plan, counts), default_config(x_TH)
    act_RI, pre_RP = up_project(x_TH, gate_up_E2IH, held, config, save=True)
    return project_rows(act_RI, down_EHI, held, config, config.down, transposed=True), (x_TH, pre_RP, held)


def held_backward(
    dout_TH: Tensor, weights_TK: Tensor, saved: Any, gate_up_E2IH: Tensor, down_EHI: Tensor
) -> HeldGradients:
    """Backward of `held_forward` and of the weighted sum over k.

    Args:
        dout_TH: gradient of the layer's output.
        weights_TK: fp32.
        saved: of the forward pass.
        gate_up_E2IH, down_EHI: slabs.
    """
    if saved is None:
        return HeldGradients(
            dx_RH=dout_TH.new_empty(0, dout_TH.shape[1]),
            dweights_R=weights_TK.new_empty(0),
            dgate_up_E2IH=torch.zeros_like(gate_up_E2IH),
            ddown_EHI=torch.zeros_like(down_EHI),
        )
    x_TH, pre_RP, held = saved
    config = default_config(x_TH)
    dpre_RP, weighted_RI, dweights_R = activation_grad(dout_TH, pre_RP, down_EHI, weights_TK, held, config)
    ddown_EHI = weight_grad(weighted_RI, dout_TH, held, config, rows_first=False)
    del weighted_RI
    dgate_up_E2IH = weight_grad(dpre_RP, x_TH, held, config, rows_first=True)
    dx_RH = project_rows(dpre_RP, gate_up_E2IH, held, config, config.input_grad, transposed=False)
    return HeldGradients(dx_RH=dx_RH, dweights_R=dweights_R, dgate_up_E2IH=dgate_up_E2IH, ddown_EHI=ddown_EHI)
