"""What a slot's process holds for one lease: transport, metrics, the slot and its signs of life."""

import contextlib
import os
import threading
import warnings

import msgpack
import torch
import zmq

from sparseray.actors.installation import JobSpec
from sparseray.actors.slot import Slot, device_full
from sparseray.actors.state.tables import process_namespace
from sparseray.actors.wire.slot_mailbox import SlotMailbox
from sparseray.errors import ConfigError
from sparseray.platform.fleet.control import Member
from sparseray.platform.fleet.job import SpecJobs
from sparseray.platform.fleet.priority import gently
from sparseray.platform.fleet.transport import ZmqTransport, own_address, private_directory
from sparseray.platform.fleet.warming import warm_holdings
from sparseray.platform.fleet.weights_port import WeightsPort
from sparseray.platform.metrics.exporter import Metrics
from sparseray.platform.run.machines import kind_here

HEARTBEAT_S = 0.1
CLOSE_S = 5.0


class Host:
    """One slot.

    Args:
        slot: slot id.
        job: identifier of the job; messages of other jobs are dropped.
        threads: torch threads.
        transport: "ipc" or "tcp".
        bind_host: `cluster.bind_host`.
        node: Ray's name of the machine.
    """

    def __init__(
        self, *, slot: int, job: str, threads: int, transport: str, bind_host: str, node: str
    ) -> None:
        # Received buffers are read-only by intent; nobody writes through the tensors that view them.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        directory, bind_host = private_directory(job) if transport == "ipc" else None, own_address(bind_host)
        self._slot_id, self._job_id, self._threads, self._node = slot, job, threads, node
        self._transport = ZmqTransport(f"slot{slot}", directory, bind_host)
        self._metrics = Metrics({"slot": str(slot)}, declare="slot")
        self._metrics_address = self._metrics.serve(bind_host)
        mailbox = SlotMailbox(self._transport, slot, job)
        self._port = WeightsPort(directory, bind_host)
        self._jobs = SpecJobs(self._metrics, self._port)
        self._slot = Slot(mailbox, self._jobs)
        self._thread = threading.Thread(target=self._serve, daemon=True, name=f"slot-{slot}")
        self._heartbeats = ""
        self._closing = threading.Event()
        self._beating = threading.Thread(target=self._beat, daemon=True, name="heartbeat")

    def _serve(self) -> None:
        """Be the slot's work thread, which has as many torch threads as the slot is given.

        The number is set here because for some libraries it is one of the calling thread, whatever the process inherits in
        OMP_NUM_THREADS. Nothing keeps other threads from a team of their own, beside which OpenMP waits by the kernel
        instead of by spinning, and each small operation takes longer.
        """
        torch.set_num_threads(self._threads)
        self._slot.serve_forever()

    def prepare(self, spec: JobSpec, heartbeats: str) -> Member:
        """Load and warm what a job needs, begin to serve and to give signs of life; harmless when repeated.

        Args:
            spec: of the job.
            heartbeats: address that signs of life go to.

        Raises:
            ConfigError: the device is full before anything has begun.
        """
        self._heartbeats = heartbeats
        job = self._jobs(spec)
        if not self._thread.is_alive():
            try:
                self._slot.roles.holdings = gently(lambda: warm_holdings(job))
            except torch.OutOfMemoryError as error:
                raise ConfigError(device_full(error, is_serving=job.is_serving)) from None
            self._thread.start()
            self._beating.start()
        return Member(
            slot=self._slot_id,
            address=self._transport.address,
            node=self._node,
            metrics=self._metrics_address,
            pid=os.getpid(),
            machine=kind_here(),
            namespace=process_namespace(),
        )

    def wait_for_end(self) -> None:
        """Return when the slot has stopped serving."""
        self._thread.join()

    def close(self) -> bool:
        """End the slot and leave no socket, thread or series; False if it does not come out of what it computes."""
        self._closing.set()
        self._slot.mailbox.stop()
        for thread in (self._thread, self._beating):
            if thread.ident is not None:
                thread.join(CLOSE_S)
        if self._thread.is_alive():
            return False
        self._transport.close()
        self._port.close()
        self._metrics.close()
        return True

    def _beat(self) -> None:
        """Tell the scheduler ten times a second that this process runs."""
        socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PUSH)
        target = ""
        beat = [msgpack.packb([self._job_id, self._slot_id])]
        while not self._closing.wait(HEARTBEAT_S):
            if self._heartbeats != target:
                socket.close(linger=0)
                socket = zmq.Context.instance().socket(zmq.PUSH)
                # Beats that nobody takes are worth nothing: none is kept for later.
                socket.setsockopt(zmq.SNDHWM, 2)
                socket.setsockopt(zmq.LINGER, 0)
                target = self._heartbeats
                socket.connect(target)
            with contextlib.suppress(zmq.Again):
                socket.send_multipart(beat, zmq.DONTWAIT)
        socket.close(linger=0)
