"""Serving as a workload: what its slots and its ingress are told, and the loop that keeps engines alive.

Weights never change here, so a lost piece that no slot has comes from the checkpoint, alone, and the others keep
what they hold: engines go on with their caches.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sparseray.actors.installation import JobSpec, Restore
from sparseray.actors.serving.messages import Drain, Draining, Routes
from sparseray.actors.state.assignment import Plan
from sparseray.actors.state.pieces import Piece
from sparseray.actors.wire.envelope import INGRESS
from sparseray.actors.wire.mailbox import Mailbox
from sparseray.actors.wire.messages import Commit, Failed, Silent
from sparseray.errors import SlotsLostError
from sparseray.log import get_logger
from sparseray.platform.config import RunConfig
from sparseray.platform.fleet.control import StalledError
from sparseray.platform.generations import Generations
from sparseray.platform.opening import serving_inventory, slots_of
from sparseray.platform.planning.drains import Drains
from sparseray.platform.reconciler import Reconciler
from sparseray.platform.run import checkpoint
from sparseray.platform.run.events import describe_pieces
from sparseray.platform.run.history import JobHistory
from sparseray.platform.workload import GivenBack

log = get_logger(__name__)

TICK_S = 0.02
ROUTES_EVERY_S = 1.0


@dataclass(frozen=True, kw_only=True)
class Served:
    """What is served, and who answers for it.

    Args:
        checkpoint: folder of the weights, absolute.
        ingress: address that tokens go to.
    """

    checkpoint: str
    ingress: str


class Serving:
    """`Workload` whose generations count once all slots have installed them.

    Args:
        config: of the model, with the server's settings.
        spec: what slots build.
        served: what is served to whom.
        mailbox: the scheduler's.
    """

    is_settled_by_commit = False

    def __init__(self, config: RunConfig, spec: JobSpec, served: Served, mailbox: Mailbox) -> None:
        self.spec, self.ingress, self.mailbox = spec, served.ingress, mailbox
        self.inventory = serving_inventory(config)
        self.commit: Commit | None = None
        self.checkpoint = served.checkpoint
        self.step: int = checkpoint.read_manifest(Path(served.checkpoint))["step"]
        self.drains = Drains(config.serve.drain_s)
        self._routes = Routes(generation=0, engines={}, reason="no engine has started yet")

    def give_back(self, missing: Sequence[Piece], step: int) -> GivenBack:
        """Read what nobody has from the checkpoint.

        Args:
            missing: pieces that nobody holds any more.
            step: of the checkpoint.
        """
        return GivenBack(
            restore=Restore(checkpoint=self.checkpoint, everything=False),
            step=step,
            text=f"{describe_pieces(missing)} had no holder left and came from {self.checkpoint}",
        )

    def may_enter(self, old: Plan, new: Plan) -> bool:
        """Once the engines that leave have finished what they have, or had their time for it.

        Args:
            old, new: the plan in force, and the next one.
        """
        now = time.monotonic()
        if self.drains.begin(set(old.attention) - set(new.attention), now):
            self.route(replace(self._routes, draining=self.drains.leaving))
        if self.drains.is_due(now):
            for slot in self.drains.leaving:
                self.mailbox.post(slot, Drain())
        return self.drains.is_over(now)

    def stay(self) -> None:
        """Let engines that were to leave go on."""
        if self.drains.begin((), time.monotonic()):
            self.route(replace(self._routes, draining=()))

    def entered(self, plan: Plan) -> None:
        """Tell the ingress who answers now."""
        self.drains.begin((), time.monotonic())
        engines = {slot: plan.addresses[slot] for slot in plan.attention}
        self.route(Routes(generation=plan.generation, engines=engines))

    def route(self, routes: Routes | None = None) -> None:
        """Send the ingress new routes, or the last ones again."""
        self._routes = routes or self._routes
        self.mailbox.post(INGRESS, self._routes)


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
        self.step = serving.step

    def start(self) -> None:
        """Give every slot its roles and its weights."""
        self.generations.begin(self.step, Restore(checkpoint=self.serving.checkpoint))

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
        if message is not None and isinstance(message.body, Failed):
            log.error("slot %d failed: %s", message.source, message.body.error)
        if message is not None and isinstance(message.body, Silent):
            self.control.probe(message.body.error)
        if message is not None and isinstance(message.body, Draining):
            self.serving.drains.told(message.source, message.body.num_requests)
        self.reconciler.reconcile(self.step)
        if self.serving.drains.leaving and self.reconciler.is_settled():
            self.serving.stay()

    def _recover(self, error: Exception) -> None:
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
