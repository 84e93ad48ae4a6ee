"""State that another slot pulls, given in chunks: what a chunk says, and the source's side of a move.

A chunk holds bytes of some tensors, one after another. To a slot of the same host it goes through a buffer that this one
lays open (state/shared_buffer.py), of a GPU by IPC: the source fills one half of it while the puller (pulls.py) empties the
other. Elsewhere its bytes are in the message. A chunk is asked for by its number and filled from the state as it lies
there, so a source keeps nothing else of a move, and no second copy of what moves is anywhere.
"""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import count

import torch
from torch import Tensor

from sparseray.actors.state.holdings import Holdings
from sparseray.actors.state.pieces import Piece
from sparseray.actors.state.shared_buffer import Buffer, BufferHandle
from sparseray.actors.state.tables import process_namespace
from sparseray.actors.wire.envelope import Body
from sparseray.log import get_logger

log = get_logger(__name__)

CHUNK_BYTES = 64 << 20
"""Two of them for each slot that pulls are all that a move takes of a source's memory."""
ALIGNMENT = 256
HALVES = 2
Group = tuple[str, int, int]
"""Pieces that lie together: the experts of a layer, or another piece by itself."""


@dataclass(frozen=True, kw_only=True)
class Pull(Body):
    """Give copies of pieces (kind, layer, index); answered by the first Chunk of them.

    Args:
        pieces: that are held at the receiver.
        namespace: of the sender's process, as `process_namespace` gives it; empty for who can map nothing.
    """

    pieces: tuple[Piece, ...]
    namespace: str


@dataclass(frozen=True, kw_only=True)
class PullOn(Body):
    """Give another chunk of a move; the one before the last has been taken. Answered by Chunk.

    Args:
        move: number that the first chunk came with.
        index: of the chunk.
        is_mapped: whether the sender can map what chunks lie in.
    """

    move: int
    index: int
    is_mapped: bool = True


