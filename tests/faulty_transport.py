"""A slot's transport in tests: it can be killed or hung, and drops, repeats, delays and reorders messages."""

from __future__ import annotations

import random
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgpack

from sparseray.platform.fleet.transport import ZmqTransport

if TYPE_CHECKING:
    from local_cluster import LocalFleet


class Killed(BaseException):
    """Ends a slot's thread where it stands, as SIGKILL ends a process."""


@dataclass(frozen=True)
class Sent:
    """A message on its way: who sends it to whom, its kind and step."""

    source: int
    to: int
    kind: str
    step: int


@dataclass
class Faults:
    """What goes wrong.

    Args:
        on_send: called before every message; it may kill or hang slots.
        drop, repeat, delay: chance of each for a message between slots, from a stream of `seed`.
        seed: of the chances.
    """

    on_send: Callable[[Sent, LocalFleet], None] = lambda sent, fleet: None
    drop: float = 0.0
    repeat: float = 0.0
    delay: float = 0.0
    seed: int = 0


class FaultyTransport:
    """A `Transport` of a slot that can be killed or hung, and that treats messages badly."""

    def __init__(self, inner: ZmqTransport, slot: int, faults: Faults, fleet: LocalFleet) -> None:
        self._inner, self._slot, self._faults, self._fleet = inner, slot, faults, fleet
        self._random = random.Random(f"{faults.seed}:{slot}")
        self._late: deque[tuple[int, int, list[Any]]] = deque()
        self._count = 0
        self._lock = threading.RLock()
        self.address = inner.address
        self.killed, self.hung = threading.Event(), threading.Event()

    def _live(self) -> None:
        while self.hung.is_set() and not self.killed.is_set():
            time.sleep(0.005)
        if self.killed.is_set():
            raise Killed

    def connect(self, peers: dict[int, str]) -> None:
        self._live()
        self._inner.connect(peers)

    def reach(self, slot: int, address: str) -> None:
        self._inner.reach(slot, address)

    def send(self, slot: int, frames: Sequence[Any]) -> None:
        self._live()
        header = msgpack.unpackb(frames[0], strict_map_key=False)
        sent = Sent(self._slot, slot, header[1], header[5])
        self._faults.on_send(sent, self._fleet)
        self._live()
        with self._lock:
            self._send(slot, [bytes(frame) for frame in frames])

    def _send(self, slot: int, frames: list[Any]) -> None:
        self._count += 1
        chance = self._random.random()
        if chance < self._faults.drop:
            return
        if self._random.random() < self._faults.delay:
            # Kept back until some later messages have overtaken it.
            self._late.append((self._count + self._random.randint(1, 4), slot, frames))
        else:
            self._inner.send(slot, frames)
            if self._random.random() < self._faults.repeat:
                self._late.append((self._count + self._random.randint(0, 6), slot, frames))
        self._flush(everything=False)

    def _flush(self, *, everything: bool) -> None:
        with self._lock:
            for due, slot, frames in list(self._late):
                if everything or due <= self._count:
                    self._late.remove((due, slot, frames))
                    self._inner.send(slot, frames)

    def receive(self, timeout_s: float) -> list[Any] | None:
        deadline = time.monotonic() + timeout_s
        while True:
            self._live()
            found = self._inner.receive(min(0.02, max(0.0, deadline - time.monotonic())))
            if found is not None:
                return found
            # Nothing else to do: what was kept back goes out now, so that nobody waits for it forever.
            self._flush(everything=True)
            if time.monotonic() >= deadline:
                return None

    def gone(self, slots: Collection[int]) -> list[int]:
        return self._inner.gone(slots)

    def close(self) -> None:
        self._inner.close()
