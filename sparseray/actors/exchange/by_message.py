"""Remote experts and remote rows behind the model's two seams (model/moe.py, model/dse.py).

The model calls `experts(layer, x, ids, weights)` and `memory(layer, rows)`; here these become
messages to the slots that hold the experts and buckets, or plain calls where that is the own slot.
Combination runs here, over k in order, so no bit depends on who computed a row.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from sparseray.actors.state.assignment import Plan
from sparseray.actors.wire.envelope import Body
from sparseray.actors.wire.messages import ExpertBackward, ExpertForward, ExpertRows, FetchRows, MemoryRows
from sparseray.kernels.moe.reference import group_by_expert

R = TypeVar("R", bound=Body)


@dataclass(frozen=True, kw_only=True)
class Call:
    """One request to a slot; `layer` as in `Message`."""

    to: int
    body: Body
    layer: int = -1


class Caller(Protocol):
    """Sends requests of the current step and part, and returns their replies, of one kind, in the same order."""

    def __call__(self, calls: Sequence[Call], reply: type[R]) -> list[R]: ...


@dataclass(frozen=True)
class _Route:
    """Rows of one call: which experts, how many rows each, and where rows and tokens lie."""

    to: int
    experts: list[int]
    counts: list[int]
    order_R: Tensor
    tokens_U: Tensor
    rows_R: Tensor


class RemoteExperts:
    """`Experts` of the model, played by the slots of a plan.

    Args:
        plan: who holds which expert.
        call: how to reach them.
        moe_layers: transformer layers that have experts, in order.

    `part` is the one that runs now: of an expert with several computing holders it names one.
    """

    def __init__(self, plan: Plan, call: Caller, moe_layers: Sequence[int]) -> None:
        self.call = call
        self.index = {layer: index for index, layer in enumerate(moe_layers)}
        self.part = 0
        self._plan = plan
        self._holders: dict[tuple[int, int], dict[int, list[int]]] = {}

    def holders(self, layer: int) -> dict[int, list[int]]:
        """Experts of the layer with index `layer` by the slot that computes them for the current part."""
        key = (layer, self.part if self._plan.spread else 0)
        if key not in self._holders:
            found: dict[int, list[int]] = {}
            for expert in range(len(self._plan.experts[layer])):
                computing = self._plan.computing(layer, expert)
                found.setdefault(computing[key[1] % len(computing)], []).append(expert)
            self._holders[key] = found
        return self._holders[key]

    def __call__(self, layer: int, x_TH: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor) -> Tensor:
        """Sum over k of weight * expert(x), [T, H]; differentiable in x and the weights."""
        out: Tensor = _RemoteExperts.apply(x_TH, topk_weights_TK, topk_ids_TK, self, self.index[layer])
        return out

    def routes(self, layer: int, topk_ids_TK: Tensor) -> list[_Route]:
        """Split the (token, k) rows of a layer over the slots that hold its experts."""
        T, K = topk_ids_TK.shape
        by_slot = self.holders(layer)
        num_experts = sum(len(experts) for experts in by_slot.values())
        order_R, counts_E = group_by_expert(topk_ids_TK, num_experts)
        counts = counts_E.tolist()
        starts = np.concatenate([[0], np.cumsum(counts)])
        found = []
        for slot, experts in by_slot.items():
            order = torch.cat([order_R[starts[e] : starts[e + 1]] for e in experts])
            tokens = order // K
            present = torch.zeros(T, dtype=torch.bool)
            present[tokens] = True
            place_T = torch.cumsum(present, 0) - 1
            found.append(
                _Route(
                    slot,
                    experts,
                    [counts[e] for e in experts],
                    order,
                    present.nonzero().squeeze(1),
                    place_T[tokens],
                )
            )
        return found


class _RemoteExperts(torch.autograd.Function):
    """Dispatch, expert computation elsewhere, combine; backward sends each token's gradient once."""

    @staticmethod
    def forward(
        ctx: Any, x_TH: Tensor, weights_TK: Tensor, ids_TK: Tensor, remote: RemoteExperts, layer: int
    ) -> Tensor:
        (T, K), H = ids_TK.shape, x_TH.shape[1]
        routes = remote.routes(layer, ids_TK)
        keep = x_TH.requires_grad
        replies = remote.call(
            [
                Call(
                    to=route.to,
                    layer=layer,
                    body=ExpertForward(
                        experts=tuple(route.experts),
                        counts=tuple(route.counts),
                        keep=keep,
                        x_UH=x_TH.detach()[route.tokens_U],
                        rows_R=route.rows_R,
                    ),
                )
                for route in routes
            ],
            ExpertRows,
        )
        y_RH = torch.empty(T * K, H)
        for route, reply in zip(routes, replies):
            y_RH[route.order_R] = reply.rows_RH
        y_TKH = y_RH.view(T, K, H)
        ctx.remote, ctx.layer, ctx.routes = remote, layer, routes
        ctx.save_for_backward(y_TKH, weights_TK)
        return (weights_TK[..., None] * y_TKH).sum(1)

    @staticmethod
    def backward(ctx: Any, dout_TH: Tensor) -> tuple[Tensor | None, ...]:
        y_TKH, weights_TK = ctx.saved_tensors
        T, K, H = y_TKH.shape
        flat_weights = weights_TK.reshape(-1)
        replies = ctx.remote.call(
            [
                Call(
                    to=route.to,
                    layer=ctx.layer,
                    body=ExpertBackward(
                        dout_UH=dout_TH[route.tokens_U], weights_R=flat_weights[route.order_R]
                    ),
                )
                for route in ctx.routes
            ],
            ExpertRows,
        )
        dx_RH = torch.empty(T * K, H)
        for route, reply in zip(ctx.routes, replies):
            dx_RH[route.order_R] = reply.rows_RH
        dweights_TK = (y_TKH * dout_TH[:, None]).sum(-1)
        return dx_RH.view(T, K, H).sum(1), dweights_TK, None, None, None


