"""The demo's story against a made-up run: who is killed, what is asked for, and that it ends with the run."""

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from sparseray.jobs import demo_story
from sparseray.platform import cluster
from sparseray.platform.run.folder import RunFolder


class Scheduler:
    """Knows one expert shard, a process that sleeps, and a spare slot."""

    def __init__(self, folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
        self.victim = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        self.folder, self.refusal = folder, ""
        self.asked: list[tuple[str, int]] = []
        monkeypatch.setattr(cluster, "ask", lambda _, method, *given, **__: getattr(self, method)(*given))
        folder.path.mkdir(parents=True)

    def event(self, kind: str, step: int) -> None:
        event = {"time": time.time(), "step": step, "kind": kind, "text": f"{kind} text", "attention": 3}
        self.folder.append_event(event)

    def status(self) -> dict[str, Any]:
        slots = [{"slot": 4, "roles": ["expert"], "pid": self.victim.pid, "experts": 8}]
        spare = {"slot": 5, "roles": ["standby"], "pid": 0, "experts": 0}
        return {"settled": True, "replicas": {"actual": 2, "target": 2}, "slots": [*slots, spare]}

    def scale(self, role: str, count: int) -> str:
        self.asked.append((role, count))
        return self.refusal


@pytest.fixture
def scheduler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    made = Scheduler(RunFolder(tmp_path / "run"), monkeypatch)
    yield made
    made.victim.kill()
    made.victim.wait()


def wait_for(lines: list[str], word: str) -> None:
    deadline = time.monotonic() + 10.0
    while not any(word in line for line in lines):
        assert time.monotonic() < deadline, lines
        time.sleep(0.01)


@pytest.mark.parametrize("refusal", ["", "there is no room"])
def test_an_expert_shard_is_killed_and_a_worker_asked_for_when_the_steps_are_reached(
    scheduler: Scheduler, refusal: str
) -> None:
    lines: list[str] = []
    scheduler.refusal = refusal
    with demo_story.story(scheduler, scheduler.folder, steps=100, attention=3, tell=lines.append):
        scheduler.event("start", 0)
        scheduler.folder.append({"step": 29})
        time.sleep(0.3)
        assert scheduler.victim.poll() is None and not lines
        scheduler.folder.append({"step": 30})
        assert scheduler.victim.wait(10.0) == -9
        wait_for(lines, f"slot 4 (pid {scheduler.victim.pid})")
        scheduler.event("recovered", 31)
        wait_for(lines, "no step was lost")
        assert not scheduler.asked
        scheduler.folder.append({"step": 55})
        wait_for(lines, "scale attention 3")
        scheduler.event("resized", 56)
        wait_for(lines, "that was refused: there is no room" if refusal else "3 attention workers train now")
    assert scheduler.asked == [("attention", 3)]


def test_a_run_that_ends_early_or_has_few_steps_left_ends_the_story(scheduler: Scheduler) -> None:
    lines: list[str] = []
    with demo_story.story(scheduler, scheduler.folder, steps=100, attention=3, tell=lines.append):
        scheduler.event("start", 0)
    assert not lines
    with demo_story.story(scheduler, scheduler.folder, steps=100, attention=3, tell=lines.append):
        scheduler.event("start", 90)
        wait_for(lines, "only 10 steps are left")
    assert scheduler.victim.poll() is None and not scheduler.asked


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
