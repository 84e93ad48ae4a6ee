"""The platform's pool: every slot actor of a Ray cluster, leased to jobs and taken back warm.

A job asks for a lease and is given a free actor of the kind at once, or a new one where the cluster has room; else the
lease waits, and whoever is given back goes to it first. Actors belong to no process: they outlive the scheduler that
started them, and its successor finds them by name and asks each whose it is.
"""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import ray

from sparseray.log import get_logger
from sparseray.platform.fleet import nodes
from sparseray.platform.fleet.lease import Held, Kind, Lease
from sparseray.platform.fleet.pool_actor import NAMESPACE, Actor, actor_name, start_actor
from sparseray.platform.fleet.slot_end import end_slot

log = get_logger(__name__)

TICK_S = 0.05
COUNT_EVERY_S = 0.5
SCHEDULED_S = 0.2
"""How long Ray may take to count what a new actor reserves."""
FIND_S = 20.0
"""How long an actor may take to say whose it is, once the scheduler is back; one that hangs is ended."""
RELEASE_S = 15.0
NEW_S = 60.0
"""How long an actor that was started ahead may wait for its first job."""
UNBOUNDED = 64
"""Room of a cluster for actors that reserve nothing."""


@dataclass(frozen=True, kw_only=True)
class Waiting:
    """A lease that was asked for.

    Args:
        lease: which.
        kind: of actor that it takes.
        grant: takes the actor; False when the job does not want it any more.
    """

    lease: Lease
    kind: Kind
    grant: Callable[[Lease, Actor], bool]


