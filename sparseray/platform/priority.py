"""Work that must not slow down what runs beside it: done in a thread of low priority; a leaf."""

import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Result = TypeVar("Result")
NICENESS = 15


def gently(work: Callable[[], Result]) -> Result:
    """Do work at low priority, and wait for it.

    A process may lower its priority but not raise it again, and on Linux priority belongs to a thread: so the work
    gets a thread of its own. Threads that it starts inherit the low priority; it should start none that stay.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="gently", initializer=_step_back) as pool:
        return pool.submit(work).result()


def _step_back() -> None:
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
