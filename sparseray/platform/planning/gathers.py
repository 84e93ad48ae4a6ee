"""What slots read before a plan gives it to them: until they have, those answer who have it. Pure; times are passed in.

Asked by serving.py before it lets a plan come. A slot that cannot read says so all the same and gets what it lacks with
the plan, as one does that takes too long.
"""

from collections.abc import Mapping, Sequence

from sparseray.actors.state.pieces import Piece

AGAIN_S, LIMIT_S = 0.5, 60.0


class Gathers:
    """Which slots read what."""

    def __init__(self) -> None:
        self.wanted: dict[int, tuple[Piece, ...]] = {}
        self._waiting: set[int] = set()
        self._began_s = self._asked_s = 0.0

    def begin(self, wanted: Mapping[int, Sequence[Piece]], now: float) -> None:
        """Want slots to read pieces, and only these; what was wanted before goes on.

        Args:
            wanted: pieces by slot.
            now: in seconds.
        """
        found = {slot: tuple(pieces) for slot, pieces in wanted.items() if pieces}
        if found != self.wanted:
            self.wanted, self._waiting = found, set(found)
            self._began_s, self._asked_s = now, float("-inf")

    def due(self, now: float) -> dict[int, tuple[Piece, ...]]:
        """Slots that are to be told now, or once more, and what."""
        if now - self._asked_s < AGAIN_S:
            return {}
        self._asked_s = now
        return {slot: self.wanted[slot] for slot in sorted(self._waiting)}

    def told(self, slot: int, pieces: Sequence[Piece]) -> None:
        """Take note that a slot has what it was told to read.

        Args:
            slot: its id.
            pieces: that it was told.
        """
        if self.wanted.get(slot) == tuple(pieces):
            self._waiting.discard(slot)

    def is_over(self, now: float) -> bool:
        """Whether all have read, or had their time."""
        return not self._waiting or now - self._began_s >= LIMIT_S
