"""Typed messages, their frames, the mailbox that fences and orders them, and what cannot travel."""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import msgpack
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparseray.actors.installation import InstallPlan, JobSpec, PullFrom, Restore
from sparseray.actors.serving.messages import Generate, Tokens
from sparseray.actors.serving.text_request import GenerationRequest, TokenEvent, TokenLogprobs
from sparseray.actors.state.assignment import Plan
from sparseray.actors.wire import codec, envelope
from sparseray.actors.wire.envelope import SCHEDULER, Body, Message, decode, encode
from sparseray.actors.wire.mailbox import Mailbox
from sparseray.actors.wire.messages import (
    Commit,
    DenseNode,
    DenseNodes,
    DenseReduced,
    Evaluated,
    ExpertForward,
    FetchRows,
    FinishPart,
    MemoryRows,
    Pieces,
    Ping,
    Pong,
    Pull,
    RowGradients,
    RunStep,
    Saved,
    SavedTensor,
)
from sparseray.actors.wire.slot_mailbox import SlotMailbox
from sparseray.errors import SlotLostError, SupersededError
from sparseray.platform.fleet.transport import ZmqTransport

ROWS = FetchRows(rows_LN=(torch.arange(3), torch.zeros(0, dtype=torch.int64)))
PLAN = Plan(
    generation=2, addresses={0: "ipc://a", 7: "ipc://b"}, part_owners=(0, 7), dense=(0, 7),
    experts=(((0, 7), (7, 0)),), buckets=(), spread=((2, 1),),
)  # fmt: skip
COMMIT = Commit(step=4, lr=0.1, memory_lr=0.2, scale=1, counts_LE=torch.ones(1, 2, dtype=torch.int64))
LOGPROBS = TokenLogprobs(token_id=3, logprob=None, top=((1, -0.5), (2, -1.0)))
EXAMPLES: list[Body] = [
    RunStep(),
    COMMIT,
    Evaluated(losses={3: (1.5, 64), 0: (2.5, 64)}),
    Saved(tensors={"a": SavedTensor(file="f", shape=(2, 0), dtype="float32", sha256="00")}),
    ExpertForward(
        experts=(1, 5), counts=(2, 0), keep=True, x_UH=torch.randn(2, 3), rows_R=torch.tensor([1, 0])
    ),
    ROWS,
    MemoryRows(values_LND=(torch.randn(3, 2).bfloat16(), torch.empty(0, 2))),
    Pull(pieces=(("dense", 0, 0), ("expert", 1, 2))),
    Pieces(tensors={"b": torch.tensor(2.5), "a": torch.tensor([True, False]), "h": torch.ones(3).half()}),
    FinishPart(rows=(RowGradients(rows_U=torch.arange(2), sums_UD=torch.randn(4, 2)[::2]),)),
    DenseNodes(nodes=(DenseNode(level=1, index=0, gradient=torch.randn(5, dtype=torch.float64)),)),
    InstallPlan(
        plan=PLAN,
        job=JobSpec(config="{}"),
        scheduler="ipc://s",
        step=4,
        restore=Restore(checkpoint=""),
        commit=COMMIT,
        pulls=(PullFrom(source=7, pieces=(("bucket", 0, 1),)),),
    ),
    Generate(request=GenerationRequest(request_id="r", prompt_tokens=(1, 2), max_tokens=3, seed=2**64 - 1)),
    Tokens(
        events=(
            TokenEvent(request_id="r", index=0, token_id=4, logprobs=LOGPROBS, prompt_logprobs=(LOGPROBS,)),
        )
    ),
]


def message(body: Body = ROWS, **changes: Any) -> Message[Body]:
    values: dict[str, Any] = {"source": 1, "generation": 1, "sequence": 1, "step": 4}
    return Message(body=body, **{**values, **changes})


