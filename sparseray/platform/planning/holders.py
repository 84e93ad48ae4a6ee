"""Which slots hold which pieces of state, from plan to plan; slots that are gone do not count."""

from collections.abc import Collection

from sparseray.actors.state.assignment import Plan
from sparseray.actors.state.pieces import Piece
from sparseray.platform.planning.moves import holdings


class Holders:
    """Who can give a piece: until a generation has settled, its new holders and those of the one before."""

    def __init__(self) -> None:
        self._slots: dict[Piece, set[int]] = {}

    def settle(self, plan: Plan) -> None:
        """Only those that the plan names hold anything."""
        self._slots = {piece: set(slots) for piece, slots in holdings(plan).items()}

    def gain(self, plan: Plan, *, others_keep: bool) -> None:
        """Those that the plan names hold their pieces now.

        Args:
            plan: that all slots have entered.
            others_keep: whether slots still have what they held before.
        """
        before = self._slots if others_keep else {}
        self._slots = {
            piece: set(slots) | before.get(piece, set()) for piece, slots in holdings(plan).items()
        }

    def forget(self, slots: Collection[int]) -> None:
        """Slots are gone."""
        self._slots = {piece: held - set(slots) for piece, held in self._slots.items()}

    def among(self, members: Collection[int]) -> dict[Piece, set[int]]:
        """Holders of every piece that are members."""
        return {piece: held & set(members) for piece, held in self._slots.items()}

    def is_spare(self, slot: int, members: Collection[int]) -> bool:
        """Whether other members hold everything that a slot holds.

        Args:
            slot: its id.
            members: living slots.
        """
        others = set(members) - {slot}
        return all(held & others for held in list(self._slots.values()) if slot in held)

    def fewest(self, members: Collection[int]) -> int:
        """Holders that the piece with the fewest has."""
        return min((len(held & set(members)) for held in list(self._slots.values())), default=0)
