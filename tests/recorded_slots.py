"""Parts of several slots that are recorded and replayed, as on GPUs, here by threads on a CPU.

What a CUDA graph does is imitated where it can go wrong: while a part is recorded nothing is put, said or waited for, and the
host may read nothing; a replay says and waits for the words that were recorded, whatever the host counts meanwhile, plus what
the device adds to them; nothing that it does for the meter counts, and what it found is put where the recording had it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from test_part_graph import Recorded
from torch import Tensor

from sparseray.actors.exchange.protocol import Recording, Run
from sparseray.actors.peers import choice
from sparseray.actors.peers.link import HostLink
from sparseray.actors.peers.meter import Meter
from sparseray.actors.peers.token_exchange import TokenExchange
from sparseray.actors.training import part_graph
from sparseray.kernels.ops import HeldRows
from sparseray.platform.fleet import company

_here = threading.local()


@dataclass
class Tape:
    """Words that a recording has built in: what was asked for, of which ranks, and the count."""

    words: list[tuple[Any, ...]] = field(default_factory=list)
    at: int | None = None
    """Of a replay, the next one; None while it is recorded."""


def _tape() -> Tape | None:
    return getattr(_here, "tape", None)


@contextmanager
def _in(tape: Tape, at: int | None) -> Iterator[None]:
    """Let this thread record, or replay."""
    assert _tape() is None
    _here.tape, tape.at = tape, at
    try:
        yield
    finally:
        _here.tape = None


class TapeLink(HostLink):
    """`HostLink` as it would be on a GPU."""

    is_recordable = True
    _shift = 0

    def shift(self, count: int) -> None:
        self._shift = count

    def _word(self, *asked: Any) -> int | None:
        """What the device makes of a count, which comes last; None while nothing happens."""
        tape, *what, count = _tape(), *asked
        if tape is None:
            assert self._shift == 0
        elif tape.at is None:
            tape.words.append(asked)
            return None
        else:
            *recorded, count = tape.words[tape.at]
            tape.at += 1
            assert recorded == what
        return int(count + self._shift)

    @property
    def _is_dry(self) -> bool:
        tape = _tape()
        return tape is not None and tape.at is None

    def put(self, rows: Tensor, into: Tensor, order_R: Tensor | None = None) -> None:
        if not self._is_dry:
            super().put(rows, into, order_R)

    def give_rows(self, rows_RN: Tensor, held: HeldRows, intos: Sequence[Tensor]) -> None:
        if not self._is_dry:
            super().give_rows(rows_RN, held, intos)

    def give_sums(self, rows_RH: Tensor, held: HeldRows, *rest: Any, **named: Any) -> None:
        if not self._is_dry:
            super().give_sums(rows_RH, held, *rest, **named)

    def signal(self, flags_S: Tensor, rank: int, count: int) -> None:
        if (word := self._word("signal", rank, count)) is not None:
            super().signal(flags_S, rank, word)

    def wait(self, flags_S: Tensor, ranks: Sequence[int], count: int) -> None:
        if (word := self._word("wait", tuple(ranks), count)) is not None:
            super().wait(flags_S, ranks, word)

    def start_read(self, values: Tensor) -> Callable[[], list[Any]]:
        if _tape() is not None:
            raise RuntimeError("operation not permitted when stream is capturing")
        return super().start_read(values)


class SlotRecorder(Recorded):
    """`Recorded`, of a slot that has a `TapeLink` where it has company."""

    def record(self, run: Run, beside: int, *, again: bool) -> Recording:
        tape = Tape()
        with _in(tape, None):
            replay, found = super().record(run, beside, again=again)

        def once_more() -> None:
            with _in(tape, 0):
                replay()
                assert tape.at == len(tape.words)

        return once_more, found


@dataclass
class Slots:
    """Recorders of the slots that ran parts, one for each generation of each, and the bytes that their meters told."""

    recorders: list[SlotRecorder] = field(default_factory=list)
    num_bytes: dict[str, float] = field(default_factory=dict)

    def total(self, name: str) -> int:
        return sum(getattr(recorder, name) for recorder in self.recorders)


def record_slots(
    patch: pytest.MonkeyPatch, error: RuntimeError | None = None, *, is_graph: bool = True
) -> Slots:
    """Have slots that exchange through memory record their parts from the third step of a generation on.

    Args:
        patch: takes it back.
        error: raised where a part is to be recorded.
        is_graph: without, parts are launched by the same link.
    """
    found, lock, phase = Slots(), threading.Lock(), Meter.phase

    def recorder(device: torch.device) -> SlotRecorder | None:
        if is_graph:
            found.recorders.append(SlotRecorder(error))
        return found.recorders[-1] if is_graph else None

    def settle(me: TokenExchange, *_: int) -> None:
        me.counts_rows = False

    @contextmanager
    def counted(me: Meter, name: str, num_bytes: int) -> Iterator[None]:
        tape = _tape()
        if tape is not None and tape.at is not None:
            yield
            return
        with phase(me, name, num_bytes):
            yield

    def tell(me: Meter, tell: Any = Meter.tell) -> None:
        with lock:
            for name, count in me._costs.num_bytes.items():
                found.num_bytes[name] = found.num_bytes.get(name, 0) + count
        tell(me)

    for module in (choice, company):
        patch.setattr(module, "HostLink", TapeLink)
    patch.setattr(TokenExchange, "settle", settle)
    patch.setattr(Meter, "phase", counted)
    patch.setattr(Meter, "tell", tell)
    patch.setattr(part_graph, "recorder_of", recorder)
    return found
