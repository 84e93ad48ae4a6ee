"""What runs on a generation of slots, as far as generations must know: training and serving are two of these."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from sparseray.actors.installation import JobSpec, Restore
from sparseray.actors.state.assignment import Plan
from sparseray.actors.state.pieces import Piece
from sparseray.actors.wire.messages import Commit
from sparseray.platform.planning.inventory import Inventory


@dataclass(frozen=True, kw_only=True)
class GivenBack:
    """Where lost pieces come from.

    Args:
        restore: for the slots.
        step: that everything is of then.
        text: for people.
    """

    restore: Restore
    step: int
    text: str


class Workload(Protocol):
    """What a plan message carries besides the plan, and when a generation counts as entered."""

    inventory: Inventory
    """What there is to place."""
    spec: JobSpec
    """What slots build."""
    ingress: str
    """Address that tokens go to; empty where none are made."""
    is_settled_by_commit: bool
    """Whether a generation counts once it has committed a step, otherwise once all slots have installed it."""
    moves_in_stages: bool
    """Whether planned changes that move much state come in several generations."""
    commit: Commit | None
    """The last one, for slots that have not received it."""

    @property
    def weights(self) -> str:
        """Folder that pieces of a generation's step can be read from at any time; empty where there is none."""
        ...

    def renewed(self, restore: Restore, step: int) -> tuple[Restore, int]:
        """Where everything is read, asked again after a generation that was to read it has failed.

        Args:
            restore, step: of that generation.
        """
        ...

    def earlier_in(self, plan: Plan) -> int:
        """Version of a server's weights that requests may be finished with in a plan; -1 for none."""

    def give_back(self, missing: Sequence[Piece], step: int) -> GivenBack:
        """Say where pieces come from that no slot holds any more.

        Args:
            missing: the pieces.
            step: that all others are of.

        Raises:
            StateLostError: nothing can be restored without the user.
        """

    def may_enter(self, old: Plan, new: Plan, left_s: float) -> bool:
        """Whether a plan that was wished for may come now; otherwise it is asked again in a moment.

        Args:
            old, new: the plan in force, and the next one.
            left_s: seconds until slots that leave are gone in any case.
        """

    def entered(self, plan: Plan) -> None:
        """Take note that all slots have a plan's roles and state."""
