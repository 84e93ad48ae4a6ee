"""Where servers of a platform read the weights that a training slot keeps aside for them, and how they read there.

A slot's copy of one committed step (actors/roles.py) is answered from a thread of its own, so neither the slot's mailbox
nor a step knows of it. What names the copies of all slots together is a source: a string that stands wherever a
checkpoint's folder may stand.
"""

import contextlib
import secrets
import threading
from collections.abc import Sequence
from pathlib import Path

import torch
import zmq

from sparseray.actors.wire.envelope import Message, decode, encode
from sparseray.actors.wire.messages import Pieces, TakeWeights
from sparseray.errors import OfferGoneError
from sparseray.log import get_logger

log = get_logger(__name__)

SCHEME = "live:"
POLL_MS, ANSWER_MS = 100, 10_000
NAMES_AT_ONCE = 64


class WeightsPort:
    """A slot's socket for what it offers; opened by the first offer.

    Args:
        directory: private folder for a Unix socket; None to use TCP.
        host: address to bind for TCP.
    """

    def __init__(self, directory: Path | None = None, host: str = "127.0.0.1") -> None:
        self._directory, self._host = directory, host
        # Whoever does not know it has not been told of the offer.
        self._key = secrets.token_hex(8)
        self._lock = threading.Lock()
        self._step, self._tensors = -1, dict[str, torch.Tensor]()
        self._thread: threading.Thread | None = None
        self._closing = threading.Event()

    def offer(self, step: int, tensors: dict[str, torch.Tensor]) -> str:
        """Answer with these tensors from now on, and with no others; returns where.

        Args:
            step: that they are of.
            tensors: by logical name; they must not change any more.
        """
        with self._lock:
            self._step, self._tensors = step, tensors
        if self._thread is None:
            socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.REP)
            socket.setsockopt(zmq.LINGER, 0)
            if self._directory is not None:
                socket.bind(f"ipc://{self._directory}/weights-{self._key}")
            else:
                socket.bind(f"tcp://{self._host}:*")
            address = bytes(socket.getsockopt(zmq.LAST_ENDPOINT)).decode().rstrip("\0")
            self._address = f"{self._key}@{address}"
            self._thread = threading.Thread(target=self._serve, args=(socket,), daemon=True, name="weights")
            self._thread.start()
        return self._address

    def withdraw(self) -> None:
        """Forget what is offered."""
        with self._lock:
            self._step, self._tensors = -1, {}

    def close(self) -> None:
        """Release the socket."""
        self.withdraw()
        self._closing.set()
        if self._thread is not None:
            self._thread.join()

    def _serve(self, socket: "zmq.Socket[bytes]") -> None:
        while not self._closing.is_set():
            if not socket.poll(POLL_MS):
                continue
            frames = socket.recv_multipart()
            found: dict[str, torch.Tensor] = {}
            try:
                message = decode(frames, self._key)
            except ValueError as error:
                log.warning("a request for weights was dropped: %s", error)
                message = None
            if message is not None and isinstance(message.body, TakeWeights):
                with self._lock:
                    if message.body.step == self._step:
                        found = {
                            name: self._tensors[name] for name in message.body.names if name in self._tensors
                        }
            socket.send_multipart(encode(_message(Pieces(tensors=found)), self._key), copy=False)
        socket.close()
        if self._directory is not None:
            with contextlib.suppress(OSError):
                (self._directory / f"weights-{self._key}").unlink()


def source_of(step: int, addresses: Sequence[str]) -> str:
    """What names the weights of a step.

    Args:
        step: that they are of.
        addresses: of the ports that have a part of them.
    """
    return f"{SCHEME}{step}:{','.join(sorted(addresses))}"


def is_offered(source: str) -> bool:
    """Whether a source is no folder but what a run offers."""
    return source.startswith(SCHEME)


def read_offered(source: str, names: Sequence[str]) -> dict[str, torch.Tensor]:
    """Read tensors where a run offers them.

    Args:
        source: from `source_of`.
        names: logical names.

    Raises:
        OfferGoneError: a slot is gone, or offers something else by now.
    """
    step, _, addresses = source.removeprefix(SCHEME).partition(":")
    left, found = list(names), dict[str, torch.Tensor]()
    with zmq.Context() as context:
        for address in addresses.split(","):
            for first in range(0, len(left), NAMES_AT_ONCE):
                found |= _ask(context, address, int(step), left[first : first + NAMES_AT_ONCE])
            left = [name for name in left if name not in found]
    if left:
        raise OfferGoneError(f"nobody offers {left[0]} of step {step} any more ({len(left)} tensors)")
    return found


def _ask(
    context: "zmq.Context[zmq.Socket[bytes]]", address: str, step: int, names: list[str]
) -> dict[str, torch.Tensor]:
    key, _, where = address.partition("@")
    with context.socket(zmq.REQ) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        socket.connect(where)
        socket.send_multipart(encode(_message(TakeWeights(step=step, names=tuple(names))), key))
        if not socket.poll(ANSWER_MS):
            raise OfferGoneError(f"the slot that offers a part of step {step} does not answer")
        message = decode([frame.buffer for frame in socket.recv_multipart(copy=False)], key)
    if message is None or not isinstance(message.body, Pieces):
        raise OfferGoneError(
            f"another slot has taken the place of the one that offered a part of step {step}"
        )
    return message.body.tensors


def _message(body: Pieces | TakeWeights) -> Message[Pieces | TakeWeights]:
    return Message(body=body, source=0, generation=0, sequence=0)
