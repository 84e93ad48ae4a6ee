"""What all slots of a generation run at the same time, round by round; an exchange in step needs all of them to agree."""

from collections.abc import Sequence
from dataclasses import dataclass, field

Round = dict[int, int]
"""Which part each slot runs; slots that run none are left out."""


def rounds_of(parts: Sequence[tuple[int, int]]) -> list[Round]:
    """What runs at the same time: the first part of every slot, the second of every slot, and so on; slots rise in each.

    Args:
        parts: (part, slot), in the order in which each slot runs its own.
    """
    found: list[Round] = []
    counts: dict[int, int] = {}
    for part, slot in parts:
        index = counts.get(slot, 0)
        counts[slot] = index + 1
        if index == len(found):
            found.append({})
        found[index][slot] = part
    return [dict(sorted(running.items())) for running in found]


@dataclass
class Turn:
    """What is being run.

    Args:
        rounds: all of them.
        trains: whether there are backward passes.
        index: of the round at hand.
        passed: layers whose forward pass has run in it.
    """

    rounds: list[Round] = field(default_factory=list)
    trains: bool = True
    index: int = 0
    passed: set[int] = field(default_factory=set)
