"""What travels between slots: one frame format, and the protocol of whatever carries it.

A message is a msgpack header and raw array buffers; nothing is ever unpickled. The header names
(job, generation, step, logical shard, layer, sequence), so that a receiver can refuse another
generation and drop a duplicate (mailbox.py does both).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgpack
import numpy as np

SCHEDULER, INGRESS = -1, -2
MAX_HEADER_BYTES = 16 << 20
_DTYPES = {"float32", "float64", "int32", "int64", "uint8", "bool"}
# job, kind; source, generation, sequence, step, shard, layer, reply_to; body; arrays.
_HEADER_TYPES = [str, str, *[int] * 7, dict, list]


class Transport(Protocol):
    """Carries frames between slots, in order for one pair of slots, at most once or not at all."""

    address: str

    def connect(self, peers: dict[int, str]) -> None:
        """Open a way to every slot in `peers` (slot id to address); known ones are kept."""

    def send(self, slot: int, frames: Sequence[Any]) -> None:
        """Queue the frames for a slot without waiting for it."""

    def receive(self, timeout_s: float) -> list[Any] | None:
        """Return the next message's frames, or None when none came in time."""

    def close(self) -> None:
        """Release sockets and files."""


@dataclass(frozen=True, kw_only=True)
class Message:
    """One message between two slots.

    Args:
        kind: what it asks or tells; slot.py has the table.
        source: slot id of the sender, `SCHEDULER` for the scheduler.
        generation: generation of the plan that the sender follows.
        step, shard, layer: what it belongs to, -1 where that has no meaning.
        sequence: unique among the sender's messages.
        reply_to: sequence of the request it answers, 0 for none.
        body: small plain values.
        arrays: bulk, read-only views of the received buffers.
    """

    kind: str
    source: int
    generation: int
    sequence: int
    step: int = -1
    shard: int = -1
    layer: int = -1
    reply_to: int = 0
    body: dict[str, Any] = field(default_factory=dict)
    arrays: tuple[np.ndarray, ...] = ()


def encode(message: Message, job: str) -> list[Any]:
    """Turn a message into frames: a msgpack header, then one buffer per array."""
    arrays = [np.ascontiguousarray(array) for array in message.arrays]
    header = [
        job,
        message.kind,
        message.source,
        message.generation,
        message.sequence,
        message.step,
        message.shard,
        message.layer,
        message.reply_to,
        message.body,
        [(array.dtype.name, array.shape) for array in arrays],
    ]
    # An array without elements has no buffer to view; its frame is empty.
    buffers = [array.reshape(-1).view(np.uint8).data if array.size else b"" for array in arrays]
    return [msgpack.packb(header), *buffers]


def decode(frames: Sequence[Any], job: str) -> Message | None:
    """Rebuild a message; None when it is of another job.

    Raises:
        ValueError: the frames are not a message of ours.
    """
    header = _header(frames)
    if header[0] != job:
        return None
    kind, source, generation, sequence, step, shard, layer, reply_to, body, specs = header[1:]
    if len(specs) != len(frames) - 1:
        raise ValueError(f"{len(specs)} arrays announced, {len(frames) - 1} received")
    arrays = [_array(spec, frame) for spec, frame in zip(specs, frames[1:])]
    return Message(
        kind=kind,
        source=source,
        generation=generation,
        sequence=sequence,
        step=step,
        shard=shard,
        layer=layer,
        reply_to=reply_to,
        body=body,
        arrays=tuple(arrays),
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


def _array(spec: Any, frame: Any) -> np.ndarray:
    """View a frame as the array that the header announces."""
    if not isinstance(spec, list) or len(spec) != 2 or not isinstance(spec[1], list):
        raise ValueError(f"{spec!r} announces no array")
    dtype, shape = spec
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise ValueError(f"dtype {dtype!r} does not travel")
    if not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError(f"shape {shape!r} is none")
    return np.frombuffer(frame, dtype=dtype).reshape(shape)
