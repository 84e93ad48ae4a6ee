"""The versions of a server's weights: the one that is served, the one that is to come, and the way from one to the other.

A version is a checkpoint, published by a user or written by the run that the server follows, or a step of that run which
its slots offer themselves (offers.py). Slots read it beside the one that they serve; a generation brings it, between two
engine steps; the one before stays until its requests end.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparseray.actors.state.assignment import Plan
from sparseray.errors import ConfigError
from sparseray.platform.config import RunConfig, from_dict, to_dict
from sparseray.platform.fleet.weights_port import is_offered
from sparseray.platform.offers import Offers, Weights
from sparseray.platform.run import checkpoint
from sparseray.platform.run.folder import RunFolder

LOOK_S = 1.0
RESEND_S = 1.0


@dataclass(frozen=True, kw_only=True)
class Version:
    """Weights that are served.

    Args:
        number: a later version's is higher, whatever its step.
        checkpoint: its folder, absolute, or what names weights that a run offers.
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

    @staticmethod
    def offered(weights: Weights, *, after: int) -> "Version":
        """The version of what a run offers.

        Args:
            weights: that are offered.
            after: number of the version before.
        """
        step = weights.step
        name = f"step_{step}-{weights.run[:8]}"
        return Version(number=max(step, after + 1), checkpoint=weights.source, step=step, name=name)

    @property
    def is_offered(self) -> bool:
        """Whether it was never on a disk."""
        return is_offered(self.checkpoint)


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

    @staticmethod
    def of_run(folder: RunFolder) -> "Identity":
        """Read it from the folder of a run that has no checkpoint yet."""
        tokenizer = checkpoint.file_sha256(folder.identity / "tokenizer.json")
        return Identity(tokenizer=tokenizer, layout=folder.layout_sha256() or "")


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
            f"--run {run}: the run has no checkpoint yet; wait for its first (train.checkpoint_every), or join the platform "
            "that it trains on (--cluster.address)"
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
    """Looks for what a run has learned since: what its slots offer while it trains here, and its checkpoints otherwise.

    Args:
        run: folder of the run; empty to follow none.
        every: steps between two versions; 0 for only those that a user publishes.
        who: identifier of the server.
        offers: of the run, while it trains on this platform; None otherwise.
    """

    def __init__(self, run: str, every: int, who: str, offers: Callable[[], Offers | None]) -> None:
        self.folder, self.every = RunFolder(Path(run)) if run else None, every
        self.who, self.offers = who, offers
        self._looked, self._refused, self._furthest = 0.0, "", 0
        self._holds: Offers | None = None

    def newest(self, step: int, now: float) -> Path | Weights | None:
        """What is due, looked for once a second: newer than all before, so that an older one that was published stays.

        Args:
            step: of the version that is served.
            now: time.
        """
        if self.folder is None or not self.every or now - self._looked < LOOK_S:
            return None
        self._looked, self._furthest = now, max(step, self._furthest)
        if (offers := self.offers()) is not None:
            weights = offers.ask(self.who, self._furthest + self.every)
            if weights is not None:
                self._holds, self._furthest = offers, weights.step
            return weights
        return self._newest_checkpoint(self.folder)

    def _newest_checkpoint(self, folder: RunFolder) -> Path | None:
        found = checkpoint.list_finished(folder.checkpoints)
        if not found or str(found[-1].absolute()) == self._refused:
            return None
        number = int(found[-1].name.removeprefix("step_"))
        if number <= self._furthest or (number < self._furthest + self.every and not has_ended(found[-1])):
            return None
        self._furthest = number
        return found[-1].absolute()

    def wait(self, least: int, limit_s: float) -> Weights | None:
        """What the run offers as soon as it can; None where it does not train here, or not in time.

        Args:
            least: step that it must be of, or of a later one.
            limit_s: seconds to wait.
        """
        offers = self.offers()
        weights = (
            None
            if offers is None
            else offers.wait(self.who, least, limit_s, lambda: self.offers() is not offers)
        )
        if weights is not None:
            self._holds, self._furthest = offers, max(self._furthest, weights.step)
        return weights

    @property
    def holds(self) -> bool:
        """Whether the run keeps something for this server."""
        return self._holds is not None

    def release(self) -> None:
        """Let go of what the run keeps; it has been read."""
        if self._holds is not None:
            self._holds.release(self.who)
            self._holds = None

    def keep(self) -> None:
        """Say that what the run keeps is still needed."""
        if self._holds is not None:
            self._holds.keep(self.who)

    def refuse(self, directory: Path) -> None:
        """Do not offer a checkpoint again."""
        self._refused = str(directory)
