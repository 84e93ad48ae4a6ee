"""The mailbox fences and orders; in a slot, one thread reads it for another."""

import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from test_messages import PLAN, ROWS, SIXTEEN, header, message

from sparseray.actors.installation import InstallPlan, JobSpec
from sparseray.actors.wire.envelope import SCHEDULER, Body, Message, decode, encode
from sparseray.actors.wire.mailbox import Mailbox
from sparseray.actors.wire.messages import Ping, Pong
from sparseray.actors.wire.slot_mailbox import SlotMailbox
from sparseray.errors import SlotLostError, SupersededError
from sparseray.platform.fleet.transport import ZmqTransport

PLANNED = InstallPlan(plan=PLAN, job=JobSpec(config="{}"), scheduler="", step=4)


class FakeTransport:
    """Hands out prepared frames and keeps what is sent; an empty queue is silence."""

    address = "fake://"

    def __init__(self) -> None:
        self.incoming: deque[list[Any]] = deque()
        self.sent: list[tuple[int, list[Any]]] = []
        self.ended: set[int] = set()

    def connect(self, peers: dict[int, str]) -> None:
        pass

    def send(self, slot: int, frames: Sequence[Any]) -> None:
        self.sent.append((slot, list(frames)))

    def receive(self, timeout_s: float) -> list[Any] | None:
        if not self.incoming:
            time.sleep(min(timeout_s, 0.001))
        return self.incoming.popleft() if self.incoming else None

    def gone(self, slots: Collection[int]) -> list[int]:
        return [slot for slot in slots if slot in self.ended]

    def close(self) -> None:
        pass

    def put(self, **changes: Any) -> None:
        self.incoming.append(encode(message(**changes), "job"))


@pytest.fixture
def transport() -> FakeTransport:
    return FakeTransport()


@pytest.fixture
def mailbox(transport: FakeTransport) -> Mailbox:
    box = Mailbox(transport, 0, "job")
    box.adopt(1)
    return box


def test_mailbox_drops_other_generations_duplicates_and_noise(
    transport: FakeTransport, mailbox: Mailbox
) -> None:
    transport.put(generation=0, sequence=1)
    transport.put(generation=2, sequence=2)
    transport.put(sequence=3)
    transport.put(sequence=3)
    transport.put(sequence=3, source=2)
    transport.incoming.append([b"noise"])
    transport.incoming.append([header(source="one"), SIXTEEN])
    transport.put(body=PLANNED, generation=0, sequence=4)
    transport.put(body=PLANNED, generation=2, sequence=5)
    found = []
    while (got := mailbox.next(0.0)) is not None:
        found.append((got.source, got.sequence, got.body.kind))
    assert found == [(1, 3, "fetch_rows"), (2, 3, "fetch_rows"), (1, 5, "install_plan")]
    assert mailbox.dropped == {"generation": 2, "duplicate": 1, "malformed": 2}


def test_mailbox_remembers_only_the_newest_sequences(transport: FakeTransport, mailbox: Mailbox) -> None:
    for sequence in range(1, 20001):
        transport.put(sequence=sequence)
        assert mailbox.next(0.0) is not None
    transport.put(sequence=20000)
    assert mailbox.next(0.0) is None
    assert len(mailbox._seen[1]) <= 8193


# -- the two threads of a slot ---------------------------------------------------------------------


