"""NSA on a CPU at a small model's sizes: the plain reference with two of its branches as masked attention.

Compression and selection are the reference's; the selected blocks and the window run in torch's fused attention
under a mask, so that a training step keeps no probabilities. Equal to `nsa_attention_reference` up to rounding.

Shapes: B sequences, T queries, S keys, Q query heads, G key/value heads, D and V head sizes, N selected blocks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sparseray.kernels.nsa.reference import BranchKeys, select_reference
from sparseray.kernels.settings import NSASizes


def _attend_masked(q_BTQD: Tensor, k_BSGD: Tensor, v_BSGV: Tensor, mask: Tensor) -> Tensor:
    out = F.scaled_dot_product_attention(
        q_BTQD.transpose(1, 2),
        k_BSGD.transpose(1, 2),
        v_BSGV.transpose(1, 2),
        attn_mask=mask,
        enable_gqa=True,
    )
    return out.transpose(1, 2)


def selected_mask(indices_BTGN: Tensor, positions_T: Tensor, num_keys: int, select_block: int) -> Tensor:
    """Keys that each query sees through its selected blocks, causally.

    Args:
        indices_BTGN: block numbers, -1 for an unused slot.
        positions_T: absolute positions of the queries.
        num_keys: keys, from position 0.
        select_block: tokens per block.

    Returns:
        bool [B, G, T, S].
    """
    B, T, G, _ = indices_BTGN.shape
    blocks = -(-num_keys // select_block)
    slots = torch.where(indices_BTGN < 0, blocks, indices_BTGN).long()
    chosen = torch.zeros(B, T, G, blocks + 1, dtype=torch.bool, device=slots.device).scatter_(-1, slots, True)
    keys_S = torch.arange(num_keys, device=slots.device)
    mask = chosen[..., :blocks].repeat_interleave(select_block, dim=-1)[..., :num_keys]
    return mask.transpose(1, 2) & (keys_S <= positions_T[:, None])


def nsa_attention_masked(
    q_BTQD: Tensor,
    keys: BranchKeys,
    gates_BTQ3: Tensor,
    sizes: NSASizes,
    *,
    q_start: int = 0,
    win_start: int = 0,
) -> Tensor:
    """The gated sum of the three branches; args and result as `Ops.nsa_attention`."""
    group = q_BTQD.shape[2] // keys.k_slc.shape[2]
    num_keys = keys.k_slc.shape[1]
    positions_T = torch.arange(q_start, q_start + q_BTQD.shape[1], device=q_BTQD.device)
    o_cmp, indices = select_reference(q_BTQD, keys.k_cmp, keys.v_cmp, num_keys, sizes, q_start=q_start)
    mask_BGTS = selected_mask(indices, positions_T, num_keys, sizes.select_block)
    o_slc = _attend_masked(q_BTQD, keys.k_slc, keys.v_slc, mask_BGTS.repeat_interleave(group, dim=1))
    keys_S = torch.arange(win_start, win_start + keys.k_win.shape[1], device=q_BTQD.device)
    distance_TS = positions_T[:, None] - keys_S
    o_win = _attend_masked(q_BTQD, keys.k_win, keys.v_win, (distance_TS >= 0) & (distance_TS < sizes.window))
    g_cmp, g_slc, g_win = gates_BTQ3.unsqueeze(-2).unbind(-1)
    return (g_cmp * o_cmp + g_slc * o_slc.float() + g_win * o_win.float()).to(q_BTQD.dtype)
