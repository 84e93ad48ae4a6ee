"""A checkpoint that is written while training goes on: a copy to host memory beside the next step, then the files.

The next update waits until the copy is there; forward and backward passes only read what is copied. A GPU that has room keeps
a copy of its own for a while, made in milliseconds; what is there then goes over a stream of its own into pinned memory, which
takes longer than a step. Thousands of tensors lie side by side in a few dozen slabs there, and go stretch by stretch: launching
their copies one by one would keep the interpreter from the steps for longer than they take. So do tables of memory rows: they change while they are copied (state/kept_rows.py), and nobody
waits. Pinning takes several times as long as copying, so that is done before the first checkpoint falls due (`reserve`), and the
memory serves all of them.

A change of plan waits for none of it: a copy is given up between two pieces, and what is in a file by then counts for nothing.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from sparseray.actors.state.kept_rows import KeptRows
from sparseray.actors.state.reading import PIECE_BYTES, Reading
from sparseray.actors.training.part_graph import LEFT_FREE
from sparseray.actors.wire.messages import Saved, SavedTensor
from sparseray.errors import UserError

Files = dict[str, dict[str, Tensor]]
Write = Callable[[str, dict[str, Tensor]], dict[str, SavedTensor]]

BLOCK_BYTES = 256 << 20
"""Host memory is taken in blocks: one by one, thousands of tensors would cost the driver more than their copies."""
ALIGNMENT = 64
GAP_BYTES = 4096
"""Between tensors that are copied as one, at most."""


class BackgroundSave:
    """Writes one checkpoint at a time for a slot.

    Args:
        is_brief: writing takes no time: none is under way, and none begins, once `forget` has returned.
    """

    def __init__(self, *, is_brief: bool = False) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        # Of its own: what a GPU copies for itself does not wait for the host's memory.
        self._reserving = ThreadPoolExecutor(1, thread_name_prefix="pinning")
        self._is_brief = is_brief
        self._kinds: list[object] = []
        self._host: Future[list[Tensor]] | None = None
        self._copied: Future[_Copies | None] | None = None
        self._stream: torch.cuda.Stream | None = None
        self._written: Future[Saved] | None = None
        self._given_up: Future[Saved] | None = None
        self._reading = Reading()
        self._kept: KeptRows | None = None
        self._step = -1

    @property
    def is_busy(self) -> bool:
        """Whether host memory still holds, or waits for, what was forgotten."""
        return self._given_up is not None and not self._given_up.done()

    def reserve(self, files: Files) -> None:
        """Begin to take host memory for checkpoints of such tensors, and keep it; without it each takes its own.

        Args:
            files: as in `start`.
        """
        tensors = _flat(files)
        stretches = _stretches(tensors)
        kinds = _kinds(tensors, stretches)
        if self._host is None or self._kinds != kinds:
            self._kinds, self._host = kinds, None
            self._host = self._reserving.submit(_host_memory, _whole(tensors, stretches))

    def start(self, step: int, files: Files, write: Write, kept: KeptRows | None = None) -> None:
        """Begin to copy and write; what is under way is forgotten, and comes first where it is busy.

        Args:
            step: that `Saved` shall name.
            files: tensors by file and logical name, as they shall be saved; they may change after `wait_until_copied`.
            write: writes one file.
            kept: of those that may change at once.
        """
        self.forget()
        device = next((t.device for t in _flat(files) if t.is_cuda), None)
        if device is not None:
            # One for all checkpoints: torch keeps what it freed for the stream that it was taken on.
            self._stream = self._stream or torch.cuda.Stream(device)
            self._stream.wait_stream(torch.cuda.current_stream(device))
        tensors, host = _flat(files), self._host
        stretches = _stretches(tensors)
        whole = _whole(tensors, stretches)
        if host is None or self._kinds != _kinds(tensors, stretches):
            host = self._reserving.submit(_host_memory, whole)
        changing = set[str]() if kept is None else kept.names
        names = [name for found in files.values() for name in found]
        still = [i for i, stretch in enumerate(stretches) if names[stretch.members[0]] not in changing]
        self._reading, self._kept, self._step = Reading(), kept, step
        reading, stream, submit = self._reading, self._stream, self._pool.submit
        self._copied = copied = submit(_copy, whole, still, host, stream, reading)
        brought = submit(_brought, files, stretches, copied, kept, stream, reading)
        # It knows nothing of the slot's own tensors, so that it keeps none of them when they are given away.
        self._written = submit(_write, brought, write, reading, is_brief=self._is_brief)

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
        """Give up what is under way: from now on none of the slot's tensors is read, and nothing of it is reported.

        A piece that is being copied is waited for; a file that is being written is not, but it is the last one.
        """
        self._reading.end()
        if self._kept is not None:
            self._kept.end()
        if self._written is not None:
            self._given_up = self._written
        self._copied = self._written = self._kept = None


def _flat(files: Files) -> list[Tensor]:
    return [tensor for tensors in files.values() for tensor in tensors.values()]


@dataclass(frozen=True)
class _Stretch:
    """Tensors that lie side by side in one memory, by position; most are alone.

    Args:
        members: the tensors, as they follow one another.
        starts: elements from the first one's beginning.
        length: elements of all, with what lies between.
    """

    members: tuple[int, ...]
    starts: tuple[int, ...]
    length: int

    @property
    def is_alone(self) -> bool:
        """Whether it is one tensor, of any shape."""
        return len(self.members) == 1


def _kinds(tensors: Sequence[Tensor], stretches: Sequence[_Stretch]) -> list[object]:
    """What room the tensors take; the files' names change with a generation."""
    return [*stretches, *((tensor.shape, tensor.dtype, tensor.is_cuda) for tensor in tensors)]


