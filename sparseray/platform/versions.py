"""The versions of a server's weights: the one that is served, the one that is to come, and the way from one to the other.

A version is a checkpoint, published by a user or written by the run that the server follows. Slots read it beside the
one that they serve; a generation brings it, between two engine steps; the one before stays until its requests end.
"""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparseray.actors.state.assignment import Plan
from sparseray.errors import ConfigError
from sparseray.platform.config import RunConfig, from_dict, to_dict
from sparseray.platform.run import checkpoint
from sparseray.platform.run.folder import RunFolder

LOOK_S = 1.0
RESEND_S = 1.0


@dataclass(frozen=True, kw_only=True)
class Version:
    """Weights that are served.

    Args:
        number: a later version's is higher, whatever its step.
        checkpoint: its folder, absolute.
        step: of the run that wrote it.
        name: for people, and in `system_fingerprint`.
    """

    number: int
    checkpoint: str
    step: int
    name: str

    @staticmethod
    def of(directory: Path, *, after: int = 0) -> "Version":
        """Read which version a checkpoint is.

        Args:
            directory: of the checkpoint.
            after: number of the version before.

        Raises:
            CheckpointError: it is none, or damaged.
        """
        manifest = checkpoint.read_manifest(directory)
        name = f"{directory.name}-{manifest['sha256'][:8]}"
        step: int = manifest["step"]
        return Version(number=max(step, after + 1), checkpoint=str(directory), step=step, name=name)


@dataclass(frozen=True, kw_only=True)
class Identity:
    """What all versions that a server serves have in common, besides the model.

    Args:
        tokenizer, layout: SHA-256 of the tokenizer and of the DSE layout; empty for none.
    """

    tokenizer: str
    layout: str

    @staticmethod
    def of(directory: Path) -> "Identity":
        """Read it from a checkpoint."""
        manifest = checkpoint.read_manifest(directory)
        tokenizer = manifest["identity"].get("tokenizer.json", "")
        return Identity(tokenizer=tokenizer, layout=manifest["dse_layout_sha256"] or "")


def check_same_model(directory: Path, config: RunConfig, served: Identity) -> None:
    """See that a checkpoint can take the place of the one that is served.

    Args:
        directory: of the checkpoint.
        config: of the server.
        served: of what it serves.

    Raises:
        UserError: it is damaged, or of another model; with what differs.
    """
    manifest = checkpoint.read_manifest(directory)
    checkpoint.check_files(directory, manifest)
    theirs = _flat(to_dict(from_dict(RunConfig, manifest["config"]))["model"])
    ours = _flat(to_dict(config)["model"])
    cure = "start a server of its own for it"
    for key in ours:
        # A server without drafting does without modules that a checkpoint has.
        is_needless = key.startswith("mtp.") and (key != "mtp.depth" or not config.model.mtp.depth)
        if theirs.get(key) != ours[key] and not is_needless:
            raise ConfigError(
                f"{directory} is a checkpoint of another model: model.{key} is {theirs.get(key)} and the server's is "
                f"{ours[key]}; {cure}"
            )
    found = Identity.of(directory)
    for what, is_other in (
        ("tokenizer", found.tokenizer != served.tokenizer),
        ("DSE layout", found.layout != served.layout),
    ):
        if is_other:
            raise ConfigError(f"{directory} was trained with another {what} than what is served; {cure}")


def _flat(plain: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in plain.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def placement(plan: Plan) -> tuple[object, ...]:
    """Who answers for which experts and rows."""
    return plan.experts, plan.buckets, plan.spread


def followed(run: Path) -> Path:
    """The newest checkpoint of a run that is to be served.

    Raises:
        ConfigError: there is no such run, or it has no checkpoint yet.
    """
    if not (run / "config.yaml").is_file():
        raise ConfigError(f"--run {run}: there is no run (no config.yaml); give the run_dir of `pretrain`")
    newest = RunFolder(run).newest_checkpoint()
    if newest is None:
        raise ConfigError(
            f"--run {run}: the run has no checkpoint yet; wait for its first (train.checkpoint_every), then ask again"
        )
    return newest.absolute()


def has_ended(directory: Path) -> bool:
    """Whether a checkpoint is the last one of its run."""
    manifest = checkpoint.read_manifest(directory)
    steps: int = from_dict(RunConfig, manifest["config"]).train.steps
    return bool(manifest["step"] >= steps)


class Coming:
    """The version that slots are reading, and how far they are.

    Args:
        version: that is to come.
        slots: that read it.
    """

    def __init__(self, version: Version, slots: Collection[int]) -> None:
        self.version, self.waiting = version, set(slots)
        self._sent = 0.0

    def is_due(self, now: float) -> bool:
        """Whether the slots are to be told (again)."""
        if now - self._sent < RESEND_S:
            return False
        self._sent = now
        return True

    def told(self, slot: int, number: int) -> None:
        """Take note that a slot has read a version.

        Args:
            slot: which.
            number: of the version.
        """
        if number == self.version.number:
            self.waiting.discard(slot)


class Follower:
    """Looks for new checkpoints of a run.

    Args:
        run: folder of the run; empty to follow none.
        every: steps between two versions; 0 for only those that a user publishes.
    """

    def __init__(self, run: str, every: int) -> None:
        self.folder, self.every = RunFolder(Path(run)) if run else None, every
        self._looked, self._refused, self._furthest = 0.0, "", 0

    def newest(self, step: int, now: float) -> Path | None:
        """A checkpoint that is due, once a second: newer than all before, so that an older one that was published stays.

        Args:
            step: of the version that is served.
            now: time.
        """
        if self.folder is None or not self.every or now - self._looked < LOOK_S:
            return None
        self._looked, self._furthest = now, max(step, self._furthest)
        found = checkpoint.list_finished(self.folder.checkpoints)
        if not found or str(found[-1].absolute()) == self._refused:
            return None
        number = int(found[-1].name.removeprefix("step_"))
        if number < self._furthest + self.every:
            return None
        self._furthest = number
        return found[-1].absolute()

    def refuse(self, directory: Path) -> None:
        """Do not offer a checkpoint again."""
        self._refused = str(directory)
