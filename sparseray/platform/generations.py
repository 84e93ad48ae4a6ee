"""The generations of a run: every change of who holds what, whatever its cause.

Loss of slots, resize, rebalance and a new scheduler all end in `_enter`: journal the plan, send it,
wait until every slot has its state. What goes wrong on the way starts the next generation; a piece
that changes hands stays with its old holders until the first commit, so nothing is lost meanwhile.
"""

import time
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

import numpy as np

from sparseray.actors.installation import InstallPlan, JobSpec, PullFrom, Restore
from sparseray.actors.state.assignment import Plan
from sparseray.actors.state.pieces import Piece
from sparseray.actors.wire.codec import to_plain
from sparseray.actors.wire.messages import Commit, Installed, Stale
from sparseray.errors import SlotsLostError, StateLostError
from sparseray.log import get_logger
from sparseray.platform.config import RunConfig
from sparseray.platform.fleet.control import Control, Fleet, Loss, StalledError
from sparseray.platform.metrics.exporter import Metrics
from sparseray.platform.planning.inventory import Inventory, Roles
from sparseray.platform.planning.policy import Rebalance, Resize, Start, View, decide
from sparseray.platform.planning.replan import Moves, holdings, make_plan, moves, replan
from sparseray.platform.planning.requests import check_request
from sparseray.platform.run import checkpoint
from sparseray.platform.run.events import Change, Events, describe_pieces, role_holders
from sparseray.platform.run.folder import RunFolder
from sparseray.platform.run.history import JobHistory, Wish
from sparseray.platform.run.journal import Journal
from sparseray.platform.run.ledger import Ledger

log = get_logger(__name__)

RESEND_S = 1.0
INSTALL_DEADLINE_S = 120.0
MOST_STALLS = 5
LOAD_DECAY = 0.9


