"""Serving as a workload: what its slots and its ingress are told.

Weights change by versions alone (publishing.py), so a lost piece that no slot has comes from the checkpoint, alone, and
the others keep what they hold: engines go on with their caches. What a run offered and is on no disk comes anew, whole.
"""

import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sparseray.actors.installation import Gather, JobSpec, Restore
from sparseray.actors.serving.messages import Drain, Routes
from sparseray.actors.state.assignment import Plan
from sparseray.actors.state.pieces import Piece
from sparseray.actors.wire.envelope import INGRESS
from sparseray.actors.wire.mailbox import Mailbox
from sparseray.actors.wire.messages import Commit
from sparseray.errors import StateLostError
from sparseray.platform.config import RunConfig
from sparseray.platform.offers import OFFER_S, Offers
from sparseray.platform.opening import serving_inventory
from sparseray.platform.planning.drains import Drains
from sparseray.platform.planning.gathers import Gathers
from sparseray.platform.run.events import describe_pieces
from sparseray.platform.run.folder import RunFolder
from sparseray.platform.run.journal import Journal
from sparseray.platform.versions import Follower, Version
from sparseray.platform.weights import ServedWeights
from sparseray.platform.workload import GivenBack

LAST_S = 2.0
"""Before a node is gone: what has not finished there goes on elsewhere, as if its engine had died."""
MOST_INGRESSES = 64
"""That a new scheduler looks for, the last ones first."""


@dataclass(frozen=True, kw_only=True)
class Served:
    """What is served, and who answers for it.

    Args:
        checkpoint: folder of the weights, absolute; empty to begin with what the slots of `run` offer.
        ingress: address of the ingress in the command; others join later.
        run: folder of the run whose steps follow; empty for none.
        identity: folder of tokenizer and DSE layout; empty for the checkpoint's.
    """

    checkpoint: str
    ingress: str
    run: str = ""
    identity: str = ""

    @property
    def identity_folder(self) -> Path:
        """Where tokenizer and DSE layout are."""
        return Path(self.identity or self.checkpoint)


