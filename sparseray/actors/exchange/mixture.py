"""The sum of a token's experts, wherever they are computed: the part of a MoE layer that every exchange shares.

The exchange gives one row for each (token, k); the weighted sum over k runs here, in k order, so no bit depends on
who computed a row. Backward sends each token's output gradient once and gets one input gradient per (token, k).

Shapes: T tokens, K experts per token, H hidden.
"""

from typing import Any, Protocol

import torch
from torch import Tensor


class ExpertRows(Protocol):
    """Computes rows through the experts of a layer and keeps what backward needs."""

    def forward_rows(self, layer: int, x_TH: Tensor, ids_TK: Tensor, *, keep: bool) -> tuple[Tensor, Any]:
        """Return the outputs [T, K, H] and a handle for `backward_rows`.

        Args:
            layer: index among the MoE layers.
            x_TH: inputs.
            ids_TK: int64, chosen experts.
            keep: keep what the backward pass needs.
        """
        ...

    def backward_rows(self, layer: int, handle: Any, dout_TH: Tensor, weights_TK: Tensor) -> Tensor:
        """Return the gradients of the inputs [T, K, H]; those of the experts stay where they are computed.

        Args:
            layer: index among the MoE layers.
            handle: from `forward_rows`.
            dout_TH: gradient of the layer's output.
            weights_TK: fp32, routing weights.
        """
        ...


def mixture(rows: ExpertRows, layer: int, x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """Sum over k of weight * expert(x), differentiable in x and the weights.

    Args:
        rows: where experts are.
        layer: index among the MoE layers.
        x_TH: tokens.
        ids_TK, weights_TK: chosen experts, int64, and their weights, fp32.

    Returns:
        [T, H].
    """
    out: Tensor = _Mixture.apply(x_TH, weights_TK, ids_TK, rows, layer)
    return out


class _Mixture(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TH: Tensor, weights_TK: Tensor, ids_TK: Tensor, rows: ExpertRows, layer: int
    ) -> Tensor:
        y_TKH, handle = rows.forward_rows(layer, x_TH.detach(), ids_TK, keep=x_TH.requires_grad)
        ctx.rows, ctx.layer, ctx.handle = rows, layer, handle
        ctx.save_for_backward(y_TKH, weights_TK)
        return (weights_TK[..., None] * y_TKH).sum(1)

    @staticmethod
    def backward(ctx: Any, dout_TH: Tensor) -> tuple[Tensor | None, ...]:
        y_TKH, weights_TK = ctx.saved_tensors
        dx_TKH = ctx.rows.backward_rows(ctx.layer, ctx.handle, dout_TH, weights_TK)
        dweights_TK = (y_TKH * dout_TH[:, None]).sum(-1)
        return dx_TKH.sum(1), dweights_TK, None, None, None