def same(left: Any, right: Any) -> bool:
    """Equality that looks into tensors."""
    if isinstance(left, Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, tuple):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, dict):
        return list(left) == list(right) and all(same(left[name], right[name]) for name in left)
    if hasattr(left, "__dataclass_fields__"):
        return type(left) is type(right) and all(
            same(getattr(left, f.name), getattr(right, f.name)) for f in fields(left)
        )
    return bool(left == right)


# -- what travels ----------------------------------------------------------------------------------


@pytest.mark.parametrize("body", EXAMPLES, ids=lambda body: body.kind)
def test_a_message_survives_the_wire(body: Body) -> None:
    sent = message(body, part=2, layer=0, reply_to=9)
    frames = [bytes(frame) for frame in encode(sent, "job")]
    got = decode(frames, "job")
    assert got is not None
    assert same(got.body, body)
    assert replace(got, body=body) == sent
    assert decode(frames, "another job") is None


@pytest.mark.parametrize("body", EXAMPLES, ids=lambda body: body.kind)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_mutated_message_is_refused_or_is_another_message_of_its_kind(body: Body, data: Any) -> None:
    frames = [bytearray(frame) for frame in encode(message(body), "job")]
    for _ in range(data.draw(st.integers(1, 3))):
        which = data.draw(st.integers(0, len(frames) - 1))
        change = data.draw(st.sampled_from(("flip", "cut", "grow", "drop", "repeat")))
        if change == "flip" and frames[which]:
            frames[which][data.draw(st.integers(0, len(frames[which]) - 1))] ^= data.draw(st.integers(1, 255))
        elif change == "cut":
            del frames[which][data.draw(st.integers(0, len(frames[which]))) :]
        elif change == "grow":
            frames[which] += data.draw(st.binary(min_size=1, max_size=9))
        elif change == "drop" and len(frames) > 1:
            del frames[which]
        else:
            frames.insert(which, bytearray(frames[which]))
    try:
        got = decode(frames, "job")
    except ValueError:
        return
    if got is not None:
        encode(got, "job")


def plain(**changes: Any) -> Any:
    """The plain values of a commit, with changes; None leaves a field out."""
    values = {"step": 4, "lr": 0.1, "memory_lr": 0.2, "scale": 1.0, "counts_LE": ["int64", [1, 2]], **changes}
    return {name: value for name, value in values.items() if value is not None}


def header(body: Any = None, **changes: Any) -> bytes:
    names = "job kind source generation sequence step part layer reply_to body".split()  # noqa: SIM905
    values = dict(zip(names, ["job", "commit", 1, 1, 1, 4, -1, -1, 0, plain() if body is None else body]))
    return msgpack.packb(list({**values, **changes}.values()))


SIXTEEN = b"0123456789abcdef"


def test_the_header_that_the_cases_below_change_is_accepted() -> None:
    assert decode([header(), SIXTEEN], "job") is not None


@pytest.mark.parametrize(
    "frames",
    [
        [],
        [b""],
        [b"GET / HTTP/1.1\r\n\r\n"],
        [b"\xff" * 64],
        [b"\xdd\xff\xff\xff\xff"],
        [msgpack.packb({"job": "job"})],
        [msgpack.packb(["job", 1, 2])],
        [header(kind=7), SIXTEEN],
        [header(kind="no such kind"), SIXTEEN],
        [header(source="one"), SIXTEEN],
        [header([1]), SIXTEEN],
        [header(plain(step=None)), SIXTEEN],
        [header(plain(more=1)), SIXTEEN],
        [header(plain(step=4.0)), SIXTEEN],
        [header(plain(step=True)), SIXTEEN],
        [header(plain(lr="0.1")), SIXTEEN],
        [header()],
        [header(), SIXTEEN, b"1234"],
        [header(), SIXTEEN[:15]],
        [header(), SIXTEEN + b"0"],
        [header(plain(counts_LE=3)), SIXTEEN],
        [header(plain(counts_LE=["int64"])), SIXTEEN],
        [header(plain(counts_LE=["object", [2]])), SIXTEEN],
        [header(plain(counts_LE=[["int64"], [2]])), SIXTEEN],
        [header(plain(counts_LE=["int64", "x"])), SIXTEEN],
        [header(plain(counts_LE=["int64", [-1, -2]])), SIXTEEN],
        [header(plain(counts_LE=["int64", [True, 2]])), SIXTEEN],
        [header(plain(counts_LE=["int64", [2**40, 2**40]])), SIXTEEN],
        [header(plain(counts_LE=["int64", [2**63, 0]]))],
    ],
)
def test_malformed_frames_raise_value_error_and_nothing_else(frames: list[bytes]) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        decode(frames, "job")


