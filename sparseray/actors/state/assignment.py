"""Who holds what in one generation: the immutable value that the scheduler decides and every slot obeys.

`platform/planning/replan.py` makes it from resources and loads; slots only read it.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from sparseray.actors.state.pieces import DENSE, Piece

MOST_IN_ROUNDS = 4
"""Slots of a server that may share experts on devices: regions lie where they do, however many there are."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Placement of one generation. A tuple of holders names the primary first, then its backups.

    Args:
        generation: rises by one with every change.
        addresses: slot id to transport address.
        part_owners: attention worker (slot id) of every part of the global batch, [L].
        dense: holders of the dense weights: all attention workers and, if those are fewer than
            the replication asks for, backups; the first one reduces the gradients.
        experts: holders of every expert, [moe layers][experts].
        buckets: holders of every memory bucket, [dse layers][buckets].
        spread: how many of an expert's holders compute it, the first ones, [moe layers][experts]; part p
            goes to holder p mod spread. Empty: one each.
    """

    generation: int
    addresses: dict[int, str]
    part_owners: tuple[int, ...]
    dense: tuple[int, ...]
    experts: tuple[tuple[tuple[int, ...], ...], ...]
    buckets: tuple[tuple[tuple[int, ...], ...], ...]
    spread: tuple[tuple[int, ...], ...] = ()

    def computing(self, layer: int, expert: int) -> tuple[int, ...]:
        """Slots that compute an expert, its primary first.

        Args:
            layer: index among the MoE layers.
            expert: of that layer.
        """
        holders = self.experts[layer][expert]
        return holders[: self.spread[layer][expert] if self.spread else 1]

    def computes(self, slot: int) -> list[tuple[int, int]]:
        """(moe layer, expert) pairs that the slot computes for some part."""
        return [key for key in self.experts_of(slot) if slot in self.computing(*key)]

    @property
    def attention(self) -> tuple[int, ...]:
        """Slots that run parts, in order of their first one."""
        return tuple(dict.fromkeys(self.part_owners))

    @property
    def expert_primaries(self) -> tuple[int, ...]:
        """Slots that compute experts, in ascending order; all of them are some expert's primary."""
        return _slots(holders[0] for layer in self.experts for holders in layer)

    @property
    def memory_primaries(self) -> tuple[int, ...]:
        """Slots that answer for memory rows, in ascending order."""
        return _slots(holders[0] for layer in self.buckets for holders in layer)

    @property
    def expert_holders(self) -> tuple[int, ...]:
        """Slots that hold any expert, primary or backup."""
        return _slots(slot for layer in self.experts for holders in layer for slot in holders)

    @property
    def memory_holders(self) -> tuple[int, ...]:
        """Slots that hold any bucket, primary or backup."""
        return _slots(slot for layer in self.buckets for holders in layer for slot in holders)

    @property
    def peers(self) -> tuple[int, ...]:
        """Slots that compute or hold what is computed with, in ascending order: all but those with tables alone."""
        return _slots([*self.part_owners, *self.dense, *self.expert_holders])

    @property
    def holders(self) -> set[int]:
        """Slots that hold or run anything."""
        return {*self.part_owners, *self.dense, *self.expert_holders, *self.memory_holders}

    def parts_of(self, slot: int) -> list[int]:
        """Parts that an attention worker runs, ascending."""
        return [part for part, owner in enumerate(self.part_owners) if owner == slot]

    def experts_of(self, slot: int) -> list[tuple[int, int]]:
        """(moe layer, expert) pairs of which the slot holds a replica."""
        return [
            (layer, expert)
            for layer, row in enumerate(self.experts)
            for expert, holders in enumerate(row)
            if slot in holders
        ]

    def buckets_of(self, slot: int) -> list[tuple[int, int]]:
        """(dse layer, bucket) pairs of which the slot holds a replica."""
        return [
            (layer, bucket)
            for layer, row in enumerate(self.buckets)
            for bucket, holders in enumerate(row)
            if slot in holders
        ]

    def pieces_of(self, slot: int) -> list[Piece]:
        """All pieces of which the slot holds a replica."""
        dense: list[Piece] = [DENSE] if slot in self.dense else []
        experts: list[Piece] = [("expert", *key) for key in self.experts_of(slot)]
        return dense + experts + [("bucket", *key) for key in self.buckets_of(slot)]

    def primary_of(self, slot: int) -> dict[str, list[Piece]]:
        """The pieces whose primary is the slot, by the kind of file that they are saved in."""
        return {
            "dense": [DENSE] if self.dense[0] == slot else [],
            "experts": [("expert", *k) for k in self.experts_of(slot) if self.experts[k[0]][k[1]][0] == slot],
            "memory": [("bucket", *k) for k in self.buckets_of(slot) if self.buckets[k[0]][k[1]][0] == slot],
        }

    def roles_of(self, slot: int) -> list[str]:
        """Names of the roles that a slot plays, for people to read."""
        roles = []
        if slot in self.part_owners:
            roles.append("attention")
        if slot in self.expert_primaries:
            roles.append("expert")
        if slot in self.memory_primaries:
            roles.append("memory")
        is_backup = slot in self.dense or slot in self.expert_holders or slot in self.memory_holders
        return roles or (["backup"] if is_backup else ["standby"])


def _slots(slots: Iterable[int]) -> tuple[int, ...]:
    return tuple(sorted(set(slots)))