class Elastic:
    """Owns the plan of a run and changes it.

    Args:
        config: the run.
        control: conversation with the slots.
        journal, folder, metrics, ledger: where decisions, events, series and time go.
        inventory: what there is to place.
        history: what was decided for this job before, by a scheduler that died.
        size: bytes of a piece.
        job: what slots build.
        on_event: told of every event.
    """

    def __init__(
        self,
        config: RunConfig,
        control: Control,
        journal: Journal,
        folder: RunFolder,
        metrics: Metrics,
        ledger: Ledger,
        *,
        inventory: Inventory,
        history: JobHistory,
        size: Callable[[Piece], int],
        job: JobSpec,
        on_event: Callable[[dict[str, Any]], None],
    ) -> None:
        self.config, self.control, self.journal = config, control, journal
        self.folder, self.metrics, self.ledger = folder, metrics, ledger
        self.inventory, self.size, self.job = inventory, size, job
        self.events = Events(folder, metrics, config.cluster.replication, on_event)
        self.wish = history.wish or Wish(roles=inventory.roles(config.cluster))
        self.plan: Plan | None = None
        self.commit: Commit | None = None
        self.load = np.zeros((0, 0))
        for counts in history.counts:
            self._average(np.array(counts, np.int64))
        self.held: dict[Piece, set[int]] = {}
        self.generation = history.generation
        self.since_change = 0
        self._pending: Change | None = None
        self._stalls = 0
        self._known: set[int] = set()

    @property
    def fleet(self) -> Fleet:
        return self.control.fleet

    @property
    def wanted(self) -> Roles:
        """Slots of each role that plans shall have."""
        return self.wish.roles

    def ask(self, wish: Wish) -> None:
        """Want something else from now on; it is journalled first, so that no scheduler's death undoes it."""
        step = self.commit.step if self.commit else 0
        self.journal.append("wish", generation=self.generation, step=step, wish=to_plain(wish))
        self.wish = wish

    # -- entering a generation -----------------------------------------------------------------

    def begin(self, step: int, restore: str) -> None:
        """Place everything for the first time, with state from a checkpoint or, "", from the seed."""
        members = self.fleet.members()
        c = self.config.cluster
        self.plan = make_plan(
            generation=self.generation + 1,
            addresses={slot: m.address for slot, m in members.items()},
            replication=c.replication,
            colocated=c.colocated,
            nodes={slot: m.node for slot, m in members.items()},
            inventory=self.inventory,
            roles=self.wanted,
        )
        try:
            self._enter(self.plan, step, restore=Restore(checkpoint=restore), pulls=None)
        except (SlotsLostError, StalledError) as error:
            self._settle(error, step, restore=Restore(checkpoint=restore))
        self._event("start", step, f"{len(self.plan.addresses)} slots")

    def take_over(self, plan: Plan, step: int) -> None:
        """Go on with a running job after its scheduler died: same slots, next generation.

        Args:
            plan: the last one that all slots had taken.
            step: the last committed one.
        """
        self.plan = plan
        self.held = {piece: set(slots) for piece, slots in holdings(plan).items()}
        gone = sorted(set(role_holders(plan)) - set(self.fleet.members()))
        now = time.monotonic()
        losses = [Loss(slot=slot, cause="gone when the scheduler came back", noticed=now) for slot in gone]
        self._pending = Change(kind="scheduler", text="a new scheduler took over", noticed=now)
        self._event("scheduler", step, "a new scheduler took over the running job")
        error = SlotsLostError(losses)
        self._tell_losses(error, step)
        self._settle(error, step, restore=None)

    def recover(self, error: Exception, step: int) -> int:
        """Go on after a loss or a stall, and return the step that the slots hold now.

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
            self._event("lost", step, f"a message: {error}")
        return self._settle(error, step, restore=None)

    def _tell_losses(self, error: SlotsLostError, step: int) -> None:
        assert self.plan is not None
        for loss in error.losses:
            roles = "+".join(self.plan.roles_of(loss.slot))
            self._event("lost", step, f"slot {loss.slot} ({roles}): {loss.cause}")

    def _settle(self, error: Exception, step: int, *, restore: Restore | None) -> int:
        """Try generations until one holds; what is lost on the way is left out of the next."""
        while True:
            if isinstance(error, SlotsLostError):
                gone = {loss.slot for loss in error.losses}
                self.held = {piece: slots - gone for piece, slots in self.held.items()}
            started = time.monotonic()
            new = self._replanned(self.wanted)
            change = None if restore else moves(self._live_holders(), new, self.size)
            if change is not None and change.missing:
                restore, step = self._give_back(change, step)
                change = None
            try:
                if self._pending is not None:
                    self._pending.phases["detect"] = self._pending.silent_s
                    self._pending.phases["decide"] = time.monotonic() - started
                self._enter(new, step, restore=restore, pulls=change)
                return step
            except (SlotsLostError, StalledError) as next_error:
                log.warning("generation %d failed: %s", new.generation, next_error)
                error = next_error
                if isinstance(error, SlotsLostError):
                    self._tell_losses(error, step)

    def _give_back(self, change: Moves, step: int) -> tuple[Restore, int]:
        """Restore what nobody holds any more from the newest checkpoint, or stop where that is not wanted."""
        newest = self.folder.newest_checkpoint()
        back = checkpoint.read_manifest(newest)["step"] if newest else 0
        what = describe_pieces(change.missing)
        where = str(newest) if newest else "its seed (no checkpoint was written yet)"
        if self.config.cluster.replication > 1:
            raise StateLostError(
                f"all {self.config.cluster.replication} replicas of {what} are gone after step {step}; the same "
                f"command resumes from {where}, {step - back} steps back"
            )
        self._event("restored", back, f"{what} had one holder: going back {step - back} steps to {where}")
        self.folder.rewind(back)
        self.journal.append("restore", generation=self.generation, step=back, checkpoint=str(newest or ""))
        self.commit = None
        return Restore(checkpoint=str(newest or "")), back

    def _enter(self, new: Plan, step: int, *, restore: Restore | None, pulls: Moves | None) -> None:
        """Journal a plan, send it, and wait until every slot has its roles and state."""
        started = time.monotonic()
        self.generation = new.generation
        self.journal.append("plan", generation=new.generation, step=step, plan=to_plain(new))
        mailbox = self.control.mailbox
        mailbox.adopt(new.generation)
        mailbox.transport.connect(new.addresses)
        sources = {source for listed in (pulls.pulls.values() if pulls else ()) for source in listed}
        self.control.needed = role_holders(new) | sources

        def send(slots: Collection[int]) -> None:
            for slot in slots:
                own = pulls.pulls.get(slot, {}) if pulls else {}
                body = InstallPlan(
                    plan=new,
                    job=self.job,
                    scheduler=mailbox.transport.address,
                    step=step,
                    restore=restore,
                    commit=self.commit,
                    pulls=tuple(PullFrom(source=source, pieces=tuple(p)) for source, p in own.items()),
                )
                self.control.post([slot], body, step=step)

        send(new.addresses)
        self._wait_until_installed(set(new.addresses), send, step)
        self.journal.append("active", generation=new.generation, step=step)
        old, self.plan = self.plan, new
        self._known |= set(new.addresses)
        gained = {piece: set(slots) for piece, slots in holdings(new).items()}
        kept = {} if restore else self._live_holders()
        self.held = {piece: slots | kept.get(piece, set()) for piece, slots in gained.items()}
        self.control.needed = role_holders(new)
        self.since_change = 0
        now = time.monotonic()
        if self._pending is not None:
            self._pending.phases["move"], self._pending.installed = now - started, now
        if pulls is not None:
            self.metrics.record("elastic_moved_bytes_total", pulls.num_bytes(self.size))
        self._record_gauges()
        log.info("generation %d follows %s", new.generation, old.generation if old else "none")

    def _wait_until_installed(
        self, waiting: set[int], send: Callable[[Collection[int]], None], step: int
    ) -> None:
        deadline, sent = time.monotonic() + INSTALL_DEADLINE_S, time.monotonic()
        while waiting:
            try:
                message = next(self.control.messages(Installed, Stale, deadline_s=RESEND_S))
            except StalledError:
                if time.monotonic() > deadline:
                    raise
                send(waiting)
                continue
            if isinstance(message.body, Stale):
                # It lives, but what it holds is of another step: it starts empty in the next generation.
                loss = Loss(
                    slot=message.source, cause=f"its state is not of step {step}", noticed=time.monotonic()
                )
                raise SlotsLostError([loss])
            waiting.discard(message.source)
            waiting &= set(self.fleet.members())
            if time.monotonic() - sent > RESEND_S:
                send(waiting)
                sent = time.monotonic()

    # -- between two steps ---------------------------------------------------------------------

    def committed(self, commit: Commit) -> None:
        """Take note of a committed step: it ends a change of generation for good."""
        assert self.plan is not None
        self.commit = commit
        self._average(commit.counts_LE.numpy())
        self.held = {piece: set(slots) for piece, slots in holdings(self.plan).items()}
        self.since_change += 1
        self._stalls = 0
        self.events.watch(self.fleet.ages(), self.control.mailbox.dropped)
        if self._pending is not None:
            change, self._pending = self._pending, None
            change.end(time.monotonic())
            for phase, seconds in change.phases.items():
                self.metrics.record("elastic_recovery_seconds", seconds, phase=phase)
            text = (
                f"back after {change.phases['total']:.2f} s ({change.parts()}), generation {self.generation}"
            )
            self._event(change.kind, commit.step, text, phases=change.phases)

    def _average(self, counts: np.ndarray) -> None:
        if counts.size:
            fresh = counts.astype(np.float64)
            same = self.load.shape == fresh.shape
            self.load = LOAD_DECAY * self.load + (1 - LOAD_DECAY) * fresh if same else fresh

    def between_steps(self, step: int) -> None:
        """Do what the policy says: start slots, resize, rebalance, retire.

        Raises:
            SlotsLostError, StalledError: on the way; `recover` goes on from there.
        """
        assert self.plan is not None
        self.control.check()
        for loss in self.control.idle_losses:
            self._event("lost", step, f"slot {loss.slot} (standby): {loss.cause}")
        self.control.idle_losses.clear()
        self._welcome(step)
        decision = decide(self._view())
        if isinstance(decision, Start):
            self.fleet.start(decision.count)
        elif isinstance(decision, Resize):
            before = self.sizes()
            self._change("resized", f"{before} to", step, self._replanned(decision.roles))
        elif isinstance(decision, Rebalance):
            # From now on every plan is packed by these loads: counting again would move the experts back.
            self.ask(replace(self.wish, packed_by=tuple(tuple(row) for row in decision.loads)))
            self._change("rebalanced", "experts packed by load", step, self._replanned(self.wanted))
        elif self.since_change > 0:
            self._retire_idle()

    def _welcome(self, step: int) -> None:
        """Take note of slots that have become ready."""
        new = set(self.fleet.members()) - self._known
        self._known |= new
        if new:
            self._event("ready", step, f"slot {', '.join(map(str, sorted(new)))} is warm")

    def _change(self, kind: str, text: str, step: int, new: Plan) -> None:
        started = time.monotonic()
        change = moves(self._live_holders(), new, self.size)
        with self.ledger.state("resizing"):
            self._enter(new, step, restore=None, pulls=change)
        seconds, moved = time.monotonic() - started, change.num_bytes(self.size)
        self.metrics.record("elastic_resize_pause_seconds", seconds)
        text = f"{text} {self.sizes()}" if kind == "resized" else text
        self._event(
            kind,
            step,
            f"{text}, {moved / 1e6:.2f} MB moved in {seconds * 1000:.0f} ms",
            pause=seconds,
            moved=moved,
        )

    def _retire_idle(self) -> None:
        """End slots beyond the wanted standby ones; only once no state is left with them."""
        assert self.plan is not None
        if self._short(self.plan):
            return
        idle = sorted(set(self.fleet.members()) - role_holders(self.plan))
        for slot in idle[self.config.cluster.standby :]:
            self.fleet.retire(slot)
            self._record_gauges()

    def _view(self) -> View:
        assert self.plan is not None
        c = self.config.cluster
        ready = tuple(sorted(set(self.fleet.members()) - role_holders(self.plan)))
        return View(
            plan=self.plan,
            roles=self.wanted,
            ready=ready,
            starting=self.fleet.starting(),
            free_slots=self.fleet.room(),
            standby=c.standby,
            expert_load=self.load.tolist(),
            steps_since_change=self.since_change,
            rebalance_above=c.rebalance_above,
            rebalance_every=c.rebalance_every,
            colocated=c.colocated,
            parts=self.inventory.parts_for(self.wanted),
        )

    def _replanned(self, roles: Roles) -> Plan:
        assert self.plan is not None
        members, c = self.fleet.members(), self.config.cluster
        if not members:
            raise StateLostError("all slots are gone; the same command resumes from the last checkpoint")
        return replan(
            self.plan,
            generation=self.generation + 1,
            addresses={slot: m.address for slot, m in members.items()},
            roles=roles,
            replication=c.replication,
            colocated=c.colocated,
            nodes={slot: m.node for slot, m in members.items()},
            loads=self.wish.packed_by,
            parts=self.inventory.parts_for(roles),
        )

    # -- for people ----------------------------------------------------------------------------

    def request(self, role: str, count: int) -> None:
        """Ask for another number of slots of a role; it is reached between two later steps.

        Raises:
            ConfigError: it cannot be; nothing was changed.
        """
        fleet = self.fleet
        roles = check_request(
            role,
            count,
            self.wanted,
            self.inventory,
            self.config.cluster,
            slots=len(fleet.members()) + fleet.starting(),
            room=fleet.room(),
        )
        self.ask(replace(self.wish, roles=roles))

    def is_settled(self) -> bool:
        """Whether the plan is as wanted and no change is under way."""
        return self.plan is not None and not self._short(self.plan) and self.since_change > 0

    def _short(self, plan: Plan) -> bool:
        now = (len(plan.attention), len(plan.expert_primaries), len(plan.memory_primaries))
        return now != (self.wanted.attention, self.wanted.experts, self.wanted.memory)

    def sizes(self) -> str:
        """The number of slots of each role, as people write it."""
        assert self.plan is not None
        p = self.plan
        return f"{len(p.attention)}+{len(p.expert_primaries)}+{len(p.memory_primaries)}"

    def _live_holders(self) -> dict[Piece, set[int]]:
        members = set(self.fleet.members())
        return {piece: slots & members for piece, slots in self.held.items()}

    def is_spare(self, slot: int) -> bool:
        """Whether other members hold everything that a slot holds."""
        others = set(self.fleet.members()) - {slot}
        return all(holders & others for holders in list(self.held.values()) if slot in holders)

    def replicas(self) -> int:
        """Holders that the piece with the fewest has."""
        members = set(self.fleet.members())
        return min((len(slots & members) for slots in list(self.held.values())), default=0)

    def finish(self, step: int) -> None:
        """Take note that the run has ended."""
        spent = ", ".join(f"{s} {seconds:.1f} s" for s, seconds in self.ledger.seconds.items() if seconds)
        self._event("end", step, f"goodput {self.ledger.goodput:.3f} ({spent})", goodput=self.ledger.goodput)

    def _record_gauges(self) -> None:
        assert self.plan is not None
        self.events.gauges(self.plan, set(self.fleet.members()), self.replicas())

    def _event(self, kind: str, step: int, text: str, **more: Any) -> None:
        assert self.plan is not None
        self.events.tell(
            kind,
            step,
            text,
            generation=self.generation,
            plan=self.plan,
            members=set(self.fleet.members()),
            **more,
        )
