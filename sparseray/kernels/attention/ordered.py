"""torch's fused attention with a backward pass that adds up in one order.

cuDNN's adds up in the order in which its blocks end, and torch takes no other way of it; FlashAttention's has a fixed
order, but torch takes that only while operations without one are refused, not while they are warned of. So cuDNN is left
out, and the refusal holds for this one step of the backward pass: elsewhere a warning is enough.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

WITH_AN_ORDER = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
FUSED = "ScaledDotProduct"
"""Begin of the names of what torch's fused attentions leave in the graph."""
BEHIND = 3
"""Steps of the graph among which it is: heads that were padded are cut again behind it. Products alone have an order anyway."""


def ordered_attention(q_BQTD: Tensor, k_BGSD: Tensor, v_BGSV: Tensor, **named: Any) -> Tensor:
    """`F.scaled_dot_product_attention`, which gives the same gradients, to the bit, whenever it is asked.

    Args:
        q_BQTD, k_BGSD, v_BGSV: of any dtype that it takes.
        named: its other arguments.
    """
    with sdpa_kernel(WITH_AN_ORDER):
        out_BQTV = F.scaled_dot_product_attention(q_BQTD, k_BGSD, v_BGSV, **named)
    node = out_BQTV.grad_fn
    for _ in range(BEHIND):
        if node is not None and node.name().startswith(FUSED):
            node.register_prehook(_refuse)
            node.register_hook(_warn)
            break
        node = node.next_functions[0][0] if node is not None and node.next_functions else None
    return out_BQTV


def _refuse(_of_outputs: object) -> None:
    torch.use_deterministic_algorithms(True)


def _warn(_of_inputs: object, _of_outputs: object) -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)