def _joins(tensor: Tensor) -> bool:
    """Whether it is copied with its neighbours. Host memory has holes, and few tensors."""
    return tensor.is_cuda and tensor.numel() > 0 and tensor.is_contiguous()


def _stretches(tensors: Sequence[Tensor]) -> list[_Stretch]:
    """What is copied at once: a piece or one tensor at most, so that blocks of host memory are filled."""
    found = list[_Stretch]()
    memories = dict[tuple[int, torch.dtype], list[int]]()
    for i, tensor in enumerate(tensors):
        if _joins(tensor):
            memories.setdefault((tensor.untyped_storage().data_ptr(), tensor.dtype), []).append(i)
        else:
            found.append(_Stretch((i,), (0,), tensor.numel()))
    for members in memories.values():
        begins = {i: int(tensors[i].storage_offset()) for i in members}
        run, end = list[int](), 0
        for i in sorted(members, key=lambda i: begins[i]):
            size, stop = tensors[i].element_size(), begins[i] + tensors[i].numel()
            if run and ((begins[i] - end) * size > GAP_BYTES or (stop - begins[run[0]]) * size > PIECE_BYTES):
                found.append(_stretch(run, begins, end))
                run = []
            run.append(i)
            end = max(end, stop)
        found.append(_stretch(run, begins, end))
    return found


def _stretch(run: Sequence[int], begins: Mapping[int, int], end: int) -> _Stretch:
    return _Stretch(tuple(run), tuple(begins[i] - begins[run[0]] for i in run), end - begins[run[0]])


def _whole(tensors: Sequence[Tensor], stretches: Sequence[_Stretch]) -> list[Tensor]:
    """Each stretch as one tensor."""
    found = []
    for stretch in stretches:
        first = tensors[stretch.members[0]].detach()
        found.append(first if stretch.is_alone else first.as_strided((stretch.length,), (1,)))
    return found


def _apart(tensors: Sequence[Tensor], stretches: Sequence[_Stretch], whole: Sequence[Tensor]) -> list[Tensor]:
    """Copies of the tensors, in order, within copies of the stretches."""
    found = list(tensors)
    for stretch, copy in zip(stretches, whole):
        for i, start in zip(stretch.members, stretch.starts):
            like = tensors[i]
            found[i] = copy if stretch.is_alone else copy[start : start + like.numel()].view(like.shape)
    return found


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
    """Host memory for all tensors, once it is there, and copies that a GPU with room keeps for now, by position."""

    host: Future[list[Tensor]]
    aside: dict[int, Tensor]


