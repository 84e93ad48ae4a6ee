"""Pure functions that place roles on slots; no Ray, no time, no randomness.

Disaggregated: every role has slots of its own. Colocated: the roles share slots, and a call
from a slot to itself is a function call (actors/slot.py). Backups go to slots of the same
role where there are enough of them, else to any other slot.
"""

from collections.abc import Sequence

from sparseray.actors.assignment import Plan
from sparseray.errors import ConfigError


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
) -> Plan:
    """Place the roles on slots 0, 1, ... in the order attention, experts, memory.

    Args:
        generation: number of the plan.
        addresses: slot id to transport address, one per slot.
        attention, experts, memory: slots that play each role.
        replication: holders of every piece of state.
        num_shards: logical shards of a step.
        moe_layers, num_experts, dse_layers, num_buckets: what there is to place.
        colocated: roles share slots.

    Raises:
        ConfigError: the numbers do not fit each other.
    """
    _check("cluster.attention_workers", attention, "logical shards (train.logical_shards)", num_shards)
    if moe_layers:
        _check("cluster.expert_shards", experts, "experts (model.moe.num_experts)", num_experts)
    if dse_layers:
        _check("cluster.memory_shards", memory, "buckets (model.dse.num_buckets)", num_buckets)
    slots = sorted(addresses)
    if replication < 1 or replication > len(slots):
        raise ConfigError(
            f"cluster.replication={replication} needs as many slots, and this placement has {len(slots)}; "
            f"give it a value from 1 to {len(slots)} or add actors"
        )
    first_expert, first_memory = (0, 0) if colocated else (attention, attention + experts)
    attention_slots = slots[:attention]
    expert_slots = slots[first_expert : first_expert + experts]
    memory_slots = slots[first_memory : first_memory + memory]
    return Plan(
        generation=generation,
        addresses=dict(addresses),
        shard_owners=tuple(split_evenly(num_shards, attention_slots)),
        dense=tuple(attention_slots + _others(attention_slots, slots, replication - attention)),
        experts=tuple(
            tuple(
                with_backups(slot, expert_slots, slots, replication)
                for slot in split_evenly(num_experts, expert_slots)
            )
            for _ in range(moe_layers)
        ),
        buckets=tuple(
            tuple(
                with_backups(slot, memory_slots, slots, replication)
                for slot in split_evenly(num_buckets, memory_slots)
            )
            for _ in range(dse_layers)
        ),
    )


def split_evenly(count: int, slots: Sequence[int]) -> list[int]:
    """Give `count` things to slots in contiguous ranges whose sizes differ by at most one."""
    return [slots[index * len(slots) // count] for index in range(count)]


def with_backups(
    primary: int, peers: Sequence[int], slots: Sequence[int], replication: int
) -> tuple[int, ...]:
    """Return the primary and its backups: the next peers in a ring, then any other slots."""
    start = peers.index(primary)
    ring = [*peers[start:], *peers[:start]]
    return tuple((ring + _others(ring, slots, replication))[:replication])


def _others(taken: Sequence[int], slots: Sequence[int], count: int) -> list[int]:
    return [slot for slot in reversed(slots) if slot not in taken][: max(0, count)]


def _check(key: str, value: int, what: str, limit: int) -> None:
    if not 1 <= value <= limit:
        raise ConfigError(f"{key}={value} does not fit {limit} {what}; give it a value from 1 to {limit}")
