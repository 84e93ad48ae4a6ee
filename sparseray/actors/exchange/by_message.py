"""Experts, rows and sums in the slots of a plan, asked by message; requests to the own slot are plain calls.

Called by the worker and the engine of a slot. It groups (token, k) rows by expert and sends every token once to each
slot that needs it; rows of all memory layers are fetched in one request to each memory shard, each distinct row once,
or without one from the tables of a shard on the same host.

Shapes: T tokens, K experts per token, H hidden, R = T*K rows, U tokens sent to a slot, N looked-up rows, D row width.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from sparseray.actors.exchange.answers import Answers
from sparseray.actors.exchange.mixture import mixture
from sparseray.actors.exchange.neighbours import NeighbourTables
from sparseray.actors.exchange.patience import Patience
from sparseray.actors.exchange.protocol import Abortable, Fetch, FetchedRows, PartGradients
from sparseray.actors.exchange.reduction import Reduction
from sparseray.actors.state.assignment import Plan
from sparseray.actors.wire.envelope import Body, Message
from sparseray.actors.wire.messages import ExpertBackward, ExpertForward, ExpertRows, FetchRows, MemoryRows
from sparseray.actors.wire.slot_mailbox import SlotMailbox
from sparseray.kernels.moe.reference import group_by_expert

R = TypeVar("R", bound=Body)


class Caller:
    """Asks other slots, and this one, and waits for the replies while it serves what others ask.

    Args:
        mailbox: of the slot.
        answers: to its own requests.
        serve: handles what comes meanwhile.
        deadline_s: seconds without a reply after which a silent slot counts as lost.
    """

    def __init__(
        self,
        mailbox: SlotMailbox,
        answers: Answers,
        serve: Callable[[Message[Body]], None],
        deadline_s: float,
    ) -> None:
        self.mailbox, self.answers, self.serve, self.deadline_s = mailbox, answers, serve, deadline_s
        self.step, self.part = 0, -1

    def __call__(
        self,
        requests: Sequence[tuple[int, Body]],
        reply: type[R],
        layer: int = -1,
        within_s: float | None = None,
    ) -> list[R]:
        """Send requests of the current step and part and return their replies in the same order.

        Args:
            requests: (slot, what to ask) each.
            reply: type of all replies.
            layer: of the envelope.
            within_s: seconds without a reply after which to give up, at once where a process has ended; None for the
                deadline.

        Raises:
            SlotLostError: a slot did not answer in time.
            SupersededError: a plan of a later generation came.
        """
        me = self.mailbox.slot
        sequences = [0 if slot == me else self.post(slot, body, layer) for slot, body in requests]
        # Others compute while this slot does.
        own = [self.answers(body, layer, self.part) if slot == me else None for slot, body in requests]
        asked = {sequence: slot for sequence, (slot, _) in zip(sequences, requests) if sequence}
        replies = self.mailbox.wait(
            asked, within_s or self.deadline_s, self.serve, watch=within_s is not None
        )
        found = [replies[sequence].body if sequence else mine for sequence, mine in zip(sequences, own)]
        return [self._checked(body, reply) for body in found]

    def post(self, slot: int, body: Body, layer: int = -1) -> int:
        """Send another slot a request of the current step and part, and return its sequence.

        Args:
            slot: whom to ask.
            body: what.
            layer: of the envelope.
        """
        return self.mailbox.post(slot, body, step=self.step, part=self.part, layer=layer)

    def first(self, asked: dict[int, int], reply: type[R]) -> tuple[int, R]:
        """Wait for any of the replies to requests that were posted; the others are to be waited for next.

        Args:
            asked: sequence of each request to the slot that was asked.
            reply: type of all replies.

        Returns:
            sequence of a request, and its reply.

        Raises:
            SlotLostError, SupersededError: as above.
        """
        replies = self.mailbox.wait(asked, self.deadline_s, self.serve, only_first=True)
        ((sequence, message),) = replies.items()
        return sequence, self._checked(message.body, reply)

    def _checked(self, body: Body | None, reply: type[R]) -> R:
        if not isinstance(body, reply):
            raise RuntimeError(
                f"slot {self.mailbox.slot} was answered by {type(body).__name__}, not {reply.__name__}"
            )
        return body


@dataclass(frozen=True)
class _Route:
    """Rows of one call: which experts, how many rows each, and where rows and tokens lie."""

    to: int
    experts: list[int]
    counts: list[int]
    order_R: Tensor
    tokens_U: Tensor
    rows_R: Tensor


class MessageExchange(Abortable):
    """`Exchange` over the slots of a plan.

    Args:
        plan: who holds what.
        call: how to reach them.
        reduction: of the gradients that meet at this slot.
        moe_layers, memory_layers: transformer layers that have experts and memory, in order.
        bounds: first row of every bucket of each memory layer.
        patience: with peers whose answers change no state; None where all wait for the first holder.
    """

    def __init__(
        self,
        plan: Plan,
        call: Caller,
        reduction: Reduction,
        *,
        moe_layers: Sequence[int],
        memory_layers: Sequence[int],
        bounds: Sequence[np.ndarray],
        patience: Patience | None = None,
    ) -> None:
        super().__init__()
        self.plan, self.call, self.reduction = plan, call, reduction
        self.index = {layer: index for index, layer in enumerate(moe_layers)}
        self.layers, self.bounds = list(memory_layers), bounds
        pieces = [holders for table in (*plan.experts, *plan.buckets) for holders in table]
        self.patience = patience if any(len(holders) > 1 for holders in pieces) else None
        self._holders: dict[tuple[int, int, tuple[int, ...]], dict[int, list[int]]] = {}
        self._owners: dict[tuple[int, ...], list[np.ndarray]] = {}
        self._parts_left = set(plan.parts_of(call.mailbox.slot))
        self._neighbours = NeighbourTables(plan.generation)
        self._fetches: list[Fetch] = []

    def begin(self, step: int, part: int) -> None:
        """Say what the next calls belong to.

        Args:
            step: whose commit comes next.
            part: of the global batch; -1 for none.
        """
        self.call.step, self.call.part = step, part

    # -- experts -------------------------------------------------------------------------------

    def experts(self, layer: int, x_TH: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor) -> Tensor:
        """Sum over k of weight * expert(x), [T, H].

        Args:
            layer: 0-based model layer.
            x_TH: inputs.
            topk_ids_TK: int64, chosen experts.
            topk_weights_TK: fp32, their weights.
        """
        return mixture(self, self.index[layer], x_TH, topk_ids_TK, topk_weights_TK)

    @property
    def _silent(self) -> tuple[int, ...]:
        return () if self.patience is None else self.patience.silent

    def _chosen(self, holders: Sequence[int]) -> int:
        return holders[0] if self.patience is None else self.patience.choose(holders)

    def _ask(self, requests: Sequence[tuple[int, Body]], reply: type[R], layer: int = -1) -> list[R]:
        if self.patience is None or not requests:
            return self.call(requests, reply, layer)
        started = time.perf_counter()
        found = self.call(requests, reply, layer, self.patience.within_s)
        self.patience.answered([slot for slot, _ in requests], time.perf_counter() - started)
        return found

    def holders(self, layer: int) -> dict[int, list[int]]:
        """Experts of the layer with index `layer` by the slot that computes them for the current part."""
        part = max(0, self.call.part) if self.plan.spread else 0
        key = layer, part, self._silent
        if key not in self._holders:
            found: dict[int, list[int]] = {}
            for expert, holders in enumerate(self.plan.experts[layer]):
                computing = self.plan.computing(layer, expert)
                slot = self._chosen((computing[part % len(computing)], *holders))
                found.setdefault(slot, []).append(expert)
            self._holders[key] = found
        return self._holders[key]

    def routes(self, layer: int, topk_ids_TK: Tensor) -> list[_Route]:
        """Split the (token, k) rows of a layer over the slots that compute its experts.

        Args:
            layer: index among the MoE layers.
            topk_ids_TK: int64, chosen experts.
        """
        T, K = topk_ids_TK.shape
        order_R, counts_E = group_by_expert(topk_ids_TK, len(self.plan.experts[layer]))
        counts = counts_E.tolist()
        starts = np.concatenate([[0], np.cumsum(counts)])
        found = []
        for slot, experts in self.holders(layer).items():
            order = torch.cat([order_R[starts[e] : starts[e + 1]] for e in experts])
            tokens = order // K
            present = torch.zeros(T, dtype=torch.bool, device=tokens.device)
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

    def forward_rows(self, layer: int, x_TH: Tensor, ids_TK: Tensor, *, keep: bool) -> tuple[Tensor, Any]:
        """Outputs [T, K, H] of every chosen expert, and the routes that their gradients take back.

        Args:
            layer: index among the MoE layers.
            x_TH: inputs.
            ids_TK: int64, chosen experts.
            keep: keep what the backward pass needs.
        """
        self.check()
        routes = self.routes(layer, ids_TK)
        requests: list[tuple[int, Body]] = [
            (
                route.to,
                ExpertForward(
                    experts=tuple(route.experts),
                    counts=tuple(route.counts),
                    keep=keep,
                    x_UH=x_TH[route.tokens_U],
                    rows_R=route.rows_R,
                ),
            )
            for route in routes
        ]
        return self._collect(routes, self._ask(requests, ExpertRows, layer), x_TH, ids_TK.shape), routes

    def backward_rows(self, layer: int, handle: Any, dout_TH: Tensor, weights_TK: Tensor) -> Tensor:
        """Gradients of the inputs [T, K, H].

        Args:
            layer: index among the MoE layers.
            handle: from `forward_rows`.
            dout_TH: gradient of the layer's output.
            weights_TK: fp32, routing weights.
        """
        self.check()
        routes: list[_Route] = handle
        flat = weights_TK.reshape(-1)
        requests: list[tuple[int, Body]] = [
            (route.to, ExpertBackward(dout_UH=dout_TH[route.tokens_U], weights_R=flat[route.order_R]))
            for route in routes
        ]
        return self._collect(routes, self.call(requests, ExpertRows, layer), dout_TH, weights_TK.shape)

    @staticmethod
    def _collect(
        routes: Sequence[_Route], replies: Sequence[ExpertRows], like: Tensor, shape: Sequence[int]
    ) -> Tensor:
        (T, K), H = shape, like.shape[1]
        y_RH = torch.empty(T * K, H, device=like.device)
        for route, reply in zip(routes, replies):
            y_RH[route.order_R] = reply.rows_RH.to(like.device)
        return y_RH.view(T, K, H)

    # -- memory rows -----------------------------------------------------------------------------

    def owner_of(self, layer: int, rows_N: np.ndarray) -> np.ndarray:
        """Slot that answers for each row of the layer with index `layer`; int64 [N].

        Args:
            layer: index among the memory layers.
            rows_N: int64 rows of its table.
        """
        buckets = np.searchsorted(self.bounds[layer], rows_N, side="right") - 1
        owners: np.ndarray = self._owners_of_buckets()[layer][buckets]
        return owners

    def _owners_of_buckets(self) -> list[np.ndarray]:
        """Slot that answers for each bucket of each memory layer."""
        if self._silent not in self._owners:
            table = [[self._chosen(holders) for holders in row] for row in self.plan.buckets]
            self._owners[self._silent] = [np.array(row, np.int64) for row in table]
        return self._owners[self._silent]

    def prefetch(self, rows: dict[int, Tensor]) -> FetchedRows:
        """Read rows of all memory layers: at most one request to each slot, each distinct row once."""
        self.check()
        if not rows:
            return FetchedRows(addresses={}, values={})
        started = time.perf_counter()
        distinct = [np.unique(rows[layer].cpu().numpy(), return_inverse=True) for layer in self.layers]
        owners = [self.owner_of(layer, unique) for layer, (unique, _) in enumerate(distinct)]
        wanted = {
            slot: tuple(
                torch.from_numpy(unique[owner == slot]) for (unique, _), owner in zip(distinct, owners)
            )
            for slot in sorted({int(slot) for table in self._owners_of_buckets() for slot in table})
        }
        replies, tiers = self._read(wanted)
        values = {}
        for index, (layer, (unique, inverse), owner) in enumerate(zip(self.layers, distinct, owners)):
            of_slots = {slot: of_layers[index].float().numpy() for slot, of_layers in replies.items()}
            found = np.empty((len(unique), next(iter(of_slots.values())).shape[1]), np.float32)
            for slot, rows_ND in of_slots.items():
                found[owner == slot] = rows_ND
            taken = torch.from_numpy(np.take(found, inverse.reshape(-1), axis=0))
            values[layer] = taken.to(rows[layer].device)
        addressed = sum(rows_TN.numel() for rows_TN in rows.values())
        seconds = time.perf_counter() - started
        self._fetches.append(Fetch(addressed=addressed, rows_by_tier=tiers, seconds=seconds))
        return FetchedRows(addresses=rows, values=values)

    def _read(
        self, wanted: dict[int, tuple[Tensor, ...]]
    ) -> tuple[dict[int, tuple[Tensor, ...]], dict[str, int]]:
        """Rows [N, D] of each layer by the slot that holds them, and how many came from where."""
        me, found = self.call.mailbox.slot, {}
        tiers = {"local": 0, "shared": 0, "remote": 0}
        for slot, own in wanted.items():
            rows_LND = self._neighbours.gather(slot, own, self.call.step - 1)
            if rows_LND is not None:
                found[slot] = rows_LND
            tier = "local" if slot == me else "remote" if rows_LND is None else "shared"
            tiers[tier] += sum(len(rows_N) for rows_N in own)
        asked = [slot for slot in wanted if slot not in found]
        replies = self._ask([(slot, FetchRows(rows_LN=wanted[slot])) for slot in asked], MemoryRows)
        for slot, reply in zip(asked, replies):
            found[slot] = reply.values_LND
            if slot != me:
                self._neighbours.introduce(slot, reply.handles)
        return found, tiers

    def take_fetches(self) -> list[Fetch]:
        """Return what was fetched since the last call."""
        found, self._fetches = self._fetches, []
        return found

    # -- gradients ---------------------------------------------------------------------------------

    def reduce(self, step: int, part: int, gradients: PartGradients) -> None:
        """Send a part's gradients to those who sum them; after the last part of this slot, the dense sums too.

        Args:
            step: that is open.
            part: that the gradients are of.
            gradients: dense ones and those of table rows.
        """
        self.check()
        self.reduction.send_part(step, part, gradients, self.owner_of)
        self._parts_left.discard(part)
        if not self._parts_left:
            self._parts_left = set(self.plan.parts_of(self.call.mailbox.slot))
            self.reduction.send_dense(step)
