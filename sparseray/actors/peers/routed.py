"""The routed experts of several slots as the model and autograd see them: tokens go out, something else is computed, rows come back.

Called by the model in both passes; what travels, and when, is across.py's.

Shapes: T tokens, K experts per token, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from sparseray.actors.peers.across import DeviceExchange


class Routed:
    """`ExpertsBeside` of the model.

    Args:
        exchange: in which tokens travel.
    """

    def __init__(self, exchange: DeviceExchange) -> None:
        self._exchange = exchange

    def __call__(self, layer: int, x_TH: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor) -> Tensor:
        """As of `Exchange.experts`.

        Args:
            layer, x_TH, topk_ids_TK, topk_weights_TK: there.
        """
        return self._run(layer, x_TH, topk_ids_TK, topk_weights_TK, None)

    def beside(
        self,
        layer: int,
        x_TH: Tensor,
        topk_ids_TK: Tensor,
        topk_weights_TK: Tensor,
        other: Callable[[], Tensor],
    ) -> Tensor:
        """The sum of both; in the backward pass, too, gradients travel while those of `other` are computed.

        Args:
            layer, x_TH, topk_ids_TK, topk_weights_TK: as of `Exchange.experts`.
            other: computes [T, H].
        """
        return self._run(layer, x_TH, topk_ids_TK, topk_weights_TK, other)

    def _run(
        self, layer: int, x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor, other: Callable[[], Tensor] | None
    ) -> Tensor:
        exchange = self._exchange
        index, weights_TK = exchange.layers.index(layer), weights_TK.contiguous()
        on_way = _Sent.apply(x_TH, weights_TK, ids_TK, exchange, index)
        beside_TH = None if other is None else other()
        out_TH: Tensor = _Returned.apply(on_way, weights_TK.detach(), exchange, index)
        return out_TH if beside_TH is None else out_TH + beside_TH


class _Sent(torch.autograd.Function):
    """Tokens go out; backward, their gradients come back. What it returns stands for them in the graph."""

    @staticmethod
    def forward(
        ctx: Any, x_TH: Tensor, weights_TK: Tensor, ids_TK: Tensor, exchange: DeviceExchange, layer: int
    ) -> Tensor:
        ctx.exchange, ctx.layer, ctx.tokens = exchange, layer, len(x_TH)
        x_TH, ids_TK = x_TH.detach().contiguous(), ids_TK.int().contiguous()
        exchange.send_rows(layer, x_TH, ids_TK, weights_TK.detach())
        return exchange.nothing.clone()

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        dx_TH, dweights_TK = ctx.exchange.backward_rows(ctx.layer, ctx.tokens)
        return dx_TH, dweights_TK, None, None, None


class _Returned(torch.autograd.Function):
    """Rows come back; backward, their gradients go out, before what was computed since the tokens were sent."""

    @staticmethod
    def forward(ctx: Any, on_way: Tensor, weights_TK: Tensor, exchange: DeviceExchange, layer: int) -> Tensor:
        ctx.exchange, ctx.layer = exchange, layer
        # Asking for it below has all be computed again that is, before gradients go out.
        ctx.save_for_backward(weights_TK)
        return exchange.forward_rows(layer, weights_TK)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        assert ctx.saved_tensors
        ctx.exchange.send_gradient(ctx.layer, grads[0].contiguous())
        return ctx.exchange.nothing, None, None, None
