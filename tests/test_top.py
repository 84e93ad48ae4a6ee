"""The one screen of `top`: a job with the figures below it, figures alone, a scheduler that is restarted."""

from typing import Any

import pytest

from sparseray.errors import SchedulerLostError
from sparseray.jobs import top
from sparseray.jobs.watch.figures import Figures, Readings
from sparseray.platform import cluster

STATUS = {"run_dir": "/runs/first", "steps": 9, "records": [], "events": []}


class Looks(Figures):
    """Figures of a server that has so many looks to live."""

    def __init__(self, looks: int) -> None:
        super().__init__()
        self.left = looks

    def look(self) -> list[Readings]:
        self.left -= 1
        now = {("server", "requests_open", frozenset()): 2.0} if self.left >= 0 else {}
        return [Readings("served", now, {}, 0.0, 0)]  # type: ignore[arg-type]


def answers(monkeypatch: pytest.MonkeyPatch, *states: str) -> None:
    """A scheduler that gives these states, "" for silence."""
    left = list(states)

    def ask(_scheduler: object, _method: str, **_options: object) -> dict[str, Any]:
        state = left.pop(0)
        if not state:
            raise SchedulerLostError("gone")
        return STATUS | {"state": state}

    monkeypatch.setattr(cluster, "ask", ask)


def test_a_job_is_shown_with_all_figures_until_it_ends(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answers(monkeypatch, "training", "", "training", "ended")
    assert top.watch("scheduler", Looks(9), every_s=0.0, is_once=False) == 0
    out = capsys.readouterr().out
    assert "/runs/first" in out and "figures of served" in out and "2 open" in out
    assert out.rstrip().endswith("the job is ended")


def test_one_look_waits_for_a_scheduler_that_is_restarted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answers(monkeypatch, "", "training")
    assert top.watch("scheduler", Looks(9), every_s=0.0, is_once=True) == 0
    assert "the job is training" in capsys.readouterr().out


def test_a_scheduler_that_stays_silent_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    answers(monkeypatch, *[""] * 3)
    monkeypatch.setattr(top, "LOST_S", -1.0)
    with pytest.raises(SchedulerLostError):
        top.watch("scheduler", Looks(9), every_s=0.0, is_once=False)


def test_figures_alone_are_shown_while_there_are_any(capsys: pytest.CaptureFixture[str]) -> None:
    looks = Looks(3)
    assert top.watch(None, looks, every_s=0.0, is_once=False) == 0
    assert looks.left == -1 and "the job" not in capsys.readouterr().out


def test_decisions_of_the_autoscaler_and_nodes_that_are_drained_are_lines_of_the_screen(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reason = "attention 1 to 2: nine of ten first tokens would take 812 ms and shall take 300 ms"
    events = [
        {"time": 0.0, "step": 7, "kind": "autoscaled", "text": reason},
        {"time": 1.0, "step": 7, "kind": "drained", "text": "slot 3 left, 0.10 MB moved in 9 ms"},
    ]
    found = STATUS | {"state": "serving", "events": events, "draining": {"4": 28}}
    monkeypatch.setattr(cluster, "ask", lambda *_, **__: found)
    monkeypatch.setenv("COLUMNS", "200")
    assert top.watch("scheduler", Looks(9), every_s=0.0, is_once=True) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.endswith(f"autoscaled {reason}") for line in lines)
    assert any("drained    slot 3 left" in line for line in lines)
    assert any(
        "draining  slot 4 is on a node that Ray drains, the first is gone in 28 s" in line for line in lines
    )
