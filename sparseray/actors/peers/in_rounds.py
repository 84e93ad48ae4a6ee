"""Experts of several slots in serving: all slots of a generation run the network in rounds, with their own tokens or none.

A round is one pass over the MoE layers. In each of them every slot gives its tokens to all that hold experts, these
compute the rows of everybody's and put them back where the tokens are. So nobody answers on demand: a slot without
requests takes part as long as others have some, told by a message (`Round`) that a round has begun. How many tokens a
slot has in a round is its own affair, up to what the regions hold: where it has fewer, ids say so. Twin in training:
across.py.

Shapes: T tokens, K experts per token, R rows, H hidden.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sparseray.actors.exchange.protocol import Abortable, Fetch, FetchedRows, PartGradients
from sparseray.actors.peers.link import Link
from sparseray.actors.peers.regions import Sizes
from sparseray.actors.peers.table import Table
from sparseray.actors.state.assignment import MOST_IN_ROUNDS, Plan
from sparseray.actors.state.experts import ExpertShard
from sparseray.actors.state.slab_experts import SlabExperts
from sparseray.actors.wire.envelope import Body
from sparseray.actors.wire.mailbox import Mailbox
from sparseray.kernels.ops import Ops

NOBODY = -1
"""Expert of a place without a token."""


@dataclass(frozen=True, kw_only=True)
class Round(Body):
    """A slot has begun a round, which needs all.

    Args:
        number: of the round in its generation.
    """

    number: int


def is_in_rounds(plan: Plan) -> bool:
    """Whether engines of a plan need each other: one of them lacks an expert."""
    return any(set(plan.attention).difference(holders) for row in plan.experts for holders in row)


def round_sizes(experts: ExpertShard, tokens: int) -> Sizes:
    """What the buffers of a server's slots are cut into.

    Args:
        experts: of any of them.
        tokens: of a round, at most.
    """
    config = experts.config
    return Sizes(
        slots=MOST_IN_ROUNDS,
        tokens=tokens,
        top_k=config.moe.top_k,
        hidden=config.hidden,
        returned=config.moe.top_k,
        dtype=experts.slabs[0].compute_dtype or torch.float32,
        nodes=0,
        dense=0,
        dense_slice=0,
        shares=0,
    )


def places_of(experts: SlabExperts) -> Tensor:
    """Row of each layer's slabs that an expert has here, int32 [layers, experts + 1]; the last place is no expert's.

    It is the number of rows for those that others compute. Slabs do not change before the next plan.

    Args:
        experts: of the slot.
    """
    every = experts.config.moe.num_experts
    places_LE = torch.empty(len(experts.slabs), every + 1, dtype=torch.int32)
    for layer, slab in enumerate(experts.slabs):
        places_LE[layer] = len(slab.rows)
        for expert, row in slab.rows.items():
            if (layer, expert) in experts.computed:
                places_LE[layer, expert] = row
    return places_LE


class Layers(Protocol):
    """What a round consists of on one kind of device."""

    def run(self, index: int, tokens: tuple[Tensor, Tensor] | None) -> Tensor | None:
        """Exchange and compute one layer.

        Args:
            index: among the MoE layers.
            tokens: own tokens [T, H] and int32 ids [T, K] of their experts; None for none.

        Returns:
            rows [T, K, H] of the own tokens; they lie there until the next call.
        """
        ...

    def end(self) -> None:
        """End a round."""

    def accompany(self) -> None:
        """Take part in a whole round without own tokens."""

    def abort(self) -> None:
        """End every wait; called by the control thread."""

    @property
    def state(self) -> Tensor | None:
        """On a device, int64: what a round leaves there first says how it ended; None where that is raised."""
        ...

    def check(self, status: int) -> None:
        """Judge the first number of `state`.

        Raises:
            SlotLostError: somebody took no part in a round.
            SupersededError: a later plan ended it.
        """

    @property
    def key(self) -> tuple[int, ...]:
        """What captured rounds depend on; where it is another one, they are captured again."""
        ...

    def rehearsed(self) -> AbstractContextManager[None]:
        """Meanwhile nothing is put, said or waited for, whatever runs on a device."""
        ...


class HostLayers:
    """`Layers` of slots that compute on a CPU.

    Args:
        plan: of the generation.
        experts: that this slot holds.
        table, link: the slots' memory, and the way to it.
        me: own slot.
        ops: what computes.
    """

    def __init__(self, plan: Plan, experts: SlabExperts, table: Table, link: Link, me: int, ops: Ops) -> None:
        self.held, self.table, self.link, self.me, self.ops = experts, table, link, me, ops
        self.owners = plan.expert_primaries
        self.others = [slot for slot in table.slots if slot != me]
        self.places_LE = places_of(experts).long()
        self._count = 0

    def run(self, index: int, tokens: tuple[Tensor, Tensor] | None) -> Tensor | None:
        """As of `Layers`.

        Args:
            index, tokens: there.
        """
        mine, rank = self.table.regions[self.me], self.table.rank(self.me)
        for slot in self.owners:
            self._give(slot, rank, tokens)
        if self.me in self.owners:
            self.link.wait(mine.flags_S, self.table.ranks(self.others), self._count + 1)
            # The own ones last: nobody else waits for them.
            for slot in (*self.others, self.me):
                self._answer(index, slot)
        owners = [slot for slot in self.owners if slot != self.me]
        self.link.wait(mine.flags_S, self.table.ranks(owners), self._count + 2)
        self._count += 2
        if tokens is None:
            return None
        T, K = tokens[1].shape
        return mine.rows_RH[: T * K].view(T, K, -1)

    def _give(self, slot: int, rank: int, tokens: tuple[Tensor, Tensor] | None) -> None:
        """Put the own tokens where a slot with experts reads them."""
        theirs = self.table.regions[slot]
        ids_TK = theirs.ids_STK[rank]
        T = 0 if tokens is None else tokens[0].shape[0]
        assert ids_TK.shape[0] >= T, f"{T} tokens in a round for {ids_TK.shape[0]}"
        if tokens is not None:
            self.link.put(tokens[0], theirs.x_STH[rank, :T])
            self.link.put(tokens[1], ids_TK[:T])
        self.link.put(torch.full_like(ids_TK[T:], NOBODY), ids_TK[T:])
        if slot != self.me:
            self.link.signal(theirs.flags_S, rank, self._count + 1)

    def _answer(self, index: int, slot: int) -> None:
        """Compute the rows of a slot whose experts are here, and put them back."""
        mine, theirs, slab = self.table.regions[self.me], self.table.regions[slot], self.held.slabs[index]
        rank, num = self.table.rank(slot), len(slab.rows)
        ids_TK = mine.ids_STK[rank]
        T = int((ids_TK[:, 0] >= 0).sum())
        # Elsewhere counts as one expert more.
        rows = self.ops.group_held(self.places_LE[index][ids_TK[:T].long()], 1, num, slab.compute[0])
        counts = rows.counts_E[:num].tolist()
        y_RH, _ = self.ops.held_forward(mine.x_STH[rank, :T], rows, counts, *slab.compute)
        self.link.put(y_RH, theirs.rows_RH, rows.order_R[: sum(counts)])
        if slot != self.me:
            self.link.signal(theirs.flags_S, self.table.rank(self.me), self._count + 2)

    state, key = None, ()

    def check(self, status: int) -> None:
        """Nothing is left."""

    def rehearsed(self) -> AbstractContextManager[None]:
        """Loops are loaded without it."""
        return nullcontext()

    def accompany(self) -> None:
        """As of `Layers`."""
        for index in range(len(self.held.slabs)):
            self.run(index, None)

    def end(self) -> None:
        """Words go on rising from round to round."""

    def abort(self) -> None:
        """As of `Layers`."""
        self.link.abort()


class RoundsExchange(Abortable):
    """`Exchange` of a slot of a server whose experts lie in several.

    Args:
        layers: what a round consists of.
        experts: that this slot holds; says which layers there are.
        mailbox: of the slot.
        others: slots that must take part.
        ops: what combines.
    """

    def __init__(
        self, layers: Layers, experts: SlabExperts, mailbox: Mailbox, others: Sequence[int], ops: Ops
    ) -> None:
        super().__init__()
        self.layers, self.mailbox, self.others, self.ops = layers, mailbox, others, ops
        self._index = {layer: index for index, layer in enumerate(experts.config.moe_layers)}
        self._begun = self._wanted = 0

    # -- rounds ------------------------------------------------------------------------------------

    @property
    def is_behind(self) -> bool:
        """Whether others have begun a round that this slot has not."""
        return not self._is_aborted and self._wanted > self._begun

    @property
    def begun(self) -> int:
        """Rounds so far."""
        return self._begun

    @property
    def is_over(self) -> bool:
        """Whether nothing can run here before the next plan."""
        return self._is_aborted

    def heard(self, number: int) -> None:
        """Take note that somebody has begun a round."""
        self._wanted = max(self._wanted, number)

    def open_round(self, step: int) -> None:
        """Begin a round; the next thing that runs is one pass over all layers.

        Args:
            step: that is open.

        Raises:
            SupersededError: the generation is over.
        """
        self.check()
        self._begun += 1
        if self._begun > self._wanted:
            for slot in self.others:
                self.mailbox.post(slot, Round(number=self._begun), step=step)

    def join(self, step: int) -> None:
        """Take part in a round without tokens.

        Args:
            step: that is open.
        """
        self.open_round(step)
        self.layers.accompany()

    # -- of Exchange -------------------------------------------------------------------------------

    def begin(self, step: int, part: int) -> None:
        """Nothing depends on it here.

        Args:
            step: whose commit comes next.
            part: of the global batch; -1 for none.
        """

    def experts(self, layer: int, x_TH: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor) -> Tensor:
        """Sum over k of weight * expert(x), [T, H].

        Args:
            layer: 0-based model layer.
            x_TH: inputs, in the slabs' dtype.
            topk_ids_TK: int64, chosen experts.
            topk_weights_TK: fp32, their weights.
        """
        self.check()
        index = self._index[layer]
        rows_TKH = self.layers.run(index, (x_TH.contiguous(), topk_ids_TK.int().contiguous()))
        assert rows_TKH is not None
        out_TH = self.ops.combine_slots(rows_TKH, topk_weights_TK.contiguous())
        if index == len(self._index) - 1:
            self.layers.end()
        return out_TH

    def prefetch(self, rows: dict[int, Tensor]) -> FetchedRows:
        """A model with memory layers is not served in rounds."""
        assert not rows
        return FetchedRows(addresses={}, values={})

    def reduce(self, step: int, part: int, gradients: PartGradients) -> None:
        """Nothing is trained here.

        Args:
            step, part, gradients: of a step in training.
        """
        raise NotImplementedError

    def take_fetches(self) -> list[Fetch]:
        """Nothing is fetched."""
        return []

    def abort(self) -> None:
        """End the round at its next operation, and every wait; called by the control thread."""
        super().abort()
        self.layers.abort()
