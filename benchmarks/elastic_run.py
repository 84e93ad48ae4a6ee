"""One real training run under a benchmark: started as a command, watched and struck from outside.

What is measured comes from the run's own files (metrics.jsonl, events.jsonl, journal.sqlite) and from
the clock of this process; slots are found through the scheduler actor, as `status` finds them.
"""

import contextlib
import itertools
import json
import os
import random
import shutil
import signal
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import psutil

from sparseray.errors import SchedulerLostError
from sparseray.platform.config import ClusterConfig, RunConfig, save_yaml

ROOT = Path(__file__).resolve().parent.parent
MARK = "SPARSERAY_BENCHMARK"
LIMIT_S = 120.0
POLL_S = 0.02
ROLES = ("attention", "expert", "memory")


class RunDied(RuntimeError):
    """A run ended, or did not do in time what is measured; the message says what and where its log is."""


@dataclass(frozen=True, kw_only=True)
class Strike:
    """One signal and what followed.

    Args:
        role: of the slot.
        seconds: from the signal to the commit of the first step that began after it.
        phases: what the platform itself says of the recovery, seconds; empty where nothing had to be recovered.
    """

    role: str
    seconds: float
    phases: dict[str, float]


class Tail:
    """Reads a growing file of JSON lines once, and again from its start when it was replaced."""

    def __init__(self, path: Path) -> None:
        self.path, self.lines = path, list[dict[str, Any]]()
        self._offset, self._inode = 0, 0

    def read(self) -> list[dict[str, Any]]:
        """All whole lines so far."""
        if not self.path.exists():
            return self.lines
        with self.path.open("rb") as file:
            inode = os.fstat(file.fileno()).st_ino
            if inode != self._inode:
                self._inode, self._offset, self.lines = inode, 0, []
            file.seek(self._offset)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        self._offset += len(whole)
        self.lines += [json.loads(line) for line in whole.splitlines()]
        return self.lines


