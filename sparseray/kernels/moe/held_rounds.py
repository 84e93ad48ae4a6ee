"""Some experts of a layer on a GPU in decoding, for tokens of several slots: nothing is read by the host.

As held.py, without a backward pass and without the counts that it takes: shapes fix the grids, so a call can be captured
in a CUDA graph. Tiles are narrow ones, as most calls have few rows an expert.

Shapes: T tokens of all slots, K experts per token, E experts here, R = T * K pairs, H hidden, I inner.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from sparseray.kernels.moe.decode import decode_config
from sparseray.kernels.moe.expert_map import plan_experts
from sparseray.kernels.moe.ffn import project_rows, up_project

ROWS_PER_EXPERT = 16
"""That tiles are chosen for."""


@torch.no_grad()
def rows_of_held(
    x_TH: Tensor, places_TK: Tensor, gate_up_E2IH: Tensor, down_EHI: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs of the pairs whose experts are here, unweighted.

    Args:
        x_TH: tokens, contiguous.
        places_TK: int32, row of the slabs that each pair's expert has; E where it is elsewhere or nowhere.
        gate_up_E2IH, down_EHI: slabs in the dtype of x.

    Returns:
        rows [R, H], of which the first are computed; the pair of each, int32 [R]; how many they are, int32 [1].
    """
    held, config = down_EHI.shape[0], decode_config(ROWS_PER_EXPERT, down_EHI.dtype)
    whole = plan_experts(places_TK, held + 1, tile_rows=config.m)
    # The last group, of rows that others compute, has no tiles.
    tile_expert_M = torch.where(whole.tile_expert_M == held, -1, whole.tile_expert_M)
    plan = replace(whole, tile_expert_M=tile_expert_M)
    act_RI, _ = up_project(x_TH, gate_up_E2IH, plan, config, save=False)
    y_RH = project_rows(act_RI, down_EHI, plan, config, config.down, transposed=True)
    return y_RH, whole.order_R, whole.offsets_E[held:]