@dataclass(frozen=True, kw_only=True)
class Fetch:
    """What one fetch of table rows cost: rows addressed, distinct rows by the slot that gave them, seconds."""

    addressed: int
    rows_by_slot: dict[int, int]
    seconds: float


class RemoteMemory:
    """`Memory` of the model: rows of the tables, fetched ahead for a whole batch.

    Addresses follow from the tokens alone, so `fetch` runs before the forward pass; `__call__`
    only hands out what lies ready, as a leaf whose gradient is the rows' gradient.
    """

    def __init__(self, plan: Plan, call: Caller, layers: Sequence[int], bounds: Sequence[np.ndarray]) -> None:
        self.call = call
        self.layers = list(layers)
        self.bounds = bounds
        self.owner = [np.array([holders[0] for holders in row], np.int64) for row in plan.buckets]
        self.slots = plan.memory_primaries
        self.ready: dict[int, Tensor] = {}
        self._fetches: list[Fetch] = []

    def owner_of(self, layer: int, rows_N: np.ndarray) -> np.ndarray:
        """Slot that answers for each row of the layer with index `layer`; int64 [N]."""
        buckets = np.searchsorted(self.bounds[layer], rows_N, side="right") - 1
        owners: np.ndarray = self.owner[layer][buckets]
        return owners

    def fetch(self, rows_LN: Sequence[np.ndarray]) -> list[Tensor]:
        """Fetch rows of every memory layer, each distinct row once.

        Args:
            rows_LN: int64 rows of each memory layer, any order, with repeats.

        Returns:
            fp32 [N, D] for each layer.
        """
        if not self.slots:
            return []
        started = time.perf_counter()
        distinct = [np.unique(rows, return_inverse=True) for rows in rows_LN]
        owners = [self.owner_of(layer, unique) for layer, (unique, _) in enumerate(distinct)]
        wanted = {
            slot: tuple(
                torch.from_numpy(unique[owner == slot]) for (unique, _), owner in zip(distinct, owners)
            )
            for slot in self.slots
        }
        replies = self.call(
            [Call(to=slot, body=FetchRows(rows_LN=rows)) for slot, rows in wanted.items()], MemoryRows
        )
        found = []
        for layer, ((unique, inverse), owner) in enumerate(zip(distinct, owners)):
            values = np.empty((len(unique), replies[0].values_LND[layer].shape[1]), np.float32)
            for slot, reply in zip(self.slots, replies):
                values[owner == slot] = reply.values_LND[layer].float().numpy()
            found.append(torch.from_numpy(np.take(values, inverse.reshape(-1), axis=0)))
        by_slot = {slot: sum(len(rows) for rows in rows_LN) for slot, rows_LN in wanted.items()}
        addressed, seconds = sum(len(rows) for rows in rows_LN), time.perf_counter() - started
        self._fetches.append(Fetch(addressed=addressed, rows_by_slot=by_slot, seconds=seconds))
        return found

    def take_fetches(self) -> list[Fetch]:
        """Return the fetches since the last call."""
        found, self._fetches = self._fetches, []
        return found

    def prepare(self, layers: Sequence[int], values: Sequence[Tensor], *, train: bool) -> None:
        """Lay out the rows of the next forward call, by transformer layer."""
        self.ready = {layer: value.requires_grad_(train) for layer, value in zip(layers, values)}

    def __call__(self, layer: int, rows_TN: Tensor) -> Tensor:
        """Return rows [T, N, D]: those that were prepared for this layer, or fetched now (serving)."""
        value = self.ready[layer] if self.ready else self._fetch_now(layer, rows_TN)
        return value.view(*rows_TN.shape, value.shape[-1])

    def _fetch_now(self, layer: int, rows_TN: Tensor) -> Tensor:
        none = np.empty(0, np.int64)
        index = self.layers.index(layer)
        wanted = [rows_TN.reshape(-1).numpy() if i == index else none for i in range(len(self.layers))]
        return self.fetch(wanted)[index]
