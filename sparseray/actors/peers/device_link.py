"""`Link` between GPUs of one host: everything is launched, and the host waits only where it reads.

A wait that comes to no end leaves a status on the device; `read` brings it to the host with the numbers that it is asked
for. So a lost neighbour costs no context, and the slot goes on in the next generation. Twin of link.py's `HostLink`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sparseray.actors.peers.link import COUNT_BITS, lost, word_of
from sparseray.actors.wire.envelope import Body, Message
from sparseray.actors.wire.slot_mailbox import SlotMailbox
from sparseray.errors import SupersededError
from sparseray.kernels import peer

MOST_SLOTS = 62
"""Bits of the word that says who is waited for."""


class DeviceLink:
    """One slot's way to the memory of others, in one generation.

    Args:
        mailbox: of the slot; what comes for it is served while the host waits.
        serve: handles what comes.
        deadline_s: seconds after which a silent source is lost.
        slots: of the generation, by rank.
        signs: of the slot: its state on the device, and what ends waits.
    """

    def __init__(
        self,
        mailbox: SlotMailbox,
        serve: Callable[[Message[Body]], None],
        deadline_s: float,
        slots: Sequence[int],
        signs: tuple[Tensor, Tensor],
    ) -> None:
        assert len(slots) <= MOST_SLOTS
        self.mailbox, self.serve, self.deadline_s, self.slots = mailbox, serve, deadline_s, slots
        self.generation = mailbox.generation
        self._state, self._end = signs

    def put(self, rows: Tensor, into: Tensor, order_R: Tensor | None = None) -> None:
        """As of `Link`.

        Args:
            rows, into, order_R: there.
        """
        peer.put_rows(rows, into, order_R, self._state)

    def signal(self, flags_S: Tensor, rank: int, count: int) -> None:
        """As of `Link`.

        Args:
            flags_S, rank, count: there.
        """
        peer.signal(flags_S, rank, word_of(self.generation, count), self._state)

    def wait(self, flags_S: Tensor, ranks: Sequence[int], count: int) -> None:
        """As of `Link`.

        Args:
            flags_S, ranks, count: there.
        """
        if ranks:
            peer.wait(
                flags_S,
                sum(1 << rank for rank in ranks),
                word_of(self.generation, count),
                (self.generation + 1) << COUNT_BITS,
                self._state,
                self._end,
                self.deadline_s,
            )

    def read(self, values: Tensor) -> list[Any]:
        """As of `Link`."""
        there = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for t in (values, self._state)]
        for host, device in zip(there, (values, self._state)):
            host.copy_(device, non_blocking=True)
        done = torch.cuda.Event()
        done.record()
        try:
            # What is on the device before these numbers ends by itself, at the latest by the bounds of its waits.
            self.mailbox.serve_until(done.query, float("inf"), self.serve, poll_s=0.0)
        except SupersededError:
            self.abort()
            raise
        status = int(there[1][0])
        if status == peer.LATE:
            raise lost(self.mailbox.slot, [s for s in self.slots if s != self.mailbox.slot], self.deadline_s)
        if status != peer.OK:
            raise SupersededError
        found: list[Any] = there[0].tolist()
        return found

    def abort(self) -> None:
        """As of `Link`."""
        self._end.fill_(peer.ENDED)
