"""The plan after a loss in which nothing moves: those who are left go on at once with what they have.

Where pieces take seconds to read, as experts do that lie on devices, or are many, what is lacking comes by later, planned changes
(gathers.py, stages.py). Pure.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Protocol

from sparseray.actors.state.assignment import Plan
from sparseray.platform.planning.inventory import Inventory

Table = tuple[tuple[tuple[int, ...], ...], ...]


class Member(Protocol):
    """A living slot."""

    @property
    def address(self) -> str: ...


def after_loss(
    old: Plan | None, members: Mapping[int, Member], inventory: Inventory, generation: int
) -> Plan | None:
    """The old plan without the slots that are gone; None where something has no holder left, or nothing is slow to read.

    Args:
        old: the plan so far.
        members: slots that are left.
        inventory: what there is to place.
        generation: number of the new plan.
    """
    if old is None or not inventory.in_slabs:
        return None
    attention = [slot for slot in old.attention if slot in members]
    addresses = {slot: member.address for slot, member in members.items()}
    return left_of(old, addresses, attention, generation) if attention else None


def left_of(old: Plan, addresses: dict[int, str], part_owners: Sequence[int], generation: int) -> Plan | None:
    """The old plan without the slots that are gone; None where something has no holder left.

    Args:
        old: the plan so far.
        addresses: of the slots that are left.
        part_owners: of the new plan.
        generation: its number.
    """
    dense = tuple(slot for slot in old.dense if slot in addresses)
    tables = [_of_the_living(table, addresses) for table in (old.experts, old.buckets)]
    if not dense or not all(holders for table in tables for row in table for holders in row):
        return None
    return replace(
        old,
        generation=generation,
        addresses=dict(addresses),
        part_owners=tuple(part_owners),
        dense=dense,
        experts=tables[0],
        buckets=tables[1],
        spread=(),
    )


def _of_the_living(table: Table, living: dict[int, str]) -> Table:
    """Holders that are left; where the primary is gone, the one of them with the fewest pieces of the row."""
    found = []
    for row in table:
        left = [tuple(slot for slot in holders if slot in living) for holders in row]
        kept = [holders[0] in living for holders in row]
        counts = dict.fromkeys(living, 0)
        for holders in (h for h, stays in zip(left, kept) if stays):
            counts[holders[0]] += 1
        for index, holders in enumerate(left):
            if holders and not kept[index]:
                first = min(holders, key=lambda slot: (counts[slot], slot))
                counts[first] += 1
                left[index] = (first, *(slot for slot in holders if slot != first))
        found.append(tuple(left))
    return tuple(found)
