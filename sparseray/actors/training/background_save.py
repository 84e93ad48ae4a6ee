"""A checkpoint that is written while training goes on: a copy to host memory beside the next step, then the files.

The next update waits until the copy is there; forward and backward passes only read what is copied. From a GPU
the copy goes over a stream of its own into pinned memory, which is taken in blocks: torch rounds what is pinned up to a
power of two, and of an expert's matrices that is half as much again.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from sparseray.actors.wire.messages import Saved, SavedTensor
from sparseray.errors import UserError

Files = dict[str, dict[str, Tensor]]
Write = Callable[[str, dict[str, Tensor]], dict[str, SavedTensor]]
GROUP_BYTES = 1 << 30
_ALIGNMENT = 256


def in_groups(tensors: dict[str, Tensor], most_bytes: int = GROUP_BYTES) -> Iterator[dict[str, Tensor]]:
    """Cut tensors into groups, in their order.

    Args:
        tensors: by name.
        most_bytes: of a group, but for one tensor that is larger.
    """
    group: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors.items():
        if group and size + _padded(tensor) > most_bytes:
            yield group
            group, size = {}, 0
        group[name] = tensor
        size += _padded(tensor)
    yield group


def _padded(tensor: Tensor) -> int:
    return -(-tensor.numel() * tensor.element_size() // _ALIGNMENT) * _ALIGNMENT


class BackgroundSave:
    """Writes one checkpoint at a time for a slot."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._copied: Future[Files] | None = None
        self._written: Future[Saved] | None = None
        self._step = -1

    def start(self, step: int, files: Files, write: Write) -> None:
        """Begin to copy and write; what is under way is waited for and forgotten.

        Args:
            step: that `Saved` shall name.
            files: tensors by file and logical name, as they shall be saved; they may change after `wait_until_copied`.
            write: writes one file.
        """
        self.forget()
        device = next((t.device for tensors in files.values() for t in tensors.values() if t.is_cuda), None)
        ready = torch.cuda.current_stream(device).record_event() if device is not None else None
        copied = self._pool.submit(_copy, files, device, ready)
        self._copied, self._step = copied, step
        self._written = self._pool.submit(lambda: _write(copied.result(), write))

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


def _copy(files: Files, device: torch.device | None, ready: torch.cuda.Event | None) -> Files:
    """Copies in host memory, of tensors as they are at an event."""
    if device is None or ready is None:
        return {file: _to_host(tensors) for file, tensors in files.items()}
    stream = torch.cuda.Stream(device)
    stream.wait_event(ready)
    with torch.cuda.stream(stream):
        found = {file: _to_host(tensors) for file, tensors in files.items()}
    stream.synchronize()
    return found


def _to_host(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies in blocks; those from a device are there when the current stream has come so far."""
    found: dict[str, Tensor] = {}
    for group in in_groups(tensors):
        start, size = 0, sum(map(_padded, group.values()))
        block = torch.empty(size, dtype=torch.uint8, pin_memory=any(t.is_cuda for t in group.values()))
        for name, tensor in group.items():
            size = tensor.numel() * tensor.element_size()
            found[name] = block[start : start + size].view(tensor.dtype).view(tensor.shape)
            found[name].copy_(tensor.detach(), non_blocking=True)
            start += _padded(tensor)
    return found


def _write(files: Files, write: Write) -> Saved:
    try:
        return Saved(
            tensors={k: v for file, tensors in files.items() for k, v in write(file, tensors).items()}
        )
    except (OSError, UserError) as error:
        return Saved(tensors={}, error=" ".join(str(error).split()))
