"""A group of slots for collectives, of one generation: formed in the background, and aborted when the generation ends.

`gloo` between CPUs, `nccl` between GPUs, taken from torch without its registry of groups, so that a process may have one
after another, and several threads one each. Slots find each other at a store of the first one's, which lives as long as
the group. Everything binds to the slot's own address. A group is never left in order: whoever might have to agree may be dead.
"""

import atexit
import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit
from weakref import WeakSet

import psutil
import torch
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from sparseray.errors import SupersededError

FORM_S = 60.0
"""Seconds for which slots wait for each other to form a group."""
_EXIT_S = 2.0
_NEVER = timedelta(days=30)
# A peer's death is ours to handle; torch would end the process for it.
_NCCL_SETTINGS = {
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
    "TORCH_NCCL_ENABLE_MONITORING": "0",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
}
_threads: WeakSet[threading.Thread] = WeakSet()


def _run_beside(run: Callable[[], None], name: str) -> None:
    thread = threading.Thread(target=run, daemon=True, name=name)
    _threads.add(thread)
    thread.start()


@atexit.register
def _await_threads() -> None:
    """Let what forms or ends come to its end, for a while: whoever comes back from torch to a Python that is gone aborts
    the process."""
    deadline = time.monotonic() + _EXIT_S
    for thread in list(_threads):
        thread.join(max(0.0, deadline - time.monotonic()))


def host_of(address: str) -> str:
    """The host in a slot's address; loopback for a Unix socket."""
    return (urlsplit(address).hostname if address.startswith("tcp:") else None) or "127.0.0.1"


class Group:
    """The slots of a generation.

    Args:
        rank: own place among them.
        size: how many there are.
        device: where what travels lies.
        host: own address.
        meeting: host and port of the first one's store, from its group; empty for the first one itself.
        timeout_s: seconds after which a collective between CPUs ends by itself.
    """

    def __init__(
        self, rank: int, size: int, device: torch.device, host: str, *, meeting: str, timeout_s: float
    ) -> None:
        self.rank, self.size, self.device, self.host = rank, size, device, host
        self.meeting, self.timeout_s = meeting, timeout_s
        self.failure: RuntimeError | None = None
        self._listener: socket.socket | None = None
        if not meeting:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            self._listener = socket.create_server((host, 0), family=family)
            self.meeting = f"{host}:{self._listener.getsockname()[1]}"
        self._lock, self._formed = threading.Lock(), threading.Event()
        self._is_ended = False
        self._store: TCPStore | None = None
        self._backend: Any = None
        self._last: tuple[Any, ...] = ()
        """The collective in flight and its memory, which must not go before it has ended."""
        _run_beside(self._form, "group")

    @property
    def is_formed(self) -> bool:
        """Whether it can be used, or has failed."""
        return self._formed.is_set()

    @property
    def is_ended(self) -> bool:
        """Whether it was aborted."""
        return self._is_ended

    def _form(self) -> None:
        try:
            host, _, port = self.meeting.rpartition(":")
            listening = None if self._listener is None else self._listener.detach()
            self._store = TCPStore(
                host,
                int(port),
                is_master=listening is not None,
                timeout=timedelta(seconds=FORM_S),
                wait_for_workers=False,
                master_listen_fd=listening,
            )
            if self.device.type == "cuda":
                self._connect_nccl()
            else:
                self._connect_gloo()
        except RuntimeError as error:
            self.failure = error
        finally:
            self._formed.set()

    def _connect_gloo(self) -> None:
        from torch.distributed import ProcessGroupGloo

        options: Any = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._devices = [ProcessGroupGloo.create_device(hostname=self.host)]
        options._timeout = timedelta(seconds=FORM_S)
        self._backend = ProcessGroupGloo(self._store, self.rank, self.size, options)  # type: ignore[arg-type]

    def _connect_nccl(self) -> None:
        """Have all ways open, too: NCCL opens them at first use, and the host would wait for the others in it."""
        from torch.distributed import ProcessGroupNCCL  # which torch for CPUs alone has not

        for name, value in {**_NCCL_SETTINGS, "NCCL_SOCKET_IFNAME": f"={_interface_of(self.host)}"}.items():
            os.environ.setdefault(name, value)
        options = ProcessGroupNCCL.Options()
        options._timeout = _NEVER
        torch.cuda.set_device(self.device)
        self._backend = ProcessGroupNCCL(self._store, self.rank, self.size, options)  # type: ignore[arg-type]
        self._backend.eager_connect_single_device(self.device)
        stream = torch.cuda.Stream(self.device)
        with torch.cuda.stream(stream):
            sent = torch.zeros(self.size, dtype=torch.uint8, device=self.device)
            # Who aborts finds the communicator from here on.
            if not self._is_ended:
                self._backend.alltoall_base(torch.empty_like(sent), sent, [], []).wait()
                stream.synchronize()

    def start(self, sent: Tensor, into: Tensor, to: list[int], of: list[int]) -> Any:
        """Begin to give every slot its share; returns torch's `Work`.

        Args:
            sent: uint8, to all slots, by rank.
            into: uint8, where what they send comes.
            to, of: bytes to each and from each; both empty where they are all the same.

        Raises:
            RuntimeError: it cannot.
            SupersededError: the group was aborted.
        """
        from torch.distributed import AllToAllOptions

        options = AllToAllOptions()
        options.timeout = timedelta(seconds=self.timeout_s)
        with self._lock:
            if self._is_ended:
                raise SupersededError
            if self.failure is not None:
                raise self.failure
            work = self._backend.alltoall_base(into, sent, of, to, options)
            self._last = work, sent, into
        return work

    def abort(self) -> None:
        """End what is in flight, and the group, in a thread of its own; called from any."""
        with self._lock:
            if self._is_ended:
                return
            self._is_ended = True
        _run_beside(self._end, "group end")

    def _end(self) -> None:
        """Of NCCL an abort frees what waits on the device; gloo has nothing like it: what is in flight has a bound."""
        if not self.is_formed:
            self._abort_backend()
            self._formed.wait()
        self._abort_backend()
        # The device is not waited for: who goes on alone may be recording a graph there.
        with contextlib.suppress(RuntimeError):
            if self._last:
                self._last[0].wait()
        self._last, self._backend, self._store = (), None, None

    def _abort_backend(self) -> None:
        with contextlib.suppress(RuntimeError):
            if self._backend is not None:
                self._backend.abort()


def _interface_of(host: str) -> str:
    """The network interface that has an address."""
    for name, addresses in psutil.net_if_addrs().items():
        if host in {address.address for address in addresses}:
            return name
    raise RuntimeError(f"no network interface has the address {host}")
