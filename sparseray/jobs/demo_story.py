"""What happens to the demo's actors while they train: one is killed, and one is added.

Runs in a thread beside the command that shows the steps; it waits for steps and events that the run's
folder shows, and asks the scheduler only who is who. It ends with the run, whatever came of it.
"""

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from sparseray.errors import SchedulerLostError
from sparseray.platform.run.folder import RunFolder

LEAST_STEPS = 20
"""A run with fewer steps left is over before anything can be seen."""
KILL_AT, ADD_AT = 0.3, 0.55
"""Parts of the steps after which the shard is killed and the worker is asked for."""
LOOK_S, START_S, BACK_S, ASK_S = 0.1, 180.0, 60.0, 5.0

Tell = Callable[[str], None]


@contextmanager
def story(scheduler: Any, folder: RunFolder, *, steps: int, attention: int, tell: Tell) -> Iterator[None]:
    """Let the story happen while the body follows the run.

    Args:
        scheduler: of the run.
        folder: of the run.
        steps: of the whole run.
        attention: workers that there shall be in the end.
        tell: shows a line to a person.
    """
    over = threading.Event()
    chapters = _Story(scheduler, folder, over, tell)
    thread = threading.Thread(
        target=chapters.play, kwargs={"steps": steps, "attention": attention}, daemon=True, name="story"
    )
    thread.start()
    try:
        yield
    finally:
        # The connection to Ray ends after this; nothing may ask through it any more.
        over.set()
        thread.join(ASK_S)


class _OverError(Exception):
    """The run has ended, or what was waited for did not come; args[0] says so when there is something to say."""


class _Story:
    def __init__(self, scheduler: Any, folder: RunFolder, over: threading.Event, tell: Tell) -> None:
        self.scheduler, self.folder, self.over, self.tell = scheduler, folder, over, tell
        self.begun = time.time()

    def play(self, *, steps: int, attention: int) -> None:
        """Kill an expert shard, see that training goes on, add an attention worker, see that it does."""
        try:
            first = int(self._event("start", self.begun, START_S)["step"])
            left = steps - first
            if left < LEAST_STEPS:
                raise _OverError(f"only {left} steps are left: nobody is killed and nobody is added")
            self._reach(first + round(KILL_AT * left))
            self._kill_expert_shard()
            self._reach(first + round(ADD_AT * left))
            self._add_attention_worker(attention)
        except _OverError as error:
            if error.args:
                self.tell(str(error))
        except SchedulerLostError as error:
            self.tell(
                f"the scheduler did not answer ({error}); training goes on without this part of the story"
            )

    def _kill_expert_shard(self) -> None:
        status = self._settled()
        victim = next(slot for slot in status["slots"] if "expert" in slot["roles"])
        self.tell(
            f"killing expert shard slot {victim['slot']} (pid {victim['pid']}) with SIGKILL, in mid-training; "
            f"each of its {victim['experts']} experts lies on another slot, too"
        )
        killed = time.time()
        os.kill(victim["pid"], signal.SIGKILL)
        back = self._event("recovered", killed, BACK_S)
        self.tell(f"training is {back['text']}; no step was lost, no checkpoint was read")

    def _add_attention_worker(self, count: int) -> None:
        from sparseray.platform.cluster import ask

        self.tell(f"adding an attention worker, as `python -m sparseray scale attention {count}` does")
        asked = time.time()
        refused: str = ask(self.scheduler, "scale", "attention", count, timeout_s=ASK_S)
        if refused:
            raise _OverError(f"that was refused: {refused}")
        done = self._event("resized", asked, BACK_S)
        self.tell(
            f"{done['attention']} attention workers train now: {done['text']}, "
            f"{done['time'] - asked:.1f} s after it was asked for"
        )

    # -- waiting -----------------------------------------------------------------------------------

    def _wait(self, look: Callable[[], Any], what: str, limit_s: float) -> Any:
        deadline = time.monotonic() + limit_s
        while not (found := look()):
            if self.over.wait(LOOK_S):
                raise _OverError
            if time.monotonic() > deadline:
                raise _OverError(f"{what} did not come within {limit_s:g} s; training goes on all the same")
        if self.over.is_set():
            raise _OverError
        return found

    def _event(self, kind: str, since: float, limit_s: float) -> dict[str, Any]:
        def look() -> dict[str, Any] | None:
            return next(
                (e for e in self.folder.event_lines() if e["kind"] == kind and e["time"] >= since), None
            )

        found: dict[str, Any] = self._wait(look, f"the event {kind!r}", limit_s)
        return found

    def _reach(self, step: int) -> None:
        """Wait for a step; a slow machine takes as long as it takes."""
        self._wait(lambda: last_step(self.folder) >= step, f"step {step}", float("inf"))

    def _settled(self) -> dict[str, Any]:
        """The scheduler's status, once every piece of state has all its holders and a spare slot is warm."""
        from sparseray.platform.cluster import ask

        def look() -> dict[str, Any] | None:
            found: dict[str, Any] = ask(self.scheduler, "status", timeout_s=ASK_S)
            replicas = found.get("replicas", {"actual": 0, "target": 1})
            spare = any(slot["roles"] == ["standby"] for slot in found.get("slots", []))
            is_whole = found.get("settled", False) and replicas["actual"] >= replicas["target"]
            return found if is_whole and spare else None

        found: dict[str, Any] = self._wait(look, "a plan with all replicas and a spare slot", BACK_S)
        return found


def last_step(folder: RunFolder) -> int:
    """The last step that a run's folder shows, 0 for none."""
    lines = folder.metrics.read_bytes().splitlines(keepends=True) if folder.metrics.exists() else []
    whole = [line for line in lines[-2:] if line.endswith(b"\n")]
    return int(json.loads(whole[-1])["step"]) if whole else 0


def summary(folder: RunFolder) -> list[str]:
    """What became of a run, in lines for people: from its records and events."""
    steps, events = [record["step"] for record in folder.records()], folder.event_lines()
    is_whole = steps == list(range(1, len(steps) + 1))
    lines = [f"steps:         {len(steps)}, " + ("each once" if is_whole else "NOT each once")]
    for event in events:
        if event["kind"] in ("lost", "recovered", "resized"):
            lines.append(f"after step {event['step']:>3}: {event['kind']}, {event['text']}")
    return lines
