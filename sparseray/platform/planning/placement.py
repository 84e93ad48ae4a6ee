"""The choices of one change of plan: which slots play a role, and on which of them each piece lies.

Pure. `Placement` is used by platform/planning/replan.py alone; the numbers behind "as even as possible, with as
little as possible moved" are costs for the search of platform/planning/balance.py.

Shapes: L layers, P pieces in a layer, G backups of a piece, S slots.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np

from sparseray.actors.state.assignment import Plan
from sparseray.platform.planning.balance import FORBIDDEN, Array, even, even_backups, pack

Table = Sequence[Sequence[tuple[int, ...]]]
NO_NODES: Mapping[int, str] = MappingProxyType({})
COPY = 64
"""Cost of a copy to a new holder; the promotion of a backup costs 1, staying 0."""


def role_slots(plan: Plan) -> dict[str, tuple[int, ...]]:
    """Return the slots of each role: "attention", "experts", "memory"."""
    return {
        "attention": plan.attention,
        "experts": plan.expert_primaries,
        "memory": plan.memory_primaries,
    }


class Placement:
    """The choices of one `replan`: which slots play a role, then which pieces lie where.

    Args:
        old: the plan so far.
        usable: slots that may have roles, ascending.
        replication: holders of every piece, at most as many as `usable`.
        nodes: slot id to the name of its node, where known.
    """

    def __init__(self, old: Plan, usable: list[int], replication: int, nodes: Mapping[int, str]) -> None:
        self.old, self.usable, self.replication, self.nodes = old, usable, replication, nodes
        self.slots: dict[str, list[int]] = {}
        self.held: dict[str, dict[int, int]] = {
            "attention": dict.fromkeys(old.dense, 1),
            "experts": _tally(old.experts),
            "memory": _tally(old.buckets),
        }

    def choose(self, wanted: dict[str, int], *, colocated: bool) -> None:
        """Give slots to roles: "attention", "experts", "memory", as many as wanted where there are enough.

        Args:
            wanted: slots of each role.
            colocated: roles share slots.
        """
        before = role_slots(self.old)
        had = {role: [s for s in before[role] if s in self.usable] for role in wanted}
        if not colocated:
            self._part(had)
        pool = self.usable
        if colocated:
            # The roles share one set of slots: those that had a role first, then the lowest ids.
            having = {slot for slots in had.values() for slot in slots}
            pool = sorted(sorted(self.usable, key=lambda s: (s not in having, s))[: max(wanted.values())])
        for role, number in wanted.items():
            self.slots[role] = sorted(s for s in had[role] if s in pool)[:number]
        if colocated:
            for role, number in wanted.items():
                free = [slot for slot in pool if slot not in self.slots[role]]
                self.slots[role] += free[: number - len(self.slots[role])]
        else:
            self._fill(wanted)
        for role, number in wanted.items():
            if number and not self.slots[role]:
                self.slots[role] = [
                    min(self.usable, key=lambda s: (self.num_roles(s), -self.held[role].get(s, 0), s))
                ]
        # Weights reach the others from the first attention worker: it stays where it is.
        first = {slot: position for position, slot in enumerate(self.old.dense)}
        self.slots["attention"].sort(key=lambda s: (first.get(s, len(first)), s))

    def _part(self, had: dict[str, list[int]]) -> None:
        """Where slots have no role, let slots that have several give some up; `_fill` finds new ones."""
        busy = {slot for slots in had.values() for slot in slots}
        left = len(self.usable) - len(busy)
        for slot in sorted(busy):
            roles = [role for role, slots in had.items() if slot in slots]
            for role in roles[1:][:left]:
                had[role].remove(slot)
                left -= 1

    def _fill(self, wanted: dict[str, int]) -> None:
        """Give slots without a role to the roles that lack some; one to each empty role first."""
        free = [slot for slot in self.usable if not self.num_roles(slot)]
        left, grants = len(free), dict.fromkeys(wanted, 0)
        for role, number in wanted.items():
            if number and not self.slots[role] and left:
                grants[role], left = 1, left - 1
        for role, number in wanted.items():
            more = min(left, max(0, number - len(self.slots[role]) - grants[role]))
            grants[role], left = grants[role] + more, left - more
        for role, number in grants.items():
            for _ in range(number):
                here = [self.nodes[s] for s in self.slots[role] if s in self.nodes]
                best = min(
                    free, key=lambda s: (-self.held[role].get(s, 0), here.count(self.nodes.get(s, "")), s)
                )
                free.remove(best)
                self.slots[role].append(best)

    def num_roles(self, slot: int) -> int:
        """How many roles a slot has so far."""
        return sum(slot in slots for slots in self.slots.values())

    def dense(self) -> tuple[int, ...]:
        """Holders of the dense weights: attention workers, then backups."""
        return tuple(self.slots["attention"] + sorted(self._others("attention")))

    def _others(self, role: str) -> list[int]:
        """Slots without the role that must hold its pieces, because its own are too few or on one node."""
        own = self.slots[role]

        def order(slot: int) -> tuple[int, int, int]:
            return (-self.held[role].get(slot, 0), self.num_roles(slot), -slot)

        others = sorted((s for s in self.usable if s not in own), key=order)
        found: list[int] = []
        at = {self.nodes.get(slot) for slot in own}
        if self.replication > 1 and len(at) == 1 and None not in at:
            # As many as the role has, so that each holds as much; one is enough for the dense weights.
            most = max(1, self.replication - len(own)) if role == "attention" else len(own)
            found = [s for s in others if self.nodes.get(s) not in {None, *at}][:most]
        others = [slot for slot in others if slot not in found]
        return found + others[: max(0, self.replication - len(own) - len(found))]

    def table(
        self, role: str, old: Table, loads: Sequence[Sequence[float]] | None
    ) -> tuple[tuple[tuple[int, ...], ...], ...]:
        """Place pieces on the role's slots and their backups.

        Args:
            role: whose slots they go to.
            old: holders so far, [layers][pieces].
            loads: of each piece, [layers][pieces]; None for equal numbers.
        """
        if not old:
            return ()
        own = sorted(self.slots[role])
        cost = costs(old, own)
        start = _start(cost)
        if loads is None:
            at = even(cost, start)
        else:
            at = np.stack([pack(c, a, np.array(load, float)) for c, a, load in zip(cost, start, loads)])
        primaries = [[own[i] for i in row] for row in at]
        if self.replication == 1:
            return tuple(tuple((slot,) for slot in row) for row in primaries)
        holders = sorted(own + self._others(role))
        return _with_backups(old, primaries, holders, self.replication - 1, self.nodes)


def costs(old: Table, slots: Sequence[int]) -> Array:
    """What it costs to make a slot the primary of a piece; int64 [L, P, S].

    Args:
        old: holders so far, [L][P].
        slots: S candidates.
    """
    column = {slot: index for index, slot in enumerate(slots)}
    cost = np.full((len(old), len(old[0]), len(slots)), COPY)
    for layer, row in enumerate(old):
        for piece, holders in enumerate(row):
            for rank, slot in enumerate(holders):
                if slot in column:
                    cost[layer, piece, column[slot]] = min(rank, 1)
    return cost


def _start(cost_LPS: Array) -> Array:
    """A cheapest slot of every piece; pieces that nobody has fill up the slots in contiguous ranges."""
    layers, things, slots = cost_LPS.shape
    at, total = np.zeros((layers, things), np.int64), np.zeros(slots, np.int64)
    for layer, cost in enumerate(cost_LPS):
        lost = cost.min(1) == COPY
        count = np.zeros(slots, np.int64)
        for rank in (0, 1):
            for piece in np.flatnonzero(~lost & (cost.min(1) == rank)):
                options = np.flatnonzero(cost[piece] == rank)
                at[layer, piece] = options[np.lexsort((total[options], count[options]))[0]]
                count[at[layer, piece]] += 1
        part, rest = divmod(things, slots)
        larger = np.lexsort((np.arange(slots), total, count <= part))[:rest]
        room = np.full(slots, part)
        room[larger] += 1
        ranges = np.repeat(np.arange(slots), np.maximum(0, room - count))
        at[layer, lost] = ranges[: int(lost.sum())]
        total += np.bincount(at[layer], minlength=slots)
    return at


def _with_backups(
    old: Table, primaries: list[list[int]], slots: list[int], group: int, nodes: Mapping[int, str]
) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """Add `group` backups, in ascending order, to every primary; one is on another node where that is possible."""
    column = {slot: index for index, slot in enumerate(slots)}
    layers, pieces = len(primaries), len(primaries[0])
    cost = np.full((layers, pieces, group, len(slots)), COPY)
    fixed = np.zeros((layers, pieces, len(slots)), bool)
    near = np.array([[a != b and nodes.get(a, a) == nodes.get(b, b) for b in slots] for a in slots])
    for layer, row in enumerate(primaries):
        for piece, primary in enumerate(row):
            present = [column[slot] for slot in old[layer][piece] if slot in column]
            cost[layer, piece, :, present] = 0
            fixed[layer, piece, column[primary]] = True
            cost[layer, piece, 0, near[column[primary]]] += FORBIDDEN
    at = _start_backups(cost, fixed)
    shape = (layers, pieces * group)
    at = even_backups(cost.reshape(*shape, -1), at.reshape(shape), group, fixed).reshape(at.shape)
    return tuple(
        tuple((primary, *sorted(slots[i] for i in at[layer, piece])) for piece, primary in enumerate(row))
        for layer, row in enumerate(primaries)
    )


def _start_backups(cost_LPGS: Array, fixed_LPS: Array) -> Array:
    """Cheapest slots of all backups; among equals the one that shares the fewest pieces with the primary.

    So all others help to replace a dead slot. After that: the fewest pieces, then the next in a ring.
    """
    layers, pieces, group, slots = cost_LPGS.shape
    at = np.zeros((layers, pieces, group), np.int64)
    count, shared = fixed_LPS.sum((0, 1)), np.zeros((slots, slots), np.int64)
    for layer in range(layers):
        for piece in range(pieces):
            free = ~fixed_LPS[layer, piece]
            primary = int(np.flatnonzero(~free)[0])
            for rank in range(group):
                options = np.flatnonzero(free)
                price = cost_LPGS[layer, piece, rank, options]
                ring = (options - primary) % slots
                best = options[np.lexsort((ring, count[options], shared[primary, options], price))[0]]
                at[layer, piece, rank], free[best] = best, False
                count[best] += 1
                shared[[primary, best], [best, primary]] += 1
    return at


def split_evenly(count: int, slots: Sequence[int]) -> list[int]:
    """Give `count` things to slots in contiguous ranges whose sizes differ by at most one.

    Args:
        count: of the things.
        slots: that share them, in order.
    """
    return [slots[index * len(slots) // count] for index in range(count)]


def _tally(table: Table) -> dict[int, int]:
    """How many pieces of a table each slot holds."""
    found: dict[int, int] = {}
    for row in table:
        for holders in row:
            for slot in holders:
                found[slot] = found.get(slot, 0) + 1
    return found
