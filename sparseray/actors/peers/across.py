"""Experts and gradients of several slots on one host, each with a device: the exchange of several GPUs.

Every slot gives its tokens to all that hold experts, each computes the rows of those that it holds and puts them back
where the tokens are (token_exchange.py). All slots of a generation make the same exchanges in the same order: in each
round every slot runs one part, or none, and those that run none compute for the others. Gradients are summed in
the order of one slot, so the number of slots changes no bit. Twin of on_device.py, where one slot has everything; table
rows go by message, as their tables lie in the host's memory.

Shapes: T tokens, K experts per token, R rows, H hidden, E experts.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from zlib import crc32

import numpy as np
import torch
from torch import Tensor

from sparseray.actors.exchange.by_message import MessageExchange
from sparseray.actors.exchange.on_device import norms_by_role, step_norms
from sparseray.actors.exchange.protocol import (
    Abortable,
    Fetch,
    FetchedRows,
    Observe,
    PartGradients,
    Recording,
    Run,
)
from sparseray.actors.peers.dense_slices import DenseSlices
from sparseray.actors.peers.expert_shares import ExpertShares
from sparseray.actors.peers.link import Link
from sparseray.actors.peers.meter import Meter
from sparseray.actors.peers.rounds import Round, Turn, rounds_of
from sparseray.actors.peers.routed import Routed
from sparseray.actors.peers.table import Table
from sparseray.actors.peers.token_exchange import TokenExchange
from sparseray.actors.state.assignment import Plan
from sparseray.actors.state.dense_slab import DenseSlabs
from sparseray.actors.state.pieces import Key
from sparseray.actors.state.slab_experts import SlabExperts
from sparseray.actors.wire.envelope import SCHEDULER
from sparseray.actors.wire.messages import Prepared


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
        observe: metrics of the slot.
    """

    is_alone = False

    def __init__(
        self,
        plan: Plan,
        dense: DenseSlabs,
        experts: SlabExperts,
        table: Table,
        link: Link,
        rows: MessageExchange,
        part_shape: tuple[int, int],
        observe: Observe,
    ) -> None:
        super().__init__()
        self.plan, self.dense, self.held, self.table, self.link = plan, dense, experts, table, link
        self.rows, self.mailbox, self.me = rows, rows.call.mailbox, rows.call.mailbox.slot
        self.part_shape, self.ops = part_shape, dense.ops
        self._recomputes = dense.model.recompute
        self.layers = list(experts.config.moe_layers)
        self.meter = Meter(link, observe)
        self.across = TokenExchange(plan, dense, experts, table, self.me, link, self.meter)
        self.slices = DenseSlices(plan, dense, table, self.me, link)
        self.shares = ExpertShares(plan, experts, table, self.me, link)
        self._turn, self._is_replayed = Turn(), False
        self.nothing = torch.zeros((), device=dense.device)
        self._routed = Routed(self)

    # -- what runs -----------------------------------------------------------------------------------

    def expect(self, parts: Sequence[tuple[int, int]], *, trains: bool) -> None:
        """Say what all slots together will run.

        Args:
            parts: (part, slot) each, in order.
            trains: forward and backward; otherwise forward alone.
        """
        self._turn = Turn(rounds_of(parts), trains)
        self.meter.forget()
        self.across.clear()

    def begin(self, step: int, part: int) -> None:
        """Say what the next calls belong to.

        Args:
            step: whose commit comes next.
            part: of the global batch; -1 for none.
        """
        self.rows.begin(step, part)
        self._is_replayed = False
        for index, running in enumerate(self._turn.rounds):
            if running.get(self.me) == part:
                self._turn.index = index

    def accompany(self, step: int) -> None:
        """Compute for others until all parts have run; in training also end the step.

        Args:
            step: that is open.
        """
        self._meet()
        turn = self._turn
        own = sum(self.me in running for running in turn.rounds)
        # An evaluation does without the modules that predict further tokens.
        layers = [
            i for i, layer in enumerate(self.layers) if turn.trains or layer < self.held.config.num_layers
        ]
        for index in range(own, len(turn.rounds)):
            turn.index = index
            for layer in layers:
                self._forward(layer)
            if turn.trains:
                for layer in reversed(layers):
                    if self._recomputes:
                        self._forward(layer)
                    self._backward(layer)
                self._end_round()
        if turn.trains:
            self._finish(step)

    @property
    def _running(self) -> Round:
        return self._turn.rounds[self._turn.index]

    # -- experts ---------------------------------------------------------------------------------------

    @property
    def experts(self) -> Routed:
        """The routed experts, as the model calls them."""
        return self._routed

    def send_rows(self, layer: int, x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> None:
        """Let tokens go to the slots of their experts.

        Args:
            layer: index among the MoE layers.
            x_TH: inputs, contiguous.
            ids_TK: int32, chosen experts, contiguous.
            weights_TK: fp32, their weights, contiguous.
        """
        self.check()
        self.across.send(layer, x_TH, (ids_TK, weights_TK))

    def forward_rows(self, layer: int, weights_TK: Tensor) -> Tensor:
        """The weighted sum of the chosen experts' outputs, [T, H], of the tokens that were sent last.

        Args:
            layer: index among the MoE layers.
            weights_TK: as there.
        """
        self._forward(layer)
        return self.across.returned(layer, len(weights_TK), weights_TK)

    def send_gradient(self, layer: int, dout_TH: Tensor) -> None:
        """Let the gradient of a layer's output go the same way.

        Args:
            layer: index among the MoE layers.
            dout_TH: contiguous.
        """
        self.check()
        self.across.send(layer, dout_TH, None)

    def backward_rows(self, layer: int, tokens: int) -> tuple[Tensor, Tensor]:
        """Gradients of the inputs, [T, H], and of the routing weights, [T, K], after `send_gradient`.

        Args:
            layer: index among the MoE layers.
            tokens: T.
        """
        self._backward(layer)
        dx_TH = self.across.returned(layer, tokens, None)
        return dx_TH, self.across.returned_weights(tokens).clone()

    def _tokens(self, layer: int) -> int:
        """Tokens of a part that a layer sees: a module k places ahead has no token for the last k."""
        sequences, length = self.part_shape
        ahead = max(0, self.layers[layer] - self.held.config.num_layers + 1)
        return sequences * (length - ahead)

    def _forward(self, layer: int) -> None:
        """Compute what all slots have sent whose experts are here."""
        self.check()
        turn = self._turn
        # What is computed again is kept only then.
        keep = turn.trains and (not self._recomputes or layer in turn.passed)
        turn.passed.add(layer)
        self.across.forward(layer, list(self._running), self._tokens(layer), keep=keep)

    def _backward(self, layer: int) -> None:
        """Give back the input gradients of what was computed here."""
        self.check()
        self.across.backward(layer, list(self._running), self._tokens(layer))

    # -- recorded --------------------------------------------------------------------------------------

    def leaves(self) -> list[Tensor]:
        """As in `Recordable`: the experts' gradients are found here."""
        return list(self.dense.parameters)

    def built_in(self) -> tuple[object, ...] | None:
        """As in `Recordable`: which slots run a part of the round, and where the experts lie.

        None where the host counts rows, or a link needs it; and in rounds that fewer slots run than the first one, since
        recordings of both would each have their own memory.
        """
        running, most = tuple(self._running), tuple(self._turn.rounds[0])
        if not self.link.is_recordable or self.across.counts_rows or running != most:
            return None
        return self.across.built_in(running)

    def recorded(self, run: Run, record: Callable[[Run], Recording]) -> Recording:
        """As in `Recordable`: a replay goes on with the words where the slot is, and leaves the experts' gradients.

        Args:
            run, record: there.
        """
        across, begin, sets = self.across, self.across.count, list[int]()
        # A recording begins with a wait for the device, which may wait for a slot that asks this one for rows.
        self.link.read(self.nothing)

        def whole() -> list[Tensor]:
            try:
                found = run()
            except BaseException:
                # What is recorded can be ended only where all of it comes together again.
                self.link.join()
                raise
            gradients = across.take_gradients()
            sets[:] = map(len, gradients)
            return [*found, *(gradient for of_set in gradients for gradient in of_set)]

        try:
            with self.meter.apart() as costs:
                replay, found = record(whole)
            words = across.count - begin
        finally:
            across.rewind(begin)
            self._turn.passed.clear()
        own = len(found) - sum(sets)

        def again() -> None:
            self.check()
            end = across.count + words
            self.link.shift(across.count - begin)
            replay()
            self.link.shift(0)
            across.count, self._is_replayed = end, True
            across.leave_gradients(_split(found[own:], sets))
            self.meter.add(costs)

        return again, found[:own]

    @property
    def launches_beside(self) -> bool:
        """As in `Recordable`: those that note statistics, of layers that are not computed again; and smaller rounds."""
        rounds = self._turn.rounds
        return not self._recomputes or any(tuple(running) != tuple(rounds[0]) for running in rounds)

    @property
    def sum_bytes(self) -> int:
        """As in `Recordable`; of the experts each slot's parts begin a sum of their own."""
        slabs, rounds = self.dense.sum.num_slabs, self._turn.rounds
        experts = sum(tensor.numel() for slab in self.held.slabs for tensor in slab.compute)
        sums = max(slabs, len(rounds[0])) if slabs > 1 else slabs
        return 4 * (slabs * self.dense.num_elements + sums * experts)

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
        self._meet()
        return FetchedRows(addresses=found.addresses, values=values)

    def _meet(self) -> None:
        if self.held.config.dse.layers:
            self.across.meet(self.nothing)

    def await_device(self) -> None:
        """As of `Exchange`; others are answered meanwhile, and a wait that came to no end is told."""
        self.link.read(self.nothing)

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
        is_last = part == self.plan.parts_of(self.me)[-1]
        # The next replay writes where the gradients of this one lie.
        lent = self._is_replayed and not is_last
        self.dense.sum.add(part, gradients.dense, lent=lent)
        if gradients.rows:
            # Rows go by message. Who only waited for the device would not answer another slot that asks for rows, while the
            # device may wait for that slot.
            self.link.read(self.nothing)
            self.rows.reduction.send_rows(step, part, gradients, self.rows.owner_of)
        self._end_round(lent=lent)
        if is_last:
            self.accompany(step)

    def _end_round(self, *, lent: bool = False) -> None:
        """Add the experts' gradients of all parts of a round to their sums.

        Args:
            lent: as in `GradientSum.add`.
        """
        self._turn.passed.clear()
        if not self.across.is_owner:
            return
        parts, gradients = list(self._running.values()), self.across.take_gradients()
        for part, of_part in zip(parts, gradients, strict=not self.across.is_summed):
            self.held.sum.add(part, of_part, len(parts) // len(gradients), lent=lent)

    def _finish(self, step: int) -> None:
        """Sum what lies in several slots, and tell the scheduler of every role's norms."""
        self.slices.sum_up(self.across.count + 1)
        self.shares.share(self.across.count + 3, self._sums_dtype())
        self.across.count += 4
        found = self.link.read(step_norms(self.dense, self.held, []))
        dense, experts, _ = norms_by_role(self.dense, self.held, found)
        of_dense = dict(zip(self.dense.names, dense))
        held = [(layer, expert) for layer, slab in enumerate(self.held.slabs) for expert in slab.rows]
        of_experts = dict(zip(map(_name, held), experts, strict=True))
        self.meter.tell()
        self.across.settle(max(map(len, self._turn.rounds)), self.part_shape[0] * self.part_shape[1])
        plan = self.plan
        if self.me in plan.dense:
            is_first = plan.dense[0] == self.me
            self._post(step, "dense", of_dense if is_first else {}, {"dense": _digest(of_dense.values())})
        if self.me in plan.expert_holders:
            backed = [key for key in self.held.owned if len(plan.experts[key[0]][key[1]]) > 1]
            computed = {_name(key): of_experts[_name(key)] for key in self.held.computed}
            digests = {_name(key): _digest([of_experts[_name(key)]]) for key in backed}
            self._post(step, "expert", computed, digests)

    def _sums_dtype(self) -> torch.dtype:
        """Of the experts' gradients: what one sum is of comes as it is, more are added in fp32 (GradientSum)."""
        is_one = len(self.plan.part_owners) == 1 or (self.across.is_summed and len(self._turn.rounds) == 1)
        return self.dense.dtype if is_one else torch.float32

    def _post(self, step: int, role: str, norms: dict[str, float], digests: dict[str, int]) -> None:
        self.mailbox.post(SCHEDULER, Prepared(role=role, norms=norms, digests=digests), step=step)

    def abort(self) -> None:
        """End the step at its next operation, and every wait."""
        super().abort()
        self.link.abort()


def _split(flat: Sequence[Tensor], sizes: Sequence[int]) -> list[list[Tensor]]:
    """Lists of some sizes, one after another."""
    rest = iter(flat)
    return [list(islice(rest, size)) for size in sizes]


def _name(key: Key) -> str:
    return f"expert.{key[0]}.{key[1]}"


def _digest(norms: Iterable[float]) -> int:
    """Of gradients by their norms, to compare replicas."""
    return crc32(np.array(list(norms)).tobytes())
