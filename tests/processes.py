"""Runs commands as real processes with an environment of their own, and finds what they leave behind."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
LIMIT_S = 120.0
LAST_LINES = 40
"""Of a log, that tell why a command failed."""


def environment(**changes: str) -> dict[str, str]:
    """The environment of a command: token authentication off unless asked for, one thread."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    return kept | {
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
        "OMP_NUM_THREADS": "1",
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        **changes,
    }


def planting(**variables: str) -> dict[str, str]:
    """What makes a command load tests/planted, beside the rest of its environment.

    Args:
        variables: that ask for something of it.
    """
    path = f"{ROOT / 'tests' / 'planted'}{os.pathsep}{environment()['PYTHONPATH']}"
    return {"PYTHONPATH": path, **variables}


def resting(seconds: float) -> dict[str, str]:
    """What makes training in a command rest so long within each step."""
    return planting(SPARSERAY_TEST_REST_S=str(seconds))


def for_slots(slots: int) -> dict[str, str]:
    """What makes a command find a GPU for each of so many slots; where there are fewer all share the first one.

    Args:
        slots: that serve at a time; where they share a GPU there is one more, for who comes while another goes.
    """
    import torch

    return {} if torch.cuda.device_count() >= slots else planting(SPARSERAY_TEST_GPUS=str(slots + 1))


def start(
    arguments: list[str],
    log: Path,
    unset: tuple[str, ...] = (),
    inside: Sequence[str] = (),
    **changes: str,
) -> subprocess.Popen[bytes]:
    """Start `python -m sparseray ARGUMENTS` as a process group of its own, its output in `log`.

    Args:
        arguments, log: of the command.
        unset: variables that it shall not have.
        inside: words of a command that starts it.
        changes: variables that it shall have.
    """
    env = {name: value for name, value in environment(**changes).items() if name not in unset}
    with log.open("ab") as file:
        return subprocess.Popen(
            [*inside, sys.executable, "-m", "sparseray", *arguments],
            cwd=ROOT,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def run(arguments: list[str], log: Path, **changes: str) -> int:
    """Run a command to its end and return its exit code."""
    return start(arguments, log, **changes).wait(LIMIT_S)


def wait_until(condition: Callable[[], object], what: str, limit_s: float = LIMIT_S) -> None:
    """Wait for a condition that another process brings about."""
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen within {limit_s} s"
        time.sleep(0.02)


@contextlib.contextmanager
def with_last_words(log: Path, temporary: Path) -> Iterator[None]:
    """If what runs in a block fails, print the ends of what a command and its workers have logged.

    Args:
        log: of the command.
        temporary: its folder of sockets and Ray.
    """
    try:
        yield
    except BaseException:
        for path in [log, *sorted(temporary.rglob("worker-*.err"))]:
            lines = path.read_text(errors="replace").splitlines() if path.exists() else []
            if lines:
                print(f"-- {path.name}", *lines[-LAST_LINES:], sep="\n")
        raise


def of_mark(mark: str) -> list[psutil.Process]:
    """All living processes whose environment has SPARSERAY_TEST=mark: Ray's daemons and workers too."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and process.environ().get("SPARSERAY_TEST") == mark:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def kill_all(process: subprocess.Popen[bytes], mark: str) -> None:
    """SIGKILL a command and all its processes, by id, and wait until they are gone."""
    for member in of_mark(mark):
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait(LIMIT_S)
    wait_until(lambda: not of_mark(mark), "the end of all processes")


def interrupt(process: subprocess.Popen[bytes]) -> None:
    """Ctrl-C in a terminal: SIGINT to the whole process group."""
    os.killpg(process.pid, signal.SIGINT)


def socket_folders(temporary: Path) -> list[Path]:
    """Folders of Unix sockets below a command's temporary folder."""
    return list((temporary / f"sparseray-{os.getuid()}").glob("*"))


@contextlib.contextmanager
def temporary_folder() -> Iterator[Path]:
    """A short private folder for TMPDIR (a socket's path is at most 107 bytes); Ray's files go there too."""
    path = Path(tempfile.mkdtemp(prefix="sr-", dir="/tmp"))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def answering(said: bytes) -> Iterator[int]:
    """A port at which somebody says this to all who connect, and nothing more."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        links: list[socket.socket] = []

        def take() -> None:
            with contextlib.suppress(OSError):
                while True:
                    links.append(listening.accept()[0])
                    links[-1].sendall(said)

        thread = threading.Thread(target=take, daemon=True)
        thread.start()
        yield int(listening.getsockname()[1])
        listening.shutdown(socket.SHUT_RDWR)
        thread.join()
        for link in links:
            link.close()
