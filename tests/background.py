"""Commands as processes of their own, and what they leave running."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[1]
MARK = "SPARSERAY_TEST_MARK"


def environment(**extra: str) -> dict[str, str]:
    """Environment of a command: this package and interpreter first, no Ray settings of the caller's, a mark."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    path = os.pathsep.join([str(Path(sys.executable).parent), kept.get("PATH", "")])
    own = {"PYTHONPATH": str(ROOT), "PATH": path, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return kept | own | {"RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0", MARK: uuid.uuid4().hex} | extra


def marked(env: dict[str, str]) -> list[psutil.Process]:
    """The processes that carry an environment's mark."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(MARK) == env[MARK] and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def named(processes: list[psutil.Process]) -> list[str]:
    """Command lines of those that still live."""
    found = []
    for process in processes:
        with contextlib.suppress(psutil.Error):
            found.append(" ".join(process.cmdline())[:150])
    return found


def end_leftovers(env: dict[str, str], wait_s: float = 10.0) -> list[str]:
    """Wait until nothing carries the mark; kill what still does, and return its command lines."""
    deadline = time.monotonic() + wait_s
    while (left := marked(env)) and time.monotonic() < deadline:
        time.sleep(0.1)
    found = named(left)
    for process in left:
        with contextlib.suppress(psutil.Error):
            process.kill()
    return found


def sparseray(
    *arguments: str, env: dict[str, str] | None = None, timeout: float = 60.0
) -> subprocess.CompletedProcess[str]:
    """Run `python -m sparseray ...` to its end."""
    command = [sys.executable, "-m", "sparseray", *arguments]
    return subprocess.run(
        command, env=env or environment(), capture_output=True, text=True, timeout=timeout, check=False
    )


class Background:
    """A command that runs until it is interrupted; its output is read as it comes."""

    def __init__(self, command: list[str], env: dict[str, str]) -> None:
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            command,
            env=env | {"PYTHONFAULTHANDLER": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)

    @property
    def output(self) -> str:
        return "".join(self.lines)

    def wait_for(self, text: str, seconds: float) -> None:
        """Wait until the output holds `text`."""
        deadline = time.monotonic() + seconds
        while text not in self.output:
            assert self.process.poll() is None, f"it ended with {self.process.poll()}:\n{self.output}"
            assert time.monotonic() < deadline, f"{text!r} did not come:\n{self.output}"
            time.sleep(0.05)

    def interrupt(self, seconds: float = 20.0) -> int:
        """Send SIGINT to the whole process group, as a terminal's Ctrl-C does, and return the exit code.

        One that does not end is made to tell where its threads stand.
        """
        os.killpg(self.process.pid, signal.SIGINT)
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.send_signal(signal.SIGABRT)
            self.process.wait(seconds)
        finally:
            self._thread.join(5.0)
        pytest.fail(f"Ctrl-C did not end it within {seconds} s:\n{self.output}")

    def terminate(self, seconds: float = 20.0) -> None:
        """End it by SIGTERM if it still runs."""
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait(seconds)


def free_ports(count: int) -> list[int]:
    """Return different ports of the loopback interface that are free now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
