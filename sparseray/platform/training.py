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
from sparseray.platform.run.folder import RunFolder
from sparseray.platform.run.journal import Journal
from sparseray.platform.workload import GivenBack


def from_newest(newest: Path | None, init_from: str) -> Restore:
    """Where a run's state comes from.

    Args:
        newest: its newest checkpoint; None where it has none yet.
        init_from: checkpoint whose weights it began with, empty for the seed.
    """
    return Restore(checkpoint=str(newest or init_from), weights_only=newest is None)


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
        self.inventory, self.init_from = training_inventory(config), config.init_from
        self.commit: Commit | None = None

    def give_back(self, missing: Sequence[Piece], step: int) -> GivenBack:
        """Go back to the newest checkpoint, or stop where replicas should have saved that.

        Args:
            missing: pieces that nobody holds any more.
            step: the last committed one.

        Raises:
            StateLostError: all replicas are gone.
        """
        newest = self.folder.newest_checkpoint()
        back = checkpoint.read_manifest(newest)["step"] if newest else 0
        what = describe_pieces(missing)
        begun = self.init_from or "its seed"
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
            restore=from_newest(newest, self.init_from),
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

    def may_enter(self, old: Plan, new: Plan) -> bool:
        """Always: a step is cut off and runs again.

        Args:
            old, new: plans.
        """
        return True

    def entered(self, plan: Plan) -> None:
        """Nobody else need know."""
