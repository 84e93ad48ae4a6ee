"""`Link` between GPUs of one host: everything is launched, and the host waits only where it reads.

A wait that comes to no end leaves a status on the device; `read` brings it to the host with the numbers that it is asked
for. So a lost neighbour costs no context, and the slot goes on in the next generation. Twin of link.py's `HostLink`.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from sparseray.actors.peers.link import COUNT_BITS, Link, lost, word_of
from sparseray.actors.wire.envelope import Body, Message
from sparseray.actors.wire.slot_mailbox import SlotMailbox
from sparseray.errors import SupersededError
from sparseray.kernels import peer, peer_rows
from sparseray.kernels.ops import HeldRows

MOST_SLOTS = 62
"""Bits of the word that says who is waited for."""


class DeviceLink(Link):
    """One slot's way to the memory of others, in one generation.

    Args:
        mailbox: of the slot; what comes for it is served while the host waits.
        serve: handles what comes.
        deadline_s: seconds after which a silent source is lost.
        slots: of the generation, by rank.
        signs: of the slot: its state on the device, and what ends waits.
    """

    is_recordable = True

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
        self.waited_s = 0.0
        self._side = torch.cuda.Stream(self._state.device)
        self._tables: dict[tuple[int, ...], Tensor] = {}

    def mark(self) -> torch.cuda.Event:
        """As of `Link`; one that is recorded has the time of the last replay."""
        event = torch.cuda.Event(enable_timing=True, external=torch.cuda.is_current_stream_capturing())
        event.record()
        return event

    def seconds(self, begin: torch.cuda.Event, end: torch.cuda.Event) -> float:
        """As of `Link`.

        Args:
            begin, end: there.
        """
        return float(begin.elapsed_time(end)) / 1e3

    def shift(self, count: int) -> None:
        """As of `Link`: kernels add it to every word.

        Args:
            count: there.
        """
        self._state[1].fill_(count)

    def put(self, rows: Tensor, into: Tensor, order_R: Tensor | None = None) -> None:
        """As of `Link`.

        Args:
            rows, into, order_R: there.
        """
        peer.put_rows(rows, into, order_R, self._state)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """As of `Link`."""
        self._side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._side):
            yield

    def join(self) -> None:
        """As of `Link`."""
        torch.cuda.current_stream().wait_stream(self._side)

    def put_all(self, numbers: Tensor, intos: Sequence[Tensor]) -> None:
        """As of `Link`.

        Args:
            numbers, intos: there.
        """
        if intos:
            is_aside = torch.cuda.current_stream() == self._side
            peer.put_all(numbers, self._table(intos), self._state, beside=is_aside)

    def put_tokens(self, x_TH: Tensor, owners_T: Tensor, intos: Sequence[Tensor]) -> None:
        """As of `Link`.

        Args:
            x_TH, owners_T, intos: there.
        """
        is_aside = torch.cuda.current_stream() == self._side
        peer_rows.put_tokens(x_TH, owners_T, self._table(intos), self._state, beside=is_aside)

    def give_rows(self, rows_RN: Tensor, held: HeldRows, intos: Sequence[Tensor]) -> None:
        """As of `Link`.

        Args:
            rows_RN, held, intos: there.
        """
        if intos:
            order_R = held.order_R[: len(rows_RN)]
            span, stride = intos[0].shape[0], intos[0].stride(0)
            peer_rows.give_rows(rows_RN, order_R, held.held, self._table(intos), span, stride, self._state)

    def give_sums(
        self, rows_RH: Tensor, held: HeldRows, weights_STK: Tensor, intos: Sequence[Tensor], *, weighted: bool
    ) -> None:
        """As of `Link`.

        Args:
            rows_RH, held, weights_STK, intos, weighted: there.
        """
        if intos:
            S, T, K = weights_STK.shape
            weights = weights_STK if weighted else None
            table, stride = self._table(intos), intos[0].stride(0)
            peer_rows.give_sums(
                rows_RH, held.inverse_R, weights, held.held, table, (S, T, K), stride, self._state
            )

    def signal_all(self, flags: Sequence[Tensor], rank: int, count: int) -> None:
        """As of `Link`.

        Args:
            flags, rank, count: there.
        """
        if flags:
            peer.signal_all(self._table(flags), rank, word_of(self.generation, count), self._state)

    def _table(self, places: Sequence[Tensor]) -> Tensor:
        """Where tensors lie, for kernels; made once."""
        key = tuple(place.data_ptr() for place in places)
        if key not in self._tables:
            self._tables[key] = peer.table_of(places, self._state.device)
        return self._tables[key]

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

    def start_read(self, values: Tensor) -> Callable[[], list[Any]]:
        """As of `Link`."""
        there = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for t in (values, self._state)]
        for host, device in zip(there, (values, self._state)):
            host.copy_(device, non_blocking=True)
        done = torch.cuda.Event()
        done.record()
        return lambda: self._finish_read(done, there)

    def _finish_read(self, done: torch.cuda.Event, there: Sequence[Tensor]) -> list[Any]:
        try:
            # What is on the device before these numbers ends by itself, at the latest by the bounds of its waits.
            self.mailbox.serve_until(done.query, float("inf"), self.serve, poll_s=0.0)
        except SupersededError:
            self.abort()
            raise
        status, self.waited_s = int(there[1][0]), int(there[1][2]) / 1e9
        if status == peer.LATE:
            raise lost(self.mailbox.slot, [s for s in self.slots if s != self.mailbox.slot], self.deadline_s)
        if status != peer.OK:
            raise SupersededError
        found: list[Any] = there[0].tolist()
        return found

    def abort(self) -> None:
        """As of `Link`."""
        self._end.fill_(peer.ENDED)
