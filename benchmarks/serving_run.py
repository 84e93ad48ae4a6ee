"""One real server under a benchmark: started as a command, watched and struck from outside."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks.elastic_run import MARK, ROOT, RunDied

LIMIT_S = 120.0
SCALED = {"attention": "attention", "expert": "experts", "memory": "memory"}


@dataclass(frozen=True, kw_only=True)
class Held:
    """What a server's processes hold.

    Args:
        processes, files, sockets: how many; files are descriptors, and sockets those that have a name.
        memory_mb: of all processes; pages that several share count for each.
    """

    processes: int
    files: int
    sockets: int
    memory_mb: float

    def is_within(self, before: "Held") -> bool:
        """Whether it is no more than it was; caches of the interpreter and of the allocator may still fill."""
        return (
            self.processes <= before.processes
            and self.sockets <= before.sockets
            and self.files <= 1.05 * before.files
            and self.memory_mb <= 1.1 * before.memory_mb
        )

    def __str__(self) -> str:
        return (
            f"{self.processes} processes, {self.files} files, {self.sockets} sockets, {self.memory_mb:.0f} MB"
        )


class Server:
    """`python -m sparseray serve`, to be used in a `with` statement; sets this process's state folder.

    Args:
        checkpoint: to serve.
        options: further ones of the command.
    """

    def __init__(self, checkpoint: Path, *options: str) -> None:
        self.mark = f"{os.getpid()}-{time.monotonic_ns()}"
        self.temporary = Path(tempfile.mkdtemp(prefix="sr-", dir="/tmp"))
        self.log = self.temporary / "log"
        os.environ["SPARSERAY_STATE_DIR"] = str(self.temporary / "state")
        # Longer than the default: other work on the machine must not look like a hang.
        arguments = [
            "serve",
            "--checkpoint",
            str(checkpoint),
            "--port",
            "0",
            "--cluster.hang_s",
            "3",
            *options,
        ]
        started = time.monotonic()
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "sparseray", *arguments],
                cwd=ROOT,
                env={**os.environ, MARK: self.mark, "TMPDIR": str(self.temporary), "OMP_NUM_THREADS": "1"},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                process_group=0,
            )
        try:
            self.wait(lambda: "Ctrl-C stops" in self.log.read_text(), "its first word")
            found = re.search(r"at http://127\.0\.0\.1:(\d+) ", self.log.read_text())
            assert found is not None, self.log.read_text()
            self.port = int(found[1])
            self.wait(self._is_ready, "an engine that answers")
            self.start_s = time.monotonic() - started
            self._attach()
        except BaseException:
            self._end()
            raise

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def _is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/ready", timeout=10.0) as answer:
                return bool(answer.status == 200)
        except urllib.error.HTTPError:
            return False

    def _attach(self) -> None:
        from sparseray.platform.cluster import attach
        from sparseray.platform.run.registry import registered_runs

        self.scheduler = attach(registered_runs()[0])

    def _end(self) -> None:
        """SIGKILL what is left, by id."""
        import ray

        ray.shutdown()
        for member in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        self.process.wait(LIMIT_S)
        shutil.rmtree(self.temporary, ignore_errors=True)

    def stop(self) -> None:
        """End it as Ctrl-C does.

        Raises:
            RunDied: not cleanly, or something is left.
        """
        import ray

        ray.shutdown()
        os.kill(self.process.pid, signal.SIGINT)
        code = self.process.wait(LIMIT_S)
        deadline = time.monotonic() + 20.0
        while self.processes() and time.monotonic() < deadline:
            time.sleep(0.1)
        if code or self.processes():
            raise RunDied(f"it ended with {code} and left {len(self.processes())} processes")

    def wait(self, condition: Callable[[], object], what: str) -> None:
        """Wait for a condition.

        Args:
            condition: asked again and again.
            what: it is, for the message.

        Raises:
            RunDied: it did not come, or the server ended.
        """
        deadline = time.monotonic() + LIMIT_S
        while not condition():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RunDied(f"{what} did not come; its log:\n{self.log.read_text()[-3000:]}")
            time.sleep(0.05)

    # -- what there is to see --------------------------------------------------------------------------

    def processes(self) -> list[psutil.Process]:
        """All living processes of the server, Ray's daemons too."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(MARK) == self.mark:
                    found.append(process)
        return found

    def sockets(self) -> int:
        """Unix sockets of slots and scheduler that have a name in the file system."""
        return sum(path.is_socket() for path in self.temporary.glob("sparseray-*/**/*"))

    def held(self) -> Held:
        """What all processes hold now."""
        processes = self.processes()
        return Held(
            processes=len(processes),
            files=sum(process.num_fds() for process in processes),
            sockets=self.sockets(),
            memory_mb=sum(process.memory_info().rss for process in processes) / 1e6,
        )

    def changes(self) -> int:
        """Changes of plan so far."""
        return int(self.ask("status")["generation"])

    def ask(self, method: str, *arguments: Any) -> Any:
        """Ask the scheduler, or the one that comes after it.

        Args:
            method: of the scheduler.
            arguments: of the call.
        """
        from sparseray.errors import SchedulerLostError
        from sparseray.platform.cluster import ask

        for _ in range(100):
            with contextlib.suppress(SchedulerLostError):
                return ask(self.scheduler, method, *arguments, timeout_s=10.0)
            time.sleep(0.2)
        raise RunDied("the scheduler does not answer")

    def slots(self, role: str) -> list[dict[str, Any]]:
        """Slots whose first role it is."""
        return [slot for slot in self.ask("status")["slots"] if slot["roles"][0] == role]

    def settle(self) -> None:
        """Wait until the plan is as wanted, with all replicas and standby slots."""

        def is_settled() -> bool:
            found = self.ask("status")
            replicas, standby = found.get("replicas", {}), len(self.slots("standby"))
            return bool(
                found.get("settled")
                and replicas["actual"] >= replicas["target"]
                and standby
                and not found["starting"]
            )

        self.wait(is_settled, "all replicas and a standby slot")

    # -- what is done to it ------------------------------------------------------------------------------

    def strike(self, role: str, number: int, which: int = 0) -> None:
        """Send a signal to a slot.

        Args:
            role: of the slot.
            number: of the signal.
            which: of the slots of this role.
        """
        slots = self.slots(role)
        os.kill(slots[which % len(slots)]["pid"], number)

    def scale(self, role: str, count: int) -> None:
        """Have another number of slots of a role, and wait for it.

        Args:
            role: attention, expert or memory.
            count: of slots.
        """
        if refused := self.ask("scale", SCALED[role], count):
            raise RunDied(f"scale {role} {count}: {refused}")
        self.wait(lambda: self.ask("status")["settled"], f"{count} slots of {role}")
