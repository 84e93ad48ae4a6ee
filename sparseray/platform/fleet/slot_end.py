"""The end of a slot: its process is gone for sure, and what Ray says it died of fits a line."""

import contextlib
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import ray

from sparseray.log import get_logger

log = get_logger(__name__)

CAUSE_CHARACTERS = 300
END_S = 2.0
EXITING = 0x4
"""PF_EXITING of Linux, from the moment that a process is to end."""


def end_slot(handle: Any, pid: int) -> None:
    """End a slot through Ray, and make sure of it where it is a process of this host.

    Args:
        handle: Ray's, of the slot.
        pid: of its process, 0 where it is another host's.
    """
    try:
        ray.kill(handle)
    except Exception as error:
        log.warning("cannot end a slot through Ray: %s", cause_of(error))
    deadline = time.monotonic() + END_S
    while pid and psutil.pid_exists(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    kill_process(pid)


def is_ending(pid: int) -> bool:
    """Whether a process of this host is gone, or on its way.

    What it held is freed first, a GPU's driver's share above all, and its sockets close after that: a tenth of a second later.

    Args:
        pid: of the process.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return not psutil.pid_exists(pid)
    # After the name, which may have spaces in it: state, four ids, terminal, flags.
    state, *_, flags = stat.rpartition(b")")[2].split()[:7]
    return state in (b"Z", b"X") or bool(int(flags) & EXITING)


def kill_process(pid: int) -> None:
    """End a process of this host at once; 0 and one that has ended are nobody."""
    if pid and psutil.pid_exists(pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def cause_of(error: Exception) -> str:
    """One line on why a slot ended: Ray puts what was raised in its process last, below a traceback."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, Exception):
        return f"{type(cause).__name__}: {' '.join(str(cause).split())}"[:CAUSE_CHARACTERS]
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    raised = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Exit)\b", line)]
    return (raised or lines[:1] or [type(error).__name__])[-1][:CAUSE_CHARACTERS]
