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
from sparseray.platform.reconciler import Reconciler
from sparseray.platform.versions import Coming, Follower, Version, check_same_model, has_ended
from sparseray.platform.weights import ServedWeights

log = get_logger(__name__)

RETIRE_EVERY_S = 0.5


class Publisher:
    """Changes the weights of a server.

    Args:
        config: of the server.
        weights: that are served.
        generations, reconciler: by which a version is entered.
        run: folder of the run that is followed; empty for none.
    """

    def __init__(
        self,
        config: RunConfig,
        weights: ServedWeights,
        generations: Generations,
        reconciler: Reconciler,
        run: str,
    ) -> None:
        self.config, self.weights = config, weights
        self.generations, self.reconciler = generations, reconciler
        self.follower = Follower(run, config.serve.follow_every)
        self._asked: Path | None = None
        self._coming: Coming | None = None
        self._finishing: dict[int, int] = {}
        self._turned = self._retired = 0.0

    def publish(self, checkpoint: str) -> str:
        """Take a checkpoint as the next version; called from any thread.

        Args:
            checkpoint: its folder; empty for the newest of the run that is followed.

        Returns:
            The name of the version.

        Raises:
            UserError: it cannot be served here; nothing was changed.
        """
        if not checkpoint:
            if self.follower.folder is None:
                raise ConfigError("this server follows no run; name a checkpoint with --checkpoint")
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
        if self.config.cluster.device == "cuda":
            raise ConfigError(
                "the weights of a server on a GPU cannot be changed while it serves; start it again"
            )
        check_same_model(directory, self.config, self.weights.identity)

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
        if self._coming is None:
            self._begin(now)
            return
        plan, coming = self.generations.plan, self._coming
        assert plan is not None
        coming.waiting &= set(plan.addresses)
        if coming.waiting:
            if coming.is_due(now):
                version = coming.version
                self._post(coming.waiting, Stage(checkpoint=version.checkpoint, version=version.number))
        elif self.weights.earlier is None:
            new = self.generations.replanned(self.generations.wanted)
            # Engines that are on their way out finish first.
            if set(plan.attention) <= set(new.attention):
                self._enter(coming.version, new)

    def _begin(self, now: float) -> None:
        asked, self._asked = self._asked, None
        if asked is None:
            asked = self.follower.newest(self.weights.version.step, now)
            if asked is None:
                return
        plan = self.generations.plan
        assert plan is not None
        try:
            self._check(asked)
            version = Version.of(asked, after=self.weights.version.number)
        except UserError as error:
            self.follower.refuse(asked)
            self.generations.tell("refused", self.weights.version.number, str(error))
            return
        self._coming = Coming(version, plan.addresses)

    def _refuse(self, version: Version, why: str) -> None:
        self._coming = None
        self.follower.refuse(Path(version.checkpoint))
        self.generations.tell("refused", self.weights.version.number, f"{version.name} cannot be read: {why}")

    def _enter(self, version: Version, new: Plan) -> None:
        """Have all slots serve a version, by a plan that keeps all engines."""
        generations, before = self.generations, self.weights.version
        assert generations.plan is not None
        self._coming, self._finishing, self._turned = None, {}, time.monotonic()
        self.weights.turn_to(version, generations.plan, new, keep=self.config.serve.in_flight == "finish")
        text = f"{version.name} follows {before.name}"
        if has_ended(Path(version.checkpoint)) and self.follower.folder is not None:
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
