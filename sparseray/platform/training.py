"""Training as a workload: what its slots are told, and where state comes from that all of them have lost."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from sparseray.actors.installation import JobSpec, Restore
from sparseray.actors.state.assignment import Plan
from sparseray.actors.state.pieces import Piece
from sparseray.actors.wire.messages import Commit
from sparseray.errors import StateLostError
from sparseray.platform.config import RunConfig
from sparseray.platform.device import is_whole
from sparseray.platform.fleet.weights_port import is_offered
from sparseray.platform.offers import OFFER_S, Offers, Weights
from sparseray.platform.opening import training_inventory
from sparseray.platform.run import checkpoint
from sparseray.platform.run.events import describe_pieces
from sparseray.platform.run.folder import Origin, RunFolder
from sparseray.platform.run.journal import Journal
from sparseray.platform.workload import GivenBack


def from_newest(newest: Path | None, origin: Origin | None) -> Restore:
    """Where a run's state comes from.

    Args:
        newest: its newest checkpoint; None where it has none yet.
        origin: what it began with; None for the seed.
    """
    if newest is not None:
        return Restore(checkpoint=str(newest))
    if origin is None:
        return Restore(checkpoint="")
    return Restore(checkpoint=origin.checkpoint, weights_only=not origin.begin)


class Training:
    """`Workload` whose generations count once they have committed a step.

    Args:
        config: the run.
        spec: what slots build.
        folder: whose newest checkpoint a run without replicas goes back to.
        journal: where that is written before it is done.
        offers: of a server that follows the run on the same platform; None where there is none.
    """

    ingress = ""
    is_settled_by_commit = True
    weights = ""

    def __init__(
        self,
        config: RunConfig,
        spec: JobSpec,
        folder: RunFolder,
        journal: Journal,
        offers: Callable[[], Offers | None],
    ) -> None:
        self.restores_from_engines, self.offers = config.train.restore_from == "engines", offers
        self._given: Offers | None = None
        # Slots that compute in step lay their memory open to each other anew in each generation, and begin checkpoints again.
        self.moves_in_stages = not is_whole(config)
        self.replication, self.spec = config.cluster.replication, spec
        self.folder, self.journal = folder, journal
        self.inventory, self.origin = training_inventory(config), folder.origin()
        self.commit: Commit | None = None

    @property
    def begin(self) -> int:
        """Step that the run goes on from, before it has a checkpoint of its own."""
        return self.origin.begin if self.origin is not None else 0

    def give_back(self, missing: Sequence[Piece], step: int) -> GivenBack:
        """Go back to the newest checkpoint or to what engines have, or stop where replicas should have saved that.

        Args:
            missing: pieces that nobody holds any more.
            step: the last committed one.

        Raises:
            StateLostError: all replicas are gone.
        """
        found, what = self.newest(), describe_pieces(missing)
        if self.replication > 1 and not is_offered(found.restore.checkpoint):
            raise StateLostError(
                f"all {self.replication} replicas of {what} are gone after step {step}; the same "
                f"command resumes from {found.text}, {step - found.step} steps back"
            )
        self._go_back(found)
        return replace(
            found, text=f"{what} had no holder left: going back {step - found.step} steps to {found.text}"
        )

    def newest(self) -> GivenBack:
        """The latest step that all state can be had of, and where from; the text names that."""
        newest = self.folder.newest_checkpoint()
        back = checkpoint.read_manifest(newest)["step"] if newest else self.begin
        if self.restores_from_engines and (weights := self._of_engines(back + 1)) is not None:
            return GivenBack(
                restore=Restore(checkpoint=weights.source, weights_only=True),
                step=weights.step,
                text="the weights of engines that serve it, with moments of zero: bits differ from here on",
            )
        begun = self.origin.checkpoint if self.origin else "its seed"
        text = str(newest) if newest else f"{begun} (no checkpoint was written yet)"
        return GivenBack(restore=from_newest(newest, self.origin), step=back, text=text)

    def _of_engines(self, least: int) -> Weights | None:
        offers = self.offers()
        if offers is None or offers.newest < least:
            return None
        self._given = offers
        return offers.wait(self.folder.path.name, least, OFFER_S, lambda: self.offers() is not offers)

    def _go_back(self, found: GivenBack) -> None:
        self.folder.rewind(found.step)
        source = found.restore.checkpoint
        self.journal.append("restore", generation=0, step=found.step, checkpoint=source)
        self.commit = None

    def renewed(self, restore: Restore, step: int) -> tuple[Restore, int]:
        """The same, as a checkpoint stays; what engines offered may be gone since.

        Args:
            restore, step: of the generation that failed.
        """
        if not is_offered(restore.checkpoint):
            return restore, step
        found = self.newest()
        self._go_back(found)
        return found.restore, found.step

    def earlier_in(self, plan: Plan) -> int:
        """None: a step leaves nothing of the one before."""
        return -1

    def may_enter(self, old: Plan, new: Plan, left_s: float) -> bool:
        """Always: it is between two steps.

        Args:
            old, new, left_s: plans, and time.
        """
        return True

    def entered(self, plan: Plan) -> None:
        """Let go of what engines gave; all slots have read it."""
        if self._given is not None:
            self._given.release(self.folder.path.name)
            self._given = None
