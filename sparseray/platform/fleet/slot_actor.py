"""The Ray actor that slots live in, one after another: the platform's, leased to jobs.

Light itself, so that all that is heavy (torch, the model) loads at low priority: a slot that starts beside a running
job would otherwise slow it down for the seconds that this takes. What is loaded stays when a lease ends; the next
job's slot is there in a moment.
"""

import gc
import importlib
import os
import threading
from typing import Any

import ray

from sparseray.platform.fleet.lease import Held, Kind, Lease
from sparseray.platform.fleet.priority import gently


class SlotActor:
    """A process for one slot at a time; everything but its start and end reaches that through its mailbox.

    Args:
        kind: what the process reserves.
    """

    def __init__(self, kind: Kind) -> None:
        self._kind, self._module = kind, gently(_load)
        self._node = ray.get_runtime_context().get_node_id()
        self._lock = threading.Lock()
        self._lease: Lease | None = None
        self._host: Any = None

    def held(self) -> Held:
        """Say what this is, and whose."""
        namespace: str = self._module.process_namespace()
        return Held(kind=self._kind, lease=self._lease, pid=os.getpid(), namespace=namespace, node=self._node)

    def prepare(self, lease: Lease, spec: Any, heartbeats: str, **host: Any) -> Any:
        """`host.Host.prepare` of a lease, with the host that is made for it; what it takes is not imported here.

        Args:
            lease: whose slot this is from now on.
            spec: a `JobSpec`.
            heartbeats: address that signs of life go to.
            host: of `host.Host`.

        Raises:
            RuntimeError: another job has this process.
        """
        with self._lock:
            if self._lease not in (None, lease):
                raise RuntimeError(f"this process is leased as {self._lease}, not as {lease}")
            if self._host is None:
                self._host = self._module.Host(
                    slot=lease.slot, job=lease.job, threads=self._kind.threads, node=self._node, **host
                )
                self._lease = lease
            found = self._host
        return found.prepare(spec, heartbeats)

    def release(self, lease: Lease) -> bool:
        """End a lease: close its slot and free what it held. False when that does not end: then the process must.

        Args:
            lease: that ends; another one is left alone.
        """
        with self._lock:
            if self._lease != lease:
                return True
            if self._host is not None and not self._host.close():
                return False
            self._host = self._lease = None
        from sparseray.platform.fleet.freeing import free_memory  # and torch, loaded by now

        free_memory()
        return True

    def wait_for_end(self, lease: Lease) -> None:
        """Return when a lease's slot has stopped serving; the scheduler's call to it fails when this process dies."""
        host = self._host
        if host is not None and self._lease == lease:
            host.wait_for_end()

    def live(self) -> None:
        """Never return: the call ends with this process."""
        threading.Event().wait()


def _load() -> Any:
    """Import what is heavy, with the garbage collector off: there is no garbage, and looking takes a fifth of the time."""
    gc.disable()
    try:
        return importlib.import_module("sparseray.platform.fleet.host")
    finally:
        # Modules stay; later collections, which stop a step, need not visit them either.
        gc.freeze()
        gc.enable()
