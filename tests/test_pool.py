"""The pool of slot actors, stepped by hand over a Ray that is made up: leases, waiting, giving back, and who is kept."""

from typing import Any

import pytest

from sparseray.platform.fleet import nodes
from sparseray.platform.fleet import pool as pool_module
from sparseray.platform.fleet.lease import Held, Kind, Lease
from sparseray.platform.fleet.pool import Pool, Waiting
from sparseray.platform.fleet.pool_actor import Actor


class Call:
    """One call of an actor; done when it is told so."""

    def __init__(self, method: str) -> None:
        self.method, self.value, self.is_done = method, None, False


class Handle:
    """An actor: what was called is kept by the name of its method."""

    def __init__(self, number: int) -> None:
        self.number, self.calls = number, dict[str, Call]()

    def __getattr__(self, method: str) -> Any:
        def remote(*_: Any, **__: Any) -> Call:
            self.calls[method] = Call(method)
            return self.calls[method]

        return type("Method", (), {"remote": staticmethod(remote)})

    def answer(self, method: str, value: Any) -> None:
        self.calls[method].value, self.calls[method].is_done = value, True


class MadeUpRay:
    """A cluster of so many CPUs, whose actors are `Handle`s."""

    def __init__(self, cpus: float) -> None:
        self.cpus, self.handles, self.ended = cpus, dict[int, Handle](), list[int]()
        self.draining = dict[str, float]()

    def start_actor(self, _platform: str, number: int, kind: Kind) -> Handle:
        self.cpus -= kind.cpus
        self.handles[number] = Handle(number)
        return self.handles[number]

    def look(self) -> nodes.Nodes:
        return nodes.Nodes(free={"CPU": self.cpus}, draining=self.draining)

    def wait(self, calls: list[Call], **_: Any) -> tuple[list[Call], list[Call]]:
        return [c for c in calls if c.is_done], [c for c in calls if not c.is_done]

    def get(self, call: Call) -> Any:
        if isinstance(call.value, Exception):
            raise call.value
        return call.value

    def end(self, handle: Handle, _pid: int) -> None:
        self.ended.append(handle.number)
        self.cpus += 1.0


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> MadeUpRay:
    made = MadeUpRay(2.0)
    monkeypatch.setattr(pool_module, "ray", made)
    monkeypatch.setattr(nodes, "look", made.look)
    monkeypatch.setattr(pool_module, "start_actor", made.start_actor)
    monkeypatch.setattr(pool_module, "end_slot", made.end)
    # What was started counts as scheduled at once, and room is looked at in every turn.
    monkeypatch.setattr(pool_module, "SCHEDULED_S", 0.0)
    monkeypatch.setattr(pool_module, "COUNT_EVERY_S", -1.0)
    return made


class Jobs:
    """Asks for leases and keeps what was granted, by job and slot."""

    def __init__(self, pool: Pool) -> None:
        self.pool, self.granted = pool, dict[tuple[str, int], Actor]()

    def ask(self, job: str, slot: int, kind: Kind | None = None) -> None:
        self.pool.ask(Waiting(lease=Lease(job=job, slot=slot), kind=kind or Kind(), grant=self._grant))

    def _grant(self, lease: Lease, actor: Actor) -> bool:
        self.granted[lease.job, lease.slot] = actor
        return True

    def numbers(self) -> dict[tuple[str, int], int]:
        return {key: actor.number for key, actor in self.granted.items()}


def made(kept: int = 0) -> tuple[Pool, Jobs]:
    numbers = iter(range(100))
    pool = Pool("platform", lambda: next(numbers), kept=kept)
    return pool, Jobs(pool)


def test_a_lease_starts_an_actor_where_there_is_room_and_waits_where_there_is_none(ray: MadeUpRay) -> None:
    pool, jobs = made()
    for slot in range(3):
        jobs.ask("run", slot)
    assert pool.lacking(Kind()) == 0, "before the cluster was asked nobody lacks anything"
    pool.turn()
    assert jobs.numbers() == {("run", 0): 0, ("run", 1): 1}
    assert (pool.lacking(Kind()), pool.room(Kind())) == (1, 0)
    ray.cpus = 1.0
    pool.turn()
    assert jobs.numbers()["run", 2] == 2 and pool.lacking(Kind()) == 0


def test_what_is_given_back_goes_to_who_waits_and_stays_warm(ray: MadeUpRay) -> None:
    pool, jobs = made()
    jobs.ask("run", 0)
    jobs.ask("run", 1)
    pool.turn()
    jobs.ask("server", 0)
    pool.turn()
    assert pool.lacking(Kind()) == 1
    assert pool.give_back(jobs.granted["run", 1]) is None
    assert pool.lacking(Kind()) == 0, "it is on its way"
    pool.turn()
    assert ("server", 0) not in jobs.granted, "its slot is not closed yet"
    ray.handles[1].answer("release", True)
    pool._hear()
    assert pool.lacking(Kind()) == 0, "it is free, and granted in a moment"
    pool.turn()
    assert jobs.numbers()["server", 0] == 1 and ray.ended == []
    assert set(pool.leased("run")) == {0} and set(pool.leased("server")) == {0}


