"""Brings a job's plan to what is wanted of it: users' wishes, the policy's, and slots that come and go.

Asked between two steps of training, and all the time in serving: observe (what is there), policy (pure), act.
"""

import time
from collections.abc import Collection
from math import inf

import numpy as np
import numpy.typing as npt

from sparseray.actors.state.assignment import Plan
from sparseray.platform.generations import Generations
from sparseray.platform.planning.policy import (
    Rebalance,
    Resize,
    Start,
    View,
    Withdraw,
    decide,
    leaving_slots,
)
from sparseray.platform.planning.requests import check_request
from sparseray.platform.run.events import role_holders
from sparseray.platform.run.history import JobHistory
from sparseray.platform.run.ledger import Ledger
from sparseray.platform.run.machines import Machines

LOAD_DECAY = 0.9


class Reconciler:
    """Acts on the difference between the plan in force and what is wanted.

    Args:
        generations: whose plan it is.
        ledger: where the time goes.
        machines: that have computed the run.
        history: of the job; loads of its last steps.
    """

    def __init__(
        self, generations: Generations, ledger: Ledger, machines: Machines, history: JobHistory
    ) -> None:
        self.generations, self.ledger, self.machines = generations, ledger, machines
        self._draining: set[int] = set()
        self.load: npt.NDArray[np.float64] = np.zeros((0, 0))
        for counts in history.counts:
            self.count(np.array(counts, np.int64))

    def count(self, counts_LE: npt.NDArray[np.int64]) -> None:
        """Take note of a step's tokens per moe layer and expert."""
        if counts_LE.size:
            fresh = counts_LE.astype(np.float64)
            same = self.load.shape == fresh.shape
            self.load = LOAD_DECAY * self.load + (1 - LOAD_DECAY) * fresh if same else fresh

    def request(self, role: str, count: int) -> None:
        """Ask for another number of slots of a role; it is reached in some later generation.

        Args:
            role: attention, experts or memory.
            count: slots that shall play it.

        Raises:
            ConfigError: it cannot be; nothing was changed.
        """
        generations = self.generations
        fleet = generations.fleet
        roles = check_request(
            role,
            count,
            generations.wish.roles,
            generations.workload.inventory,
            generations.cluster,
            slots=len(fleet.members()) - len(fleet.draining()) + fleet.starting() + generations.lent_slots,
            room=fleet.room(),
        )
        generations.ask(roles=roles)

    def reconcile(self, step: int) -> None:
        """Do one thing that the policy says: start slots, resize, rebalance, retire.

        Raises:
            SlotsLostError, StalledError: on the way; `Generations.recover` goes on from there.
        """
        generations = self.generations
        control = generations.control
        control.check()
        for loss in control.idle_losses:
            generations.tell("lost", step, f"slot {loss.slot} (standby): {loss.cause}")
        control.idle_losses.clear()
        self._welcome(step)
        self._tell_drains(step)
        if text := self.machines.news(member.machine for member in generations.fleet.members().values()):
            generations.tell("machine", step, text)
        decision = decide(self._view())
        if isinstance(decision, Start):
            generations.fleet.start(decision.count)
        elif isinstance(decision, Withdraw):
            generations.fleet.withdraw(decision.count)
        elif isinstance(decision, Resize):
            new = generations.replanned(decision.roles, decision.without)
            draining = generations.fleet.draining()
            left_s = min((draining.get(slot, 0.0) for slot in decision.without), default=inf)
            if generations.workload.may_enter(self._plan, new, left_s):
                if decision.without:
                    self.change("drained", f"slot {_listed(decision.without)} left", step, new)
                else:
                    self.change("resized", f"{self.sizes()} to", step, new)
        elif isinstance(decision, Rebalance):
            # From now on every plan is packed by these loads: counting again would move the experts back.
            packed_by = tuple(tuple(row) for row in decision.loads)
            generations.ask(packed_by=packed_by)
            text = "experts packed by load"
            self.change("rebalanced", text, step, generations.replanned(generations.wanted))
        elif generations.since_change > 0:
            self._retire_idle()

    def _welcome(self, step: int) -> None:
        """Take note of slots that have become ready."""
        new = set(self.generations.fleet.members()) - self.generations.known
        self.generations.known |= new
        if new:
            self.generations.tell("ready", step, f"slot {_listed(new)} is warm")

    def _tell_drains(self, step: int) -> None:
        """Tell of slots whose node is to be drained, once."""
        draining = self.generations.fleet.draining()
        new, self._draining = set(draining) - self._draining, set(draining)
        if new:
            left_s = min(draining[slot] for slot in new)
            when = "" if left_s == inf else f", which is gone in {max(0.0, left_s):.0f} s"
            text = f"slot {_listed(new)} must leave: Ray drains the node{when}"
            self.generations.tell("draining", step, text)

    def change(self, kind: str, text: str, step: int, new: Plan) -> None:
        """Enter a plan and tell how long that took.

        Args:
            kind, text: of the event.
            step: the last committed one.
            new: the plan.
        """
        generations, started = self.generations, time.monotonic()
        with self.ledger.state("resizing"):
            pulls = generations.change(new, step)
        seconds, moved = time.monotonic() - started, pulls.num_bytes(generations.size)
        generations.events.metrics.record("elastic_resize_pause_seconds", seconds)
        text = f"{text} {self.sizes()}" if kind == "resized" else text
        generations.tell(
            kind,
            step,
            f"{text}, {moved / 1e6:.2f} MB moved in {seconds * 1000:.0f} ms",
            pause=seconds,
            moved=moved,
        )

    def _retire_idle(self) -> None:
        """End slots beyond the wanted standby ones, and those whose node is drained, once no state is left with them."""
        fleet = self.generations.fleet
        idle = set(fleet.members()) - role_holders(self._plan)
        leaving = idle & set(fleet.draining())
        surplus = [] if self._is_short() else sorted(idle - leaving)[self.generations.standby :]
        for slot in (*leaving, *surplus):
            fleet.retire(slot)
            self.generations.show()

    def _view(self) -> View:
        generations, c = self.generations, self.generations.cluster
        fleet = generations.fleet
        draining = fleet.draining()
        return View(
            plan=self._plan,
            roles=generations.wanted,
            ready=tuple(sorted(set(fleet.members()) - role_holders(self._plan) - set(draining))),
            starting=fleet.starting(),
            waiting=fleet.waiting(),
            free_slots=fleet.room(),
            standby=generations.standby,
            expert_load=self.load.tolist(),
            steps_since_change=generations.since_change,
            rebalance_above=c.rebalance_above,
            rebalance_every=c.rebalance_every,
            colocated=c.colocated,
            parts=generations.workload.inventory.parts_for(generations.wanted),
            draining=draining,
        )

    @property
    def _plan(self) -> Plan:
        assert self.generations.plan is not None
        return self.generations.plan

    def is_settled(self) -> bool:
        """Whether the plan is as wanted and no change is under way."""
        generations = self.generations
        if generations.plan is None or leaving_slots(generations.plan, generations.fleet.draining()):
            return False
        return not self._is_short() and generations.since_change > 0

    def _is_short(self) -> bool:
        plan, wanted = self._plan, self.generations.wanted
        now = (len(plan.attention), len(plan.expert_primaries), len(plan.memory_primaries))
        return now != (wanted.attention, wanted.experts, wanted.memory)

    def sizes(self) -> str:
        """The number of slots of each role, as people write it."""
        p = self._plan
        return f"{len(p.attention)}+{len(p.expert_primaries)}+{len(p.memory_primaries)}"

    def finish(self, step: int) -> None:
        """Take note that the run has ended."""
        spent = ", ".join(f"{s} {seconds:.1f} s" for s, seconds in self.ledger.seconds.items() if seconds)
        goodput = self.ledger.goodput
        self.generations.tell("end", step, f"goodput {goodput:.3f} ({spent})", goodput=goodput)


def _listed(slots: Collection[int]) -> str:
    return ", ".join(map(str, sorted(slots)))
