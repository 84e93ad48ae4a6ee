"""Brings new weights into a server that goes on answering: read beside the old ones, then entered like any other plan.

Asked by the server's loop (serving.py) all the time. A version is staged by all slots, journalled, entered between two
engine steps, and the one before is retired once no request uses it. Nothing here waits.
"""

import time
from pathlib import Path

from sparseray.actors.serving.messages import Load, Retire, Stage, Staged
from sparseray.actors.state.assignment import Plan
from sparseray.actors.wire.envelope import Body, Message
from sparseray.errors import ConfigError, UserError
from sparseray.log import get_logger
from sparseray.platform.config import RunConfig
from sparseray.platform.generations import Generations
from sparseray.platform.offers import OFFER_S, Weights
from sparseray.platform.reconciler import Reconciler
from sparseray.platform.versions import Coming, Follower, Version, check_same_model, has_ended
from sparseray.platform.weights import ServedWeights

log = get_logger(__name__)

RETIRE_EVERY_S = 0.5
"""How long a run may take to its next step."""


class Publisher:
    """Changes the weights of a server.

    Args:
        config: of the server.
        weights: that are served.
        generations, reconciler: by which a version is entered.
        follower: of the run that is followed.
    """

    def __init__(
        self,
        config: RunConfig,
        weights: ServedWeights,
        generations: Generations,
        reconciler: Reconciler,
        follower: Follower,
    ) -> None:
        self.config, self.weights = config, weights
        self.generations, self.reconciler = generations, reconciler
        self.follower = follower
        self._asked: Path | Weights | None = None
        self._is_asking = False
        self._coming: Coming | None = None
        self._finishing: dict[int, int] = {}
        self._turned = self._retired = 0.0

    def publish(self, checkpoint: str) -> str:
        """Take a checkpoint as the next version; called from any thread.

        Args:
            checkpoint: its folder; empty for what the run that is followed has now: a step that its slots offer, where it
                trains on this platform, or its newest checkpoint.

        Returns:
            The name of the version.

        Raises:
            UserError: it cannot be served here; nothing was changed.
        """
        if not checkpoint:
            if self.follower.folder is None:
                raise ConfigError("this server follows no run; name a checkpoint with --checkpoint")
            self._check_device()
            self._is_asking = True
            try:
                self._asked = weights = self.follower.wait(self.weights.version.step + 1, OFFER_S)
            finally:
                self._is_asking = False
            if weights is not None:
                return Version.offered(weights, after=self.weights.version.number).name
            newest = self.follower.folder.newest_checkpoint()
            if newest is None:
                raise ConfigError(f"{self.follower.folder.path} has no checkpoint")
            checkpoint = str(newest)
        directory = Path(checkpoint).absolute()
        self._check(directory)
        name = Version.of(directory).name
        if name != self.weights.version.name:
            self._asked = directory
        return name

    def _check(self, directory: Path) -> None:
        self._check_device()
        check_same_model(directory, self.config, self.weights.identity)

    def _check_device(self) -> None:
        if self.config.cluster.device == "cuda":
            raise ConfigError(
                "the weights of a server on a GPU cannot be changed while it serves; start it again"
            )

    def hear(self, message: Message[Body]) -> None:
        """Take note of what a slot says."""
        body, coming = message.body, self._coming
        if isinstance(body, Load) and body.version == self.weights.version.number:
            self._finishing[message.source] = body.num_earlier
        elif isinstance(body, Staged) and coming is not None and body.version == coming.version.number:
            if body.error:
                self._refuse(coming.version, f"slot {message.source}: {body.error}")
            else:
                coming.told(message.source, body.version)

    def look(self, now: float) -> None:
        """Do what is next.

        Args:
            now: time.

        Raises:
            SlotsLostError, StalledError: while a version was entered.
        """
        self._retire(now)
        self.follower.keep()
        if self._coming is None:
            if self.follower.holds and not self._is_wanted and self.reconciler.is_settled():
                self.weights.is_offered = False
                self.follower.release()
            self._begin(now)
            return
        plan, coming = self.generations.plan, self._coming
        assert plan is not None
        # A slot that was left without a role is in the plan still when it has been given back.
        coming.waiting &= set(plan.addresses) & set(self.generations.fleet.members())
        if coming.waiting:
            if coming.is_due(now):
                version = coming.version
                self._post(coming.waiting, Stage(checkpoint=version.checkpoint, version=version.number))
        elif self.weights.earlier is None:
            new = self.generations.replanned(self.generations.wanted)
            # Engines that are on their way out finish first.
            if set(plan.attention) <= set(new.attention):
                self._enter(coming.version, new)

    @property
    def _is_wanted(self) -> bool:
        """Whether a user's wish has yet to be begun."""
        return self._is_asking or self._asked is not None

    def _begin(self, now: float) -> None:
        plan = self.generations.plan
        assert plan is not None
        asked, self._asked = self._asked, None
        if asked is None:
            asked = self.follower.newest(self.weights.version.step, now)
            if asked is None:
                return
        after = self.weights.version.number
        try:
            if isinstance(asked, Weights):
                # Of the same run, so of the same model.
                self._check_device()
                version = Version.offered(asked, after=after)
            else:
                self._check(asked)
                version = Version.of(asked, after=after)
        except UserError as error:
            self._give_up(asked, str(error))
            return
        self._coming = Coming(version, plan.addresses)

    def _refuse(self, version: Version, why: str) -> None:
        self._coming = None
        self._give_up(Path(version.checkpoint), f"{version.name} cannot be read: {why}")

    def _give_up(self, asked: Path | Weights, why: str) -> None:
        self.follower.release()
        if isinstance(asked, Path):
            self.follower.refuse(asked)
        self.generations.tell("refused", self.weights.version.number, why)

    def _enter(self, version: Version, new: Plan) -> None:
        """Have all slots serve a version, by a plan that keeps all engines."""
        generations, before = self.generations, self.weights.version
        assert generations.plan is not None
        self._coming, self._finishing, self._turned = None, {}, time.monotonic()
        self.weights.turn_to(version, generations.plan, new, keep=self.config.serve.in_flight == "finish")
        text = f"{version.name} follows {before.name}"
        if (
            not version.is_offered
            and has_ended(Path(version.checkpoint))
            and self.follower.folder is not None
        ):
            text += "; the run that is followed has ended with it"
        generations.events.metrics.record("serving_versions_total", 1)
        self.reconciler.change("published", text, version.number, new)

    def _retire(self, now: float) -> None:
        """Let the version before go, once nobody uses it; by force where another one waits for its place."""
        plan, weights = self.generations.plan, self.weights
        assert plan is not None
        if weights.earlier is None:
            return
        engines = set(plan.attention)
        if all(self._finishing.get(slot) == 0 for slot in engines):
            self._post(set(plan.addresses), Retire(version=weights.version.number, engines_only=False))
            weights.earlier = None
            return
        is_waited_for = self._coming is not None and not self._coming.waiting
        has_had_its_time = now - self._turned > self.config.serve.drain_s
        if is_waited_for and has_had_its_time and now - self._retired > RETIRE_EVERY_S:
            self._retired = now
            self._post(engines, Retire(version=weights.version.number, engines_only=True))

    def _post(self, slots: set[int], body: Body) -> None:
        self.generations.control.post(sorted(slots), body, step=self.weights.version.number + 1)
