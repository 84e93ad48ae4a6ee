"""All roles in this slot: tensors go straight to the operation, on the device where they lie, and no message is made.

Called by the worker and the engine of a slot that holds and computes everything; the twin of by_message.py.

Shapes: T tokens, K experts per token, H hidden, R = T*K rows, N table rows per token, D row width.
"""

import threading
import time
from typing import Any

import torch
from torch import Tensor

from sparseray.actors.exchange.answers import observe_rows
from sparseray.actors.exchange.mixture import mixture
from sparseray.actors.exchange.protocol import Abortable, Fetch, FetchedRows, Observe, PartGradients
from sparseray.actors.exchange.reduction import Reduction, sum_rows
from sparseray.actors.state.holdings import Holdings
from sparseray.kernels.moe.reference import group_by_expert


class LocalExchange(Abortable):
    """`Exchange` of a slot that has everything.

    Args:
        holdings: of the slot.
        reduction: of its gradients; all of them meet here.
        slot: own slot id.
        observe: metrics of the slot.
    """

    def __init__(self, holdings: Holdings, reduction: Reduction, slot: int, observe: Observe) -> None:
        super().__init__()
        self.state, self.memory, self.reduction = holdings.experts, holdings.memory, reduction
        self.slot, self.observe = slot, observe
        self.index = {layer: index for index, layer in enumerate(self.state.config.moe_layers)}
        self.abreast = torch.get_num_threads()
        self._begun = threading.local()
        self._fetches: list[Fetch] = []

    def begin(self, step: int, part: int) -> None:
        """Say what the next calls of this thread belong to.

        Args:
            step: whose commit comes next.
            part: of the global batch; -1 for none.
        """
        self._begun.part = part

    def experts(self, layer: int, x_TH: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor) -> Tensor:
        """Sum over k of weight * expert(x), [T, H].

        Args:
            layer: 0-based model layer.
            x_TH: inputs.
            topk_ids_TK: int64, chosen experts.
            topk_weights_TK: fp32, their weights.
        """
        return mixture(self, self.index[layer], x_TH, topk_ids_TK, topk_weights_TK)

    def forward_rows(self, layer: int, x_TH: Tensor, ids_TK: Tensor, *, keep: bool) -> tuple[Tensor, Any]:
        """Outputs [T, K, H] of every chosen expert, and the order in which the rows were computed, both ways.

        Args:
            layer: index among the MoE layers.
            x_TH: inputs.
            ids_TK: int64, chosen experts.
            keep: keep what the backward pass needs.
        """
        self.check()
        started, (T, K) = time.perf_counter(), ids_TK.shape
        order_R, counts_E = group_by_expert(ids_TK, self.state.config.moe.num_experts)
        counts = counts_E.tolist()
        y_RH = self.state.forward(
            layer, self._begun.part, x_TH, order_R // K, range(len(counts)), counts, keep
        )
        places_R = torch.empty_like(order_R).scatter_(0, order_R, torch.arange(T * K))
        y_TKH = y_RH.index_select(0, places_R).view(T, K, -1)
        observe_rows(self.observe, "forward", T * K, time.perf_counter() - started)
        return y_TKH, (order_R, places_R)

    def backward_rows(self, layer: int, handle: Any, dout_TH: Tensor, weights_TK: Tensor) -> Tensor:
        """Gradients of the inputs [T, K, H].

        Args:
            layer: index among the MoE layers.
            handle: from `forward_rows`.
            dout_TH: gradient of the layer's output.
            weights_TK: fp32, routing weights.
        """
        self.check()
        started, (T, K), (order_R, places_R) = time.perf_counter(), weights_TK.shape, handle
        dx_RH = self.state.backward(layer, self._begun.part, dout_TH, weights_TK.reshape(-1)[order_R])
        dx_TKH = dx_RH.index_select(0, places_R).view(T, K, -1)
        observe_rows(self.observe, "backward", T * K, time.perf_counter() - started)
        return dx_TKH

    def prefetch(self, rows: dict[int, Tensor]) -> FetchedRows:
        """Read rows of all memory layers."""
        self.check()
        if self.memory is None:
            return FetchedRows(addresses={}, values={})
        started, values = time.perf_counter(), {}
        for index, (layer, rows_TN) in enumerate(rows.items()):
            values[layer] = self.memory.gather(index, rows_TN.reshape(-1)).float()
        addressed = sum(rows_TN.numel() for rows_TN in rows.values())
        self._fetches.append(
            Fetch(
                addressed=addressed,
                rows_by_tier={"local": addressed},
                seconds=time.perf_counter() - started,
            )
        )
        return FetchedRows(addresses=rows, values=values)

    def reduce(self, step: int, part: int, gradients: PartGradients) -> None:
        """Add a part's gradients to the sums that lie here.

        Args:
            step: that is open.
            part: that the gradients are of.
            gradients: dense ones and those of table rows.
        """
        self.check()
        self.reduction.add_dense(part, gradients)
        self.reduction.finish(step, part, [sum_rows(rows, values) for rows, values in gradients.rows])
        self.reduction.dense_complete(step)

    def take_fetches(self) -> list[Fetch]:
        """Return what was fetched since the last call."""
        found, self._fetches = self._fetches, []
        return found
