"""Ctrl-C, SIGTERM and a terminal that closes as one thing: a request to stop, heard while a command is at work."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

Handler = Callable[[int, FrameType | None], None]
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def stops_noted(handle: Handler) -> Iterator[None]:
    """Have SIGINT, SIGTERM and SIGHUP call `handle`, in the main thread; what handled them before comes back after.

    A SIGHUP that is ignored, as under nohup, stays ignored.
    """
    numbers = [n for n in STOPS if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
    previous = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def stops_interrupt() -> Iterator[None]:
    """Have every request to stop end the command as Ctrl-C does, so that it leaves nothing half-done."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    with stops_noted(interrupt):
        yield
