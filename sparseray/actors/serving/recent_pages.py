"""`RecentPages`: which pages have a page in the pools that keep the newest tokens of a sequence alone; host memory only.

Part of `CachePool`, whose pages they belong to: a page that several requests share has one recent page, which each of
them holds as long as its next rows may read it. What was given back stays with its page until it is needed for another,
so that a later request can go on from there; first goes what nobody can find again, then the midst of prompts, last
their ends (`CachePool.trim`), of each the longest unused first. Page 0 belongs to nobody.
"""

from __future__ import annotations

LOST, MIDST, END = range(3)
"""How much a recent page is worth that nobody holds: nothing, as others in a prompt, as the last of one."""


class RecentPages:
    """Gives out recent pages; there are enough for all requests together (`CacheSizes`).

    Args:
        num_pages: recent ones, with page 0.
        of_pages: pages that may have one.
    """

    def __init__(self, num_pages: int, of_pages: int) -> None:
        self._of, self._owner = [0] * of_pages, [0] * num_pages
        self._holders = [0] * num_pages
        self._free: tuple[dict[int, None], ...] = (dict.fromkeys(range(1, num_pages)), {}, {})
        self._moved: dict[int, int] = {}

    @property
    def num_held(self) -> int:
        """Recent pages that requests hold."""
        return sum(1 for count in self._holders if count)

    def has(self, page: int) -> bool:
        """Whether a page's tokens are still there."""
        return self._of[page] > 0

    def hold(self, page: int) -> None:
        """Keep a page's recent page for a request; it gets one if it has none."""
        found = self._of[page]
        if not found:
            found = self._take()
            self._of[page], self._owner[found] = found, page
            self._moved[page] = found
        for group in self._free:
            group.pop(found, None)
        self._holders[found] += 1

    def _take(self) -> int:
        group = next(group for group in self._free if group)
        found = next(iter(group))
        del group[found]
        self._of[self._owner[found]] = 0
        return found

    def give_back(self, page: int, worth: int) -> None:
        """A request needs a page's recent page no more.

        Args:
            page: that it held.
            worth: to others, if nobody else holds it.
        """
        found = self._of[page]
        self._holders[found] -= 1
        if not self._holders[found]:
            self._free[worth][found] = None
            if worth == LOST:
                self._of[page] = self._owner[found] = 0

    def drop(self, page: int) -> None:
        """What a page held is gone, and nobody holds it."""
        found = self._of[page]
        if found:
            self._of[page] = self._owner[found] = 0
            for group in self._free:
                group.pop(found, None)
            self._free[LOST][found] = None

    def take_moved(self) -> dict[int, int]:
        """The recent page of every page that has got one since the last call."""
        moved, self._moved = self._moved, {}
        return moved
