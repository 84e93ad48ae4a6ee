"""How slots start: what a failure says, and what is loaded."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from processes import environment

from sparseray.actors.installation import JobSpec
from sparseray.errors import ClusterError
from sparseray.platform.config import ClusterConfig
from sparseray.platform.fleet import nodes, pool, pool_actor, ray_fleet, slot_end
from sparseray.platform.fleet.warming import first_alone

TEXT = """The actor died because of an error raised in its creation task, ray::SlotActor.__init__() (pid=7, ip=127.0.0.1)
  File "sparseray/platform/fleet/slot_actor.py", line 20, in __init__
    self._host = gently(_load).Host(**host)
ModuleNotFoundError: No module named 'zmq'"""


class DyingRay:
    """A Ray whose actors die while they start."""

    def __init__(self, error: Exception) -> None:
        self.error, self.started = error, 0

    def start_actor(self, *_: Any) -> Any:
        self.started += 1
        return self

    def __getattr__(self, _: str) -> Any:
        """Any method of an actor."""
        return self

    def remote(self, *_: Any, **__: Any) -> Any:
        return object()

    def wait(self, references: list[Any], **_: Any) -> tuple[list[Any], list[Any]]:
        return references[:1], references[1:]

    def get(self, _: Any) -> None:
        raise self.error

    def kill(self, *_: Any, **__: Any) -> None:
        """It is dead already."""

    def look(self) -> nodes.Nodes:
        return nodes.Nodes(free={"CPU": 8.0})


def with_cause() -> Exception:
    error = RuntimeError("ray::SlotActor.prepare() (pid=7)\n  a traceback")
    error.cause = PermissionError("/data/train: not\nallowed")  # type: ignore[attr-defined]
    return error


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RuntimeError(TEXT), "ModuleNotFoundError: No module named 'zmq'"),
        (with_cause(), "PermissionError: /data/train: not allowed"),
        (RuntimeError("The actor was killed by the out-of-memory killer"), "out-of-memory killer"),
        (RuntimeError(), "RuntimeError"),
    ],
)
def test_slots_that_die_at_their_start_say_why(
    monkeypatch: pytest.MonkeyPatch, error: Exception, words: str
) -> None:
    dying = DyingRay(error)
    for module in (ray_fleet, pool, slot_end):
        monkeypatch.setattr(module, "ray", dying)
    monkeypatch.setattr(nodes, "look", dying.look)
    monkeypatch.setattr(pool, "start_actor", dying.start_actor)
    numbers, actors = iter(range(100)), iter(range(100))
    slots = pool.Pool("platform", lambda: next(actors))
    slots.start()
    spec: JobSpec = None  # type: ignore[assignment]  # nobody reads it
    config = ClusterConfig(transport="tcp")
    fleet = ray_fleet.RayFleet(
        "job", config, spec, slots, lambda: next(numbers), lambda members: None, lambda: True
    )
    try:
        with pytest.raises(ClusterError, match="died at their start 3 times") as caught:
            fleet.open(2)
    finally:
        fleet.close()
        slots.close()
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert dying.started == 6


class FullRay(DyingRay):
    """A Ray that has room for nobody."""

    def look(self) -> nodes.Nodes:
        return nodes.Nodes(free={"CPU": 0.0})


def test_slots_that_are_wanted_no_more_do_not_wait_at_the_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a training run would be asked to lend slots that nobody wants."""
    full = FullRay(RuntimeError())
    for module in (ray_fleet, pool, slot_end):
        monkeypatch.setattr(module, "ray", full)
    monkeypatch.setattr(nodes, "look", full.look)
    numbers, actors = iter(range(100)), iter(range(100))
    slots, config = pool.Pool("platform", lambda: next(actors)), ClusterConfig(transport="tcp")
    spec: JobSpec = None  # type: ignore[assignment]  # nobody reads it
    fleet = ray_fleet.RayFleet(
        "job", config, spec, slots, lambda: next(numbers), lambda members: None, lambda: True
    )
    try:
        fleet.start(3)
        slots.turn()
        assert (fleet.waiting(), slots.lacking(pool_actor.kind_of(config))) == (3, 3)
        fleet.withdraw(2)
        assert (fleet.waiting(), fleet.starting(), slots.lacking(pool_actor.kind_of(config))) == (1, 1, 1)
        fleet.withdraw(2)
        assert (fleet.waiting(), slots.lacking(pool_actor.kind_of(config))) == (0, 0)
    finally:
        fleet.close()
        slots.close()


def test_training_does_not_load_what_only_answers_need() -> None:
    program = (
        "import sys; import sparseray.platform.fleet.host, sparseray.platform.scheduler, sparseray.jobs.pretrain\n"
        "print(sorted({'llguidance', 'starlette', 'uvicorn'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], env=environment(), capture_output=True, text=True)
    assert done.stdout.splitlines()[-1:] == ["[]"], done.stderr + done.stdout


def test_who_only_asks_the_platform_does_not_load_what_trains() -> None:
    """`scale`, `status`, `top`, `publish`, `down`: two seconds of each of them."""
    program = "import sys; import sparseray.platform.cluster; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], env=environment(), check=False)
    assert done.returncode == 0


def test_the_first_slot_warms_alone_and_those_that_wait_follow_side_by_side(tmp_path: Path) -> None:
    path, ends, inside = tmp_path / "new" / "lock", threading.Event(), threading.Barrier(3)
    first_is_in, order = threading.Event(), []

    def first() -> None:
        with first_alone(path):
            first_is_in.set()
            ends.wait(20.0)
            order.append("first")

    def later() -> None:
        with first_alone(path):
            order.append("later")
            # Neither gets by unless both are in.
            inside.wait(20.0)

    threads = [threading.Thread(target=first)]
    threads[0].start()
    assert first_is_in.wait(20.0)
    threads += [threading.Thread(target=later) for _ in range(2)]
    for thread in threads[1:]:
        thread.start()
    time.sleep(0.2)
    assert order == []
    ends.set()
    inside.wait(20.0)
    for thread in threads:
        thread.join(20.0)
    assert order == ["first", "later", "later"]


def test_nobody_waits_for_a_first_slot_that_is_killed_or_hangs_or_where_no_lock_can_be_had(
    tmp_path: Path,
) -> None:
    program = (
        "import pathlib, sys, time; from sparseray.platform.fleet.warming import first_alone\n"
        "with first_alone(pathlib.Path(sys.argv[1])):\n    print('in', flush=True); time.sleep(100)"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "lock")]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"in\n"
    with first_alone(tmp_path / "lock", limit_s=0.1):
        assert process.poll() is None
    process.kill()
    process.wait()
    with first_alone(tmp_path / "lock", limit_s=1e6):
        pass
    for path in (Path("/proc/nowhere/lock"), Path(os.devnull)):
        with first_alone(path, limit_s=1e6):
            pass