def test_an_actor_that_nobody_wants_ends_and_one_that_is_kept_or_owed_does_not(ray: MadeUpRay) -> None:
    pool, jobs = made()
    jobs.ask("run", 0)
    jobs.ask("run", 1)
    pool.turn()
    end = pool.give_back(jobs.granted["run", 0])
    assert end is not None
    end.result()
    assert ray.ended == [0]
    pool.owed = 1
    assert pool.give_back(jobs.granted["run", 1]) is None
    ray.handles[1].answer("release", True)
    pool.turn()
    assert pool.status()["leased"] == 0 and ray.ended == [0]
    pool.owed = 0
    pool.turn()
    pool.close()
    assert ray.ended == [0, 1]


def test_so_many_actors_are_kept_warm_whoever_has_them(ray: MadeUpRay) -> None:
    pool, jobs = made(kept=2)
    pool.turn()
    for number in (0, 1):
        ray.handles[number].answer("held", Held(kind=Kind(), lease=None, pid=0, namespace="", node="b"))
    pool.turn()
    assert pool.status() == {"leased": 0, "free": 2, "starting": 0, "waiting": 0, "kept": 2}
    jobs.ask("run", 0)
    assert jobs.numbers() == {("run", 0): 0}, "a free one is given at once, without Ray"
    assert pool.give_back(jobs.granted["run", 0]) is None


def test_an_actor_that_dies_or_does_not_close_its_slot_is_no_more(
    ray: MadeUpRay, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool, jobs = made(kept=1)
    pool.turn()
    ray.handles[0].answer("live", RuntimeError("the actor died"))
    pool.turn()
    assert 1 in ray.handles, "another is started in its place"
    jobs.ask("run", 0)
    pool.give_back(jobs.granted["run", 0])
    ray.handles[1].answer("release", False)
    pool.turn()
    assert 2 in ray.handles
    jobs.ask("run", 1)
    monkeypatch.setattr(pool_module, "RELEASE_S", -1.0)
    pool.give_back(jobs.granted["run", 1])
    pool.turn()
    pool.close()
    assert sorted(ray.ended)[:3] == [0, 1, 2]


def test_a_lease_takes_an_actor_of_its_own_kind_alone(ray: MadeUpRay) -> None:
    pool, jobs = made(kept=1)
    pool.turn()
    threads = Kind(threads=2)
    jobs.ask("run", 0, threads)
    pool.turn()
    assert jobs.granted["run", 0].kind == threads and jobs.numbers()["run", 0] == 1


def test_a_lease_that_is_withdrawn_or_refused_takes_nothing(ray: MadeUpRay) -> None:
    pool, jobs = made(kept=1)
    ray.cpus = 0.0
    jobs.ask("run", 0)
    pool.turn()
    pool.withdraw(Lease(job="run", slot=0))
    ray.cpus = 1.0
    pool.ask(Waiting(lease=Lease(job="run", slot=1), kind=Kind(), grant=lambda lease, actor: False))
    pool.turn()
    assert jobs.granted == {} and pool.status()["leased"] == 0


def test_nothing_is_leased_kept_or_started_on_a_node_that_is_to_be_drained(ray: MadeUpRay) -> None:
    pool, jobs = made(kept=2)
    pool.turn()
    for number, node in enumerate("ab"):
        ray.handles[number].answer("held", Held(kind=Kind(), lease=None, pid=0, namespace="", node=node))
    pool.turn()
    jobs.ask("run", 0)
    assert jobs.numbers() == {("run", 0): 0}
    ray.draining, ray.cpus = {"a": 100.0, "b": 100.0}, 1.0
    pool.turn()
    pool._ends.submit(lambda: None).result()
    assert ray.ended == [1], "the free one ends, the leased one is its job's to leave"
    assert sorted(ray.handles) == [0, 1, 2], "another is kept in the place of each, where there is room"
    ray.handles[2].answer("held", Held(kind=Kind(), lease=None, pid=0, namespace="", node="c"))
    pool.turn()
    end = pool.give_back(jobs.granted["run", 0])
    assert end is not None, "it does not stay warm"
    end.result()
    jobs.ask("run", 1)
    assert jobs.numbers()["run", 1] == 2
    pool.turn()
    assert pool.nodes.draining == {"a": 100.0, "b": 100.0}
    pool.close()
