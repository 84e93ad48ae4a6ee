"""What happens to the demo's actors while they train and serve: some are killed, and one is lent.

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

from sparseray.errors import SchedulerLostError, UserError
from sparseray.jobs.demo_server import MOST_ENGINES, DemoServer, Heard
from sparseray.platform.run.folder import RunFolder

LEAST_STEPS = 20
"""A run with fewer steps left is over before anything can be seen."""
KILL_AT = 0.1
"""Part of the steps after which the shard is killed."""
LOOK_S, START_S, BACK_S, ASK_S = 0.1, 180.0, 60.0, 5.0
PROMPT, TOKENS, SEED = "def __init__(self, ", 64, 1

Tell = Callable[[str], None]


@contextmanager
def story(
    scheduler: Any, folder: RunFolder, server: DemoServer, *, steps: int, tell: Tell
) -> Iterator["Story"]:
    """Let the story happen while the body follows the run.

    Args:
        scheduler: of the run.
        folder: of the run.
        server: not started yet.
        steps: of the whole run.
        tell: shows a line to a person.
    """
    over = threading.Event()
    chapters = Story(scheduler, folder, server, over, tell)
    thread = threading.Thread(target=chapters.play, args=(steps,), daemon=True, name="story")
    thread.start()
    try:
        yield chapters
    finally:
        # The connection to Ray ends after this; nothing may ask through it any more.
        over.set()
        thread.join(ASK_S)


class _OverError(Exception):
    """The run has ended, or what was waited for did not come; args[0] says so when there is something to say."""


class Story:
    """The chapters, and what came of them.

    Args:
        scheduler, folder, server: of the run, and what serves it.
        over: set when the run has ended.
        tell: shows a line to a person.
    """

    def __init__(
        self, scheduler: Any, folder: RunFolder, server: DemoServer, over: threading.Event, tell: Tell
    ) -> None:
        self.scheduler, self.folder, self.server = scheduler, folder, server
        self.over, self.tell = over, tell
        self.begun = time.time()
        self.first: Heard | None = None
        """What the server said first."""
        self.outcome: list[str] = []
        """Lines for the end."""

    def play(self, steps: int) -> None:
        """Kill an expert shard, serve, have a slot lent, kill an engine in mid-stream; see that all goes on.

        Args:
            steps: of the whole run.
        """
        try:
            first = int(self._event("start", self.begun, START_S)["step"])
            left = steps - first
            if left < LEAST_STEPS:
                raise _OverError(f"only {left} steps are left: nobody is killed and nothing is lent")
            self._reach(first + round(KILL_AT * left))
            self._kill_expert_shard()
            self._serve()
            self._lend()
            self._kill_engine()
        except _OverError as error:
            self.tell(
                str(error)
                or "training ended before the rest of this could be shown; it needs a less busy machine"
            )
        except (UserError, OSError) as error:
            self.tell(f"the server did not do its part: {error}; training goes on")
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

    def _serve(self) -> None:
        """Serve what the run has learned so far, on the same platform, from the memory of its slots."""
        self.tell("serving the run while it trains: two engines join the platform")
        self.server.start()
        self.first = self.server.stream(PROMPT, TOKENS, SEED)
        self.tell(f"{self.first.version} says after {PROMPT!r}:\n{PROMPT}{self.first.text}")

    def _lend(self) -> None:
        """Have more clients than two engines can answer; the third engine's slot is the run's."""
        self.tell("more clients than two engines can answer, and no slot is free")
        begun = time.time()
        with self.server.load() as failed:
            lent = self._event("lent", begun, BACK_S)
            self.tell(f"training has {lent['text']}, {lent['time'] - begun:.1f} s after they came")
            self._wait(lambda: len(self._engines()) == MOST_ENGINES, "the third engine", BACK_S)
            said = f"{MOST_ENGINES} engines answer, {time.time() - begun:.1f} s after the clients came"
            self.tell(said)
        self.outcome.append(
            f"under load:    {said}, one on a slot that training lent; {len(failed)} requests failed"
        )

    def _kill_engine(self) -> None:
        """Kill one of the engines while each of them has a stream, which goes on at another."""
        assert self.first is not None
        engines = self._engines()
        victim, reached = engines[0], threading.Event()

        def kill(pieces: int) -> None:
            if pieces == TOKENS // 3 and not reached.is_set():
                reached.set()
                self.tell(f"killing engine slot {victim['slot']} (pid {victim['pid']}) in mid-stream")
                os.kill(victim["pid"], signal.SIGKILL)

        heard = self.server.streams(PROMPT, TOKENS, SEED, len(engines), kill)
        same = sum(one.text == self.first.text for one in heard)
        worst, plain = max(max(one.gaps_s) for one in heard), max(self.first.gaps_s)
        said = (
            f"{len(heard)} streams, one an engine, one engine killed: {same} of them the text from before; "
            f"longest gap {worst * 1000:.0f} ms, {plain * 1000:.0f} ms undisturbed"
        )
        self.tell(said)
        self.outcome.append(f"in mid-stream: {said}")

    def _engines(self) -> list[dict[str, Any]]:
        """The slots that play an engine."""
        from sparseray.platform.cluster import JobHandle, ask

        jobs = ask(self.scheduler.platform, "jobs", timeout_s=ASK_S)
        serving = next(job for job in jobs if job["state"] == "serving")
        self.server.folder = serving["run_dir"]
        handle = JobHandle(platform=self.scheduler.platform, job=serving["job"])
        found = ask(handle, "status", timeout_s=ASK_S)
        return [slot for slot in found.get("slots", []) if "attention" in slot["roles"]]

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
        if event["kind"] in ("lost", "recovered", "lent", "returned"):
            lines.append(f"after step {event['step']:>3}: {event['kind']}, {event['text']}")
    return lines
