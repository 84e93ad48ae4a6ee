"""Experts and gradients of several slots on one host, each with a device: the exchange of several GPUs.

Every slot gives its tokens to all that hold experts, each computes the rows of those that it holds and puts them back
where the tokens are (kernels/held_ops.py). All slots of a generation make the same exchanges in the same order: in each
round every slot runs one part, or none, and those that run none compute for the others. Gradients are summed in
the order of one slot, so the number of slots changes no bit. Twin of on_device.py, where one slot has everything; table
rows go by message, as their tables lie in the host's memory.

Shapes: T tokens, K experts per token, R rows, H hidden, E experts.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any
from zlib import crc32

import numpy as np
import torch
from torch import Tensor

from sparseray.actors.exchange.by_message import MessageExchange
from sparseray.actors.exchange.on_device import step_norms
from sparseray.actors.exchange.protocol import Abortable, Fetch, FetchedRows, PartGradients
from sparseray.actors.peers.dense_slices import DenseSlices
from sparseray.actors.peers.expert_shares import ExpertShares
from sparseray.actors.peers.link import Link
from sparseray.actors.peers.rounds import Round, Turn, rounds_of
from sparseray.actors.peers.table import Table
from sparseray.actors.state.assignment import Plan
from sparseray.actors.state.dense_slab import DenseSlabs
from sparseray.actors.state.pieces import Key
from sparseray.actors.state.slab_experts import SlabExperts
from sparseray.actors.wire.envelope import SCHEDULER
from sparseray.actors.wire.messages import Prepared
from sparseray.kernels.ops import HeldRows


@dataclass(frozen=True, kw_only=True)
class _Kept:
    """What the backward pass of one source's rows needs."""

    rows: HeldRows
    counts: list[int]
    saved: Any


