"""Which holder of a piece is asked, and how long: one that is silent is asked no more while another has the same.

A call in serving changes no state and replicas hold the same bits, so a call that takes much longer than calls took
of late is made again at the next holder (serving/enduring.py), long before the scheduler calls a slot lost. What a
slot says late is dropped, and shows that it is there again.
"""

from collections import deque
from collections.abc import Collection, Sequence

LEAST_S = 0.06
TIMES = 4.0
FIRST_S = 0.25
_REMEMBERED = 64


class Patience:
    """What an engine knows of how its peers answer; it outlives plans.

    Args:
        deadline_s: seconds after which a call has failed, whoever was asked.
    """

    def __init__(self, deadline_s: float = 0.0) -> None:
        self.deadline_s = deadline_s
        self.silent: tuple[int, ...] = ()
        """Slots that did not answer in time, the longest silent first."""
        self._took_s: deque[float] = deque(maxlen=_REMEMBERED)
        self._misses = 0

    @property
    def within_s(self) -> float:
        """Seconds that the next call may take; twice as many after each one that was too few."""
        usual_s = max(self._took_s, default=FIRST_S)
        return min(self.deadline_s, max(LEAST_S, TIMES * usual_s) * 2.0**self._misses)

    def choose(self, holders: Sequence[int]) -> int:
        """The first holder that answers; where none does, the one that has had the longest time to come back."""
        return min(holders, key=lambda slot: self.silent.index(slot) if slot in self.silent else -1)

    def answered(self, slots: Collection[int], seconds: float) -> None:
        """Take note of a call that was answered.

        Args:
            slots: that were asked.
            seconds: that it took.
        """
        self._took_s.append(seconds)
        self._misses = 0
        if self.silent:
            self.silent = tuple(slot for slot in self.silent if slot not in slots)

    def missed(self, slots: Collection[int]) -> None:
        """Take note of slots that did not answer in time."""
        self.silent = (*(slot for slot in self.silent if slot not in slots), *sorted(slots))
        self._misses += 1

    def heard(self, slot: int) -> None:
        """Take note of a late answer."""
        if slot in self.silent:
            self.silent = tuple(other for other in self.silent if other != slot)
