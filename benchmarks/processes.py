"""The end of a command that a benchmark started in a session of its own, and of all that it started."""

import os
import signal
import subprocess
from contextlib import suppress
from typing import Any


def end(process: "subprocess.Popen[Any]", *, within_s: float = 20.0) -> int:
    """Ctrl-C, an end to what does not follow it, and the exit code.

    Args:
        process: leader of its process group.
        within_s: that it has to end in order.
    """
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGINT)
    with suppress(subprocess.TimeoutExpired):
        process.wait(within_s)
    # What it started may outlive it.
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    return process.wait()