@dataclass(frozen=True, kw_only=True)
class Chunk(Body):
    """Bytes of tensors as they are at the plan's step; entry i of each row is about the same tensor.

    Args:
        move, index: which chunk it is.
        chunks: of the move, in all; -1 where the source knows of no such move.
        names: of tensors, as `Holdings.tensors` gives them in runs.
        starts, sizes: first byte within each tensor, and how many.
        handle: of the buffer that they lie in; None where they are in `data`.
        offsets: where in the buffer.
        data: uint8, the bytes of each tensor; none where they are in the buffer.
    """

    move: int
    index: int
    chunks: int
    names: tuple[str, ...] = ()
    starts: tuple[int, ...] = ()
    sizes: tuple[int, ...] = ()
    handle: BufferHandle | None = None
    offsets: tuple[int, ...] = ()
    data: tuple[Tensor, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Span:
    """Bytes of a tensor.

    Args:
        group, name: whose.
        start, size: which of its bytes.
        offset: where they lie in their chunk.
    """

    group: Group
    name: str
    start: int
    size: int
    offset: int


def as_bytes(tensor: Tensor) -> Tensor:
    """The same memory as uint8 [nbytes]; of a contiguous tensor."""
    return tensor.detach().view(-1).view(torch.uint8)


def cut(tensors: Iterable[tuple[Group, str, int]], chunk_bytes: int) -> list[tuple[Span, ...]]:
    """Cut tensors into chunks, in their order; a large one goes over several.

    Args:
        tensors: group, name and bytes of each.
        chunk_bytes: of a chunk at most; a multiple of ALIGNMENT.
    """
    chunks: list[list[Span]] = []
    end = chunk_bytes
    for group, name, num_bytes in tensors:
        start = 0
        while start < num_bytes:
            if end == chunk_bytes:
                chunks.append([])
                end = 0
            size = min(num_bytes - start, chunk_bytes - end)
            chunks[-1].append(Span(group=group, name=name, start=start, size=size, offset=end))
            start += size
            end = min(chunk_bytes, end + -(-size // ALIGNMENT) * ALIGNMENT)
    return [tuple(chunk) for chunk in chunks]


def _num_bytes(chunk: Sequence[Span]) -> int:
    return chunk[-1].offset + chunk[-1].size


class _Move:
    """What one slot pulls from this one.

    Args:
        number: of the move.
        holdings: that have the pieces.
        pieces: that move.
        with_optimizer: whether their optimizer state does too.
        is_mapped: whether the puller can map this slot's memory.
    """

    def __init__(
        self,
        number: int,
        holdings: Holdings,
        pieces: Sequence[Piece],
        *,
        with_optimizer: bool,
        is_mapped: bool,
    ) -> None:
        self.number, self.holdings, self.with_optimizer = number, holdings, with_optimizer
        self.is_mapped = is_mapped
        self._buffers: dict[str, Buffer] = {}
        self._stream: torch.cuda.Stream | None = None
        self._groups: dict[Group, list[Piece]] = {}
        for piece in pieces:
            group = ("expert", piece[1], 0) if piece[0] == "expert" else piece
            self._groups.setdefault(group, []).append(piece)
        sizes: dict[str, list[tuple[Group, str, int]]] = {}
        for group in self._groups:
            for name, tensor in self._tensors([group]).items():
                sizes.setdefault(tensor.device.type, []).append((group, name, tensor.nbytes))
        # A chunk lies where its tensors do: rows of memory tables in the host's memory, whatever computes.
        self.chunks = [
            (device, chunk) for device, of in sorted(sizes.items()) for chunk in cut(of, CHUNK_BYTES)
        ]

    def _tensors(self, groups: Iterable[Group]) -> dict[str, Tensor]:
        pieces = [piece for group in groups for piece in self._groups[group]]
        return self.holdings.tensors(pieces, with_optimizer=self.with_optimizer, in_runs=True)

    def give(self, index: int) -> Chunk:
        """Copy a chunk to where the puller finds it."""
        if not self.chunks:
            return Chunk(move=self.number, index=index, chunks=0)
        device, spans = self.chunks[index]
        tensors = self._tensors(dict.fromkeys(span.group for span in spans))
        parts = [as_bytes(tensors[s.name])[s.start : s.start + s.size] for s in spans]
        chunk = Chunk(
            move=self.number,
            index=index,
            chunks=len(self.chunks),
            names=tuple(span.name for span in spans),
            starts=tuple(span.start for span in spans),
            sizes=tuple(span.size for span in spans),
        )
        with self._beside(device):
            buffer = self._buffer(device)
            if buffer is None:
                # Of the host's memory as it is: what changes before a frame leaves was wanted in a generation that is over.
                return replace(chunk, data=tuple(part.cpu() for part in parts))
            half = index % HALVES * (buffer.num_bytes // HALVES)
            offsets = tuple(half + span.offset for span in spans)
            for offset, part in zip(offsets, parts):
                buffer.bytes[offset : offset + len(part)].copy_(part)
            finish_copies(buffer.bytes.device)
        return replace(chunk, handle=buffer.handle, offsets=offsets)

    def _beside(self, device: str) -> AbstractContextManager[object]:
        """Where to launch copies: an engine's stream may wait, in a round, for the very slot that pulls."""
        if device != "cuda" or self.with_optimizer:
            return nullcontext()
        self._stream = self._stream or torch.cuda.Stream()
        return torch.cuda.stream(self._stream)

    def _buffer(self, device: str) -> Buffer | None:
        """The buffer of the chunks on a device; None where they go by message."""
        if self.is_mapped and device not in self._buffers:
            half = max(_num_bytes(spans) for of, spans in self.chunks if of == device)
            half = -(-half // ALIGNMENT) * ALIGNMENT
            try:
                self._buffers[device] = Buffer(HALVES * half, torch.device(device))
            except (OSError, torch.OutOfMemoryError) as error:
                log.warning("no memory to give state through, it goes by message: %s", error)
                self.is_mapped = False
        return self._buffers.get(device) if self.is_mapped else None


def finish_copies(device: torch.device) -> None:
    """Return once the copies that this thread has launched are done."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


class Giving:
    """The moves of which this slot is a source, until the first commit after them.

    Args:
        holdings: that have the pieces.
        with_optimizer: whether pieces move with their optimizer state.
    """

    def __init__(self, holdings: Holdings, *, with_optimizer: bool) -> None:
        self._holdings, self._with_optimizer = holdings, with_optimizer
        self._numbers = count(1)
        self._moves: dict[int, _Move] = {}

    def begin(self, body: Pull) -> Chunk:
        """Answer the request that begins a move."""
        move = _Move(
            next(self._numbers),
            self._holdings,
            body.pieces,
            with_optimizer=self._with_optimizer,
            is_mapped=body.namespace == process_namespace(),
        )
        self._moves[move.number] = move
        return move.give(0)

    def go_on(self, body: PullOn) -> Chunk:
        """Answer a request for another chunk; one of a move that is over is nobody's any more."""
        move = self._moves.get(body.move)
        if move is None:
            return Chunk(move=body.move, index=body.index, chunks=-1)
        move.is_mapped &= body.is_mapped
        return move.give(body.index)

    def end(self) -> None:
        """Give the memory of all moves back."""
        self._moves.clear()
