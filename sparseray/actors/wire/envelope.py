"""The envelope of every message between slots, and how it becomes frames.

The envelope (job, generation, step, part, layer, sequence) is what a receiver fences, orders and answers by
(mailbox.py does); what a message says is its body, a frozen dataclass (messages.py). A frame is a msgpack header,
then the raw bytes of the body's tensors; nothing is ever unpickled.
"""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import msgpack

from sparseray.actors.wire.codec import pack, unpack

SCHEDULER, INGRESS = -1, -2
"""Slot ids of those that are no slots; further ingresses count down from the first."""
MAX_HEADER_BYTES = 16 << 20
# job, kind; source, generation, sequence, step, part, layer, reply_to; body.
_HEADER_TYPES = [str, str, *[int] * 7, dict]


class Transport(Protocol):
    """Carries frames between slots, in order for one pair of slots, at most once or not at all."""

    address: str

    def connect(self, peers: dict[int, str]) -> None:
        """Open a way to every slot in `peers` (slot id to address); known ones are kept."""

    def reach(self, slot: int, address: str) -> None:
        """Open a way to one more, which later calls of `connect` leave alone.

        Args:
            slot: its id.
            address: of its inbox.
        """

    def send(self, slot: int, frames: Sequence[Any]) -> None:
        """Queue the frames for a slot without waiting for it.

        Args:
            slot: receiver.
            frames: bytes-like, header first.
        """

    def gone(self, slots: Collection[int]) -> list[int]:
        """Those of some slots that are known to have ended."""

    def receive(self, timeout_s: float) -> list[Any] | None:
        """Return the next message's frames, or None when none came in time."""

    def close(self) -> None:
        """Release sockets and files."""


class Body:
    """Base of what a message says; a subclass is a frozen dataclass, and its name is the kind on the wire."""

    kind: ClassVar[str]
    # Whether it may come from a generation that the receiver has not entered yet: because it opens it, or anyway.
    opens_generation: ClassVar[bool] = False
    is_of_any_generation: ClassVar[bool] = False
    known: ClassVar[dict[str, type["Body"]]] = {}

    def __init_subclass__(cls) -> None:
        cls.kind = re.sub(r"(?<!^)(?=[A-Z])", "_", cls.__name__).lower()
        Body.known[cls.kind] = cls


B = TypeVar("B", bound=Body, covariant=True)


@dataclass(frozen=True, kw_only=True)
class Message(Generic[B]):
    """One message between two slots.

    Args:
        body: what it asks or tells.
        source: slot id of the sender, `SCHEDULER` for the scheduler.
        generation: generation of the plan that the sender follows.
        sequence: unique among the sender's messages.
        step, part, layer: what it belongs to, -1 where that has no meaning.
        reply_to: sequence of the request it answers, 0 for none.
    """

    body: B
    source: int
    generation: int
    sequence: int
    step: int = -1
    part: int = -1
    layer: int = -1
    reply_to: int = 0


def encode(message: Message[Body], job: str) -> list[Any]:
    """Turn a message into frames: a msgpack header, then the raw bytes of its tensors.

    Args:
        message: to send.
        job: identifier that the receiver compares.

    Raises:
        ValueError: a field of the body holds what its type does not allow, or the header grew too large to travel.
    """
    m = message
    tensors: list[Any] = []
    header = [job, m.body.kind, m.source, m.generation, m.sequence, m.step, m.part, m.layer, m.reply_to]
    head = msgpack.packb([*header, pack(m.body, tensors)])
    if len(head) > MAX_HEADER_BYTES:
        raise ValueError(f"{m.body.kind}: a header of {len(head)} bytes is over {MAX_HEADER_BYTES}")
    return [head, *tensors]


def decode(frames: Sequence[Any], job: str) -> Message[Body] | None:
    """Rebuild a message; None when it is of another job.

    Args:
        frames: as they came.
        job: own identifier.

    Raises:
        ValueError: the frames are not a message of ours.
    """
    header = _header(frames)
    if header[0] != job:
        return None
    kind, source, generation, sequence, step, part, layer, reply_to, body = header[1:]
    if kind not in Body.known:
        raise ValueError(f"no message of kind {kind!r:.60} is known")
    return Message(
        body=unpack(Body.known[kind], body, frames[1:]),
        source=source,
        generation=generation,
        sequence=sequence,
        step=step,
        part=part,
        layer=layer,
        reply_to=reply_to,
    )


def _header(frames: Sequence[Any]) -> list[Any]:
    """Unpack the first frame and check every field's type: over TCP anybody may have sent it."""
    if not frames:
        raise ValueError("a message without frames")
    head = memoryview(frames[0])
    if head.nbytes > MAX_HEADER_BYTES:
        raise ValueError(f"a header of {head.nbytes} bytes is over the limit of {MAX_HEADER_BYTES}")
    try:
        header = msgpack.unpackb(head, strict_map_key=False)
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise ValueError(f"a header that is not msgpack ({error})") from None
    if not isinstance(header, list) or [type(value) for value in header] != _HEADER_TYPES:
        raise ValueError("a frame without a header of ours")
    return header
