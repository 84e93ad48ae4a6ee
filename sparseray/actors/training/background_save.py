"""A checkpoint that is written while training goes on: a copy to host memory beside the next step, then the files.

The next update waits until the copy is there; forward and backward passes only read what is copied. A GPU that has
room keeps a copy of its own for a while, made in milliseconds; what is there then goes over a stream of its own into pinned
memory, which takes longer than a step. Pinning takes several times as long as copying, so that is done before the first
checkpoint falls due (`reserve`), and the memory serves all of them.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from sparseray.actors.wire.messages import Saved, SavedTensor
from sparseray.errors import UserError

Files = dict[str, dict[str, Tensor]]
Write = Callable[[str, dict[str, Tensor]], dict[str, SavedTensor]]

BLOCK_BYTES = 256 << 20
"""Host memory is taken in blocks: one by one, thousands of tensors would cost the driver more than their copies."""
ALIGNMENT = 64
LEFT_FREE = 1 / 16
"""Of a GPU's memory, that a copy there leaves for evaluations."""


class BackgroundSave:
    """Writes one checkpoint at a time for a slot."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._kinds: list[object] = []
        self._host: Future[list[Tensor]] | None = None
        self._copied: Future[_Copies] | None = None
        self._stream: torch.cuda.Stream | None = None
        self._written: Future[Saved] | None = None
        self._step = -1

    def reserve(self, files: Files) -> None:
        """Begin to take host memory for checkpoints of such tensors, and keep it; without it each takes its own.

        Args:
            files: as in `start`.
        """
        if self._host is None or self._kinds != _kinds(files):
            self._kinds, self._host = _kinds(files), None
            self._host = self._pool.submit(_host_memory, _flat(files))

    def start(self, step: int, files: Files, write: Write) -> None:
        """Begin to copy and write; what is under way is waited for and forgotten.

        Args:
            step: that `Saved` shall name.
            files: tensors by file and logical name, as they shall be saved; they may change after `wait_until_copied`.
            write: writes one file.
        """
        self.forget()
        device = next((t.device for t in _flat(files) if t.is_cuda), None)
        if device is not None:
            # One for all checkpoints: torch keeps what it freed for the stream that it was taken on.
            self._stream = self._stream or torch.cuda.Stream(device)
            self._stream.wait_stream(torch.cuda.current_stream(device))
        host = self._host if self._kinds == _kinds(files) else None
        copied = self._pool.submit(_copy, _flat(files), host, self._stream)
        self._copied, self._step = copied, step
        names = {file: list(tensors) for file, tensors in files.items()}
        self._written = self._pool.submit(_write, names, copied, self._stream, write)

    def wait_until_copied(self) -> None:
        """Return once nothing is read any more of what was to be saved."""
        if self._copied is not None:
            self._copied.exception()
            self._copied = None

    def take(self) -> tuple[int, Saved] | None:
        """The step and the result of a checkpoint that is done, once."""
        if self._written is None or not self._written.done():
            return None
        written, self._written = self._written, None
        return self._step, written.result()

    def forget(self) -> None:
        """Wait for what is under way and drop its result: nobody waits for it."""
        if self._written is not None:
            self._written.exception()
        self._copied = self._written = None


def _flat(files: Files) -> list[Tensor]:
    return [tensor for tensors in files.values() for tensor in tensors.values()]


def _kinds(files: Files) -> list[object]:
    """What room the tensors take; the files' names change with a generation."""
    return [(tensor.shape, tensor.dtype, tensor.is_cuda) for tensor in _flat(files)]


def _host_memory(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Room for a copy of each tensor, pinned for those that lie on a GPU; what it holds means nothing."""
    left: dict[bool, Tensor] = {}

    def room(tensor: Tensor) -> Tensor:
        size, is_pinned = tensor.numel() * tensor.element_size(), tensor.is_cuda
        block = left.get(is_pinned)
        if block is None or len(block) < size:
            block = torch.empty(max(size, BLOCK_BYTES), dtype=torch.uint8, pin_memory=is_pinned)
        if size < BLOCK_BYTES:
            left[is_pinned] = block[-(-size // ALIGNMENT) * ALIGNMENT :]
        return block[:size].view(tensor.dtype).view(tensor.shape)

    return [room(tensor) for tensor in tensors]


@dataclass(frozen=True)
class _Copies:
    """Copies of tensors, each on the GPU for now or in `host` already, where all shall be."""

    now: list[Tensor]
    host: list[Tensor]

    def bring(self, stream: torch.cuda.Stream | None) -> list[Tensor]:
        """Return them in host memory; what the GPU kept is free from then on.

        Args:
            stream: that they were made on.
        """
        if any(now is not own for now, own in zip(self.now, self.host)):
            _transfer(self.now, self.host, stream)
            self.now[:] = self.host
        return self.host


def _copy(
    tensors: Sequence[Tensor], reserved: Future[list[Tensor]] | None, stream: torch.cuda.Stream | None
) -> _Copies:
    """Copies of tensors as they are for what is next on a stream."""
    host = _host_memory(tensors) if reserved is None else reserved.result()
    if stream is None or not _has_room(tensors, stream.device):
        _transfer(tensors, host, stream)
        return _Copies(list(host), host)
    with torch.cuda.stream(stream):
        now = [tensor.detach().clone() if tensor.is_cuda else own for tensor, own in zip(tensors, host)]
    for own, tensor in zip(host, tensors, strict=True):
        if not tensor.is_cuda:
            own.copy_(tensor.detach())
    stream.synchronize()
    return _Copies(now, host)


def _has_room(tensors: Sequence[Tensor], device: torch.device) -> bool:
    """Whether a GPU can keep copies of what lies on it."""
    free, total = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor.is_cuda)
    return free - needed > LEFT_FREE * total


def _transfer(tensors: Sequence[Tensor], into: Sequence[Tensor], stream: torch.cuda.Stream | None) -> None:
    """Copy tensors, and return when that is done.

    Args:
        tensors: on a GPU or not.
        into: host memory, as many.
        stream: of the copies from a GPU.
    """
    with nullcontext() if stream is None else torch.cuda.stream(stream):
        for own, tensor in zip(into, tensors, strict=True):
            own.copy_(tensor.detach(), non_blocking=True)
    if stream is not None:
        stream.synchronize()


def _write(
    names: dict[str, list[str]], copied: Future[_Copies], stream: torch.cuda.Stream | None, write: Write
) -> Saved:
    try:
        copies = iter(copied.result().bring(stream))
        files = {file: dict(zip(found, copies)) for file, found in names.items()}
        return Saved(
            tensors={k: v for file, tensors in files.items() for k, v in write(file, tensors).items()}
        )
    except (OSError, UserError, RuntimeError) as error:
        # The last of them where the host has no memory left that can be pinned.
        return Saved(tensors={}, error=" ".join(str(error).split()))
