"""Starts a nursery (nursery.py) beside this process, and has a Ray that this process starts take its workers from there."""

import os
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sparseray.platform.config import ClusterConfig
from sparseray.platform.fleet import launch

SCRIPT = """#!/bin/sh
case "$1 $2" in
*/default_worker.py\\ *) exec {python} -IS {launch} {address} {python} "$@" ;;
*/log_monitor.py | */autoscaler/*/monitor.py) exec sleep 2000000000 ;;
*/dashboard/agent.py) exec {python} "$@" --listen-port=0 ;;
*) exec {python} "$@" ;;
esac
"""
"""What Ray starts as Python. Two of its daemons only sleep: one would print workers' words at the driver, which has
turned that off, one would start machines, and a Ray on loopback has none. That is 1 s of processor time and 160 MB.
The agent takes a free port: at its fixed one it waits 3 s for another Ray on the machine to end, and gives up."""


class ForkedWorkers:
    """One nursery, and the program by which Ray asks it for workers.

    Args:
        threads: of OpenMP in each worker; loaded libraries keep the number that they began with.
    """

    def __init__(self, threads: int) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="sparseray-workers-"))
        self._program, address = self._folder / "python", self._folder / "socket"
        words = {"python": sys.executable, "launch": launch.__file__, "address": str(address)}
        quoted = {name: shlex.quote(word) for name, word in words.items()}
        self._program.write_text(SCRIPT.format(**quoted))
        self._program.chmod(0o700)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listening:
            # Here already, so that nobody can ask too early.
            listening.bind(str(address))
            listening.listen(64)
            number = listening.fileno()
            self._process = subprocess.Popen(
                [sys.executable, "-m", "sparseray.platform.fleet.nursery", str(number), str(self._folder)],
                stdin=subprocess.PIPE,
                pass_fds=[number],
                env={**os.environ, "OMP_NUM_THREADS": str(threads)},
                # A group of its own is no Ctrl-C's. Not a session: where Linux shares processors by session, an ingress
                # beside busy slots in another one waited up to half a second for its turn.
                process_group=0,
            )

    @contextmanager
    def started_by_ray(self) -> Iterator[None]:
        """While this lasts, a Ray that is started takes this nursery's workers: it starts them by `sys.executable`."""
        before, sys.executable = sys.executable, str(self._program)
        try:
            yield
        finally:
            sys.executable = before

    def close(self) -> None:
        """End the nursery; its workers end with their Ray."""
        self._process.kill()
        self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)


@contextmanager
def forked_workers(config: ClusterConfig) -> Iterator[ForkedWorkers | None]:
    """Workers of the Ray that a command will start, loading while the command checks what it was given; None where it joins one."""
    if config.address:
        yield None
        return
    workers = ForkedWorkers(config.threads_per_slot)
    try:
        yield workers
    finally:
        workers.close()
