"""Paged caches of all sequences of an engine: pools of pages for every layer, and histories of the memory layers.

A page has the same number in all pools, so a sequence needs one table whatever its layers keep. What a layer reads of the
newest tokens alone lies in pools with fewer pages, which have numbers, and a table, of their own. Slot 0 and page 0
belong to nobody: rows without a sequence read and write there.

Shapes: S slots, B sequences of a call, L reach of the convolution, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparseray.kernels.ops import Pages
from sparseray.model.config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class PageCounts:
    """Pages of the pools, with page 0.

    Args:
        whole: of what a sequence keeps of all its tokens.
        recent: of what it keeps of the newest alone; 0 where no layer has that.
    """

    whole: int
    recent: int = 0


@dataclass(frozen=True, kw_only=True)
class Paged:
    """What a call of the network needs of the pools.

    Args:
        pages: whose rows are where.
        pools: of each layer; its attention alone knows what it is.
        histories: fp32 [S, L, H] of each memory layer.
        slots_B: integers, which history each sequence has; read while decoding.
        slots: the same, known to the host; read with chunks.
    """

    pages: Pages
    pools: Sequence[object]
    histories: dict[int, Tensor]
    slots_B: Tensor
    slots: tuple[int, ...] = ()


def new_histories(config: ModelConfig, num_slots: int, device: torch.device) -> dict[int, Tensor]:
    """Zeros for every slot and memory layer."""
    dse = config.dse
    reach = (dse.kernel_size - 1) * max(dse.orders)
    return {
        layer: torch.zeros(num_slots, reach, config.hidden, dtype=torch.float32, device=device)
        for layer in dse.layers
    }
