"""Pure functions that place roles on slots; no Ray, no time, no randomness.

Disaggregated: every role has slots of its own. Colocated: the roles share slots, and a call
from a slot to itself is a function call (actors/slot.py). Backups go to slots of the same
role where there are enough of them, else to any other slot. A new plan keeps what it can of the
old one; the search for that is platform/balance.py, what then travels platform/moves.py.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from sparseray.actors.assignment import Plan
from sparseray.errors import ConfigError
from sparseray.platform.balance import FORBIDDEN, Array, even, even_backups, pack
from sparseray.platform.moves import Moves, Piece, holdings, least_bytes, moves, piece_bytes

__all__ = [
    "Moves",
    "Piece",
    "Roles",
    "fitting",
    "holdings",
    "least_bytes",
    "make_plan",
    "moves",
    "num_slots",
    "packed",
    "piece_bytes",
    "replan",
    "role_slots",
]

Table = Sequence[Sequence[tuple[int, ...]]]
NO_NODES: Mapping[int, str] = MappingProxyType({})
NOBODY = -1
COPY = 64
"""Cost of a copy to a new holder; the promotion of a backup costs 1, staying 0."""


@dataclass(frozen=True, kw_only=True)
class Roles:
    """Wanted number of slots for each role, 0 where the model has none."""

    attention: int
    experts: int
    memory: int


def num_slots(attention: int, experts: int, memory: int, *, colocated: bool) -> int:
    """Slots that a placement needs."""
    return max(attention, experts, memory) if colocated else attention + experts + memory


def make_plan(
    *,
    generation: int,
    addresses: dict[int, str],
    attention: int,
    experts: int,
    memory: int,
    replication: int,
    num_shards: int,
    moe_layers: int,
    num_experts: int,
    dse_layers: int,
    num_buckets: int,
    colocated: bool = False,
    nodes: Mapping[int, str] = NO_NODES,
) -> Plan:
    """Place the roles on slots 0, 1, ... in the order attention, experts, memory; `replan` from nothing.

    Args:
        generation: number of the plan.
        addresses: slot id to transport address, one per slot.
        attention, experts, memory: slots that play each role.
        replication: holders of every piece of state.
        num_shards: logical shards of a step.
        moe_layers, num_experts, dse_layers, num_buckets: what there is to place.
        colocated: roles share slots.
        nodes: slot id to the name of its node, where known.

    Raises:
        ConfigError: the numbers do not fit each other.
    """
    _check("cluster.attention_workers", attention, "logical shards (train.logical_shards)", num_shards)
    if moe_layers:
        _check("cluster.expert_shards", experts, "experts (model.moe.num_experts)", num_experts)
    if dse_layers:
        _check("cluster.memory_shards", memory, "buckets (model.dse.num_buckets)", num_buckets)
    if replication < 1 or replication > len(addresses):
        raise ConfigError(
            f"cluster.replication={replication} needs as many slots, and this placement has {len(addresses)}; "
            f"give it a value from 1 to {len(addresses)} or add actors"
        )
    nothing = Plan(
        generation=generation - 1,
        addresses={},
        shard_owners=(NOBODY,) * num_shards,
        dense=(),
        experts=(((NOBODY,),) * num_experts,) * moe_layers,
        buckets=(((NOBODY,),) * num_buckets,) * dse_layers,
    )
    return replan(
        nothing,
        generation=generation,
        addresses=addresses,
        roles=Roles(attention=attention, experts=experts, memory=memory),
        replication=replication,
        colocated=colocated,
        nodes=nodes,
    )


def replan(
    old: Plan,
    *,
    generation: int,
    addresses: dict[int, str],
    roles: Roles,
    replication: int,
    colocated: bool = False,
    nodes: Mapping[int, str] = NO_NODES,
    avoid: Collection[int] = (),
    loads: Sequence[Sequence[float]] | None = None,
) -> Plan:
    """Make the next plan: as balanced as a fresh one, with as little as possible moved.

    A role keeps its slots; beyond `roles` those with the highest ids go, and slots without a role fill up
    what is missing. With too few of them the role's survivors share its work, and a role without any slot
    goes to the slot with the fewest roles.

    Args:
        old: the plan so far.
        generation: number of the new plan.
        addresses: every slot of the new generation: with roles, spare, leaving; slots of `old` that are not
            in it are dead.
        roles: wanted slots of each role; more than a role can use, or 0 for one the model needs, is mended.
        replication: wanted holders of every piece of state; fewer where there are fewer slots.
        colocated: roles share slots.
        nodes: slot id to the name of its node; where known, a piece's holders are not all on one node if
            that is possible.
        avoid: slots that must end without any role.
        loads: tokens of every expert, [moe layers][experts]; primaries are then placed such that the slots of
            a layer have equal loads. None: equal numbers of experts.

    Raises:
        ConfigError: no slot is left.
    """
    usable = sorted(set(addresses) - set(avoid))
    if not usable:
        raise ConfigError(f"no slot is left for generation {generation}; start one")
    places = _Places(old, usable, min(max(1, replication), len(usable)), nodes)
    places.choose(fitting(old, roles), colocated=colocated)
    attention = places.slots["attention"]
    return Plan(
        generation=generation,
        addresses=dict(addresses),
        shard_owners=tuple(_split_evenly(len(old.shard_owners), attention)),
        dense=places.dense(),
        experts=places.table("experts", old.experts, loads),
        buckets=places.table("memory", old.buckets, None),
    )


def fitting(plan: Plan, roles: Roles) -> Roles:
    """Return the roles that a plan can use: at least one slot where there is work, at most one a thing."""

    def limit(value: int, things: int) -> int:
        return min(max(1, value), things)

    return Roles(
        attention=limit(roles.attention, len(plan.shard_owners)),
        experts=limit(roles.experts, len(plan.experts[0]) if plan.experts else 0),
        memory=limit(roles.memory, len(plan.buckets[0]) if plan.buckets else 0),
    )


def role_slots(plan: Plan) -> dict[str, tuple[int, ...]]:
    """Return the slots of each role: "attention", "experts", "memory"."""
    return {
        "attention": plan.attention,
        "experts": plan.expert_primaries,
        "memory": plan.memory_primaries,
    }


def packed(plan: Plan, loads: Sequence[Sequence[float]]) -> list[list[int]]:
    """Return the primaries that `replan` gives the same expert slots by load, [moe layers][experts]."""
    slots = plan.expert_primaries
    cost = _costs(plan.experts, slots)
    at = cost.argmin(2)
    return [[slots[i] for i in pack(c, a, np.array(load, float))] for c, a, load in zip(cost, at, loads)]


class _Places:
    """The choices of one `replan`: which slots play a role, then which pieces lie where."""

    def __init__(self, old: Plan, usable: list[int], replication: int, nodes: Mapping[int, str]) -> None:
        self.old, self.usable, self.replication, self.nodes = old, usable, replication, nodes
        self.slots: dict[str, list[int]] = {}
        self.held: dict[str, dict[int, int]] = {
            "attention": dict.fromkeys(old.dense, 1),
            "experts": _tally(old.experts),
            "memory": _tally(old.buckets),
        }

    def choose(self, roles: Roles, *, colocated: bool) -> None:
        """Give slots to roles."""
        wanted = {"attention": roles.attention, "experts": roles.experts, "memory": roles.memory}
        before = role_slots(self.old)
        had = {role: [s for s in before[role] if s in self.usable] for role in wanted}
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
        return tuple(self.slots["attention"] + self._others("attention"))

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
        """Place pieces on the role's slots and their backups."""
        if not old:
            return ()
        own = sorted(self.slots[role])
        cost = _costs(old, own)
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


def _costs(old: Table, slots: Sequence[int]) -> Array:
    """What it costs to make a slot the primary of a piece; int64 [L, P, S]."""
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
    """Add `group` backups to every primary, the first of them on another node where that is possible."""
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
        tuple((primary, *(slots[i] for i in at[layer, piece])) for piece, primary in enumerate(row))
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


def _split_evenly(count: int, slots: Sequence[int]) -> list[int]:
    """Give `count` things to slots in contiguous ranges whose sizes differ by at most one."""
    return [slots[index * len(slots) // count] for index in range(count)]


def _tally(table: Table) -> dict[int, int]:
    """How many pieces of a table each slot holds."""
    found: dict[int, int] = {}
    for row in table:
        for holders in row:
            for slot in holders:
                found[slot] = found.get(slot, 0) + 1
    return found


def _check(key: str, value: int, what: str, limit: int) -> None:
    if not 1 <= value <= limit:
        raise ConfigError(f"{key}={value} does not fit {limit} {what}; give it a value from 1 to {limit}")
