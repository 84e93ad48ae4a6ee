"""`Link` by collectives: between slots of several hosts, and the plain twin of the others on one.

The memory of the others is not here: their regions are views of memory that nobody has (`far_regions`), which only say
where something goes. What is put there is kept until the next word, for which all slots meet: they tell each other how much
there is, give it to each other, and each writes what it got into its own regions. The host waits for both, serving its
mailbox, so a lost neighbour ends a wait as it does in link.py. Who sums what in which order is not the link's affair, so no
bit differs.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparseray.actors.peers.group import FORM_S, Group
from sparseray.actors.peers.link import POLL_S, HostLink, lost
from sparseray.actors.peers.regions import Regions, Sizes
from sparseray.actors.wire.envelope import Body, Message
from sparseray.actors.wire.slot_mailbox import SlotMailbox
from sparseray.errors import SlotLostError, SupersededError
from sparseray.log import get_logger

log = get_logger(__name__)

_ALIGNMENT = 16
_TOLD = 5
"""Numbers that tell what a piece is."""
_UNIT = torch.int16
"""What is written is a number of these, whatever it stands for."""


def far_regions(sizes: Sizes, slots: Sequence[int]) -> dict[int, Regions]:
    """Regions of slots, by rank one behind the other, in memory that does not exist.

    Args:
        sizes: of each.
        slots: by rank.
    """
    size = sizes.num_bytes
    every = torch.empty(len(slots) * size, dtype=torch.uint8, device="meta")
    return {slot: sizes.cut(every[rank * size : (rank + 1) * size]) for rank, slot in enumerate(slots)}


@dataclass(frozen=True, kw_only=True)
class _Piece:
    """Rows for another slot.

    Args:
        place: in its buffer, of the rows that lie there: first byte, number, bytes of one, bytes from one to the next.
        rows: that are put, contiguous.
        order_R: int64, which of the rows there they are; None for all.
    """

    place: tuple[int, int, int, int]
    rows: Tensor
    order_R: Tensor | None

    @property
    def told(self) -> list[int]:
        """What its receiver must know of it."""
        ordered = -1 if self.order_R is None else len(self.order_R)
        return [*self.place, ordered]


class CollectiveLink(HostLink):
    """One slot's way to the memory of others, in one generation.

    Args:
        mailbox, serve, deadline_s, slots: as of `HostLink`.
        group: of the generation.
        own: uint8, the own buffer, which the regions are cut from.
    """

    def __init__(
        self,
        mailbox: SlotMailbox,
        serve: Callable[[Message[Body]], None],
        deadline_s: float,
        slots: Sequence[int],
        group: Group,
        own: Tensor,
    ) -> None:
        super().__init__(mailbox, serve, deadline_s, slots)
        self.group, self._own = group, own
        self._pieces: list[list[_Piece]] = [[] for _ in slots]

    def put(self, rows: Tensor, into: Tensor, order_R: Tensor | None = None) -> None:
        """As of `Link`; what goes to another slot must not change before the next word.

        Args:
            rows, into, order_R: there.
        """
        if not into.is_meta:
            super().put(rows, into, order_R)
        elif rows.numel():
            size = into.element_size()
            rank, first = divmod(int(into.storage_offset()) * size, self._own.numel())
            place = first, 1, into.numel() * size, 0
            if order_R is not None or not into.is_contiguous():
                place = first, len(into), into[0].numel() * size, into.stride(0) * size
            order_R = None if order_R is None else order_R.long()
            self._pieces[rank].append(_Piece(place=place, rows=rows.contiguous(), order_R=order_R))

    def signal(self, flags_S: Tensor, rank: int, count: int) -> None:
        """All meet at every word, whoever has put something.

        Args:
            flags_S, rank, count: as of `Link`.
        """

    def wait(self, flags_S: Tensor, ranks: Sequence[int], count: int) -> None:
        """As of `Link`, for all that was put by any slot.

        Args:
            flags_S, ranks, count: there.
        """
        started = time.perf_counter()
        if not self.mailbox.serve_until(lambda: self.group.is_formed, FORM_S, self.serve, poll_s=POLL_S):
            raise self._nobody(FORM_S)
        device = self._own.device
        messages = [_packed(pieces, device) for pieces in self._pieces]
        sizes = [sum(part.numel() for part in message) for message in messages]
        heads = torch.tensor([[len(p), size] for p, size in zip(self._pieces, sizes)]).to(device)
        heads_S2 = self._all(heads.view(-1).view(torch.uint8), [], []).view(torch.int64).view(-1, 2)
        coming: list[list[int]] = heads_S2.tolist()
        parts = [part for message in messages for part in message]
        sent = torch.cat(parts) if parts else self._own[:0]
        of = [size for _, size in coming]
        for (num, _), message in zip(coming, self._all(sent, sizes, of).split(of)):
            if num:
                self._take(message, num)
        self._pieces = [[] for _ in self.slots]
        self.waited_s += time.perf_counter() - started

    def _all(self, sent: Tensor, to: list[int], of: list[int]) -> Tensor:
        """Give every slot its share, and return what comes from all.

        Args:
            sent: uint8, to all slots.
            to, of: bytes to each and from each; empty where they are all the same.
        """
        into = torch.empty(sum(of) if of else sent.numel(), dtype=torch.uint8, device=sent.device)
        try:
            work = self.group.start(sent, into, to, of)
        except RuntimeError as error:
            raise self._broken(error) from None
        poll_s = 0.0 if sent.is_cuda else POLL_S
        if not self.mailbox.serve_until(work.is_completed, self.deadline_s, self.serve, poll_s=poll_s):
            raise self._nobody(self.deadline_s)
        try:
            work.wait()
        except RuntimeError as error:
            raise self._broken(error) from None
        if self.group.is_ended:
            raise SupersededError
        return into

    def _broken(self, error: RuntimeError) -> SlotLostError:
        """Wait for the plan that follows when a neighbour is gone, which the scheduler sees too; else say so."""
        log.info("slot %d: %s", self.mailbox.slot, str(error).splitlines()[0])
        self.mailbox.serve_until(lambda: False, self.deadline_s, self.serve, poll_s=POLL_S)
        return self._nobody(self.deadline_s)

    def _nobody(self, seconds: float) -> SlotLostError:
        return lost(self.mailbox.slot, [s for s in self.slots if s != self.mailbox.slot], seconds)

    def _take(self, message: Tensor, num: int) -> None:
        """Write what came from one slot where it belongs.

        Args:
            message: uint8, as `_packed` made it.
            num: pieces in it.
        """
        own, first = self._own.view(_UNIT), self._own.storage_offset()
        head = num * _TOLD * 8
        told = message[:head].view(torch.int64).view(num, _TOLD).tolist()
        sizes = [size for place in told for size in _sizes(place)]
        parts = iter(_parts(message[head + _padding(head) :], sizes))
        for start, span, width, stride, ordered in told:
            shape = span, width // _UNIT.itemsize
            there = own.as_strided(shape, (stride // _UNIT.itemsize, 1), (first + start) // _UNIT.itemsize)
            if ordered < 0:
                there.copy_(next(parts).view(_UNIT).view(shape))
            else:
                order_R = next(parts).view(torch.int64)
                there[order_R] = next(parts).view(_UNIT).view(ordered, -1)

    def abort(self) -> None:
        """As of `Link`."""
        self.group.abort()


def _sizes(told: list[int]) -> list[int]:
    """Bytes of what follows of a piece."""
    _, span, width, _, ordered = told
    return [span * width] if ordered < 0 else [ordered * 8, ordered * width]


def _padding(size: int) -> int:
    return -size % _ALIGNMENT


def _packed(pieces: Sequence[_Piece], device: torch.device) -> list[Tensor]:
    """Bytes of a message, in parts: what there is, then each piece, all at aligned places.

    Args:
        pieces: for one slot.
        device: where it is sent from.
    """
    if not pieces:
        return []
    tensors = [torch.tensor([piece.told for piece in pieces]).to(device)]
    for piece in pieces:
        tensors += [piece.rows] if piece.order_R is None else [piece.order_R, piece.rows]
    found = []
    for tensor in tensors:
        part = tensor.reshape(-1).view(torch.uint8)
        found += [part, part.new_zeros(_padding(part.numel()))]
    return found


def _parts(message: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """Cut what `_packed` made.

    Args:
        message: uint8.
        sizes: bytes of its parts.
    """
    found, start = [], 0
    for size in sizes:
        found.append(message[start : start + size])
        start += size + _padding(size)
    return found