class Serving:
    """`Workload` whose generations count once all slots have installed them.

    Args:
        config: of the model, with the server's settings.
        spec: what slots build.
        served: what is served to whom.
        mailbox: the scheduler's.
        journal: of the server.
        offers: of the run that is followed, while it trains on this platform.
    """

    is_settled_by_commit = moves_in_stages = False

    def __init__(
        self,
        config: RunConfig,
        spec: JobSpec,
        served: Served,
        mailbox: Mailbox,
        journal: Journal,
        offers: Callable[[], Offers | None],
    ) -> None:
        self.spec, self.served, self.mailbox, self.journal = spec, served, mailbox, journal
        self._joining = threading.Lock()
        self.ingress = served.ingress
        self.inventory = serving_inventory(config)
        self.commit: Commit | None = None
        self.state = ServedWeights(served.checkpoint, served.run, journal)
        self.follower = Follower(served.run, config.serve.follow_every, mailbox.job, offers)
        self.drains, self.gathers = Drains(config.serve.drain_s), Gathers()
        self._avoided: set[int] = set()
        self._routes = Routes(generation=0, engines={}, reason="no engine has started yet")
        # It hears of a plan only once there is one, and before that why there is none.
        mailbox.transport.reach(INGRESS, served.ingress)
        self._joined: dict[int, str] = {}
        for entry in reversed(journal.read("ingress", limit=MOST_INGRESSES)):
            self._reach(entry["number"], entry["address"])

    def join(self, address: str) -> int:
        """Give one more ingress a number and, from now on, routes; called from any thread.

        Args:
            address: of its inbox.
        """
        with self._joining:
            last = self.journal.last("ingress")
            number: int = (INGRESS if last is None else last["number"]) - 1
            generation, step = self._routes.generation, self.state.version.number
            self.journal.append("ingress", generation=generation, step=step, number=number, address=address)
            self._reach(number, address)
        return number

    def _reach(self, number: int, address: str) -> None:
        self.mailbox.transport.reach(number, address)
        self._joined[number] = address

    def give_back(self, missing: Sequence[Piece], step: int) -> GivenBack:
        """Read what nobody has from the checkpoint.

        Args:
            missing: pieces that nobody holds any more.
            step: of the checkpoint.
        """
        before = self.state.version
        restore = self.restore()
        return GivenBack(
            restore=replace(restore, everything=self.state.version is not before),
            step=self.state.version.number,
            text=f"{describe_pieces(missing)} had no holder left and came from {self.state.version.name}",
        )

    def restore(self) -> Restore:
        """Where everything can be read.

        Where what is served is there no more, the run that is followed gives what it has now: a step that its slots offer,
        or its newest checkpoint.

        Raises:
            StateLostError: it has neither.
        """
        before = self.state.version
        if self.served.run and (before.is_offered or not self.state.is_there):
            version = self._from_run(before)
            if version.checkpoint != before.checkpoint:
                self.state.jump_to(version, self._routes.generation)
            self.state.is_offered = version.is_offered
        return Restore(checkpoint=self.state.version.checkpoint)

    def _from_run(self, before: Version) -> Version:
        if (weights := self.follower.wait(0, OFFER_S)) is not None:
            is_same = weights.source == before.checkpoint
            return before if is_same else Version.offered(weights, after=before.number)
        newest = RunFolder(Path(self.served.run)).newest_checkpoint()
        if newest is None:
            raise StateLostError(
                f"the run in {self.served.run} does not train on this platform and has no checkpoint; start it again "
                "with its `pretrain` command, then the server"
            )
        return Version.of(newest.absolute(), after=before.number)

    def renewed(self, restore: Restore, step: int) -> tuple[Restore, int]:
        """As `Workload.renewed`: what a run offered may be gone since.

        Args:
            restore, step: of the generation that failed.
        """
        if not self.state.version.is_offered:
            return restore, step
        again = self.restore()
        return again, self.state.version.number

    @property
    def weights(self) -> str:
        """Where the version in force can be read at any time; empty where it was offered, and is no more."""
        version = self.state.version
        return "" if version.is_offered and not self.state.is_offered else version.checkpoint

    def earlier_in(self, plan: Plan) -> int:
        """As `ServedWeights.earlier_in`."""
        return self.state.earlier_in(plan)

    def may_enter(self, old: Plan, new: Plan, left_s: float) -> bool:
        """Once slots have what they get, and engines that leave have finished; or both had their time.

        Args:
            old, new: the plan in force, and the next one.
            left_s: seconds until slots that leave are gone in any case.
        """
        now = time.monotonic()
        has_gathered = self._has_gathered(old, new, now)
        if self.drains.begin(set(old.attention) - set(new.attention), now):
            self.route()
        if self.drains.is_due(now):
            for slot in self.drains.leaving:
                self.mailbox.post(slot, Drain())
        return (has_gathered and self.drains.is_over(now)) or left_s < LAST_S

    def avoid(self, slots: Collection[int]) -> None:
        """Have engines finish what they have and get nothing new, long before a plan without them comes.

        Args:
            slots: on nodes that are to be drained.
        """
        if set(slots) != self._avoided:
            self._avoided = set(slots)
            self.route()

    def _has_gathered(self, old: Plan, new: Plan, now: float) -> bool:
        """Whether all have read what a plan gives them; what can be read nowhere they get with the plan, from peers."""
        gathers, weights = self.gathers, self.weights
        before = {slot: set(old.pieces_of(slot)) for slot in new.addresses}
        wanted = {slot: [p for p in new.pieces_of(slot) if p not in held] for slot, held in before.items()}
        gathers.begin(wanted if weights else {}, now)
        if due := gathers.due(now):
            self.mailbox.transport.connect({**old.addresses, **new.addresses})
        for slot, pieces in due.items():
            body = Gather(
                pieces=pieces,
                job=self.spec,
                scheduler=self.mailbox.transport.address,
                step=self.state.version.number,
                weights=weights,
            )
            self.mailbox.post(slot, body)
        return gathers.is_over(now)

    def stay(self) -> None:
        """Let engines that were to leave go on."""
        if self.drains.begin((), time.monotonic()):
            self.route()

    def entered(self, plan: Plan) -> None:
        """Tell the ingress who answers now."""
        self.drains.begin((), time.monotonic())
        self.gathers.begin({}, time.monotonic())
        engines = {slot: plan.addresses[slot] for slot in plan.attention}
        self.route(Routes(generation=plan.generation, engines=engines))

    def route(self, routes: Routes | None = None) -> None:
        """Send the ingress new routes, or the last ones again."""
        routes = routes or self._routes
        draining = {*self.drains.leaving, *self._avoided} & set(routes.engines)
        self._routes = replace(routes, versions=self.state.names, draining=tuple(sorted(draining)))
        for number in self.mailbox.transport.gone(list(self._joined)):
            self._joined.pop(number, None)
        for number in (INGRESS, *list(self._joined)):
            self.mailbox.post(number, self._routes)
