"""What a plan that is to come gives a slot, read beside what it does now: others are to ask it once it has everything.

The scheduler asks for it before it sends the plan (platform/planning/gathers.py); the plan then finds it here (roles.py).
"""

from collections.abc import Callable, Collection

from torch import Tensor

from sparseray.actors.installation import Gather, InstallPlan, Reads
from sparseray.actors.serving.staging import Staging
from sparseray.actors.state.holdings import Holdings
from sparseray.actors.state.pieces import Piece


class Gathering:
    """Pieces of one version that are read, or have been."""

    def __init__(self) -> None:
        self._staging = Staging[dict[str, Tensor]]()
        self._last: Gather | None = None

    def start(self, message: Gather, holdings: Holdings, read: Reads, tell: Callable[[str], None]) -> None:
        """Read pieces in a thread.

        Args:
            message: names them, and where they are.
            holdings: that they are for.
            read: reads tensors.
            tell: called once they are here, or with what went wrong.
        """
        if message != self._last:
            # What was read for a plan that will not come is nobody's.
            self._staging, self._last = Staging(), message
        names = holdings.names(message.pieces, with_optimizer=False)
        self._staging.start(message, lambda: read(message.weights, names), tell)

    def give(self, holdings: Holdings, pieces: Collection[Piece], plan: InstallPlan) -> None:
        """Let a plan have what was read for it.

        Args:
            holdings: that take it over.
            pieces: that the plan gives the slot.
            plan: names the version.
        """
        message, staging = self._last, self._staging
        self._last, self._staging = None, Staging()
        if message is None or (message.step, message.weights) != (plan.step, plan.weights):
            return
        lacking = set(message.pieces) & set(pieces) - holdings.held
        if lacking and (tensors := staging.take(message)) is not None:
            holdings.load(sorted(lacking), tensors, plan.step, with_optimizer=False)
