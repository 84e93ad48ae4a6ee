"""Training as a workload: what its slots are told, and where state comes from that all of them have lost."""

from collections.abc import Sequence
from pathlib import Path

from sparseray.actors.installation import JobSpec, Restore
from sparseray.actors.state.assignment import Plan
from sparseray.actors.state.pieces import Piece
from sparseray.actors.wire.messages import Commit
from sparseray.errors import StateLostError
from sparseray.platform.config import RunConfig
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
    """

    ingress = ""
    is_settled_by_commit = True
    weights = ""

    def __init__(self, config: RunConfig, spec: JobSpec, folder: RunFolder, journal: Journal) -> None:
        self.replication, self.spec = config.cluster.replication, spec
        self.folder, self.journal = folder, journal
        self.inventory, self.origin = training_inventory(config), folder.origin()
        self.commit: Commit | None = None

    @property
    def begin(self) -> int:
        """Step that the run goes on from, before it has a checkpoint of its own."""
        return self.origin.begin if self.origin is not None else 0

    def give_back(self, missing: Sequence[Piece], step: int) -> GivenBack:
        """Go back to the newest checkpoint, or stop where replicas should have saved that.

        Args:
            missing: pieces that nobody holds any more.
            step: the last committed one.

        Raises:
            StateLostError: all replicas are gone.
        """
        newest = self.folder.newest_checkpoint()
        back = checkpoint.read_manifest(newest)["step"] if newest else self.begin
        what = describe_pieces(missing)
        begun = self.origin.checkpoint if self.origin else "its seed"
        where = str(newest) if newest else f"{begun} (no checkpoint was written yet)"
        if self.replication > 1:
            raise StateLostError(
                f"all {self.replication} replicas of {what} are gone after step {step}; the same "
                f"command resumes from {where}, {step - back} steps back"
            )
        self.folder.rewind(back)
        self.journal.append("restore", generation=0, step=back, checkpoint=str(newest or ""))
        self.commit = None
        return GivenBack(
            restore=from_newest(newest, self.origin),
            step=back,
            text=f"{what} had one holder: going back {step - back} steps to {where}",
        )

    def renewed(self, restore: Restore, step: int) -> tuple[Restore, int]:
        """The same: a checkpoint stays.

        Args:
            restore, step: of the generation that failed.
        """
        return restore, step

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
        """Nobody else need know."""
