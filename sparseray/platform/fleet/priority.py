"""Work that must not slow down what runs beside it: done in a thread of low priority; a leaf."""

import ctypes
import os
import platform
import struct
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Result = TypeVar("Result")
NICENESS = 10
"""A tenth of a busy process' share: at 15 it is a thirtieth, and a slot beside a run took a minute to start."""
SLICE_NS = 100_000
SCHED_SETATTR = {"x86_64": 314, "aarch64": 274}


def gently(work: Callable[[], Result]) -> Result:
    """Do work at low priority, and wait for it.

    A process may lower its priority but not raise it again, and on Linux priority belongs to a thread: so the work
    gets a thread of its own. Threads that it starts inherit the low priority; it should start none that stay.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="gently", initializer=_step_back) as pool:
        return pool.submit(work).result()


def _step_back() -> None:
    """Lower the calling thread's weight, and shorten its time slice where the kernel lets us (Linux 6.12).

    A step is a chain of short messages between processes. Without the second, each of them may wait out a whole
    slice of this thread, weight or no weight: steps beside a starting slot took 1.2 times as long, with it 1.08.
    """
    if sys.platform != "linux":
        return
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
    call = SCHED_SETATTR.get(platform.machine())
    if call is not None:
        # struct sched_attr: size, policy, flags, nice, priority, runtime, deadline, period.
        attributes = struct.pack("IIQiIQQQ", 48, 0, 0, NICENESS, 0, SLICE_NS, 0, 0)
        # What an older kernel or a sandbox refuses is left as it is.
        ctypes.CDLL(None).syscall(call, 0, ctypes.c_char_p(attributes), 0)
