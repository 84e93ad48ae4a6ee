"""Typed messages, their frames, the mailbox that fences and orders them, and what cannot travel."""

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import msgpack
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparseray.actors.exchange.chunks import Chunk, Pull, PullOn
from sparseray.actors.installation import InstallPlan, JobSpec, PullFrom, Restore
from sparseray.actors.serving.messages import Generate, Tokens
from sparseray.actors.serving.text_request import GenerationRequest, TokenEvent, TokenLogprobs
from sparseray.actors.state.assignment import Plan
from sparseray.actors.state.shared_buffer import BufferHandle
from sparseray.actors.wire import codec, envelope
from sparseray.actors.wire.envelope import Body, Message, decode, encode
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
    RowGradients,
    RunStep,
    Saved,
    SavedTensor,
    TableHandle,
)
from sparseray.platform.fleet.transport import ZmqTransport

ROWS = FetchRows(rows_LN=(torch.arange(3), torch.zeros(0, dtype=torch.int64)))
PLAN = Plan(
    generation=2, addresses={0: "ipc://a", 7: "ipc://b"}, part_owners=(0, 7), dense=(0, 7),
    experts=(((0, 7), (7, 0)),), buckets=(), spread=((2, 1),),
)  # fmt: skip
COMMIT = Commit(step=4, lr=0.1, memory_lr=0.2, scale=1, counts_LE=torch.ones(1, 2, dtype=torch.int64))
HANDLE = BufferHandle(namespace="boot-1", pid=2, num_bytes=64, token=2**62 - 1, descriptor=-1, storage=("0",))
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
    MemoryRows(
        values_LND=(torch.randn(3, 2).bfloat16(), torch.empty(0, 2)),
        handles=(
            TableHandle(
                namespace="boot-1",
                pid=2,
                descriptor=3,
                token=2**62 - 1,
                num_rows=3,
                width=2,
                row_dtype="bfloat16",
            ),
        ),
    ),
    Pull(pieces=(("dense", 0, 0), ("expert", 1, 2)), namespace="here"),
    PullOn(move=3, index=4, is_mapped=False),
    Chunk(move=3, index=4, chunks=6, names=("a",), starts=(0,), sizes=(2,), data=(torch.ones(2),)),
    Chunk(move=3, index=4, chunks=6, offsets=(32,), handle=HANDLE),
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
    Tokens.of(
        [
            TokenEvent(request_id="r", index=0, token_id=4),
            TokenEvent(request_id="r", index=0, token_id=4, logprobs=LOGPROBS, prompt_logprobs=(LOGPROBS,)),
        ]
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


def test_events_of_a_step_come_in_their_order() -> None:
    plain = [TokenEvent(request_id=name, index=3, token_id=7) for name in "abc"]
    events = [
        TokenEvent(request_id="d", index=1, token_id=2, accepted=1),
        *plain[:2],
        TokenEvent(request_id="d", index=2, token_id=2, finish_reason="length"),
        plain[2],
        TokenEvent(request_id="e", index=0, finish_reason="stop"),
    ]
    sent = Tokens.of(events, 4)
    assert sent.events() == events
    assert (sent.request_ids, sent.version) == (("a", "b", "d", "c"), 4)
    assert sent.finish_reasons == ("", "", "length", "")


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
    values = {"step": 4, "lr": 0.1, "memory_lr": 0.2, "scale": 1.0, "counts_LE": ["int64", [1, 2]]}
    values |= {"is_skipped": False, **changes}
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
        Pull(pieces=[("dense", 0, 0)], namespace=""),  # type: ignore[arg-type]
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
        sender.post(1, Pull(pieces=(("expert", 1, 1),) * 1000, namespace=""))
    # Nothing of either has left.
    sender.post(1, Ping())
    got = receiver.next(10.0)
    assert got is not None and isinstance(got.body, Ping)
    assert receiver.dropped["malformed"] == 0
    for box in (sender, receiver):
        box.transport.close()
