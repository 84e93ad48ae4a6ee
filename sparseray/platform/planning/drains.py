"""The end of engines that are planned to go: they finish what they have, within a limit. Pure; times are passed in.

Asked by serving.py before it lets a plan with fewer engines come; an ingress sends those that drain nothing new.
"""

from collections.abc import Collection

ASK_S = 0.05


class Drains:
    """Which engines are leaving, and what they have still to do.

    Args:
        limit_s: seconds that they get.
    """

    def __init__(self, limit_s: float) -> None:
        self.limit_s = limit_s
        self.leaving: tuple[int, ...] = ()
        self._left: dict[int, int] = {}
        self._began_s = self._asked_s = 0.0

    def begin(self, leaving: Collection[int], now: float) -> bool:
        """Want engines to leave, and only these; returns whether others did before.

        Args:
            leaving: slots.
            now: in seconds.
        """
        wanted = tuple(sorted(leaving))
        if wanted == self.leaving:
            return False
        self.leaving, self._left, self._began_s, self._asked_s = wanted, {}, now, 0.0
        return True

    def is_due(self, now: float) -> bool:
        """Whether they are to be asked again how much they have."""
        if now - self._asked_s < ASK_S:
            return False
        self._asked_s = now
        return True

    def told(self, slot: int, num_requests: int) -> None:
        """Take note of what an engine has.

        Args:
            slot: its id.
            num_requests: that it has not finished.
        """
        self._left[slot] = num_requests

    def is_over(self, now: float) -> bool:
        """Whether all have finished, or had their time."""
        return now - self._began_s >= self.limit_s or all(self._left.get(slot) == 0 for slot in self.leaving)
