"""The table of pointers that a generation is: whose buffer lies where."""

from collections.abc import Sequence
from dataclasses import dataclass

from sparseray.actors.peers.regions import Regions


@dataclass(frozen=True, kw_only=True)
class Table:
    """The slots of a generation, and their memory.

    Args:
        slots: all that hold or run anything, rising; a slot's rank is its place among them.
        regions: by slot, one's own too.
    """

    slots: tuple[int, ...]
    regions: dict[int, Regions]

    def rank(self, slot: int) -> int:
        """Place of a slot among all."""
        return self.slots.index(slot)

    def ranks(self, slots: Sequence[int]) -> list[int]:
        """Places of some slots."""
        return [self.slots.index(slot) for slot in slots]
