"""Frames over ZeroMQ: one inbox per slot, one outgoing queue per peer. Any thread may send, one receives.

Unix sockets in a private folder on one host (the default), TCP on an address of the user's choice
across hosts. PUSH and PULL sockets keep the order of one pair; lost peers never block a sender.
"""

import os
import pathlib
import shutil
import socket
import tempfile
import threading
from collections.abc import Collection, Sequence
from typing import Any

import zmq
from zmq.utils.monitor import recv_monitor_message

from sparseray.platform.cluster_config import OF_NODE

MAX_FRAME_BYTES = 1 << 30
_COPY_BELOW = 64 << 10
_WATCHED = zmq.EVENT_CONNECTED | zmq.EVENT_DISCONNECTED


def own_address(bind_host: str) -> str:
    """The address to bind to for `cluster.bind_host`; where that is the machine's own, Ray knows it."""
    if bind_host != OF_NODE:
        return bind_host
    import ray.util  # which nothing else here needs

    address: str = ray.util.get_node_ip_address()
    return address


_OPEN: set["zmq.Context[zmq.Socket[bytes]]"] = set()
"""Contexts of transports that are not closed: the garbage collector may end one before its sockets, and would wait for them."""


class ZmqTransport:
    """A slot's inbox and its ways to the others.

    Args:
        name: file name of the inbox, unique within the job.
        directory: private folder for Unix sockets; None to use TCP.
        host: address to bind for TCP.
        max_frame_bytes: largest frame that is sent or taken.
    """

    def __init__(
        self,
        name: str,
        directory: pathlib.Path | None,
        host: str = "127.0.0.1",
        *,
        max_frame_bytes: int = MAX_FRAME_BYTES,
    ) -> None:
        self.max_frame_bytes = max_frame_bytes
        self._context = zmq.Context()
        _OPEN.add(self._context)
        # A ZeroMQ socket may go from thread to thread, one at a time.
        self._sending = threading.Lock()
        self._inbox = self._context.socket(zmq.PULL)
        self._inbox.setsockopt(zmq.RCVHWM, 0)
        self._inbox.setsockopt(zmq.MAXMSGSIZE, max_frame_bytes)
        if directory is not None:
            path = directory / f"{name}-{os.getpid()}"
            self.address = f"ipc://{path}"
            self._inbox.bind(self.address)
        else:
            self._inbox.bind(f"tcp://{host}:*")
            self.address = bytes(self._inbox.getsockopt(zmq.LAST_ENDPOINT)).decode().rstrip("\0")
        self._outgoing: dict[int, tuple[str, zmq.Socket[bytes]]] = {}
        self._ends: dict[int, zmq.Socket[bytes]] = {}
        self._gone: set[int] = set()
        self._guests: dict[int, str] = {}

    def connect(self, peers: dict[int, str]) -> None:
        """Open a queue to every peer; one whose address changed is replaced, one that left is closed."""
        with self._sending:
            peers = {**self._guests, **peers}
            for slot in [s for s, (address, _) in self._outgoing.items() if peers.get(s) != address]:
                self._close(slot, linger=0)
            for slot, address in peers.items():
                if slot not in self._outgoing:
                    self._open(slot, address)

    def reach(self, slot: int, address: str) -> None:
        """Open a queue to one more peer, which `connect` leaves alone.

        Args:
            slot: its id.
            address: of its inbox.
        """
        with self._sending:
            self._guests[slot] = address
            if slot in self._outgoing and self._outgoing[slot][0] != address:
                self._close(slot, linger=0)
            if slot not in self._outgoing:
                self._open(slot, address)

    def _open(self, slot: int, address: str) -> None:
        queue = self._context.socket(zmq.PUSH)
        queue.setsockopt(zmq.SNDHWM, 0)
        queue.setsockopt(zmq.LINGER, 1000)
        self._ends[slot] = queue.get_monitor_socket(_WATCHED)
        queue.connect(address)
        self._outgoing[slot] = (address, queue)

    def send(self, slot: int, frames: Sequence[Any]) -> None:
        """Queue frames for a slot; large ones are not copied, so the caller must not change them.

        Args:
            slot: receiver; connected before.
            frames: bytes-like, header first.

        Raises:
            ValueError: a frame is over the limit; the receiver would drop it without a word.
        """
        largest = max(len(frame) for frame in frames)
        if largest > self.max_frame_bytes:
            raise ValueError(f"a frame of {largest} bytes is over the transport's {self.max_frame_bytes}")
        last = len(frames) - 1
        with self._sending:
            _, queue = self._outgoing[slot]
            for index, frame in enumerate(frames):
                flags = zmq.SNDMORE if index < last else 0
                queue.send(frame, flags, copy=len(frame) < _COPY_BELOW)

    def _close(self, slot: int, *, linger: int) -> None:
        _, queue = self._outgoing.pop(slot)
        queue.disable_monitor()
        self._ends.pop(slot).close(linger=0)
        queue.close(linger=linger)
        self._gone.discard(slot)

    def gone(self, slots: Collection[int]) -> list[int]:
        """Those of some slots whose inbox was closed after it had been there, as the kernel does for a dead process."""
        with self._sending:
            for slot in self._ends.keys() & set(slots):
                while self._ends[slot].poll(0):
                    event = recv_monitor_message(self._ends[slot])["event"]
                    change = self._gone.add if event == zmq.EVENT_DISCONNECTED else self._gone.discard
                    change(slot)
            return sorted(self._gone & set(slots))

    def receive(self, timeout_s: float) -> list[Any] | None:
        """Return the frames of the next message, or None after `timeout_s` seconds."""
        if not self._inbox.poll(int(timeout_s * 1000)):
            return None
        return [frame.buffer for frame in self._inbox.recv_multipart(copy=False)]

    def close(self) -> None:
        """Close all sockets and remove the inbox's file."""
        with self._sending:
            for slot in list(self._outgoing):
                self._close(slot, linger=200)
        self._inbox.close(linger=0)
        self._context.term()
        _OPEN.discard(self._context)
        if self.address.startswith("ipc://"):
            pathlib.Path(self.address.removeprefix("ipc://")).unlink(missing_ok=True)


def private_directory(job: str) -> pathlib.Path:
    """Return a folder for Unix sockets that only this user can enter (a socket's path is at most 107 bytes)."""
    path = _root() / job[:16]
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    os.chmod(path.parent, 0o700)
    return path


def remove_directory(job: str) -> None:
    """Remove the folder of a job that has ended, and those of jobs that were killed before they could."""
    shutil.rmtree(_root() / job[:16], ignore_errors=True)
    for folder in _root().glob("*"):
        inboxes = list(folder.glob("*"))
        if inboxes and not any(_is_served(inbox) for inbox in inboxes):
            shutil.rmtree(folder, ignore_errors=True)


def _root() -> pathlib.Path:
    return pathlib.Path(tempfile.gettempdir()) / f"sparseray-{os.getuid()}"


def _is_served(inbox: pathlib.Path) -> bool:
    """Whether a process listens on a Unix socket; the kernel refuses a connection once none does."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(inbox))
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except OSError:
            return True
    return True
