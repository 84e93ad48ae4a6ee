"""Who works in a run folder: a lock of the kernel's, which a killed holder does not leave behind."""

import fcntl
import json
import os
import socket
import time
from pathlib import Path
from typing import Any, TextIO

from sparseray.log import get_logger

log = get_logger(__name__)

LOCK = "lock"


def hold(folder: Path, **about: str) -> TextIO | None:
    """Take the lock of a run folder for as long as the file that is returned is open.

    Args:
        folder: of the run.
        about: what others shall know of the holder.

    Returns:
        None when another process holds it.
    """
    file = (folder / LOCK).open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    except OSError as error:
        log.warning("%s cannot be locked, another run there would not be noticed: %s", folder, error)
    file.truncate(0)
    content = {"pid": os.getpid(), "host": socket.gethostname(), "time": time.time(), **about}
    file.write(json.dumps(content) + "\n")
    file.flush()
    return file


def holder(folder: Path) -> dict[str, Any] | None:
    """Who holds the lock of a run folder: {"pid", "host", "time", ...}; None when nobody does."""
    try:
        with (folder / LOCK).open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                found: dict[str, Any] = json.loads(file.readline() or "{}")
                return found
    except OSError:
        # Not there, or not ours to read: whoever opens the folder says what is wrong with it.
        return None
    return None
