"""Leave to read a slot's state beside its steps, given for one piece at a time: who takes it back waits for one piece."""

import threading
from types import TracebackType

PIECE_BYTES = 64 << 20
"""Read at a time; a GPU brings what a step tells the host through the same engine, in turn."""


class Reading:
    """What a copy in another thread asks for each piece; entered, it says whether there still is leave."""

    def __init__(self) -> None:
        self._lock, self._is_over = threading.Lock(), False

    def end(self) -> None:
        """Return once nobody reads, and nobody will."""
        # First, so that whoever holds the lock does not take it again.
        self._is_over = True
        with self._lock:
            return

    def __enter__(self) -> bool:
        self._lock.acquire()
        return not self._is_over

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release()