@dataclass
class Box:
    """A slot's mailbox whose control thread runs, what it sent, and how often it was told to abort."""

    mailbox: SlotMailbox
    transport: FakeTransport
    aborts: list[None]

    def sent(self) -> list[Message[Body]]:
        found = [decode(frames, "job") for _, frames in list(self.transport.sent)]
        return [message for message in found if message is not None]

    def until(self, is_true: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 10.0
        while not is_true():
            assert time.monotonic() < deadline
            time.sleep(0.001)


@pytest.fixture
def box(transport: FakeTransport) -> Iterator[Box]:
    mailbox, aborts = SlotMailbox(transport, 0, "job"), []
    mailbox.adopt(1)
    control = threading.Thread(target=mailbox.read, args=(lambda: aborts.append(None),))
    control.start()
    yield Box(mailbox, transport, aborts)
    mailbox.close()
    control.join()


def test_waiting_serves_others_and_returns_the_replies(box: Box) -> None:
    first, second = box.mailbox.post(1, ROWS), box.mailbox.post(2, ROWS)
    box.transport.put(sequence=1, source=2, reply_to=second)
    box.transport.put(sequence=1, source=3)
    box.transport.put(sequence=2, source=1, reply_to=first)
    served: list[Message[Body]] = []
    replies = box.mailbox.wait({first: 1, second: 2}, 10.0, served.append)
    assert (replies[first].source, replies[second].source) == (1, 2)
    assert [m.source for m in served] == [3]
    assert [slot for slot, _ in box.transport.sent] == [1, 2]


def test_silent_slots_are_named_after_the_deadline(box: Box) -> None:
    first, second = box.mailbox.post(1, ROWS), box.mailbox.post(2, ROWS)
    box.transport.put(source=1, reply_to=first)
    with pytest.raises(SlotLostError, match=r"slots \[2\]"):
        box.mailbox.wait({first: 1, second: 2}, 0.1, lambda m: None)


def test_who_can_ask_others_does_not_wait_for_a_slot_that_has_ended(box: Box) -> None:
    first, second = box.mailbox.post(1, ROWS), box.mailbox.post(2, ROWS)
    box.transport.ended.add(2)
    started = time.monotonic()
    with pytest.raises(SlotLostError, match=r"the end of slots \[2\]") as error:
        box.mailbox.wait({first: 1, second: 2}, 10.0, lambda m: None, watch=True)
    assert time.monotonic() - started < 5.0 and error.value.slots == (2,)
    with pytest.raises(SlotLostError, match="no answer"):
        box.mailbox.wait({second: 2}, 0.1, lambda m: None)


def test_a_transport_sees_the_end_of_the_peers_that_it_was_connected_to(tmp_path: Path) -> None:
    ways = [ZmqTransport(f"slot{i}", tmp_path) for i in range(3)]
    try:
        ways[0].connect({1: ways[1].address, 2: ways[2].address})
        for slot in (1, 2):
            ways[0].send(slot, [b"x"])
            assert ways[slot].receive(5.0) is not None
        assert ways[0].gone([1, 2]) == []
        ways[1].close()
        deadline = time.monotonic() + 5.0
        while not ways[0].gone([1, 2]) and time.monotonic() < deadline:
            time.sleep(0.005)
        assert ways[0].gone([1, 2]) == ways[0].gone([1]) == [1] and ways[0].gone([2]) == []
        # Whoever comes to its place is somebody else.
        ways[0].connect({1: ways[2].address})
        assert ways[0].gone([1, 2]) == []
    finally:
        ways[0].close()
        ways[2].close()


def test_a_ping_is_answered_while_the_work_thread_computes_and_before_its_plan_is_taken(box: Box) -> None:
    # This thread, the work thread's part, takes nothing from its mailbox meanwhile. Others have nothing to ping for.
    box.transport.put(body=Ping(), source=77, sequence=4)
    box.transport.put(body=Ping(), source=SCHEDULER, sequence=5)
    box.transport.put(body=Ping(), source=SCHEDULER, sequence=6, generation=2)
    box.until(lambda: len(box.transport.sent) == 2)
    assert [(m.body, m.generation, m.reply_to) for m in box.sent()] == [(Pong(), 1, 5), (Pong(), 2, 6)]


def test_a_plan_ends_a_wait_goes_first_and_leaves_the_old_generations_messages_behind(box: Box) -> None:
    asked = box.mailbox.post(1, ROWS)
    box.transport.put(sequence=1)
    box.transport.put(body=PLANNED, source=SCHEDULER, generation=2, sequence=9)
    box.transport.put(sequence=2, generation=2)
    with pytest.raises(SupersededError):
        box.mailbox.wait({asked: 1}, 10.0, lambda m: None)
    assert box.aborts
    plan = box.mailbox.next(0.0)
    assert plan is not None and plan.body.kind == "install_plan"
    box.mailbox.adopt(2)
    early = box.mailbox.next(10.0)
    assert early is not None and (early.sequence, early.generation) == (2, 2)
    assert box.mailbox.next(0.05) is None
    # The same plan once more is an ordinary message: it does not end what its generation has begun.
    box.transport.put(body=PLANNED, source=SCHEDULER, generation=2, sequence=10)
    again = box.mailbox.next(10.0)
    assert again is not None and again.sequence == 10 and len(box.aborts) == 1


def test_what_ends_the_control_thread_ends_the_work_thread(box: Box) -> None:
    def break_down(timeout_s: float) -> None:
        raise OSError("no socket")

    asked = box.mailbox.post(1, ROWS)
    box.transport.receive = break_down  # type: ignore[method-assign]
    with pytest.raises(SupersededError):
        box.mailbox.wait({asked: 1}, 10.0, lambda m: None)
    with pytest.raises(OSError, match="no socket"):
        box.mailbox.next(0.0)


def test_transports_that_nobody_closed_are_collected_without_waiting(tmp_path: Path) -> None:
    """As of a slot that died: what the collector ends first is up to it, and a context would wait for its sockets."""
    script = f"""
import gc, pathlib
from sparseray.platform.fleet.transport import ZmqTransport
gc.disable()
for pair in range(30):
    one, two = (ZmqTransport(name + str(pair), directory=pathlib.Path({str(tmp_path)!r})) for name in "ab")
    one.connect({{1: two.address}})
    one.send(1, [b"header", bytes(100_000)])
    one.cycle = two.cycle = [one, two]
del one, two
print(gc.collect() > 0)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.stdout == "True\n", done.stderr
