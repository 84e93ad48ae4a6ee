"""The slots of a job: leases of the platform's actors (pool.py), and who of them lives.

Two threads watch: one waits for Ray's word (a call that ends only with its actor), one listens to
heartbeats, which go from slot to scheduler over the data plane's sockets and so need no Ray at all.
"""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import msgpack
import ray

from sparseray.actors.installation import JobSpec
from sparseray.actors.state.tables import process_namespace
from sparseray.errors import ClusterError, JobEndedError, UserError
from sparseray.log import get_logger
from sparseray.platform.config import ClusterConfig
from sparseray.platform.fleet.control import Loss, Member
from sparseray.platform.fleet.lease import Lease
from sparseray.platform.fleet.pool import Pool, Waiting
from sparseray.platform.fleet.pool_actor import Actor, kind_of
from sparseray.platform.fleet.slot_end import cause_of, kill_process
from sparseray.platform.fleet.transport import ZmqTransport, own_address, private_directory

log = get_logger(__name__)

WATCH_S = 0.05
LISTEN_S = 0.05
START_DEADLINE_S = 90.0
GPU_START_DEADLINE_S = 600.0
"""A machine's first start compiles every kernel."""
MOST_STARTS = 3


class RayFleet:
    """`Fleet` of Ray actors.

    Args:
        job, config: identifier of the job, and how its slots are made.
        spec: of the job that slots build and warm themselves for.
        pool: whose actors they are.
        next_slot: gives the next slot id, which is journalled before it is used.
        on_change: told when members came or went.
        may_act: whether this scheduler still leads; one that does not must end no slot.
    (`is_spare`, set later, says whether all that a slot holds is held by others too, and `loan` how many slots more
    others would lend.)
    """

    def __init__(
        self,
        job: str,
        config: ClusterConfig,
        spec: JobSpec,
        pool: Pool,
        next_slot: Callable[[], int],
        on_change: Callable[[dict[int, Member]], None],
        may_act: Callable[[], bool],
    ) -> None:
        self.job, self.config, self.spec, self._pool = job, config, spec, pool
        self._kind = kind_of(config)
        self._next_slot, self._on_change, self._may_act = next_slot, on_change, may_act
        directory = private_directory(job) if config.transport == "ipc" else None
        self._transport = ZmqTransport("heartbeats", directory, own_address(config.bind_host))
        self.heartbeats = self._transport.address
        self._start_deadline_s = GPU_START_DEADLINE_S if config.device == "cuda" else START_DEADLINE_S
        self._lock = threading.Lock()
        self._asked: set[int] = set()
        self._actors: dict[int, Actor] = {}
        self._members: dict[int, Member] = {}
        self._starting: dict[Any, tuple[int, float]] = {}
        self._ends: dict[Any, int] = {}
        self._heard: dict[int, float] = {}
        self._losses: list[Loss] = []
        self._refused: UserError | None = None
        self.is_spare: Callable[[int], bool] = lambda slot: True
        self.loan: Callable[[], int] = lambda: 0
        self._running, self._is_closed = True, False
        self._threads = [
            threading.Thread(target=target, daemon=True, name=target.__name__)
            for target in (self._watch, self._listen)
        ]
        for thread in self._threads:
            thread.start()

    # -- Fleet -----------------------------------------------------------------------------------

    def members(self) -> dict[int, Member]:
        """Slots that are warm and not known to be gone."""
        with self._lock:
            return dict(self._members)

    def starting(self) -> int:
        """Slots that were asked for and are not warm yet."""
        with self._lock:
            return len(self._asked) + len(self._starting)

    def waiting(self) -> int:
        """Slots that were asked for and not given by the pool yet."""
        with self._lock:
            return len(self._asked)

    def room(self) -> int:
        """How many more slots the pool, the cluster and those who lend can give, as of half a second ago."""
        room = self._pool.room(self._kind) + self.loan()
        with self._lock:
            held = len(self._asked) + len(self._actors)
        return min(room, self.config.max_slots - held) if self.config.max_slots else room

    def draining(self) -> dict[int, float]:
        """Members on nodes that are to be drained, and seconds until these are gone, as of half a second ago."""
        nodes, now = self._pool.nodes.draining, time.time()
        return {slot: nodes[m.node] - now for slot, m in self.members().items() if m.node in nodes}

    def losses(self) -> list[Loss]:
        """Losses since the last call.

        Raises:
            JobEndedError: the fleet was closed; whoever waits for its slots waits in vain.
        """
        with self._lock:
            if self._is_closed:
                raise JobEndedError("the job was ended at once")
            taken, self._losses = self._losses, []
        return taken

    def start(self, count: int) -> None:
        """Start slots in the background."""
        for _ in range(count):
            slot = self._next_slot()
            with self._lock:
                self._asked.add(slot)
            self._pool.ask(
                Waiting(lease=Lease(job=self.job, slot=slot), kind=self._kind, grant=self._granted)
            )

    def withdraw(self, count: int) -> None:
        """Ask no longer for the latest slots that wait; what the pool gives meanwhile stays."""
        with self._lock:
            latest = sorted(self._asked)[-count:]
            self._asked.difference_update(latest)
        for slot in latest:
            self._pool.withdraw(Lease(job=self.job, slot=slot))

    def retire(self, slot: int) -> None:
        """End a slot that has no role any more."""
        self._remove(slot, is_planned=True)

    def give_up(self, slot: int, cause: str) -> None:
        """Count a slot as lost and end its process.

        Args:
            slot, cause: its id, and why, for the run's events.
        """
        self._lose(slot, cause)

    # -- life ------------------------------------------------------------------------------------

    def open(self, count: int) -> None:
        """Start slots until `count` are warm.

        Raises:
            UserError: what one of them found wrong, or what they died of.
            RuntimeError: one of them did not come up.
        """
        deadline = time.monotonic() + self._start_deadline_s
        for _ in range(MOST_STARTS):
            self.start(count - len(self.members()))
            while self.starting():
                if self._refused is not None:
                    raise self._refused
                if time.monotonic() > deadline:
                    raise RuntimeError(
                        f"{self.starting()} slots did not start within {self._start_deadline_s:g} s"
                    )
                time.sleep(0.01)
            if self._refused is not None:
                raise self._refused
            if len(self.members()) >= count:
                return
            causes = "; ".join(sorted({loss.cause for loss in self.losses()}))
            log.warning("slots died at their start: %s", causes)
        raise ClusterError(
            f"slots died at their start {MOST_STARTS} times: {causes}; mend that where they run, and start again"
        )

    def reopen(self) -> None:
        """Take the slots of a job that goes on; those that are gone are left out."""
        for slot, actor in self._pool.leased(self.job).items():
            self._follow(slot, actor)
        deadline = time.monotonic() + self._start_deadline_s
        while self.starting() and time.monotonic() < deadline:
            time.sleep(0.01)

    def close(self) -> None:
        """Give all slots back, and wait for those that end."""
        self._running = False
        for thread in self._threads:
            thread.join(2.0)
        with self._lock:
            self._is_closed = True
            slots = [*self._asked, *self._actors]
        for end in [self._remove(slot, is_planned=True) for slot in slots]:
            if end is not None:
                end.result()
        self._transport.close()

    def _granted(self, lease: Lease, actor: Actor) -> bool:
        with self._lock:
            if lease.slot not in self._asked:
                return False
            self._asked.discard(lease.slot)
        self._follow(lease.slot, actor)
        return True

    def _follow(self, slot: int, actor: Actor) -> None:
        reference = actor.handle.prepare.remote(
            Lease(job=self.job, slot=slot),
            self.spec,
            self.heartbeats,
            transport=self.config.transport,
            bind_host=self.config.bind_host,
        )
        with self._lock:
            self._actors[slot] = actor
            self._starting[reference] = (slot, time.monotonic())

    def _remove(self, slot: int, *, is_planned: bool = False) -> "Future[None] | None":
        """Let go of a slot: one that is lost ends at once, one that is not needed goes back to the pool.

        Returns:
            the end of its process; None where that goes on.
        """
        with self._lock:
            self._asked.discard(slot)
            actor = self._actors.pop(slot, None)
            member = self._members.pop(slot, None)
            self._heard.pop(slot, None)
            self._ends = {reference: s for reference, s in self._ends.items() if s != slot}
            self._starting = {ref: found for ref, found in self._starting.items() if found[0] != slot}
            members = dict(self._members)
        if actor is None:
            self._pool.withdraw(Lease(job=self.job, slot=slot))
            return None
        pid = member.pid if member is not None and member.namespace == process_namespace() else 0
        if is_planned and member is not None:
            end = self._pool.give_back(actor, pid)
        else:
            kill_process(pid)
            end = self._pool.end(actor, pid)
        if end is not None:
            self._remove_inbox(member)
        if member is not None:
            self._on_change(members)
        return end

    @staticmethod
    def _remove_inbox(member: Member | None) -> None:
        """A killed slot cannot remove its own socket file."""
        if member is not None and member.address.startswith("ipc://"):
            Path(member.address.removeprefix("ipc://")).unlink(missing_ok=True)

    def _lose(self, slot: int, cause: str) -> None:
        if not self._may_act():
            log.warning("slot %d: %s; another scheduler leads now and will see to it", slot, cause)
            self._running = False
            return
        now = time.monotonic()
        with self._lock:
            if slot not in self._actors:
                return
            self._losses.append(
                Loss(slot=slot, cause=cause, noticed=now, silent_s=now - self._heard.get(slot, now))
            )
        self._remove(slot)

    # -- watching ----------------------------------------------------------------------------------

    def _watch(self) -> None:
        """Take Ray's word: who is warm, and who has ended."""
        while self._running:
            try:
                with self._lock:
                    references = [*self._starting, *self._ends]
                    late = [
                        s
                        for s, since in self._starting.values()
                        if time.monotonic() - since > self._start_deadline_s
                    ]
                for slot in late:
                    self._lose(slot, f"it did not start within {self._start_deadline_s:g} s")
                if not references:
                    time.sleep(WATCH_S)
                    continue
                for reference in ray.wait(references, num_returns=1, timeout=WATCH_S)[0]:
                    self._take(reference)
            except Exception as error:
                # Ray's head may be away for a while; heartbeats go on without it.
                log.warning("cannot ask Ray about the slots: %s", " ".join(str(error).split())[:200])
                time.sleep(0.5)

    def _take(self, reference: Any) -> None:
        with self._lock:
            is_start = reference in self._starting
            slot = self._starting[reference][0] if is_start else self._ends.pop(reference, None)
            actor = self._actors.get(slot) if slot is not None else None
        if actor is None or slot is None:
            return
        try:
            found = ray.get(reference)
        except Exception as error:
            cause = getattr(error, "cause", None)
            self._refused = cause if isinstance(cause, UserError) else self._refused
            log.info("slot %d: %s", slot, " ".join(str(error).split()))
            self._lose(slot, f"could not start: {cause_of(error)}" if is_start else "its process died")
            return
        if not is_start:
            self._lose(slot, "it stopped serving")
            return
        end = actor.handle.wait_for_end.remote(Lease(job=self.job, slot=slot))
        with self._lock:
            self._heard[slot] = time.monotonic()
            self._ends[end] = slot
            self._members[slot] = found
            self._starting.pop(reference, None)
            members = dict(self._members)
        self._on_change(members)

    def _listen(self) -> None:
        """Take heartbeats; a slot that gives none for `hang_s` counts as lost."""
        last = time.monotonic()
        while self._running:
            frames = self._transport.receive(LISTEN_S)
            while frames is not None:
                self._hear(frames)
                frames = self._transport.receive(0.0)
            now = time.monotonic()
            with self._lock:
                if now - last > self.config.hang_s / 3:
                    # This process itself stood still: silence since then says nothing about the others.
                    self._heard = {
                        slot: max(heard, now - self.config.hang_s / 2) for slot, heard in self._heard.items()
                    }
                silent = {
                    s: now - heard for s, heard in self._heard.items() if now - heard > self.config.hang_s
                }
            last = now
            for slot, silence in silent.items():
                # A busy machine looks like a dead slot: where nobody else has its state, that is worth a longer wait.
                if self.is_spare(slot) or silence > self.config.deadline_s:
                    self._lose(slot, f"no sign of life for {silence:.1f} s")

    def _hear(self, frames: list[Any]) -> None:
        try:
            job, slot = msgpack.unpackb(frames[0])
        except (ValueError, TypeError, msgpack.UnpackException):
            log.warning("a heartbeat that is none of ours was dropped")
            return
        with self._lock:
            if job == self.job and slot in self._heard:
                self._heard[slot] = time.monotonic()

    def ages(self) -> dict[int, float]:
        """Seconds since each member's last heartbeat."""
        now = time.monotonic()
        with self._lock:
            return {slot: now - heard for slot, heard in self._heard.items()}