@dataclass(frozen=True)
class Number:
    value: int


@pytest.mark.parametrize(
    "body",
    [
        replace(COMMIT, step="4"),
        replace(COMMIT, lr=None),
        replace(COMMIT, counts_LE=[1]),
        replace(COMMIT, counts_LE=torch.zeros(1, dtype=torch.complex64)),
        Evaluated(losses={0: (1.5, 2, 3)}),  # type: ignore[dict-item]
        Pull(pieces=[("dense", 0, 0)]),  # type: ignore[arg-type]
        Saved(tensors={"a": Number(1)}),  # type: ignore[dict-item]
    ],
)
def test_a_wrong_field_is_an_error_at_its_sender(body: Body) -> None:
    with pytest.raises(ValueError, match=type(body).__name__):
        encode(message(body), "job")


# -- what is too large -----------------------------------------------------------------------------


def pair(tmp_path: Path, **options: Any) -> tuple[Mailbox, Mailbox]:
    boxes = [Mailbox(ZmqTransport(f"slot{i}", tmp_path, **options), i, "job") for i in range(2)]
    boxes[0].transport.connect({1: boxes[1].transport.address})
    return boxes[0], boxes[1]


def test_a_tensor_beyond_a_frames_limit_travels_in_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(codec, "CHUNK_BYTES", 1 << 16)
    sender, receiver = pair(tmp_path, max_frame_bytes=1 << 16)
    gradient = torch.randn(100_003)
    sender.post(1, DenseReduced(gradient=gradient))
    got = receiver.next(10.0)
    assert got is not None and isinstance(got.body, DenseReduced)
    assert torch.equal(got.body.gradient, gradient)
    for box in (sender, receiver):
        box.transport.close()


def test_what_no_transport_takes_is_an_error_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sender, receiver = pair(tmp_path, max_frame_bytes=1 << 16)
    with pytest.raises(ValueError, match="400012 bytes"):
        sender.post(1, DenseReduced(gradient=torch.zeros(100_003)))
    monkeypatch.setattr(envelope, "MAX_HEADER_BYTES", 1 << 10)
    with pytest.raises(ValueError, match="header"):
        sender.post(1, Pull(pieces=(("expert", 1, 1),) * 1000))
    # Nothing of either has left.
    sender.post(1, Ping())
    got = receiver.next(10.0)
    assert got is not None and isinstance(got.body, Ping)
    assert receiver.dropped["malformed"] == 0
    for box in (sender, receiver):
        box.transport.close()


# -- the mailbox --------------------------------------------------------------------------------------

PLANNED = InstallPlan(plan=PLAN, job=JobSpec(config="{}"), scheduler="", step=4)


class FakeTransport:
    """Hands out prepared frames and keeps what is sent; an empty queue is silence."""

    address = "fake://"

    def __init__(self) -> None:
        self.incoming: deque[list[Any]] = deque()
        self.sent: list[tuple[int, list[Any]]] = []

    def connect(self, peers: dict[int, str]) -> None:
        pass

    def send(self, slot: int, frames: Sequence[Any]) -> None:
        self.sent.append((slot, list(frames)))

    def receive(self, timeout_s: float) -> list[Any] | None:
        if not self.incoming:
            time.sleep(min(timeout_s, 0.001))
        return self.incoming.popleft() if self.incoming else None

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


def test_a_ping_is_answered_while_the_work_thread_computes_and_before_its_plan_is_taken(box: Box) -> None:
    # This thread, the work thread's part, takes nothing from its mailbox meanwhile.
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
