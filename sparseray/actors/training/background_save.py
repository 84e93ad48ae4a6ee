"""A checkpoint that is written while training goes on: a copy to host memory beside the next step, then the files.

The next update waits until the copy is there; forward and backward passes only read what is copied. Tables of memory rows are
larger than a step is long: they change while they are copied (state/kept_rows.py), and nobody waits. From a GPU
the copy goes over a stream of its own into pinned memory. Pinning takes several times as long as copying, so that is done
before the first checkpoint falls due (`reserve`), and the memory serves all of them.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from sparseray.actors.state.kept_rows import KeptRows
from sparseray.actors.wire.messages import Saved, SavedTensor
from sparseray.errors import UserError

Files = dict[str, dict[str, Tensor]]
Write = Callable[[str, dict[str, Tensor]], dict[str, SavedTensor]]

BLOCK_BYTES = 256 << 20
"""Host memory is taken in blocks: one by one, thousands of tensors would cost the driver more than their copies."""
ALIGNMENT = 64


class BackgroundSave:
    """Writes one checkpoint at a time for a slot."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._kinds: list[object] = []
        self._host: Future[list[Tensor]] | None = None
        self._copied: Future[Files] | None = None
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

    def start(self, step: int, files: Files, write: Write, kept: KeptRows | None = None) -> None:
        """Begin to copy and write; what is under way is waited for and forgotten.

        Args:
            step: that `Saved` shall name.
            files: tensors by file and logical name, as they shall be saved; they may change after `wait_until_copied`.
            write: writes one file.
            kept: of those that may change at once.
        """
        self.forget()
        device = next((t.device for t in _flat(files) if t.is_cuda), None)
        ready = torch.cuda.current_stream(device).record_event() if device is not None else None
        host = self._host if self._kinds == _kinds(files) else None
        copied = self._pool.submit(_copy, files, host, kept, device, ready)
        self._copied, self._step = copied, step
        self._written = self._pool.submit(_write, copied, files, kept, write)

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


def _copy(
    files: Files,
    reserved: Future[list[Tensor]] | None,
    kept: KeptRows | None,
    device: torch.device | None,
    ready: torch.cuda.Event | None,
) -> Files:
    """Host memory of all tensors, with copies of those that change only later, as they are at an event."""
    tensors = _flat(files)
    room = iter(_host_memory(tensors) if reserved is None else reserved.result())
    host = {file: dict(zip(found, room)) for file, found in files.items()}
    pairs = [
        (host[file][name], tensor.detach())
        for file, found in files.items()
        for name, tensor in found.items()
        if kept is None or name not in kept.places
    ]
    if device is None or ready is None:
        for own, tensor in pairs:
            own.copy_(tensor)
        return host
    stream = torch.cuda.Stream(device)
    stream.wait_event(ready)
    with torch.cuda.stream(stream):
        for own, tensor in pairs:
            own.copy_(tensor, non_blocking=True)
    stream.synchronize()
    return host


def _write(copied: Future[Files], files: Files, kept: KeptRows | None, write: Write) -> Saved:
    try:
        host = copied.result() if kept is None else _with_changing(copied, files, kept)
        return Saved(
            tensors={k: v for file, tensors in host.items() for k, v in write(file, tensors).items()}
        )
    except (OSError, UserError, RuntimeError) as error:
        # The last of them where the host has no memory left that can be pinned.
        return Saved(tensors={}, error=" ".join(str(error).split()))


def _with_changing(copied: Future[Files], files: Files, kept: KeptRows) -> Files:
    """Copy what changes meanwhile too, and put back what it was when the copy began."""
    try:
        host = copied.result()
        for file, tensors in files.items():
            changing = {name: host[file][name] for name in tensors if name in kept.places}
            for name, own in changing.items():
                own.copy_(tensors[name].detach())
            kept.put_back(changing)
        return host
    finally:
        # Before the files are written, which takes many steps.
        kept.end()
