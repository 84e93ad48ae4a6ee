"""The demo's story against a made-up run and server: who is killed, when a slot is lent, and that it ends with the run."""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from sparseray.errors import UserError
from sparseray.jobs import demo_story
from sparseray.jobs.demo_server import MOST_ENGINES, Heard
from sparseray.platform import cluster
from sparseray.platform.run.folder import RunFolder


def sleeping() -> "subprocess.Popen[bytes]":
    return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])


class Scheduler:
    """Knows one expert shard and one engine, processes that sleep, and a spare slot."""

    def __init__(self, folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
        self.victim, self.engine = sleeping(), sleeping()
        self.folder, self.platform, self.engines = folder, object(), 2
        monkeypatch.setattr(cluster, "ask", lambda who, method, **_: self.answer(who, method))
        folder.path.mkdir(parents=True)

    def event(self, kind: str, step: int) -> None:
        self.folder.append_event({"time": time.time(), "step": step, "kind": kind, "text": f"{kind} text"})

    def answer(self, who: Any, method: str) -> Any:
        if method == "jobs":
            jobs = [("t", "/run", "training"), ("s", "/servers/s", "serving")]
            return [dict(zip(("job", "run_dir", "state"), job)) for job in jobs]
        if who is not self:
            assert who.job == "s"
            pids = [self.engine.pid, *range(1, self.engines)]
            return {"slots": [{"slot": n, "roles": ["attention"], "pid": pid} for n, pid in enumerate(pids)]}
        slots = [{"slot": 4, "roles": ["expert"], "pid": self.victim.pid, "experts": 8}]
        spare = {"slot": 5, "roles": ["standby"], "pid": 0, "experts": 0}
        return {"settled": True, "replicas": {"actual": 2, "target": 2}, "slots": [*slots, spare]}


class Server:
    """Answers at once; under load it has one engine more."""

    def __init__(self, scheduler: Scheduler, refusal: str = "") -> None:
        self.scheduler, self.refusal, self.folder = scheduler, refusal, ""

    def start(self) -> None:
        if self.refusal:
            raise UserError(self.refusal)

    def stream(self, *_: Any) -> Heard:
        return Heard(text="text", gaps_s=[0.01, 0.02], version="step_20-ab")

    def streams(
        self, prompt: str, tokens: int, seed: int, count: int, at: Callable[[int], None]
    ) -> list[Heard]:
        for pieces in range(tokens + 1):
            at(pieces)
        return [Heard(text=f"text{'!' * (n == 1)}", gaps_s=[0.01, 0.3], version="") for n in range(count)]

    @contextmanager
    def load(self) -> Iterator[list[str]]:
        self.scheduler.event("lent", 40)
        self.scheduler.engines = MOST_ENGINES
        yield []


@pytest.fixture
def scheduler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    made = Scheduler(RunFolder(tmp_path / "run"), monkeypatch)
    yield made
    for process in (made.victim, made.engine):
        process.kill()
        process.wait()


def wait_for(lines: list[str], word: str) -> None:
    deadline = time.monotonic() + 10.0
    while not any(word in line for line in lines):
        assert time.monotonic() < deadline, lines
        time.sleep(0.01)


def play(scheduler: Scheduler, server: Server, lines: list[str]) -> Any:
    return demo_story.story(scheduler, scheduler.folder, server, steps=100, tell=lines.append)  # type: ignore[arg-type]


@pytest.mark.parametrize("refusal", ["", "it did not answer"])
def test_a_shard_dies_a_server_joins_a_slot_is_lent_and_an_engine_dies_in_mid_stream(
    scheduler: Scheduler, refusal: str
) -> None:
    lines: list[str] = []
    with play(scheduler, Server(scheduler, refusal), lines) as story:
        scheduler.event("start", 0)
        scheduler.folder.append({"step": 9})
        time.sleep(0.3)
        assert scheduler.victim.poll() is None and not lines
        scheduler.folder.append({"step": 10})
        assert scheduler.victim.wait(10.0) == -9
        wait_for(lines, f"slot 4 (pid {scheduler.victim.pid})")
        scheduler.event("recovered", 11)
        wait_for(lines, "no step was lost")
        wait_for(lines, "did not answer" if refusal else "longest gap 300 ms, 20 ms undisturbed")
    if refusal:
        assert scheduler.engine.poll() is None
    else:
        # A process that was killed ends a moment after the signal.
        assert scheduler.engine.wait(10.0) == -9
        assert "3 engines answer" in story.outcome[0] and "; 0 requests failed" in story.outcome[0]
        # One of the three said something else.
        assert (
            "3 streams, one an engine, one engine killed: 2 of them the text from before" in story.outcome[1]
        )


def test_a_run_that_ends_early_or_has_few_steps_left_ends_the_story(scheduler: Scheduler) -> None:
    lines: list[str] = []
    with play(scheduler, Server(scheduler), lines):
        scheduler.event("start", 0)
    assert len(lines) == 1 and "training ended before" in lines[0]
    lines.clear()
    with play(scheduler, Server(scheduler), lines):
        scheduler.event("start", 90)
        wait_for(lines, "only 10 steps are left")
    assert scheduler.victim.poll() is None and scheduler.engine.poll() is None


def test_the_summary_says_whether_each_step_stands_there_once(scheduler: Scheduler) -> None:
    for step in (1, 2):
        scheduler.folder.append({"step": step})
    scheduler.event("lost", 1)
    assert demo_story.summary(scheduler.folder) == [
        "steps:         2, each once",
        "after step   1: lost, lost text",
    ]
    scheduler.folder.append({"step": 2})
    assert "NOT each once" in demo_story.summary(scheduler.folder)[0]
