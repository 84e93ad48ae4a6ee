"""Drives a server: keeps its plan as it is wanted, whatever happens to its slots, its load and its weights."""

import time
from collections.abc import Callable
from pathlib import Path

from sparseray.actors.installation import Gathered
from sparseray.actors.serving.messages import Draining, Load, Routes
from sparseray.actors.wire.messages import Failed, Offered, Silent
from sparseray.errors import ConfigError, SlotsLostError
from sparseray.log import get_logger
from sparseray.model.config import ModelConfig
from sparseray.platform.autoscaler import EVERY_S, ROLES, Autoscaler, Situation
from sparseray.platform.config import RunConfig
from sparseray.platform.fleet.control import StalledError
from sparseray.platform.generations import Generations
from sparseray.platform.offers import Offers
from sparseray.platform.opening import slots_of
from sparseray.platform.planning.autoscale import Scaling
from sparseray.platform.planning.inventory import Roles, num_slots
from sparseray.platform.publishing import Publisher
from sparseray.platform.reconciler import Reconciler
from sparseray.platform.run.history import JobHistory
from sparseray.platform.serving import Serving

log = get_logger(__name__)

TICK_S = 0.02
ROUTES_EVERY_S = 1.0


class Server:
    """Keeps a server's plan as it is wanted, whatever happens to its slots.

    Args:
        config: of the model, with the server's settings.
        serving: what is served.
        generations, reconciler: who holds what, and what is wanted.
        should_stop: asked all the time.
    """

    def __init__(
        self,
        config: RunConfig,
        serving: Serving,
        generations: Generations,
        reconciler: Reconciler,
        *,
        should_stop: Callable[[], bool],
    ) -> None:
        self.config, self.serving, self.should_stop = config, serving, should_stop
        self.generations, self.reconciler, self.control = generations, reconciler, generations.control
        self.publisher = Publisher(config, serving.state, generations, reconciler, serving.follower)
        self.autoscaler = Autoscaler(config.serve, config.cluster, serving.inventory)
        self.offers = Offers(self.control.mailbox.job)
        self._looked, self._refused = 0.0, ""

    @property
    def step(self) -> int:
        """Number of the version in force: in messages it stands where training has its last step."""
        return self.serving.state.version.number

    @property
    def versions(self) -> list[str]:
        """Names of the versions that may answer; the one in force is last."""
        return list(self.serving.state.names.values())

    def publish(self, checkpoint: str) -> str:
        """As `Publisher.publish`."""
        return self.publisher.publish(checkpoint)

    def can_give(self, model: ModelConfig, run: str) -> bool:
        """Whether its slots have all weights of a step of a run, which it follows, to their last bit.

        Args:
            model: of the run.
            run: its folder.
        """
        version, is_cpu = self.serving.state.version, self.config.cluster.device != "cuda"
        is_of_run = version.is_offered or Path(version.checkpoint).is_relative_to(run)
        is_step = is_of_run and version.number == version.step
        return self.serving.served.run == run and is_step and is_cpu and self.config.model == model

    def start(self) -> None:
        """Give every slot its roles and its weights."""
        restore = self.serving.restore()
        self.generations.begin(self.step, restore)

    def take_over(self, history: JobHistory) -> None:
        """Go on with the slots of a scheduler that died."""
        assert history.plan is not None
        if self.control.fleet.members():
            self.generations.take_over(history.plan, self.step)
        else:
            self._start_again("all slots are gone")

    def run(self) -> None:
        """Serve until asked to stop."""
        routed = 0.0
        while not self.should_stop():
            try:
                self._turn()
            except (SlotsLostError, StalledError) as error:
                self._recover(error)
            if time.monotonic() - routed > ROUTES_EVERY_S:
                self.serving.route()
                routed = time.monotonic()

    def _turn(self) -> None:
        message = self.control.mailbox.next(TICK_S)
        now = time.monotonic()
        if message is not None and isinstance(message.body, Failed):
            log.error("slot %d failed: %s", message.source, message.body.error)
        elif message is not None and isinstance(message.body, Silent):
            self.control.probe(message.body.error)
        elif message is not None and isinstance(message.body, Load):
            self.autoscaler.hear(message.source, message.body, now)
        elif message is not None and isinstance(message.body, Draining):
            self.serving.drains.told(message.source, message.body.num_requests)
        elif message is not None and isinstance(message.body, Offered):
            self.offers.hear(message.source, message.body)
        elif message is not None and isinstance(message.body, Gathered):
            self.serving.gathers.told(message.source, message.body.pieces)
        if message is not None:
            self.publisher.hear(message)
        if now - self._looked > EVERY_S:
            self._looked = now
            self._autoscale(self._situation(), now)
        self.publisher.look(now)
        self.serving.avoid(self.control.fleet.draining())
        self.reconciler.reconcile(self.step)
        assert self.generations.plan is not None
        self.offers.look(self.step, self.generations.plan, self.control)
        if self.serving.drains.leaving and self.reconciler.is_settled():
            self.serving.stay()

    def _situation(self) -> Situation:
        generations, fleet = self.generations, self.generations.fleet
        plan, wanted = generations.plan, generations.wanted
        assert plan is not None
        colocated = self.config.cluster.colocated
        slots = len(fleet.members()) - len(fleet.draining()) + fleet.starting() + fleet.room()
        spare = slots - num_slots(wanted, colocated=colocated)
        now = (len(plan.attention), len(plan.expert_primaries), len(plan.memory_primaries))
        most = (slots if colocated else getattr(wanted, role) + spare for role in ROLES)
        return Situation(
            now=Roles(**dict(zip(ROLES, now))), wanted=wanted, room=Roles(**dict(zip(ROLES, most)))
        )

    def _autoscale(self, there: Situation, now: float) -> None:
        """Ask for other numbers of slots where the policy wants them, and show what it sees."""
        for role, scaling in self.autoscaler.decide(there, now).items():
            if scaling.count != getattr(there.wanted, role):
                self._ask(role, getattr(there.wanted, role), scaling)
        record = self.generations.events.metrics.record
        self.autoscaler.show(there, now, record)
        record("serving_version_step", self.serving.state.version.step)

    def _ask(self, role: str, before: int, scaling: Scaling) -> None:
        try:
            self.reconciler.request(role, scaling.count)
        except ConfigError as error:
            # The policy will ask again; a person need read it once.
            if str(error) != self._refused:
                log.warning("not scaled: %s", error)
            self._refused = str(error)
            return
        self._refused = ""
        direction = "up" if scaling.count > before else "down"
        self.generations.events.metrics.record("autoscale_changes_total", 1, role=role, direction=direction)
        text = f"{role} {before} to {scaling.count}: {scaling.reason}"
        self.generations.tell("autoscaled", self.step, text)

    def _recover(self, error: Exception) -> None:
        self.offers.forget()
        with self.reconciler.ledger.state("recovering", failed="recovering"):
            if self.control.fleet.members():
                self.generations.recover(error, self.step)
            else:
                self._start_again(str(error))

    def _start_again(self, why: str) -> None:
        """No slot is left: start others, which read the checkpoint."""
        generation = self.generations.generation
        self.serving.route(Routes(generation=generation, engines={}, reason=f"every slot was lost: {why}"))
        fleet, count = self.control.fleet, slots_of(self.config, self.serving.inventory)
        while len(fleet.members()) < count and not self.should_stop():
            lacking = count - len(fleet.members()) - fleet.starting()
            if lacking > 0:
                fleet.start(lacking)
            time.sleep(TICK_S)
        fleet.losses()
        if not self.should_stop():
            self.start()
