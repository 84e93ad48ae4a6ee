"""A process that has loaded all that a slot or a scheduler needs, and forks Ray's workers: 2 s of imports are paid once.

Whoever starts a Ray of its own starts it (forked_workers.py), and has that Ray start its workers through launch.py. It
has one thread, has opened nothing and computes nothing, so a fork of it is as good as a new process. It ends with the
process that started it; workers outlive it, and later ones load for themselves.
"""

import contextlib
import gc
import importlib
import json
import os
import runpy
import selectors
import shutil
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from sparseray.platform.fleet.priority import gently

MODULES = ("sparseray.platform.fleet.host", "sparseray.platform.composition")
"""What slots and schedulers load, all but Ray: that reads its environment once, and each worker has its own."""
LATER = "sparseray.platform.scheduler"
"""What they load with Ray."""
BESIDE_S = 15.0
"""Workers that are wanted so long after this process was ready start beside others that work, and step back for them."""
FIXED = ("LD_", "OMP_", "MKL_", "OPENBLAS_", "NUMBA_", "PYTHON", "TRITON_")
"""Variables that are read while modules load: a worker that has others is not forked."""


class Nursery:
    """Forks workers for those who ask at its socket.

    Args:
        listening: file descriptor of a socket that listens.
        lifeline: file descriptor that ends with the process that this one is for.
    """

    def __init__(self, listening: int, lifeline: int) -> None:
        self._socket = socket.socket(fileno=listening)
        self._lifeline, self._environment = lifeline, fixed(os.environ)
        self._links: dict[int, tuple[socket.socket, int]] = {}
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._socket, selectors.EVENT_READ)
        self._selector.register(lifeline, selectors.EVENT_READ)

    def serve(self) -> dict[str, Any] | None:
        """Fork until the lifeline ends; a child returns what worker it shall be."""
        while True:
            for key, _ in self._selector.select():
                if key.fileobj == self._lifeline:
                    return None
                if key.fileobj is not self._socket:
                    self._end(key.data)
                elif (wanted := self._fork()) is not None:
                    return wanted

    def _fork(self) -> dict[str, Any] | None:
        """Take one request; one that cannot be met is closed, and whoever asked helps himself."""
        link, _ = self._socket.accept()
        try:
            wanted, files = _receive(link)
        except (OSError, ValueError):
            link.close()
            return None
        is_child = False
        if fixed(wanted["environment"]) != self._environment:
            link.close()
        elif pid := os.fork():
            link.sendall(b"+")
            watch = os.pidfd_open(pid)
            self._links[pid] = link, watch
            self._selector.register(link, selectors.EVENT_READ, pid)
            self._selector.register(watch, selectors.EVENT_READ, pid)
        else:
            is_child = True
            link.close()
            self._leave(files)
        for file in files:
            os.close(file)
        return wanted if is_child else None

    def _leave(self, files: Sequence[int]) -> None:
        """In a child: keep nothing of this process, and take the files that came with the request."""
        # Ray ends what is left of a worker's group of processes with it.
        os.setpgid(0, 0)
        self._selector.close()
        self._socket.close()
        for link, watch in self._links.values():
            link.close()
            os.close(watch)
        os.close(self._lifeline)
        for target, file in enumerate(files):
            os.dup2(file, target)

    def _end(self, pid: int) -> None:
        """A worker has ended, or who asked for it has: neither stays without the other."""
        link, watch = self._links.pop(pid, (None, -1))
        if link is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        self._selector.unregister(link)
        self._selector.unregister(watch)
        with contextlib.suppress(OSError):
            link.sendall(str(abs(os.waitstatus_to_exitcode(status))).encode())
        link.close()
        os.close(watch)


def become(wanted: dict[str, Any], *, is_beside: bool) -> None:
    """Be a worker as if this process had been started for it.

    Args:
        wanted: its arguments, environment and folder.
        is_beside: whether it shall load gently what it still needs.
    """
    os.environ.clear()
    os.environ.update(wanted["environment"])
    os.chdir(wanted["folder"])
    sys.argv = wanted["arguments"]
    if is_beside:
        gently(lambda: importlib.import_module(LATER))
    runpy.run_path(sys.argv[0], run_name="__main__")


def fixed(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that cannot be changed any more once modules are loaded."""
    return {name: value for name, value in environment.items() if value and name.startswith(FIXED)}


def _receive(link: socket.socket) -> tuple[dict[str, Any], list[int]]:
    head, files, _, _ = socket.recv_fds(link, 8, 3)
    body = b""
    while len(body) < int.from_bytes(head, "big"):
        more = link.recv(1 << 16)
        if not more:
            raise ValueError("a request that ends too early")
        body += more
    return json.loads(body), files


def main(listening: int, folder: str) -> None:
    """Load everything, then fork; whoever asks meanwhile waits.

    Args:
        listening: file descriptor of the socket.
        folder: of the socket's file; it ends with this process.
    """
    nursery = Nursery(listening, lifeline=os.dup(0))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    gc.disable()
    for module in MODULES:
        importlib.import_module(module)
    gc.freeze()
    gc.enable()
    ready = time.monotonic()
    wanted = nursery.serve()
    if wanted is None:
        shutil.rmtree(folder, ignore_errors=True)
    else:
        become(wanted, is_beside=time.monotonic() - ready > BESIDE_S)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
