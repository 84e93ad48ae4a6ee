"""The generations of a job: every change of who holds what, whatever its cause and whatever runs.

Loss of slots, resize, rebalance and a new scheduler all end in `_enter`: journal the plan, send it, wait until
every slot has its state. What goes wrong on the way starts the next generation; a piece that changes hands stays
with its old holders until the generation has settled, so nothing is lost meanwhile. Training settles by its next
commit, serving by the last `Installed` (workload.py).
"""

import threading
import time
from collections.abc import Callable, Collection
from dataclasses import replace
from functools import partial
from typing import Any

from sparseray.actors.installation import Restore
from sparseray.actors.state.assignment import Plan
from sparseray.actors.state.pieces import Piece
from sparseray.actors.wire.codec import to_plain
from sparseray.actors.wire.envelope import INGRESS
from sparseray.actors.wire.messages import Settled
from sparseray.errors import SlotsLostError, StateLostError
from sparseray.log import get_logger
from sparseray.platform.config import ClusterConfig
from sparseray.platform.fleet.control import Control, Fleet, Loss, StalledError
from sparseray.platform.installing import install
from sparseray.platform.planning import stages
from sparseray.platform.planning.holders import Holders
from sparseray.platform.planning.inventory import Roles, num_slots
from sparseray.platform.planning.replan import Moves, make_plan, moves, replan, role_slots
from sparseray.platform.planning.shrink import after_loss
from sparseray.platform.run.events import Change, Events, role_holders
from sparseray.platform.run.history import JobHistory, Wish
from sparseray.platform.run.journal import Journal
from sparseray.platform.workload import Workload

log = get_logger(__name__)

REFILL_S = 0.02
MOST_STALLS = 5


