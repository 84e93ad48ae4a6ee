"""Sums over logical parts along one aligned binary tree, whoever computed the leaves.

Floating-point sums depend on their order. Here node (level, i) is always node (level-1, 2i) plus
node (level-1, 2i+1), so one worker or eight give the same bits, in whatever order leaves arrive.
"""

from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class TreeSum(Generic[T]):
    """Collects leaves or inner nodes and combines siblings as soon as both are there.

    Args:
        leaves: number of logical parts.
        combine: (left, right) to their sum; it may reuse `left`'s memory.
    """

    def __init__(self, leaves: int, combine: Callable[[T, T], T]) -> None:
        self._leaves = leaves
        self._combine = combine
        self._nodes: dict[tuple[int, int], T] = {}
        self._depth = max(0, (leaves - 1).bit_length())

    def add(self, level: int, index: int, value: T, keep: Callable[[T], T] | None = None) -> None:
        """Add a leaf (level 0) or a finished subtree.

        Args:
            level: 0 for a leaf; a subtree of level n covers 2^n leaves.
            index: among those of its level.
            value: belongs to the sum from now on.
            keep: where it is only lent, makes what the sum may keep of it; not called for what is added at once.
        """
        while level < self._depth:
            sibling = index ^ 1
            if sibling << level < self._leaves:
                if (level, sibling) not in self._nodes:
                    break
                other = self._nodes.pop((level, sibling))
                if index < sibling:
                    value = self._combine(value if keep is None else keep(value), other)
                else:
                    value = self._combine(other, value)
                keep = None
            level, index = level + 1, index >> 1
        self._nodes[(level, index)] = value if keep is None else keep(value)

    @property
    def root(self) -> T | None:
        """The sum over all parts, or None while some are missing."""
        return self._nodes.get((self._depth, 0))

    def nodes(self) -> list[tuple[int, int, T]]:
        """Return the subtrees that are complete so far, as (level, index, sum)."""
        return [
            (level, index, value) for (level, index), value in sorted(self._nodes.items(), key=lambda n: n[0])
        ]
