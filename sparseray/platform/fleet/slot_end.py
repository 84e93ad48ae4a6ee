"""The end of a slot: its process is gone for sure, and what Ray says it died of fits a line."""

import contextlib
import os
import re
import signal
import time
from typing import Any

import psutil
import ray

from sparseray.log import get_logger

log = get_logger(__name__)

CAUSE_CHARACTERS = 300
END_S = 2.0


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
