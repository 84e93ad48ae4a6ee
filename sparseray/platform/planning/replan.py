"""Pure functions that place roles on slots; no Ray, no time, no randomness.

Disaggregated: every role has slots of its own. Colocated: the roles share slots, and a call
from a slot to itself is a function call (actors/slot.py). Backups go to slots of the same
role where there are enough of them, else to any other slot. A new plan keeps what it can of the
old one: platform/planning/placement.py chooses, by the search of platform/planning/balance.py; what then travels says
platform/planning/moves.py.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict

import numpy as np

from sparseray.actors.state.assignment import Plan
from sparseray.actors.state.pieces import Piece
from sparseray.errors import ConfigError
from sparseray.platform.planning.balance import pack
from sparseray.platform.planning.inventory import Inventory, Roles
from sparseray.platform.planning.moves import Moves, holdings, least_bytes, moves, piece_bytes
from sparseray.platform.planning.placement import NO_NODES, Placement, costs, role_slots, split_evenly
from sparseray.platform.planning.spread import slot_loads, spread_hot

__all__ = [
    "Moves",
    "Piece",
    "fitting",
    "holdings",
    "least_bytes",
    "loads_when_packed",
    "make_plan",
    "moves",
    "piece_bytes",
    "replan",
    "role_slots",
]

NOBODY = -1


def make_plan(
    *,
    generation: int,
    addresses: dict[int, str],
    inventory: Inventory,
    roles: Roles,
    replication: int,
    colocated: bool = False,
    nodes: Mapping[int, str] = NO_NODES,
) -> Plan:
    """Place the roles on slots 0, 1, ... in the order attention, experts, memory; `replan` from nothing.

    Args:
        generation: number of the plan.
        addresses: slot id to transport address, one per slot.
        inventory: what there is to place.
        roles: slots that play each role.
        replication: holders of every piece of state.
        colocated: roles share slots.
        nodes: slot id to the name of its node, where known.

    Raises:
        ConfigError: the numbers do not fit each other.
    """
    inventory.check(roles)
    if replication < 1 or replication > len(addresses):
        raise ConfigError(
            f"cluster.replication={replication} needs as many slots, and this placement has {len(addresses)}; "
            f"give it a value from 1 to {len(addresses)} or add actors"
        )
    nothing = Plan(
        generation=generation - 1,
        addresses={},
        part_owners=(NOBODY,) * inventory.parts_for(roles),
        dense=(),
        experts=(((NOBODY,),) * inventory.experts,) * inventory.moe_layers,
        buckets=(((NOBODY,),) * inventory.buckets,) * inventory.dse_layers,
    )
    return replan(
        nothing,
        generation=generation,
        addresses=addresses,
        roles=roles,
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
    parts: int | None = None,
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
            a layer have equal loads, and what is left too hot is computed by several of its holders
            (spread.py). None: equal numbers of experts.
        parts: what attention workers share from now on. None: as many as in the old plan.

    Raises:
        ConfigError: no slot is left.
    """
    usable = sorted(set(addresses) - set(avoid))
    if not usable:
        raise ConfigError(f"no slot is left for generation {generation}; start one")
    places = Placement(old, usable, min(max(1, replication), len(usable)), nodes)
    parts = parts or len(old.part_owners)
    places.choose(asdict(fitting(old, roles, parts)), colocated=colocated)
    attention = places.slots["attention"]
    experts = places.table("experts", old.experts, loads)
    spread: tuple[tuple[int, ...], ...] = ()
    if loads is not None:
        own = sorted(places.slots["experts"])
        experts, spread = spread_hot(experts, own, loads, parts)
    return Plan(
        generation=generation,
        addresses=dict(addresses),
        part_owners=tuple(split_evenly(parts, attention)),
        dense=places.dense(),
        experts=experts,
        buckets=places.table("memory", old.buckets, None),
        spread=spread,
    )


def fitting(plan: Plan, roles: Roles, parts: int | None = None) -> Roles:
    """Return the roles that a plan can use: at least one slot where there is work, at most one a thing.

    Args:
        plan: what there is to place.
        roles: wanted slots of each role.
        parts: what attention workers share; None for the plan's.
    """

    def limit(value: int, things: int) -> int:
        return min(max(1, value), things)

    return Roles(
        attention=limit(roles.attention, parts or len(plan.part_owners)),
        experts=limit(roles.experts, len(plan.experts[0]) if plan.experts else 0),
        memory=limit(roles.memory, len(plan.buckets[0]) if plan.buckets else 0),
    )


def loads_when_packed(plan: Plan, loads: Sequence[Sequence[float]]) -> list[dict[int, float]]:
    """Load of every expert slot in each layer as `replan` would leave it on the same slots by load.

    Args:
        plan: whose expert slots they are.
        loads: tokens of every expert, [moe layers][experts].
    """
    slots = plan.expert_primaries
    cost = costs(plan.experts, slots)
    found = []
    for c, a, load in zip(cost, cost.argmin(2), loads):
        at = [(slots[i],) for i in pack(c, a, np.array(load, float))]
        (holders,), (spread,) = spread_hot((tuple(at),), slots, [load], len(plan.part_owners))
        found.append(dict.fromkeys(slots, 0.0) | slot_loads(holders, spread, load))
    return found
