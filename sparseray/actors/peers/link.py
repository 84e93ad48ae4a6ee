"""How a slot writes to the buffers of others, and how it learns what they have written to its own.

Words (int64, one for each source) say how far a source has come: what it wrote before is there when its word is. A word
is a generation and, below it, a count that rises; so words are never reset, one of an older generation counts for nothing,
and one of a later generation ends a wait. Every slot comes to every word, also where it waits for nobody. `HostLink` is the
plain twin of `DeviceLink` (device_link.py), and what `CollectiveLink` (collective_link.py) computes with.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

from torch import Tensor

from sparseray.actors.wire.envelope import Body, Message
from sparseray.actors.wire.slot_mailbox import SlotMailbox
from sparseray.errors import SlotLostError
from sparseray.kernels.dse.gather import read_word, write_word
from sparseray.kernels.moe.expert_sum import combine_slots
from sparseray.kernels.ops import HeldRows

COUNT_BITS = 32
POLL_S = 2e-4


def word_of(generation: int, count: int) -> int:
    """What a word says; greater words are later.

    Args:
        generation: below 2^31.
        count: of what was written in it, below 2^32.
    """
    return generation << COUNT_BITS | count


class Link(Protocol):
    """One slot's way to the others' memory, in one generation; what is asked for happens in the order of the calls."""

    waited_s: float
    """Seconds spent in waits for others, as far as the last `read` tells."""
    is_recordable: bool = False
    """Whether all but reading happens without the host, so that it can be recorded and happen again."""

    def shift(self, count: int) -> None:
        """Have the words of what follows count so much further; those of a recording are what they were in it.

        Args:
            count: 0 for what is asked for as it happens.
        """
        assert self.is_recordable, "nothing was recorded"

    def mark(self) -> Any:
        """A moment in what is asked for."""

    def seconds(self, begin: Any, end: Any) -> float:
        """Seconds between two marks, when a `read` after them is over.

        Args:
            begin, end: of `mark`.
        """
        ...

    def put(self, rows: Tensor, into: Tensor, order_R: Tensor | None = None) -> None:
        """Write rows to another's memory, or to the own.

        Args:
            rows: contiguous.
            into: where, of the same dtype and of rows of the same length.
            order_R: integers, the place of each row in `into`; None for one after another.
        """

    def aside(self) -> AbstractContextManager[None]:
        """What is asked for in the block begins after what was before, and goes on beside what comes after."""
        ...

    def join(self) -> None:
        """Let nothing that follows begin before all that was asked for aside has happened."""

    def put_all(self, numbers: Tensor, intos: Sequence[Tensor]) -> None:
        """Write the same numbers to several places.

        Args:
            numbers: contiguous.
            intos: contiguous, of the same dtype and size.
        """

    def put_tokens(self, x_TH: Tensor, owners_T: Tensor, intos: Sequence[Tensor]) -> None:
        """Write each token to the places whose bit it has, at its own row.

        Args:
            x_TH: contiguous.
            owners_T: int64, bits.
            intos: as in `put_all`.
        """

    def give_rows(self, rows_RN: Tensor, held: HeldRows, intos: Sequence[Tensor]) -> None:
        """Write each row that is held to the place of its (token, k) pair.

        Args:
            rows_RN: in the order of `held`; numbers alone are rows of one.
            held: whose rows they are, of the tokens of several sources, which have the same number.
            intos: [T * K, N] or [T * K] of each source, contiguous.
        """

    def give_sums(
        self, rows_RH: Tensor, held: HeldRows, weights_STK: Tensor, intos: Sequence[Tensor], *, weighted: bool
    ) -> None:
        """Write the sum of each token's rows that are held; of one that has none, nothing or zeros.

        Args:
            rows_RH, held: as in `give_rows`.
            weights_STK: fp32, of the rows.
            intos: [T, H] of each source, of any stride.
            weighted: whether rows are multiplied by their weights.
        """

    def signal_all(self, flags: Sequence[Tensor], rank: int, count: int) -> None:
        """`signal` to several slots.

        Args:
            flags: of each.
            rank, count: as there.
        """

    def signal(self, flags_S: Tensor, rank: int, count: int) -> None:
        """Say there that all that was put before can be read.

        Args:
            flags_S: of the other slot.
            rank: own place among the sources.
            count: of the word.
        """

    def wait(self, flags_S: Tensor, ranks: Sequence[int], count: int) -> None:
        """Let nothing that follows begin before some sources have come so far.

        Args:
            flags_S: own.
            ranks: of the sources; none for one that only comes to the word.
            count: that they must have reached.

        Raises:
            SlotLostError: one does not, in time; a device says so at the next `read`.
            SupersededError: a later plan came.
        """

    def read(self, values: Tensor) -> list[Any]:
        """Bring numbers to the host, when all that was asked for before has happened; raises as `wait` does."""
        return self.start_read(values)()

    def start_read(self, values: Tensor) -> Callable[[], list[Any]]:
        """As `read`, when what is returned is called: what is asked for between does not hold it up."""
        ...

    def abort(self) -> None:
        """End every wait; called by the control thread."""


class HostLink(Link):
    """`Link` over shared memory of the host, for slots that compute on a CPU.

    Args:
        mailbox: of the slot; what comes for it is served while it waits.
        serve: handles what comes.
        deadline_s: seconds after which a silent source is lost.
        slots: of the generation, by rank.
    """

    def __init__(
        self,
        mailbox: SlotMailbox,
        serve: Callable[[Message[Body]], None],
        deadline_s: float,
        slots: Sequence[int],
    ) -> None:
        self.mailbox, self.serve, self.deadline_s, self.slots = mailbox, serve, deadline_s, slots
        self.waited_s = 0.0

    def mark(self) -> float:
        """As of `Link`."""
        return time.perf_counter()

    def seconds(self, begin: float, end: float) -> float:
        """As of `Link`.

        Args:
            begin, end: there.
        """
        return end - begin

    def put(self, rows: Tensor, into: Tensor, order_R: Tensor | None = None) -> None:
        """As of `Link`.

        Args:
            rows, into, order_R: there.
        """
        if order_R is None:
            into.copy_(rows)
        else:
            into[order_R] = rows

    def aside(self) -> AbstractContextManager[None]:
        """Everything happens at once."""
        return nullcontext()

    def join(self) -> None:
        """It has happened."""

    def put_all(self, numbers: Tensor, intos: Sequence[Tensor]) -> None:
        """As of `Link`.

        Args:
            numbers, intos: there.
        """
        for into in intos:
            self.put(numbers, into)

    def put_tokens(self, x_TH: Tensor, owners_T: Tensor, intos: Sequence[Tensor]) -> None:
        """As of `Link`.

        Args:
            x_TH, owners_T, intos: there.
        """
        for index, into in enumerate(intos):
            wanted = (owners_T >> index & 1).nonzero()[:, 0]
            self.put(x_TH[wanted], into, wanted)

    def give_rows(self, rows_RN: Tensor, held: HeldRows, intos: Sequence[Tensor]) -> None:
        """As of `Link`.

        Args:
            rows_RN, held, intos: there.
        """
        order_R = held.order_R[: int(held.held)]
        for source, into in enumerate(intos):
            is_its = order_R // len(into) == source
            self.put(rows_RN[: len(order_R)][is_its], into, order_R[is_its] % len(into))

    def give_sums(
        self, rows_RH: Tensor, held: HeldRows, weights_STK: Tensor, intos: Sequence[Tensor], *, weighted: bool
    ) -> None:
        """As of `Link`.

        Args:
            rows_RH, held, weights_STK, intos, weighted: there.
        """
        count, shape = int(held.held), weights_STK.shape
        rows = rows_RH.new_zeros(weights_STK.numel(), rows_RH.shape[1])
        rows[held.order_R[:count]] = rows_RH[:count]
        for of_source, weights_TK, into in zip(rows.view(*shape, -1), weights_STK, intos):
            self.put(combine_slots(of_source, weights_TK if weighted else None), into)

    def signal_all(self, flags: Sequence[Tensor], rank: int, count: int) -> None:
        """As of `Link`.

        Args:
            flags, rank, count: there.
        """
        for flags_S in flags:
            self.signal(flags_S, rank, count)

    def signal(self, flags_S: Tensor, rank: int, count: int) -> None:
        """As of `Link`.

        Args:
            flags_S, rank, count: there.
        """
        write_word(flags_S.numpy(), rank, word_of(self.mailbox.generation, count))

    def wait(self, flags_S: Tensor, ranks: Sequence[int], count: int) -> None:
        """As of `Link`.

        Args:
            flags_S, ranks, count: there.
        """
        words, wanted = flags_S.numpy(), word_of(self.mailbox.generation, count)

        def late() -> list[int]:
            return [self.slots[rank] for rank in ranks if read_word(words, rank) < wanted]

        started = time.perf_counter()
        is_there = self.mailbox.serve_until(lambda: not late(), self.deadline_s, self.serve, poll_s=POLL_S)
        self.waited_s += time.perf_counter() - started
        if not is_there:
            raise lost(self.mailbox.slot, late(), self.deadline_s)

    def start_read(self, values: Tensor) -> Callable[[], list[Any]]:
        """As of `Link`."""
        found: list[Any] = values.tolist()
        return lambda: found

    def abort(self) -> None:
        """The mailbox knows."""


def lost(slot: int, silent: list[int], seconds: float) -> SlotLostError:
    """What is raised where others do not come.

    Args:
        slot: that waited.
        silent: for whom.
        seconds: how long.
    """
    return SlotLostError(f"slot {slot} got nothing from slots {silent} within {seconds:.3g} s", silent)