class Generations:
    """Owns the plan of a job and changes it.

    Args:
        cluster: replication and how slots share roles.
        control: conversation with the slots.
        journal, events: where decisions go, and what is told of them.
        workload: what runs.
        history: what was decided for this job before, by a scheduler that died.
        size: bytes of a piece.
    """

    def __init__(
        self,
        cluster: ClusterConfig,
        control: Control,
        journal: Journal,
        events: Events,
        workload: Workload,
        *,
        history: JobHistory,
        size: Callable[[Piece], int],
    ) -> None:
        self.cluster, self.control, self.journal, self.events = cluster, control, journal, events
        self.workload, self.size = workload, size
        self.wish = history.wish or Wish(roles=workload.inventory.roles(cluster))
        self.plan: Plan | None = None
        self.holders = Holders()
        self.generation = history.generation
        self.since_change = 0
        self.unfinished = -1
        """The generation in which, after a loss, those who were left went on with what they had."""
        self.known: set[int] = set()
        self._pending: Change | None = None
        self._stalls = 0
        self._asking = threading.Lock()

    @property
    def fleet(self) -> Fleet:
        """The slots."""
        return self.control.fleet

    @property
    def wanted(self) -> Roles:
        """Slots of each role that plans shall have."""
        return self.workload.inventory.shared(self.wish.lent.left_of(self.wish.roles))

    @property
    def standby(self) -> int:
        """Spare slots that there shall be."""
        return max(0, self.cluster.standby - self.wish.lent.standby)

    @property
    def lent_slots(self) -> int:
        """Slots of the wish that the run does without."""
        return self.wish.lent.slots(colocated=self.cluster.colocated)

    def ask(self, **changes: Any) -> None:
        """Want something else from now on; it is journalled first, so that no scheduler's death undoes it.

        Users, the policy and lending wish from threads of their own.
        """
        step = self.workload.commit.step if self.workload.commit else 0
        with self._asking:
            wish = replace(self.wish, **changes)
            self.journal.append("wish", generation=self.generation, step=step, wish=to_plain(wish))
            self.wish = wish

    # -- causes of a change ------------------------------------------------------------------------

    def begin(self, step: int, restore: Restore) -> None:
        """Place everything for the first time.

        Args:
            step: that the state is of.
            restore: where it comes from.
        """
        members = self.fleet.members()
        self.plan = make_plan(
            generation=self.generation + 1,
            addresses={slot: m.address for slot, m in members.items()},
            replication=self.workload.inventory.replicas(self.wanted, self.cluster.replication),
            colocated=self.cluster.colocated,
            nodes={slot: m.node for slot, m in members.items()},
            inventory=self.workload.inventory,
            roles=self.wanted,
        )
        try:
            self._enter(self.plan, step, restore=restore, pulls=None)
        except (SlotsLostError, StalledError) as error:
            self._settle(error, step, restore=restore)
        self.tell("start", step, f"{len(self.plan.addresses)} slots")

    def take_over(self, plan: Plan, step: int) -> None:
        """Go on with a running job after its scheduler died: same slots, next generation.

        Args:
            plan: the last one that all slots had taken.
            step: the last committed one.
        """
        self.plan = plan
        self.holders.settle(plan)
        gone = sorted(set(role_holders(plan)) - set(self.fleet.members()))
        now = time.monotonic()
        losses = [Loss(slot=slot, cause="gone when the scheduler came back", noticed=now) for slot in gone]
        self._pending = Change(kind="scheduler", text="a new scheduler took over", noticed=now)
        self.tell("scheduler", step, "a new scheduler took over the running job")
        error = SlotsLostError(losses)
        self._tell_losses(error, step)
        self._settle(error, step, restore=None)

    def recover(self, error: Exception, step: int) -> int:
        """Go on after a loss or a stall, and return the step that the slots hold now.

        Args:
            error: what was noticed.
            step: the last committed one.

        Raises:
            StateLostError: every replica of something is gone.
            RuntimeError: nothing moves although all slots answer.
        """
        if isinstance(error, SlotsLostError):
            first = error.losses[0]
            self._pending = Change(
                kind="recovered", text=str(error), noticed=first.noticed, silent_s=first.silent_s
            )
            self._tell_losses(error, step)
            self._stalls = 0
        else:
            self._stalls += 1
            if self._stalls > MOST_STALLS:
                raise RuntimeError(f"step {step + 1} does not end although all slots answer: {error}")
            self._pending = Change(kind="recovered", text=f"stalled: {error}", noticed=time.monotonic())
            self.tell("lost", step, f"a message: {error}")
        return self._settle(error, step, restore=None)

    def change(self, new: Plan, step: int) -> Moves:
        """Enter a plan that was wished for, and return what moved.

        Args:
            new: the plan.
            step: that is committed.

        Raises:
            SlotsLostError, StalledError: on the way; `recover` goes on from there.
        """
        pulls = moves(self.holders.among(self.fleet.members()), new, self.size)
        self._enter(new, step, restore=None, pulls=pulls)
        return pulls

    def reload(self, step: int, restore: Restore, text: str) -> None:
        """Throw away all state and load other state in its place, as that of the committed step.

        Args:
            step: the last committed one.
            restore: where the state comes from.
            text: why, for people.
        """
        self.tell("restored", step, text)
        try:
            self._enter(self.replanned(self.wanted), step, restore=restore, pulls=None)
        except (SlotsLostError, StalledError) as error:
            self._settle(error, step, restore=restore)

    def replanned(self, roles: Roles, without: Collection[int] = ()) -> Plan:
        """The next plan, from the slots that are there.

        Args:
            roles: wanted slots of each role.
            without: slots that shall have none; those that have none on a node which is to be drained get none, either.
        """
        assert self.plan is not None
        members = self.fleet.members()
        if not members:
            raise StateLostError("all slots are gone; the same command resumes from the last checkpoint")
        again = partial(
            replan,
            self.plan,
            generation=self.generation + 1,
            addresses={slot: m.address for slot, m in members.items()},
            roles=roles,
            replication=self.workload.inventory.replicas(roles, self.cluster.replication),
            colocated=self.cluster.colocated,
            nodes={slot: m.node for slot, m in members.items()},
            loads=self.wish.packed_by,
            parts=self.workload.inventory.parts_for(roles),
        )
        leaving = {*without, *(set(self.fleet.draining()) - self.plan.holders)}
        leaving = leaving if set(members) - leaving else set()
        plan = again(avoid=leaving)
        # A slot that has lost its role to a loan would be kept as a backup, and never be free to go.
        idle = set(members).difference(*role_slots(plan).values(), leaving) if self.lent_slots else set()
        is_enough = len(members) - len(idle | leaving) >= self.cluster.replication
        return again(avoid=idle | leaving) if idle and is_enough else plan

    # -- entering ------------------------------------------------------------------------------------

    def _settle(self, error: Exception, step: int, *, restore: Restore | None) -> int:
        """Try generations until one holds; what is lost on the way is left out of the next."""
        while True:
            if isinstance(error, SlotsLostError):
                self.holders.forget({loss.slot for loss in error.losses})
            started = time.monotonic()
            self._refill()
            left = after_loss(self.plan, self.fleet.members(), self.workload.inventory, self.generation + 1)
            new = left or self.replanned(self.wanted)
            pulls = None
            if restore is not None and restore.everything:
                restore, step = self.workload.renewed(restore, step)
            else:
                held = self.holders.among(self.fleet.members())
                # What serves does that by `shrink.after_loss`, above.
                if self.plan is not None and self.workload.is_settled_by_commit:
                    wished, new = new, stages.after_loss(self.plan, new, held, self.size)
                    self.unfinished = new.generation if new is not wished else -1
                pulls = moves(held, new, self.size)
                if pulls.missing:
                    found = self.workload.give_back(pulls.missing, step)
                    restore, step = found.restore, found.step
                    self.tell("restored", step, found.text)
            try:
                if self._pending is not None:
                    self._pending.phases["detect"] = self._pending.silent_s
                    self._pending.phases["decide"] = time.monotonic() - started
                is_fresh = restore is not None and restore.everything
                self._enter(new, step, restore=restore, pulls=None if is_fresh else pulls)
                return step
            except (SlotsLostError, StalledError) as next_error:
                log.warning("generation %d failed: %s", new.generation, next_error)
                error = next_error
                if isinstance(error, SlotsLostError):
                    self._tell_losses(error, step)

    def _refill(self) -> None:
        """Start slots where none is left; without replicas a checkpoint has all that they need."""
        if self.fleet.members() or self.cluster.replication > 1:
            return
        self.fleet.start(num_slots(self.wanted, colocated=self.cluster.colocated))
        while self.fleet.starting():
            time.sleep(REFILL_S)

    def _enter(self, new: Plan, step: int, *, restore: Restore | None, pulls: Moves | None) -> None:
        """Journal a plan, send it, and wait until every slot has its roles and state."""
        started = time.monotonic()
        self.generation = new.generation
        self.journal.append("plan", generation=new.generation, step=step, plan=to_plain(new))
        mailbox, ingress = self.control.mailbox, self.workload.ingress
        mailbox.adopt(new.generation)
        mailbox.transport.connect({**new.addresses, **({INGRESS: ingress} if ingress else {})})
        sources = {source for listed in (pulls.pulls.values() if pulls else ()) for source in listed}
        self.control.needed = role_holders(new) | sources
        exchange, size = self.cluster.exchange, self.size
        install(
            self.control, self.workload, new, step, restore=restore, pulls=pulls, exchange=exchange, size=size
        )
        self.journal.append("active", generation=new.generation, step=step)
        self._entered(new, step, pulls, others_keep=restore is None or not restore.everything)
        if self._pending is not None:
            now = time.monotonic()
            self._pending.phases["move"], self._pending.installed = now - started, now
        if not self.workload.is_settled_by_commit:
            self.control.post(new.addresses, Settled(), step=step + 1)
            self.settled(step)

    def _entered(self, new: Plan, step: int, pulls: Moves | None, *, others_keep: bool) -> None:
        """Take note that all slots have a plan."""
        old, self.plan = self.plan, new
        self.known |= set(new.addresses)
        self.holders.gain(new, others_keep=others_keep)
        self.control.needed = role_holders(new)
        self.since_change = 0
        if pulls is not None:
            self.events.metrics.record("elastic_moved_bytes_total", pulls.num_bytes(self.size))
        self.show()
        log.info("generation %d follows %s", new.generation, old.generation if old else "none")
        self.workload.entered(new)

    def settled(self, step: int) -> None:
        """Take note that the generation works: it ends a change for good. Called after every commit."""
        assert self.plan is not None
        self.holders.settle(self.plan)
        self.since_change += 1
        self._stalls = 0
        self.events.watch(self.fleet.ages(), self.control.mailbox.dropped)
        if self._pending is not None:
            change, self._pending = self._pending, None
            change.end(time.monotonic())
            for phase, seconds in change.phases.items():
                self.events.metrics.record("elastic_recovery_seconds", seconds, phase=phase)
            text = (
                f"back after {change.phases['total']:.2f} s ({change.parts()}), generation {self.generation}"
            )
            self.tell(change.kind, step, text, phases=change.phases)

    # -- for people ----------------------------------------------------------------------------------

    def is_spare(self, slot: int) -> bool:
        """Whether other members hold everything that a slot holds."""
        return self.holders.is_spare(slot, self.fleet.members())

    def replicas(self) -> int:
        """Holders that the piece with the fewest has."""
        return self.holders.fewest(self.fleet.members())

    def show(self) -> None:
        """Show the plan in force as metrics."""
        assert self.plan is not None
        self.events.gauges(self.plan, set(self.fleet.members()), self.replicas())
        self.events.metrics.record("elastic_lent_slots", self.lent_slots)

    def _tell_losses(self, error: SlotsLostError, step: int) -> None:
        assert self.plan is not None
        for loss in error.losses:
            roles = "+".join(self.plan.roles_of(loss.slot))
            self.tell("lost", step, f"slot {loss.slot} ({roles}): {loss.cause}")

    def tell(self, kind: str, step: int, text: str, **more: Any) -> None:
        """Tell of an event after a step, under the plan in force.

        Args:
            kind: of the event.
            step: after which it came.
            text: for people.
            more: further values of the record.
        """
        assert self.plan is not None
        members = set(self.fleet.members())
        self.events.tell(
            kind, step, text, generation=self.generation, plan=self.plan, members=members, **more
        )