class DeviceExchange(Abortable):
    """`Exchange` of one of several slots that compute in slabs.

    Args:
        plan: of the generation.
        dense: weights of this slot.
        experts: that this slot holds.
        table: the slots and their memory.
        link: to it.
        rows: table rows, and the way of their gradients.
        part_shape: sequences of a part, and tokens of each.
    """

    def __init__(
        self,
        plan: Plan,
        dense: DenseSlabs,
        experts: SlabExperts,
        table: Table,
        link: Link,
        rows: MessageExchange,
        part_shape: tuple[int, int],
    ) -> None:
        super().__init__()
        self.plan, self.dense, self.held, self.table, self.link = plan, dense, experts, table, link
        self.rows, self.mailbox, self.me = rows, rows.call.mailbox, rows.call.mailbox.slot
        self.part_shape, self.ops = part_shape, dense.ops
        self._recomputes = dense.model.recompute
        self.layers = list(experts.config.moe_layers)
        self.owners = plan.expert_primaries
        self.slices = DenseSlices(plan, dense, table, self.me, link)
        self.shares = ExpertShares(plan, experts, table, self.me, link)
        self._turn, self._count = Turn(), 0
        self._places: dict[int, tuple[dict[int, int], Tensor]] = {}
        self._kept: dict[tuple[int, int], _Kept] = {}
        self._gradients: dict[int, list[Tensor]] = {}

    # -- what runs -----------------------------------------------------------------------------------

    def expect(self, parts: Sequence[tuple[int, int]], *, trains: bool) -> None:
        """Say what all slots together will run.

        Args:
            parts: (part, slot) each, in order.
            trains: forward and backward; otherwise forward alone.
        """
        self._turn = Turn(rounds_of(parts), trains)
        self._kept.clear()
        self._gradients.clear()

    def begin(self, step: int, part: int) -> None:
        """Say what the next calls belong to.

        Args:
            step: whose commit comes next.
            part: of the global batch; -1 for none.
        """
        self.rows.begin(step, part)
        for index, running in enumerate(self._turn.rounds):
            if running.get(self.me) == part:
                self._turn.index = index

    def accompany(self, step: int) -> None:
        """Compute for others until all parts have run; in training also end the step.

        Args:
            step: that is open.
        """
        turn = self._turn
        own = sum(self.me in running for running in turn.rounds)
        # An evaluation does without the modules that predict further tokens.
        layers = [
            i for i, layer in enumerate(self.layers) if turn.trains or layer < self.held.config.num_layers
        ]
        for index in range(own, len(turn.rounds)):
            turn.index = index
            for layer in layers:
                self._serve_forward(layer, None)
            if turn.trains:
                for layer in reversed(layers):
                    if self._recomputes:
                        self._serve_forward(layer, None)
                    self._serve_backward(layer, None)
                self._end_round()
        if turn.trains:
            self._finish(step)

    @property
    def _running(self) -> Round:
        return self._turn.rounds[self._turn.index]

    # -- experts ---------------------------------------------------------------------------------------

    def experts(self, layer: int, x_TH: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor) -> Tensor:
        """Sum over k of weight * expert(x), [T, H].

        Args:
            layer: 0-based model layer.
            x_TH: inputs, in the slabs' dtype.
            topk_ids_TK: int64, chosen experts.
            topk_weights_TK: fp32, their weights.
        """
        index = self.layers.index(layer)
        out_TH: Tensor = _Exchanged.apply(x_TH, topk_weights_TK, topk_ids_TK, self, index)
        return out_TH

    def forward_rows(self, layer: int, x_TH: Tensor, ids_TK: Tensor) -> Tensor:
        """Outputs [T, K, H] of every chosen expert; they lie there until the next call.

        Args:
            layer: index among the MoE layers.
            x_TH: inputs, contiguous.
            ids_TK: int32, chosen experts.
        """
        self._dispatch(x_TH, ids_TK, "ids_STK")
        self._serve_forward(layer, (x_TH, ids_TK))
        return self._returned(*ids_TK.shape)

    def backward_rows(self, layer: int, dout_TH: Tensor, weights_TK: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of the inputs [T, K, H] and of the routing weights [T, K].

        Args:
            layer: index among the MoE layers.
            dout_TH: gradient of the layer's output, contiguous.
            weights_TK: fp32, contiguous.
        """
        self._dispatch(dout_TH, weights_TK, "weights_STK")
        self._serve_backward(layer, (dout_TH, weights_TK))
        dweights_R = self.table.regions[self.me].row_weights_R[: weights_TK.numel()]
        return self._returned(*weights_TK.shape), dweights_R.view_as(weights_TK)

    def _dispatch(self, tokens_TH: Tensor, chosen_TK: Tensor, name: str) -> None:
        """Give all that hold experts the tokens of this slot, and which experts or which weights they have."""
        self.check()
        T, rank = tokens_TH.shape[0], self.table.rank(self.me)
        for slot in self.owners:
            if slot != self.me:
                theirs = self.table.regions[slot]
                self.link.put(tokens_TH, theirs.x_STH[rank, :T])
                self.link.put(chosen_TK, getattr(theirs, name)[rank, :T])
                self.link.signal(theirs.flags_S, rank, self._count + 1)

    def _returned(self, T: int, K: int) -> Tensor:
        return self.table.regions[self.me].rows_RH[: T * K].view(T, K, -1)

    def _arrived(
        self, layer: int, own: tuple[Tensor, Tensor] | None, name: str
    ) -> dict[int, tuple[Tensor, Tensor]]:
        """What every slot that runs a part has sent, the own last: nobody else waits for that."""
        mine, others = self.table.regions[self.me], [slot for slot in self._running if slot != self.me]
        self.link.wait(mine.flags_S, self.table.ranks(others), self._count + 1)
        T, found = self._tokens(layer), {}
        for slot in others:
            rank = self.table.rank(slot)
            found[slot] = mine.x_STH[rank, :T], getattr(mine, name)[rank, :T]
        return found if own is None else found | {self.me: own}

    def _tokens(self, layer: int) -> int:
        """Tokens of a part that a layer sees: a module k places ahead has no token for the last k."""
        sequences, length = self.part_shape
        ahead = max(0, self.layers[layer] - self.held.config.num_layers + 1)
        return sequences * (length - ahead)

    def _serve_forward(self, layer: int, own: tuple[Tensor, Tensor] | None) -> None:
        """Compute the rows of all slots whose experts are here, and give them back."""
        self.check()
        turn = self._turn
        # What is computed again is kept only then.
        keep = turn.trains and (not self._recomputes or layer in turn.passed)
        turn.passed.add(layer)
        if self.me in self.owners:
            arrived, slab = self._arrived(layer, own, "ids_STK"), self.held.slabs[layer]
            num, places_E = len(slab.rows), self._places_of(layer)
            like = slab.compute[0]
            grouped = {
                s: self.ops.group_held(places_E[ids.long()], num, like) for s, (_, ids) in arrived.items()
            }
            counts = self._read_counts(grouped, num)
            for slot, (x_TH, _) in arrived.items():
                if keep and slot != self.me:
                    x_TH = x_TH.clone()
                rows, of_slot = grouped[slot], counts[slot]
                y_RH, saved = self.ops.held_forward(x_TH, rows, of_slot, *slab.compute)
                if keep:
                    self._kept[(layer, slot)] = _Kept(rows=rows, counts=of_slot, saved=saved)
                self._give_back(slot, rows.order_R[: sum(of_slot)], y_RH, None)
        self._collected(own is not None)

    def _read_counts(self, grouped: dict[int, HeldRows], num: int) -> dict[int, list[int]]:
        """Rows of every expert here, by source: the one thing that the host waits for."""
        if not grouped:
            return {}
        found = self.link.read(torch.stack([rows.counts_E for rows in grouped.values()]))
        return {slot: counts[:num] for slot, counts in zip(grouped, found)}

    def _serve_backward(self, layer: int, own: tuple[Tensor, Tensor] | None) -> None:
        """Give back the input gradients of what was computed here, and keep the experts' own."""
        self.check()
        if self.me in self.owners:
            slab = self.held.slabs[layer].compute
            for slot, (dout_TH, weights_TK) in self._arrived(layer, own, "weights_STK").items():
                kept = self._kept.pop((layer, slot))
                found = self.ops.held_backward(dout_TH, weights_TK, kept.rows, kept.counts, kept.saved, *slab)
                self._give_back(slot, kept.rows.order_R[: sum(kept.counts)], found.dx_RH, found.dweights_R)
                into = self._gradients.setdefault(slot, [torch.empty(0)] * (2 * len(self.layers)))
                into[2 * layer : 2 * layer + 2] = found.dgate_up_E2IH, found.ddown_EHI
        self._collected(own is not None)

    def _give_back(self, slot: int, order_R: Tensor, rows_RH: Tensor, weights_R: Tensor | None) -> None:
        """Put rows at their places in the memory of the slot whose tokens they are of."""
        theirs = self.table.regions[slot]
        self.link.put(rows_RH, theirs.rows_RH, order_R)
        if weights_R is not None:
            self.link.put(weights_R, theirs.row_weights_R, order_R)
        if slot != self.me:
            self.link.signal(theirs.flags_S, self.table.rank(self.me), self._count + 2)

    def _collected(self, runs: bool) -> None:
        """End an exchange: the rows of the own tokens are here."""
        if runs:
            others = [slot for slot in self.owners if slot != self.me]
            flags_S = self.table.regions[self.me].flags_S
            self.link.wait(flags_S, self.table.ranks(others), self._count + 2)
        self._count += 2

    def _places_of(self, layer: int) -> Tensor:
        """Row of the slabs of each expert that is computed here, int32 [E]; the number of rows for all others."""
        rows = self.held.slabs[layer].rows
        if layer not in self._places or self._places[layer][0] is not rows:
            computed = [e for e in rows if (layer, e) in self.held.computed]
            places_E = torch.full((self.held.config.moe.num_experts,), len(rows), dtype=torch.int32)
            places_E[computed] = torch.tensor([rows[e] for e in computed], dtype=torch.int32)
            self._places[layer] = rows, places_E.to(self.dense.device)
        return self._places[layer][1]

    # -- rows ------------------------------------------------------------------------------------------

    def prefetch(self, rows: dict[int, Tensor]) -> FetchedRows:
        """Read rows of all memory layers and send them to the device.

        Args:
            rows: int64 [T, N] by 0-based model layer, on the CPU.
        """
        self.check()
        found = self.rows.prefetch(rows)
        values = {
            layer: value.to(self.dense.device).to(self.dense.dtype) for layer, value in found.values.items()
        }
        return FetchedRows(addresses=found.addresses, values=values)

    def take_fetches(self) -> list[Fetch]:
        """Return what was fetched since the last call."""
        return self.rows.take_fetches()

    # -- gradients ---------------------------------------------------------------------------------------

    def reduce(self, step: int, part: int, gradients: PartGradients) -> None:
        """Add a part's gradients to the sums; after the last part of this slot, compute for others and end the step.

        Args:
            step: that is open.
            part: that the gradients are of.
            gradients: on the device: dense ones and those of table rows.
        """
        self.check()
        self.dense.sum.add(part, gradients.dense)
        if gradients.rows:
            self.rows.reduction.send_rows(step, part, gradients, self.rows.owner_of)
        self._end_round()
        if part == self.plan.parts_of(self.me)[-1]:
            self.accompany(step)

    def _end_round(self) -> None:
        """Add the experts' gradients of all parts of a round to their sums."""
        self._turn.passed.clear()
        if self.me in self.owners:
            for slot, part in self._running.items():
                self.held.sum.add(part, self._gradients.pop(slot))

    def _finish(self, step: int) -> None:
        """Sum what lies in several slots, and tell the scheduler of every role's norms."""
        self.slices.sum_up(self._count + 1)
        self.shares.share(self._count + 3)
        self._count += 4
        of_dense, of_experts, _ = step_norms(self.dense, self.held, [], self.link.read)
        plan = self.plan
        if self.me in plan.dense:
            is_first = plan.dense[0] == self.me
            self._post(step, "dense", of_dense if is_first else {}, {"dense": _digest(of_dense.values())})
        if self.me in plan.expert_holders:
            backed = [key for key in self.held.owned if len(plan.experts[key[0]][key[1]]) > 1]
            norms = {_name(key): of_experts[_name(key)] for key in self.held.computed}
            digests = {_name(key): _digest([of_experts[_name(key)]]) for key in backed}
            self._post(step, "expert", norms, digests)

    def _post(self, step: int, role: str, norms: dict[str, float], digests: dict[str, int]) -> None:
        self.mailbox.post(SCHEDULER, Prepared(role=role, norms=norms, digests=digests), step=step)

    def abort(self) -> None:
        """End the step at its next operation, and every wait."""
        super().abort()
        self.link.abort()


def _name(key: Key) -> str:
    return f"expert.{key[0]}.{key[1]}"


def _digest(norms: Iterable[float]) -> int:
    """Of gradients by their norms, to compare replicas."""
    return crc32(np.array(list(norms)).tobytes())


class _Exchanged(torch.autograd.Function):
    """The sum of a token's experts: rows go out and come back, in each direction."""

    @staticmethod
    def forward(
        ctx: Any, x_TH: Tensor, weights_TK: Tensor, ids_TK: Tensor, exchange: DeviceExchange, layer: int
    ) -> Tensor:
        weights_TK = weights_TK.detach().contiguous()
        x_TH, ids_TK = x_TH.detach().contiguous(), ids_TK.int().contiguous()
        rows_TKH = exchange.forward_rows(layer, x_TH, ids_TK)
        ctx.exchange, ctx.layer = exchange, layer
        ctx.save_for_backward(weights_TK)
        return exchange.ops.combine_slots(rows_TKH, weights_TK)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (weights_TK,) = ctx.saved_tensors
        dx_TKH, dweights_TK = ctx.exchange.backward_rows(ctx.layer, grads[0].contiguous(), weights_TK)
        return ctx.exchange.ops.combine_slots(dx_TKH, None), dweights_TK.clone(), None, None, None
