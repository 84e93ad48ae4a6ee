"""Which engines answer: pings that are due, and who has been silent for too long after one. Pure; times are passed in.

An engine's control thread answers a ping whatever its work thread computes, so silence means that its process stands
still or cannot be reached. Silence while this process stood still itself says nothing.
"""

from collections.abc import Collection

PING_S = 0.25
SILENT_S = 1.0
STALL_S = 0.3


class SignsOfLife:
    """What is known of the engines; a new one counts as silent until it has answered."""

    def __init__(self) -> None:
        self.silent: set[int] = set()
        self._heard_s: dict[int, float] = {}
        self._asked_s: dict[int, float] = {}
        self._pinged_s: dict[int, float] = {}
        self._looked_s = 0.0

    def heard(self, slot: int, now: float) -> None:
        """Take note of a word from a slot."""
        self._heard_s[slot] = now
        self._asked_s.pop(slot, None)
        self.silent.discard(slot)

    def look(self, engines: Collection[int], now: float) -> list[int]:
        """Find out who is silent, and return who is to be pinged.

        Args:
            engines: that there are now; others are forgotten.
            now: in seconds.
        """
        if now - self._looked_s > STALL_S:
            self._asked_s = dict.fromkeys(self._asked_s, now)
        self._looked_s = now
        for slot in set(self._pinged_s) - set(engines):
            for times in (self._heard_s, self._asked_s, self._pinged_s):
                times.pop(slot, None)
        self.silent &= set(engines)
        due = []
        for slot in engines:
            if slot not in self._pinged_s:
                self.silent.add(slot)
            if now - self._asked_s.get(slot, now) > SILENT_S:
                self.silent.add(slot)
            last_s = max(self._heard_s.get(slot, 0.0), self._pinged_s.get(slot, 0.0))
            if slot not in self._pinged_s or now - last_s > PING_S:
                due.append(slot)
                self._pinged_s[slot] = now
                self._asked_s.setdefault(slot, now)
        return due
