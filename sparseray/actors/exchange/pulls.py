"""A slot that copies pieces from others, chunk by chunk (chunks.py), into tensors of its own.

Called while a slot enters a generation (installation.py), with room for all that comes: a chunk is copied from the source's
memory, or out of its message, to where it belongs, and nowhere in between. Two chunks of each source are on their way.
"""

import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sparseray.actors.exchange.by_message import Caller
from sparseray.actors.exchange.chunks import Chunk, Pull, PullOn, as_bytes, finish_copies
from sparseray.actors.state.pieces import Piece
from sparseray.actors.state.shared_buffer import BufferHandle, open_buffer
from sparseray.actors.state.tables import process_namespace
from sparseray.errors import SlotLostError
from sparseray.log import get_logger

log = get_logger(__name__)


def pull(
    call: Caller, wanted: Mapping[int, tuple[Piece, ...]], tensors: Mapping[str, Tensor], device: torch.device
) -> None:
    """Copy pieces from their sources.

    Args:
        call: asks them.
        wanted: pieces by source.
        tensors: of all pieces, as each source gives them in runs, to be filled.
        device: of this slot.

    Raises:
        SlotLostError: a source did not answer in time.
        SupersededError: a plan of a later generation came.
    """
    _Pulling(call, wanted, tensors, device).run()


class _Pulling:
    """One pull: what is asked for, and what has come.

    Args:
        call, wanted, tensors, device: as in `pull`.
    """

    def __init__(
        self,
        call: Caller,
        wanted: Mapping[int, tuple[Piece, ...]],
        tensors: Mapping[str, Tensor],
        device: torch.device,
    ) -> None:
        self.call, self.wanted, self.device = call, wanted, device
        self._bytes = {name: as_bytes(tensor) for name, tensor in tensors.items()}
        self._left = {name: len(room) for name, room in self._bytes.items()}
        self._asked: dict[int, int] = {}
        self._mapped: dict[int, dict[BufferHandle, Tensor]] = {slot: {} for slot in wanted}

    def run(self) -> None:
        """Ask until everything is here."""
        started = time.perf_counter()
        for slot, pieces in self.wanted.items():
            self._ask(slot, Pull(pieces=pieces, namespace=process_namespace()))
        while self._asked:
            sequence, chunk = self.call.first(self._asked, Chunk)
            self._take(self._asked.pop(sequence), chunk)
        assert not any(self._left.values()), "a source gave less, or more, than all bytes of a tensor"
        self.call.answers.observe("elastic_pull_seconds_total", time.perf_counter() - started)

    def _ask(self, slot: int, body: Pull | PullOn) -> None:
        self._asked[self.call.post(slot, body)] = slot

    def _go_on(self, slot: int, chunk: Chunk, ahead: int) -> None:
        index = chunk.index + ahead
        if index < chunk.chunks:
            self._ask(slot, PullOn(move=chunk.move, index=index))

    def _take(self, slot: int, chunk: Chunk) -> None:
        """Copy what has come, and ask for what comes into its place."""
        if chunk.chunks < 0:
            raise SlotLostError(f"slot {slot} has given up what it was giving", [slot])
        try:
            parts = self._parts(slot, chunk)
        except OSError as error:
            log.warning("the memory of slot %d cannot be mapped, state comes by message: %s", slot, error)
            self._ask(slot, PullOn(move=chunk.move, index=chunk.index, is_mapped=False))
            return
        if chunk.index == 0:
            self._go_on(slot, chunk, 1)
        for name, start, part in zip(chunk.names, chunk.starts, parts, strict=True):
            self._bytes[name][start : start + len(part)].copy_(part)
            self._left[name] -= len(part)
        finish_copies(self.device)
        path = "message" if chunk.handle is None else "mapped"
        self.call.answers.observe("elastic_pulled_bytes_total", sum(chunk.sizes), path=path)
        self._go_on(slot, chunk, 2)

    def _parts(self, slot: int, chunk: Chunk) -> Sequence[Tensor]:
        """The bytes of each tensor of a chunk, where they lie."""
        if chunk.handle is None:
            return chunk.data
        mapped = self._mapped[slot]
        if chunk.handle not in mapped:
            mapped[chunk.handle] = open_buffer(chunk.handle, self.device, slot)
        return [mapped[chunk.handle][o : o + size] for o, size in zip(chunk.offsets, chunk.sizes)]