class Pool:
    """Owns the actors.

    Args:
        platform: identifier, part of their names.
        next_number: gives the next number, which is journalled before it is used.
        kept: actors that are kept warm, leased ones among them, whether or not a job asks for them.
        kind: of those.
    """

    def __init__(
        self, platform: str, next_number: Callable[[], int], *, kept: int = 0, kind: Kind | None = None
    ) -> None:
        self._platform, self._next_number = platform, next_number
        self.kept, self._kind = kept, kind or Kind()
        self.owed = 0
        """Free actors that are kept for a job that has lent them."""
        self._lock = threading.RLock()
        self._actors: dict[int, Actor] = {}
        self._waiting: list[Waiting] = []
        self._words: dict[Any, tuple[str, int]] = {}
        self.nodes = nodes.Nodes()
        """As of half a second ago."""
        self._counted = 0.0
        self._wake, self._running = threading.Event(), True
        self._ends = ThreadPoolExecutor(4, thread_name_prefix="end")
        self._thread = threading.Thread(target=self._watch, daemon=True, name="pool")

    def start(self) -> None:
        """Begin to watch; before that, `find` may be called."""
        self._thread.start()

    # -- leases ------------------------------------------------------------------------------------

    def ask(self, waiting: Waiting) -> None:
        """Grant a lease now or as soon as there is an actor for it."""
        with self._lock:
            self._waiting.append(waiting)
            self._serve(may_start=False)
        self._wake.set()

    def withdraw(self, lease: Lease) -> None:
        """Forget a lease that was not granted yet."""
        with self._lock:
            self._waiting = [waiting for waiting in self._waiting if waiting.lease != lease]

    def give_back(self, actor: Actor, pid: int = 0) -> "Future[None] | None":
        """Take an actor back: it closes its slot and stays warm if somebody may want it, or ends.

        Args:
            actor: which.
            pid: of its process where it is of this host, else 0.

        Returns:
            what ends with it; None where it stays.
        """
        with self._lock:
            if actor.number not in self._actors or self._must_go(actor) or not self._is_wanted(actor.kind):
                return self.end(actor, pid)
            actor.leaving = time.monotonic()
            self._words[actor.handle.release.remote(actor.lease)] = "released", actor.number
        self._wake.set()
        return None

    def end(self, actor: Actor, pid: int) -> "Future[None]":
        """End an actor's process.

        Args:
            actor: which.
            pid: of its process where it is of this host, else 0.
        """
        with self._lock:
            self._actors.pop(actor.number, None)
        return self._ends.submit(end_slot, actor.handle, pid)

    def leased(self, job: str) -> dict[int, Actor]:
        """Actors that a job has, by slot id."""
        with self._lock:
            return {
                a.lease.slot: a
                for a in self._actors.values()
                if a.lease is not None and a.lease.job == job and a.leaving is None
            }

    def room(self, kind: Kind) -> int:
        """How many more leases of a kind could be granted now."""
        with self._lock:
            free = len(self._free(kind))
            asked = sum(waiting.kind == kind for waiting in self._waiting)
            return max(0, free + self._startable(kind) - asked)

    def lacking(self, kind: Kind) -> int:
        """Leases of a kind for which there is no actor, none that is or will be free, and no room for one.

        Before the cluster's room is known, none.
        """
        with self._lock:
            if not self._counted or self._startable(kind) > 0:
                return 0
            coming = sum(
                actor.kind == kind and actor.leaving is not None for actor in self._actors.values()
            ) + len(self._free(kind))
            return max(0, sum(waiting.kind == kind for waiting in self._waiting) - coming)

    def status(self) -> dict[str, int]:
        """How many actors there are, by what they do, and how many leases wait."""
        with self._lock:
            leased = sum(actor.lease is not None for actor in self._actors.values())
            free = sum(actor.lease is None and actor.is_warm for actor in self._actors.values())
            return {
                "leased": leased,
                "free": free,
                "starting": len(self._actors) - leased - free,
                "waiting": len(self._waiting),
                "kept": self.kept,
            }

    # -- life --------------------------------------------------------------------------------------

    def find(self) -> None:
        """Find the actors that the scheduler before had, and end those that do not answer."""
        prefix = actor_name(self._platform, 0).removesuffix("0")
        asked: dict[Any, tuple[int, Any]] = {}
        for entry in ray.util.list_named_actors(all_namespaces=True):
            if entry["namespace"] == NAMESPACE and entry["name"].startswith(prefix):
                handle = ray.get_actor(entry["name"], namespace=NAMESPACE)
                asked[handle.held.remote()] = int(entry["name"].removeprefix(prefix)), handle
        answered, silent = ray.wait([*asked], num_returns=len(asked), timeout=FIND_S) if asked else ([], [])
        for reference in answered:
            number, handle = asked[reference]
            try:
                held: Held = ray.get(reference)
            except ray.exceptions.RayError as error:
                log.info("slot actor %d is gone: %s", number, " ".join(str(error).split())[:200])
                continue
            self._adopt(
                Actor(
                    number=number,
                    handle=handle,
                    kind=held.kind,
                    lease=held.lease,
                    is_new=False,
                    is_warm=True,
                    node=held.node,
                )
            )
        for reference in silent:
            number, handle = asked[reference]
            log.warning("slot actor %d does not say whose it is, and is ended", number)
            self._ends.submit(end_slot, handle, 0)

    def adopt(self, count: int) -> None:
        """Take the actors 0, 1, ... that were started ahead, by the command that started this platform, too."""
        for number in range(count):
            handle = ray.get_actor(actor_name(self._platform, number), namespace=NAMESPACE)
            self._adopt(Actor(number=number, handle=handle, kind=self._kind, started=time.monotonic()))

    def give_back_others(self, jobs: set[str]) -> None:
        """Take back what jobs hold that are not among `jobs` any more."""
        with self._lock:
            others = [a for a in self._actors.values() if a.lease is not None and a.lease.job not in jobs]
            for actor in others:
                self.give_back(actor)

    def close(self) -> None:
        """End every actor."""
        self._running = False
        self._wake.set()
        if self._thread.ident is not None:
            self._thread.join(5.0)
        with self._lock:
            self._waiting.clear()
            for actor in list(self._actors.values()):
                self.end(actor, 0)
        self._ends.shutdown(wait=True)

    def _adopt(self, actor: Actor) -> None:
        self._actors[actor.number] = actor
        self._words[actor.handle.live.remote()] = "ended", actor.number
        if not actor.is_warm:
            self._words[actor.handle.held.remote()] = "warm", actor.number

    def _start(self, kind: Kind, lease: Lease | None) -> Actor:
        number = self._next_number()
        handle = start_actor(self._platform, number, kind)
        actor = Actor(number=number, handle=handle, kind=kind, lease=lease, started=time.monotonic())
        self._adopt(actor)
        return actor

    def _watch(self) -> None:
        while self._running:
            self._wake.wait(TICK_S)
            try:
                self.turn()
            except Exception as error:
                # Ray's head may be away for a while; free actors are leased without it.
                log.warning("cannot ask Ray about the pool: %s", " ".join(str(error).split())[:200])
                time.sleep(0.5)

    def turn(self) -> None:
        """Take note of what actors and the cluster say, grant what waits, and end what nobody wants."""
        is_asked = self._wake.is_set() and bool(self._waiting)
        self._wake.clear()
        self._hear()
        if is_asked or time.monotonic() - self._counted > COUNT_EVERY_S:
            self.nodes, self._counted = nodes.look(), time.monotonic()
        with self._lock:
            self._serve(may_start=True)
            self._fit()

    def _hear(self) -> None:
        """Take note of what actors have said: that they are warm, have closed a slot, or ended."""
        with self._lock:
            words = list(self._words)
        for reference in ray.wait(words, num_returns=len(words), timeout=0)[0] if words else []:
            try:
                said = ray.get(reference)
            except Exception:
                said = None
            with self._lock:
                word, number = self._words.pop(reference)
                actor = self._actors.get(number)
                if actor is None:
                    continue
                if said is None or said is False:
                    # Whoever leases it hears of its death from Ray, too.
                    self.end(actor, 0)
                elif word == "warm":
                    actor.is_warm, actor.node = True, said.node
                elif word == "released":
                    actor.lease = actor.leaving = None
        with self._lock:
            for actor in list(self._actors.values()):
                if actor.leaving is not None and time.monotonic() - actor.leaving > RELEASE_S:
                    log.warning("slot actor %d did not close its slot, and is ended", actor.number)
                    self.end(actor, 0)

    # -- under the lock ----------------------------------------------------------------------------

    def _serve(self, *, may_start: bool) -> None:
        """Grant what waits, first come, first served."""
        waiting, self._waiting = self._waiting, []
        for one in waiting:
            free = self._free(one.kind)
            if not free and (not may_start or self._startable(one.kind) < 1):
                self._waiting.append(one)
                continue
            # The warm ones first.
            actor = min(free, key=lambda a: not a.is_warm) if free else self._start(one.kind, one.lease)
            actor.lease, actor.is_new = one.lease, False
            if not one.grant(one.lease, actor):
                actor.lease = None

    def _fit(self) -> None:
        """Have as many actors as are kept, and no free ones beyond; none on a node that is to be drained counts."""
        staying = [actor for actor in self._actors.values() if not self._must_go(actor)]
        for actor in list(self._actors.values()):
            if actor.lease is None and self._must_go(actor):
                self.end(actor, 0)
        while len(staying) < self.kept and self._startable(self._kind) > 0:
            staying.append(self._start(self._kind, None))
        free = [actor for actor in staying if actor.lease is None]
        leased = len(staying) - len(free)
        for actor in free[max(0, self.kept - leased, self.owed) :]:
            if not (actor.is_new and time.monotonic() - actor.started < NEW_S):
                self.end(actor, 0)

    def _must_go(self, actor: Actor) -> bool:
        return actor.node in self.nodes.draining

    def _free(self, kind: Kind) -> list[Actor]:
        """Actors of a kind that a lease may have."""
        return [
            actor
            for actor in self._actors.values()
            if actor.lease is None and actor.kind == kind and not self._must_go(actor)
        ]

    def _is_wanted(self, kind: Kind) -> bool:
        return (
            len(self._actors) <= self.kept
            or self.owed > 0
            or any(waiting.kind == kind for waiting in self._waiting)
        )

    def _startable(self, kind: Kind) -> int:
        """New actors of a kind for which the cluster has room, as of half a second ago."""
        since = [a.kind for a in self._actors.values() if a.started > self._counted - SCHEDULED_S]
        counts = [UNBOUNDED]
        for name, each, taken in (
            ("CPU", kind.cpus, sum(k.cpus for k in since)),
            ("GPU", kind.gpus, sum(k.gpus for k in since)),
        ):
            if each:
                counts.append(int((self.nodes.free.get(name, 0.0) - taken) / each + 1e-6))
        return max(0, min(counts))
