"""The memory that a slot lays open to the others of its host: of its GPU by an IPC handle, or shared memory of the host.

Its owner makes it and says how it is opened (`handle`, which travels in a message); the others map it. A process that
is killed leaves nothing behind: the host's memory has no name, and the driver ends what it mapped of a GPU.
"""

import mmap
import os
import secrets
from dataclasses import dataclass

import torch
from torch import Tensor

from sparseray.actors.state.tables import anonymous_file, process_namespace
from sparseray.actors.wire.envelope import Body
from sparseray.errors import UserError

HEADER_BYTES = 256


@dataclass(frozen=True, kw_only=True)
class BufferHandle:
    """How a process of the same user on the same host opens a buffer.

    Args:
        namespace: within which `pid` means that process, as `process_namespace` gives it.
        pid: of the owner.
        num_bytes: of the buffer.
        token: random number, for process ids come again and buffers are made anew.
        descriptor: of the host's memory in the owner; -1 for a GPU's.
        storage: of a GPU's memory, what torch opens it by: bytes as hexadecimal digits, numbers as they are.
    """

    namespace: str
    pid: int
    num_bytes: int
    token: int
    descriptor: int
    storage: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Introduce(Body):
    """Say how your buffer is opened; answered by Introduced."""


@dataclass(frozen=True, kw_only=True)
class Introduced(Body):
    """How a slot's buffer of this generation is opened.

    Args:
        handle: of the buffer.
        meeting: host and port where the generation's group meets (peers/group.py), empty where it needs none.
    """

    handle: BufferHandle
    meeting: str = ""


class Buffer:
    """Memory of this slot, zeros at first, that others write to.

    Args:
        num_bytes: how much.
        device: where.
    """

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self.num_bytes, self._descriptor, self._token = num_bytes, -1, secrets.randbits(62)
        self._storage: tuple[str, ...] = ()
        if device.type == "cuda":
            self.bytes = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
            shared = self.bytes.untyped_storage()._share_cuda_()
            self._storage = tuple(x.hex() if isinstance(x, bytes) else str(int(x)) for x in shared)
            return
        self._descriptor = anonymous_file(HEADER_BYTES + num_bytes)
        whole = _mapped(self._descriptor, num_bytes)
        whole[:8].view(torch.int64)[0] = self._token
        self.bytes = whole[HEADER_BYTES:]

    def __del__(self) -> None:
        if getattr(self, "_descriptor", -1) >= 0:
            os.close(self._descriptor)

    @property
    def handle(self) -> BufferHandle:
        """What others open it by."""
        return BufferHandle(
            namespace=process_namespace(),
            pid=os.getpid(),
            num_bytes=self.num_bytes,
            token=self._token,
            descriptor=self._descriptor,
            storage=self._storage,
        )


def _mapped(descriptor: int, num_bytes: int) -> Tensor:
    """The host's memory: a header, which holds the token, and the buffer's bytes."""
    return torch.frombuffer(mmap.mmap(descriptor, HEADER_BYTES + num_bytes), dtype=torch.uint8)


def open_buffer(handle: BufferHandle, device: torch.device, slot: int) -> Tensor:
    """Map another slot's buffer; its bytes, on this slot's own device.

    Args:
        handle: from its owner.
        device: of this slot.
        slot: whose it is, for people.

    Raises:
        UserError: it lies on another host.
        OSError: its owner is gone, or the two GPUs cannot reach each other's memory.
    """
    if handle.namespace != process_namespace():
        raise UserError(
            f"slot {slot} is on another host, and its memory cannot be mapped here; for training set"
            " cluster.exchange=auto, or cluster.attention_workers, expert_shards and memory_shards to the GPUs of one host"
        )
    if handle.storage:
        return _opened_on_gpu(handle, device)
    descriptor = os.open(f"/proc/{handle.pid}/fd/{handle.descriptor}", os.O_RDWR | os.O_CLOEXEC)
    try:
        whole = _mapped(descriptor, handle.num_bytes)
    finally:
        os.close(descriptor)
    if int(whole[:8].view(torch.int64)[0]) != handle.token:
        raise OSError(f"process {handle.pid} has another buffer there now")
    return whole[HEADER_BYTES:]


def _opened_on_gpu(handle: BufferHandle, device: torch.device) -> Tensor:
    """Opened on the own device, which may use pointers into a peer's memory as its own."""
    _, ipc, size, offset, counter, place, event, is_event_needed = handle.storage
    try:
        storage = torch.UntypedStorage._new_shared_cuda(
            torch.cuda.current_device() if device.index is None else device.index,
            bytes.fromhex(ipc),
            int(size),
            int(offset),
            bytes.fromhex(counter),
            int(place),
            bytes.fromhex(event),
            bool(int(is_event_needed)),
        )
    except RuntimeError as error:
        raise OSError(str(error)) from error
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage)[: handle.num_bytes]