def _copy(
    tensors: Sequence[Tensor],
    still: Sequence[int],
    host: Future[list[Tensor]],
    stream: torch.cuda.Stream | None,
    reading: Reading,
) -> _Copies | None:
    """Copy those that change only later, as they are for what is next on a stream; None if that was ended.

    Args:
        tensors: all of them.
        still: positions of these.
        host: memory for all.
        stream: of a GPU.
        reading: leave to read them.
    """
    if stream is not None and _has_room(tensors, stream.device):
        with reading as may_read, torch.cuda.stream(stream):
            aside = {i: tensors[i].detach().clone() for i in still} if may_read else {}
            stream.synchronize()
        return _Copies(host, aside) if may_read else None
    room = host.result()
    is_whole = _transfer([(room[i], tensors[i]) for i in still], stream, reading)
    return _Copies(host, {}) if is_whole else None


def _has_room(tensors: Sequence[Tensor], device: torch.device) -> bool:
    """Whether a GPU can keep copies of what lies on it."""
    free, total = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor.is_cuda)
    return free - needed > LEFT_FREE * total


def _transfer(
    pairs: Sequence[tuple[Tensor, Tensor]], stream: torch.cuda.Stream | None, reading: Reading
) -> bool:
    """Copy tensors, and return when that is done and all else on the stream; False if it was ended.

    Args:
        pairs: host memory, and what goes there.
        stream: of the copies from a GPU.
        reading: leave to read what is copied.
    """
    with torch.cuda.stream(stream) if stream is not None else nullcontext():
        for group in _pieces(pairs):
            with reading as may_read:
                if not may_read:
                    return False
                for own, piece in group:
                    own.copy_(piece, non_blocking=stream is not None)
                if stream is not None:
                    stream.synchronize()
    return True


def _pieces(pairs: Sequence[tuple[Tensor, Tensor]]) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Cut what is copied into groups of `PIECE_BYTES`, or little more; one at least."""
    group, asked = list[tuple[Tensor, Tensor]](), 0
    for own, tensor in pairs:
        to, source = own, tensor.detach()
        if source.is_contiguous():
            to, source = to.view(-1), source.view(-1)
        rows = max(1, PIECE_BYTES // max(1, source[:1].nbytes)) if source.dim() else 1
        for part in zip(to.split(rows), source.split(rows)) if source.dim() else [(to, source)]:
            group.append(part)
            asked += part[0].nbytes
            if asked >= PIECE_BYTES:
                yield group
                group, asked = [], 0
    yield group


def _brought(
    files: Files,
    stretches: Sequence[_Stretch],
    copied: Future[_Copies | None],
    kept: KeptRows | None,
    stream: torch.cuda.Stream | None,
    reading: Reading,
) -> Files | None:
    """All copies in host memory: bring what the GPU kept, and copy what changes meanwhile; None if that was ended."""
    try:
        copies = copied.result()
        if copies is None:
            return None
        room = copies.host.result()
        is_whole = _transfer([(room[i], tensor) for i, tensor in copies.aside.items()], stream, reading)
        copies.aside.clear()
        left = iter(_apart(_flat(files), stretches, room))
        host = {file: dict(zip(found, left)) for file, found in files.items()}
        if kept is not None and is_whole:
            is_whole = _copy_changing(files, host, kept, reading)
        return host if is_whole else None
    finally:
        # Before the files are written, which takes many steps.
        if kept is not None:
            kept.end()


def _copy_changing(files: Files, host: Files, kept: KeptRows, reading: Reading) -> bool:
    """Copy what is written over meanwhile, as it was when the copy began; False if that was ended.

    Args:
        files: of the checkpoint.
        host: memory for copies of all.
        kept: rows that were written over.
        reading: leave to read the tables.
    """
    for file, tensors in files.items():
        changing = {name: tensor for name, tensor in tensors.items() if name in kept.names}
        if not kept.copy(changing, host[file], reading):
            return False
    return True


def _write(brought: Future[Files | None], write: Write, reading: Reading, *, is_brief: bool) -> Saved:
    """Write all files, as long as anybody wants them.

    Args:
        brought: copies.
        write: writes one file.
        reading: ends when nobody does.
        is_brief: who ends it waits for the file under way.
    """
    try:
        host, found = brought.result(), dict[str, SavedTensor]()
        for file, tensors in (host or {}).items():
            with reading as is_wanted:
                if not is_wanted:
                    break
                if is_brief:
                    found |= write(file, tensors)
            if not is_brief:
                found |= write(file, tensors)
        return Saved(tensors=found)
    except (OSError, UserError, RuntimeError) as error:
        # The last of them where the host has no memory left that can be pinned.
        return Saved(tensors={}, error=" ".join(str(error).split()))
