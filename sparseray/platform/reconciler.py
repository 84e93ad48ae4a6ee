"""Brings a job's plan to what is wanted of it: users' wishes, the policy's, and slots that come and go.

Asked between two steps of training, and all the time in serving: observe (what is there), policy (pure), act.
"""

import time
from collections.abc import Collection
from dataclasses import dataclass
from math import inf

import numpy as np
import numpy.typing as npt

from sparseray.actors.state.assignment import Plan
from sparseray.platform.generations import Generations
from sparseray.platform.planning.inventory import Roles
from sparseray.platform.planning.moves import moves
from sparseray.platform.planning.policy import (
    HURRY_S,
    Rebalance,
    Resize,
    Start,
    View,
    Withdraw,
    decide,
    leaving_slots,
)
from sparseray.platform.planning.requests import check_request
from sparseray.platform.planning.stages import Pace, next_stage
from sparseray.platform.run.events import role_holders
from sparseray.platform.run.history import JobHistory
from sparseray.platform.run.ledger import Ledger
from sparseray.platform.run.machines import Machines

LOAD_DECAY = 0.9


@dataclass(frozen=True, kw_only=True)
class _Way:
    """What a plan in force is on the way to.

    Args:
        kind, text: of the event when it is reached.
        generation: of the plan.
        ahead: slots that held nothing before the first stage.
    """

    kind: str
    text: str
    generation: int
    ahead: set[int]


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
        self.pace = Pace()
        self._on_the_way: _Way | None = None
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
            draining = generations.fleet.draining()
            left_s = min((draining.get(slot, 0.0) for slot in decision.without), default=inf)
            text = f"slot {_listed(decision.without)} left" if decision.without else f"{self.sizes()} to"
            kind = "drained" if decision.without else "resized"
            self._go_on(kind, text, step, decision.roles, decision.without, left_s)
        elif (way := self._way) is not None:
            self._go_on(way.kind, way.text, step, generations.wanted)
        elif generations.unfinished == generations.generation:
            self._go_on("mended", "everything has its holders again", step, generations.wanted)
        elif isinstance(decision, Rebalance):
            # From now on every plan is packed by these loads: counting again would move the experts back.
            packed_by = tuple(tuple(row) for row in decision.loads)
            generations.ask(packed_by=packed_by)
            self._go_on("rebalanced", "experts packed by load", step, generations.wanted)
        elif generations.since_change > 0:
            self._retire_idle()

    def _go_on(
        self,
        kind: str,
        text: str,
        step: int,
        roles: Roles,
        without: Collection[int] = (),
        left_s: float = inf,
    ) -> None:
        """Enter the plan that is wished for, or the next one on the way there, unless training is to go on first.

        Args:
            kind, text: of the event at the end.
            step: the last committed one.
            roles, without: as in `Generations.replanned`.
            left_s: seconds until slots that leave are gone in any case.
        """
        generations, way, before = self.generations, self._way, self._plan
        is_resting = generations.since_change == 0 or not self.pace.is_due(time.monotonic())
        if self._is_on_the_way and is_resting and left_s > HURRY_S:
            return
        new = generations.replanned(roles, without)
        stage, left = self._stage(new, left_s)
        if stage is not new:
            started = time.monotonic()
            moved = self.change("staged", f"{left / 1e6:.2f} MB to go", step, stage)
            now_s = time.monotonic()
            self.pace.count(moved, now_s - started, now_s)
            ahead = (way.ahead if way else set()) | (stage.holders - before.holders)
            self._on_the_way = _Way(kind=kind, text=text, generation=stage.generation, ahead=ahead)
        elif generations.workload.may_enter(before, new, left_s):
            self.change(kind, text, step, new)

    def _stage(self, new: Plan, left_s: float) -> tuple[Plan, int]:
        """As `next_stage`, and all bytes to go; what serves has its pieces already, and who has little time moves at once."""
        generations = self.generations
        if not generations.workload.moves_in_stages:
            return new, 0
        held = generations.holders.among(generations.fleet.members())
        left = moves(held, new, generations.size).num_bytes(generations.size)
        if left_s < HURRY_S + 2 * self.pace.seconds(left):
            return new, left
        return next_stage(self._plan, new, held, generations.size, self.pace.budget), left

    @property
    def _way(self) -> "_Way | None":
        """Where the plan in force leads; None where it is none on the way, or of another's making."""
        way = self._on_the_way
        return way if way is not None and way.generation == self.generations.generation else None

    @property
    def _is_on_the_way(self) -> bool:
        """Whether the plan in force is to be followed by another one, whatever is wished for."""
        return self._way is not None or self.generations.unfinished == self.generations.generation

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

    def change(self, kind: str, text: str, step: int, new: Plan) -> int:
        """Enter a plan, tell how long that took, and return the bytes that moved.

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
        return moved

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
        # Slots that hold something of what they are to play, and nothing else, wait for their roles as if they had nothing.
        ahead = self._way.ahead if self._way else set()
        return View(
            plan=self._plan,
            roles=generations.wanted,
            ready=tuple(sorted(set(fleet.members()) - (role_holders(self._plan) - ahead) - set(draining))),
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
        return not self._is_short() and not self._is_on_the_way and generations.since_change > 0

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
