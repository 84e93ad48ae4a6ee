"""Statistics of a forward pass for people who watch: gates and selected blocks, noted while someone collects.

The network calls `note_*` at the places where these values pass; outside `collect` that is one look at a
context variable. Values are read, never changed, so no bit of a result depends on whether anyone collects.

Shapes: B sequences, T tokens, R rows, Q query heads, G key/value heads, N selected blocks, H hidden.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

# (metric, labels, value)
Noted = list[tuple[str, dict[str, str], float]]
_collecting: ContextVar[Noted | None] = ContextVar("statistics", default=None)
BRANCHES = ("compress", "select", "window")


@contextmanager
def collect() -> Iterator[Noted]:
    """Collect the statistics of the forward passes that this thread runs within."""
    found: Noted = []
    token = _collecting.set(found)
    try:
        yield found
    finally:
        _collecting.reset(token)


def is_collecting() -> bool:
    """Whether anyone wants statistics now."""
    return _collecting.get() is not None


@torch.no_grad()
def note_attention(
    layer: int, gates_BTQ3: Tensor, indices_BTGN: Tensor, positions_T: Tensor, block: int
) -> None:
    """Note the gates of the three branches, and how many blocks were selected and how far away they lie.

    Args:
        layer: 0-based model layer.
        gates_BTQ3: fp32 in [0, 1].
        indices_BTGN: selected blocks, -1 for an unused place.
        positions_T: absolute positions of the queries.
        block: tokens of a block.
    """
    found = _collecting.get()
    if found is None:
        return
    means = gates_BTQ3.float().flatten(0, -2).mean(0).tolist()
    for branch, mean in zip(BRANCHES, means):
        found.append(("nsa_branch_gate_mean", {"layer": str(layer), "branch": branch}, mean))
    used_BTGN = indices_BTGN >= 0
    visible_T = torch.div(positions_T, block, rounding_mode="floor") + 1
    ratio = (used_BTGN.sum(-1) / visible_T[:, None]).mean()
    distance_BTGN = (positions_T[:, None, None] - indices_BTGN * block) * used_BTGN
    distance = distance_BTGN.sum() / used_BTGN.sum().clamp(min=1)
    found.append(("nsa_selected_block_ratio", {"layer": str(layer)}, float(ratio)))
    found.append(("nsa_selected_distance_tokens", {"layer": str(layer)}, float(distance)))


@torch.no_grad()
def note_memory(layer: int, value_RH: Tensor, gated_RH: Tensor) -> None:
    """Note the gate of a memory layer, recovered from its value before and after gating.

    Args:
        layer: 0-based model layer.
        value_RH: values of the rows.
        gated_RH: gate * value.
    """
    found = _collecting.get()
    if found is None:
        return
    value_RH = value_RH.float()
    square_R = value_RH.square().sum(-1)
    gate_R = ((value_RH * gated_RH.float()).sum(-1) / square_R)[square_R > 0]
    if gate_R.numel():
        labels = {"layer": str(layer)}
        found.append(("dse_gate_mean", labels, float(gate_R.mean())))
        found.append(("dse_gate_active_ratio", labels, float((gate_R > 0.5).float().mean())))
