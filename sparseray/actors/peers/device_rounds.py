"""A round's layers on a GPU: everything is launched, also into a CUDA graph, and nothing is read by the host.

What a captured step needs of a generation (who takes part, where their memory and which experts lie) is in tensors that
outlive generations and are filled when one is entered (`RoundTables`). So after a loss the graphs go on with those who
are left. Capture again is needed only where the slabs themselves are others. Twin of in_rounds.py's `HostLayers`.

Shapes: S slots by rank, C tokens of a slot at most, T own tokens, K experts per token, E experts, H hidden.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from sparseray.actors.peers.in_rounds import places_of
from sparseray.actors.peers.link import COUNT_BITS, lost
from sparseray.actors.peers.table import Table
from sparseray.actors.state.assignment import MOST_IN_ROUNDS, Plan
from sparseray.actors.state.slab_experts import SlabExperts
from sparseray.errors import SupersededError
from sparseray.kernels import peer, peer_rounds
from sparseray.kernels.capture import capturing
from sparseray.kernels.moe.held_rounds import rows_of_held


class RoundTables:
    """What captured steps read of the generation in force.

    Args:
        experts: of the slot.
        signs: of the slot: its state on the device, and what ends waits.
    """

    def __init__(self, experts: SlabExperts, signs: tuple[Tensor, Tensor]) -> None:
        self.state, self.end = signs
        self.table, self.who = peer_rounds.new_table(MOST_IN_ROUNDS, experts.device)
        shape = len(experts.slabs), experts.config.moe.num_experts + 1
        # The last place is that of no token's expert.
        self.places_LE = torch.zeros(shape, dtype=torch.int32, device=experts.device)
        self.idle: tuple[tuple[int, ...], torch.cuda.CUDAGraph] | None = None
        """A round without own tokens, and what it was captured for."""

    def enter(self, plan: Plan, experts: SlabExperts, table: Table, me: int, generation: int) -> None:
        """Fill everything for a generation.

        Args:
            plan, generation: that is entered.
            experts: that this slot holds.
            table: the slots' memory.
            me: own slot.
        """
        rank, rows = table.rank(me), [[0] * peer_rounds.FIELDS for _ in range(MOST_IN_ROUNDS)]
        for index, slot in enumerate(table.slots):
            theirs = table.regions[slot]
            found = theirs.x_STH[rank], theirs.ids_STK[rank], theirs.rows_RH, theirs.flags_S
            rows[index] = [tensor.data_ptr() for tensor in found]
        owners = sum(1 << table.rank(slot) for slot in plan.expert_primaries)
        self.table.copy_(torch.tensor(rows))
        others = (1 << len(table.slots)) - 1 & ~(1 << rank)
        self.who.copy_(torch.tensor([others, owners, rank]))
        self.places_LE.copy_(places_of(experts))
        self.state[:2] = torch.tensor([peer.OK, generation << COUNT_BITS])


class DeviceLayers:
    """`Layers` of a slot with a GPU.

    Args:
        experts: that this slot holds.
        tables: filled for this generation.
        table: the slots' memory.
        me: own slot.
        is_owner: whether it holds experts that it computes.
        deadline_s: after which a wait ends.
    """

    def __init__(
        self,
        experts: SlabExperts,
        tables: RoundTables,
        table: Table,
        me: int,
        *,
        is_owner: bool,
        deadline_s: float,
    ) -> None:
        self.held, self.tables, self.peers, self.me = experts, tables, table, me
        self.is_owner, self.deadline_s = is_owner, deadline_s
        self.mine, self.state = table.regions[me], tables.state

    @property
    def key(self) -> tuple[int, ...]:
        """What captured steps depend on; where it is another one, they are captured again."""
        slabs = [tensor.data_ptr() for slab in self.held.slabs for tensor in slab.compute]
        return int(self.is_owner), self.mine.flags_S.data_ptr(), *slabs

    def run(self, index: int, tokens: tuple[Tensor, Tensor] | None) -> Tensor | None:
        """As of `Layers`.

        Args:
            index, tokens: there.
        """
        t, mine, count = self.tables, self.mine, 2 * index
        C, K = mine.ids_STK.shape[1:]
        if tokens is None:
            tokens = mine.x_STH[0, :0], mine.ids_STK[0, :0]
        T = tokens[0].shape[0]
        assert T <= C, f"{T} tokens in a round for {C}"
        peer_rounds.give(*tokens, C, t.table, t.who, t.state)
        peer_rounds.say(count + 1, peer_rounds.OWNERS, t.table, t.who, t.state)
        if self.is_owner:
            self._wait(count + 1, peer_rounds.OTHERS)
            self._answer(index)
            peer_rounds.say(count + 2, peer_rounds.OTHERS, t.table, t.who, t.state)
        self._wait(count + 2, peer_rounds.OWNERS)
        return mine.rows_RH[: T * K].view(T, K, -1) if T else None

    def accompany(self) -> None:
        """As of `Layers`; a graph, as it takes the host longer than the device otherwise."""
        self.capture().replay()

    @torch.no_grad()
    def capture(self) -> torch.cuda.CUDAGraph:
        """The graph of a round without own tokens, made where there is none."""
        key, idle = self.key, self.tables.idle
        if idle is not None and idle[0] == key:
            return idle[1]
        with self.rehearsed():
            self._pass()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with capturing(graph):
                self._pass()
        self.tables.idle = key, graph
        return graph

    def _pass(self) -> None:
        for index in range(len(self.held.slabs)):
            self.run(index, None)
        self.end()

    def _wait(self, count: int, field: int) -> None:
        t = self.tables
        peer_rounds.wait(count, field, self.mine.flags_S, t.who, t.state, t.end, self.deadline_s)

    def _answer(self, index: int) -> None:
        """Compute the rows of all slots whose experts are here, and put them back."""
        mine, slab = self.mine, self.held.slabs[index]
        S, C, K = mine.ids_STK.shape
        places_TK = self.tables.places_LE[index][mine.ids_STK.view(S * C, K).long()]
        found = rows_of_held(mine.x_STH.view(S * C, -1), places_TK, *slab.compute)
        peer_rounds.answer(*found, C * K, self.tables.table, self.tables.state)

    def end(self) -> None:
        """Words of the next round follow those of this one."""
        self.tables.state[1:2] += 2 * len(self.held.slabs)

    def abort(self) -> None:
        """As of `Layers`."""
        self.tables.end.fill_(peer.ENDED)

    @contextmanager
    def rehearsed(self) -> Iterator[None]:
        """Meanwhile nothing is put, said or waited for, whatever runs."""
        before = self.tables.state.clone()
        self.tables.state[:1] = peer.ENDED
        yield
        self.tables.state.copy_(before)

    def check(self, status: int) -> None:
        """Judge a round by the state that it left.

        Raises:
            SlotLostError: somebody took no part in it.
            SupersededError: a later plan ended it.
        """
        if status == peer.LATE:
            raise lost(self.me, [slot for slot in self.peers.slots if slot != self.me], self.deadline_s)
        if status != peer.OK:
            raise SupersededError
