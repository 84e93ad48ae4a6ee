"""Which weights a server serves, and those whose requests are still being finished: what plans say of them, journalled."""

from dataclasses import asdict
from pathlib import Path

from sparseray.actors.state.assignment import Plan
from sparseray.platform.run.folder import RunFolder
from sparseray.platform.run.journal import Journal
from sparseray.platform.versions import Identity, Version, placement


class ServedWeights:
    """The version in force, and the one before while requests of it are open.

    Args:
        checkpoint: that the server began with, absolute; empty where it begins with what the run offers.
        run: folder of the run that is followed; empty for none.
        journal: of the server; a version that it names goes on after its scheduler died.
    """

    def __init__(self, checkpoint: str, run: str, journal: Journal) -> None:
        self.journal = journal
        self.is_offered = False
        """Whether the run still keeps the version in force, which is on no disk."""
        if (last := journal.last("version")) is not None:
            self.version, self.identity = Version(**last["version"]), Identity(**last["identity"])
        elif not checkpoint:
            self.version = Version(number=0, checkpoint="", step=0, name="")
            self.identity = Identity.of_run(RunFolder(Path(run)))
        else:
            # A run that is followed removes its old checkpoints: what is known of this one is kept.
            self.version, self.identity = Version.of(Path(checkpoint)), Identity.of(Path(checkpoint))
            self._write(0)
        self.earlier: Version | None = None
        self._placed: tuple[object, ...] = ()

    def turn_to(self, version: Version, plan: Plan, new: Plan, *, keep: bool) -> None:
        """Serve another version from the next plan on.

        Args:
            version: the next.
            plan, new: in force, and the next one.
            keep: whether requests may be finished with the version before.
        """
        self._placed = placement(new)
        self.earlier = self.version if keep and placement(plan) == self._placed else None
        self.version, self.is_offered = version, version.is_offered
        self._write(new.generation)

    def jump_to(self, version: Version, generation: int) -> None:
        """Serve another version because the one before cannot be read any more.

        Args:
            version: the next.
            generation: in force.
        """
        self.version, self.earlier, self.is_offered = version, None, version.is_offered
        self._write(generation)

    @property
    def is_there(self) -> bool:
        """Whether the version in force can be read."""
        version = self.version
        return (
            self.is_offered
            if version.is_offered
            else bool(version.checkpoint) and Path(version.checkpoint).exists()
        )

    def _write(self, generation: int) -> None:
        found, identity = asdict(self.version), asdict(self.identity)
        self.journal.append(
            "version", generation=generation, step=self.version.number, version=found, identity=identity
        )

    def earlier_in(self, plan: Plan) -> int:
        """Number of the version that requests may be finished with in a plan; -1 for none.

        Where others answer for experts or rows than before, nobody has them of the version before.
        """
        if self.earlier is not None and placement(plan) != self._placed:
            self.earlier = None
        return -1 if self.earlier is None else self.earlier.number

    @property
    def names(self) -> dict[int, str]:
        """Names of the versions that may answer, by number; the one in force is last."""
        versions = [self.version] if self.earlier is None else [self.earlier, self.version]
        return {version.number: version.name for version in versions}
