"""Pure functions that place roles on slots; no Ray, no time, no randomness.

Disaggregated: every role has slots of its own. Colocated: the roles share slots, and a call
from a slot to itself is a function call (actors/slot.py). Backups go to slots of the same
role where there are enough of them, else to any other slot. A new plan keeps what it can of the
old one: platform/planning/placement.py chooses, by the search of platform/planning/balance.py; what then travels says
platform/planning/moves.py.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sparseray.actors.state.assignment import Plan
from sparseray.actors.state.pieces import Piece
from sparseray.errors import ConfigError
from sparseray.platform.planning.balance import pack
from sparseray.platform.planning.moves import Moves, holdings, least_bytes, moves, piece_bytes
from sparseray.platform.planning.placement import NO_NODES, Placement, costs, role_slots, split_evenly
from sparseray.platform.planning.spread import slot_loads, spread_hot

__all__ = [
    "Moves",
    "Piece",
    "Roles",
    "fitting",
    "holdings",
    "least_bytes",
    "loads_when_packed",
    "make_plan",
    "moves",
    "num_slots",
    "piece_bytes",
    "replan",
    "role_slots",
]

NOBODY = -1


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
            a layer have equal loads, and what is left too hot is computed by several of its holders
            (spread.py). None: equal numbers of experts.

    Raises:
        ConfigError: no slot is left.
    """
    usable = sorted(set(addresses) - set(avoid))
    if not usable:
        raise ConfigError(f"no slot is left for generation {generation}; start one")
    places = Placement(old, usable, min(max(1, replication), len(usable)), nodes)
    wanted = fitting(old, roles)
    places.choose(
        {"attention": wanted.attention, "experts": wanted.experts, "memory": wanted.memory},
        colocated=colocated,
    )
    attention = places.slots["attention"]
    experts = places.table("experts", old.experts, loads)
    spread: tuple[tuple[int, ...], ...] = ()
    if loads is not None:
        own = sorted(places.slots["experts"])
        experts, spread = spread_hot(experts, own, loads, len(old.shard_owners))
    return Plan(
        generation=generation,
        addresses=dict(addresses),
        shard_owners=tuple(split_evenly(len(old.shard_owners), attention)),
        dense=places.dense(),
        experts=experts,
        buckets=places.table("memory", old.buckets, None),
        spread=spread,
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


def loads_when_packed(plan: Plan, loads: Sequence[Sequence[float]]) -> list[dict[int, float]]:
    """Load of every expert slot in each layer as `replan` would leave it on the same slots by load."""
    slots = plan.expert_primaries
    cost = costs(plan.experts, slots)
    found = []
    for c, a, load in zip(cost, cost.argmin(2), loads):
        at = [(slots[i],) for i in pack(c, a, np.array(load, float))]
        (holders,), (spread,) = spread_hot((tuple(at),), slots, [load], len(plan.shard_owners))
        found.append(dict.fromkeys(slots, 0.0) | slot_loads(holders, spread, load))
    return found


def _check(key: str, value: int, what: str, limit: int) -> None:
    if not 1 <= value <= limit:
        raise ConfigError(f"{key}={value} does not fit {limit} {what}; give it a value from 1 to {limit}")