class Training:
    """A run of `python -m sparseray pretrain`, to be used in a `with` statement.

    Args:
        config: model, data and optimizer; `cluster` is replaced.
        cluster: slots, replication, standby.
        folder: where the run folder and the log go.
        name: of the run.
    """

    def __init__(self, config: RunConfig, cluster: ClusterConfig, folder: Path, name: str) -> None:
        self.config, self.cluster, self.name = config, cluster, name
        self.run_dir, self.log = folder / name, folder / f"{name}.log"
        self._metrics, self._events = (
            Tail(self.run_dir / "metrics.jsonl"),
            Tail(self.run_dir / "events.jsonl"),
        )
        self._scheduler: Any = None
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "Training":
        try:
            self._start()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def _start(self) -> None:
        file = self.run_dir.parent / f"{self.name}.yaml"
        save_yaml(replace(self.config, cluster=self.cluster, run_dir=str(self.run_dir)), file)
        command = [sys.executable, "-m", "sparseray", "pretrain", "--config", str(file)]
        before = len(self.records())
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, MARK: self.mark, "TMPDIR": str(self.temporary)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.wait(lambda: len(self.records()) > before + 2, "its first steps")
        self._attach()

    def _attach(self) -> None:
        from sparseray.platform.cluster import attach
        from sparseray.platform.run.registry import registered_runs

        run = next(run for run in registered_runs() if run.run_dir == str(self.run_dir))
        self._scheduler = attach(run)

    def _end(self) -> None:
        """SIGKILL what is left of the run, by id; a run that was stopped before has left nothing."""
        self._detach()
        for member in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        if self._process is not None:
            self._process.wait(LIMIT_S)
        shutil.rmtree(self.temporary, ignore_errors=True)

    def _detach(self) -> None:
        if self._scheduler is not None:
            import ray

            self._scheduler = None
            ray.shutdown()

    def stop(self, *, keeps_cluster: bool = False) -> None:
        """End the run as Ctrl-C does and wait until its processes are gone.

        Args:
            keeps_cluster: the Ray cluster is not the run's own, so its daemons stay.

        Raises:
            RunDied: it did not end cleanly.
        """
        assert self._process is not None
        self._detach()
        if self._process.poll() is None:
            os.kill(self._process.pid, signal.SIGINT)
        code = self._process.wait(LIMIT_S)
        if code not in (0, 130):
            raise RunDied(self._said(f"ended with code {code}"))
        if keeps_cluster:
            return
        deadline = time.monotonic() + 20.0
        while self.processes() and time.monotonic() < deadline:
            time.sleep(0.1)
        if left := self.processes():
            raise RunDied(self._said(f"left {len(left)} processes: {' '.join(left[0].cmdline())[:80]}"))

    @cached_property
    def temporary(self) -> Path:
        """TMPDIR of the run's processes; short, as the path of a Unix socket is at most 107 bytes."""
        return Path(tempfile.mkdtemp(prefix="sr-", dir="/tmp"))

    # -- what there is to see -------------------------------------------------------------------

    @property
    def mark(self) -> str:
        """Value of an environment variable that all processes of the run have."""
        return f"{os.getpid()}-{self.name}"

    @property
    def driver(self) -> psutil.Process:
        """The process of the command."""
        assert self._process is not None
        return psutil.Process(self._process.pid)

    def processes(self) -> list[psutil.Process]:
        """All living processes of the run, Ray's daemons too."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(MARK) == self.mark:
                    found.append(process)
        return found

    def records(self) -> list[dict[str, Any]]:
        """One record per committed step."""
        return self._metrics.read()

    def events(self) -> list[dict[str, Any]]:
        """Losses, recoveries, resizes."""
        return self._events.read()

    @property
    def scheduler(self) -> Any:
        """Handle of the job, for `cluster.ask`."""
        return self._scheduler

    def ask(self, method: str, *arguments: Any) -> Any:
        """Call the scheduler, also one that is being restarted."""
        from sparseray.platform.cluster import ask

        deadline = time.monotonic() + LIMIT_S
        while True:
            self.check()
            try:
                return ask(self._scheduler, method, *arguments)
            except SchedulerLostError:
                if time.monotonic() > deadline:
                    raise RunDied(self._said("its scheduler does not answer")) from None
                time.sleep(0.1)

    def slots(self, role: str = "") -> list[dict[str, Any]]:
        """Slots that play a role, or all."""
        found: list[dict[str, Any]] = self.ask("status").get("slots", [])
        return [slot for slot in found if not role or role in slot["roles"]]

    def check(self) -> None:
        """Raise RunDied when the command has ended."""
        if self._process is not None and self._process.poll() is not None:
            raise RunDied(self._said(f"ended by itself with code {self._process.returncode}"))

    def wait(self, condition: Callable[[], object], what: str, limit_s: float = LIMIT_S) -> None:
        """Wait for a condition while the run lives."""
        deadline = time.monotonic() + limit_s
        while not condition():
            self.check()
            if time.monotonic() > deadline:
                raise RunDied(self._said(f"{what} did not come within {limit_s:g} s"))
            time.sleep(POLL_S)

    def _said(self, what: str) -> str:
        lines = self.log.read_text(errors="replace").splitlines() if self.log.exists() else []
        events = "; ".join(f"{e['kind']} {e['text'][:90]}" for e in self.events()[-3:])
        return f"run {self.name}: {what}; events: {events}; log {self.log}: {' / '.join(lines[-2:])[:300]}"

    def wait_steps(self, count: int) -> list[dict[str, Any]]:
        """Wait for that many more commits and return their records."""
        before = len(self.records())
        self.wait(lambda: len(self.records()) >= before + count, f"{count} more steps", LIMIT_S + count)
        return self.records()[before:]

    def wait_calm(self, steps: int = 3) -> None:
        """Wait until plan and standby slots are as wanted and nothing starts any more."""

        def is_calm() -> bool:
            status = self.ask("status")
            idle = sum(slot["roles"] == ["standby"] for slot in status.get("slots", []))
            enough = idle == self.cluster.standby and not status.get("starting", 1)
            if enough and status["settled"] and status["replicas"]["actual"] >= self.cluster.replication:
                return True
            time.sleep(0.2)
            return False

        self.wait(is_calm, "a settled plan with its standby slots")
        self.wait_steps(steps)

    # -- what is done to it -----------------------------------------------------------------------

    def strike(self, role: str, number: int, source: random.Random, count: int = 1) -> Strike:
        """Send a signal to slots of a role (with `count` 2: also to one of the next role) and time what follows."""
        roles = [ROLES[(ROLES.index(role) + i) % len(ROLES)] for i in range(count)] if count > 1 else [role]
        pids: list[int] = []
        for each in roles:
            choice = [slot["pid"] for slot in self.slots(each) if slot["pid"] not in pids]
            if not choice:
                raise RunDied(self._said(f"no slot plays {each}"))
            pids.append(source.choice(choice))
        return self.signal(pids, number, " + ".join(roles))

    def signal(self, pids: Sequence[int], number: int, role: str) -> Strike:
        """Send a signal to processes and wait for the commit of a step that began afterwards."""
        known, struck = len(self.events()), time.time()
        for pid in pids:
            os.kill(pid, number)
        return self.after(struck, known, role)

    def after(self, struck: float, known_events: int, role: str) -> Strike:
        """Time the first commit of a step that began after `struck` (`time.time`)."""

        def first() -> float:
            found = 0.0
            for record in reversed(self.records()):
                if record["time"] - record["seconds"] < struck:
                    break
                found = record["time"]
            return found

        self.wait(first, f"a step after {role} was struck", 60.0)
        seconds = first() - struck
        self.wait_steps(1)
        new = [e for e in self.events()[known_events:] if e["kind"] in ("recovered", "scheduler")]
        return Strike(role=role, seconds=seconds, phases=new[-1].get("phases", {}) if new else {})

    def scale(self, role: str, count: int) -> dict[str, Any]:
        """Ask for a number of slots and return the event of the change.

        Raises:
            RunDied: it was refused, or did not come.
        """
        known = len(self.events())
        refused = self.ask("scale", role, count)
        if refused:
            raise RunDied(self._said(f"scale {role} {count} was refused: {refused}"))
        self.wait(
            lambda: any(e["kind"] == "resized" for e in self.events()[known:]),
            f"the resize of {role} to {count}",
        )
        return next(e for e in self.events()[known:] if e["kind"] == "resized")

    # -- what is read off it ------------------------------------------------------------------------

    def repeated_steps(self) -> int:
        """Steps that were committed more than once: what a loss threw away, from the journal."""
        with contextlib.closing(
            sqlite3.connect(f"file:{self.run_dir}/journal.sqlite?mode=ro", uri=True)
        ) as db:
            row = db.execute("SELECT count(*) - count(DISTINCT step) FROM decisions WHERE kind = 'commit'")
            return int(row.fetchone()[0])

    def curve(self) -> list[tuple[int, float, float, float]]:
        """Step, loss, balance loss and gradient norm of every step, to be compared to the bit."""
        return [(r["step"], r["loss"], r["aux_loss"], r["grad_norm"]) for r in self.records()]


def gaps(records: Sequence[dict[str, Any]]) -> list[float]:
    """Seconds from each commit to the next."""
    return [b["time"] - a["time"] for a, b in itertools.pairwise(records)]


def median_step(records: Sequence[dict[str, Any]]) -> float:
    """Median seconds from one commit to the next."""
    return statistics.median(gaps(records))


@contextlib.contextmanager
def environment() -> Iterator[None]:
    """Keep the runs of a benchmark apart from the user's own: state folder, Ray settings, one thread."""
    with tempfile.TemporaryDirectory(prefix="sr-state-") as state:
        for name in [name for name in os.environ if name.startswith("RAY_")]:
            del os.environ[name]
        os.environ |= {
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "XDG_STATE_HOME": state,
            "RAY_AUTH_MODE": "disabled",
            "RAY_USAGE_STATS_ENABLED": "0",
            # As a local run sets it for itself: niced slots starve on a busy machine.
            "RAY_worker_niceness": "0",
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        }
        yield
