"""Fencing and duplicates, over any transport: what comes of another generation, or again, is nobody's to see.

Scheduler, ingress and every slot own a mailbox; a slot's has two threads (slot_mailbox.py).
"""

import itertools
import threading
import time
from collections import deque

from sparseray.actors.wire.envelope import Body, Message, Transport, decode, encode
from sparseray.log import get_logger

log = get_logger(__name__)

_REMEMBERED = 4096
_HELD = 65536


class Mailbox:
    """The one door through which a slot's messages come and go.

    Args:
        transport: what carries the frames.
        slot: own slot id.
        job: identifier of the job; frames of other jobs are dropped.
    """

    def __init__(self, transport: Transport, slot: int, job: str) -> None:
        self.transport = transport
        self.slot = slot
        self.job = job
        self.generation = 0
        self.dropped = {"generation": 0, "duplicate": 0, "malformed": 0}
        self._sequence = itertools.count(1)
        self._lock = threading.RLock()
        self._seen: dict[int, set[int]] = {}
        self._early: deque[Message[Body]] = deque(maxlen=_HELD)
        self._due: deque[Message[Body]] = deque()

    def adopt(self, generation: int) -> None:
        """Enter a generation: older messages are refused from now on, and those that came early are due."""
        with self._lock:
            if generation != self.generation:
                self.generation = generation
                self._adopt()

    def _adopt(self) -> None:
        self._seen.clear()
        self._due.clear()
        early, self._early = self._early, deque(maxlen=_HELD)
        for message in early:
            if self._accept(message):
                self._deliver(message)

    def _deliver(self, message: Message[Body]) -> None:
        self._due.append(message)

    def post(
        self,
        to: int,
        body: Body,
        *,
        step: int = -1,
        part: int = -1,
        layer: int = -1,
        reply_to: int = 0,
        generation: int | None = None,
    ) -> int:
        """Send one message and return its sequence number.

        Args:
            to: slot id of the receiver.
            body: what to say; its tensors must not change afterwards, they leave without a copy.
            step, part, layer, reply_to: of the envelope.
            generation: of the envelope; None for the one that was entered.

        Raises:
            ValueError: it cannot travel.
        """
        sequence = next(self._sequence)
        message = Message(
            body=body,
            source=self.slot,
            generation=self.generation if generation is None else generation,
            sequence=sequence,
            step=step,
            part=part,
            layer=layer,
            reply_to=reply_to,
        )
        self.transport.send(to, encode(message, self.job))
        return sequence

    def next(self, timeout_s: float) -> Message[Body] | None:
        """Return the next acceptable message, or None when none came within `timeout_s` seconds."""
        if self._due:
            return self._due.popleft()
        deadline = time.monotonic() + timeout_s
        while True:
            frames = self.transport.receive(max(0.0, deadline - time.monotonic()))
            if frames is None:
                return None
            try:
                message = decode(frames, self.job)
            except ValueError as error:
                self.dropped["malformed"] += 1
                log.warning("slot %d dropped a frame: %s", self.slot, error)
                continue
            with self._lock:
                is_ours = message is not None and self._accept(message)
            if is_ours:
                return message

    def _accept(self, message: Message[Body]) -> bool:
        if message.body.is_of_any_generation:
            return True
        if message.generation > self.generation:
            # A plan opens a generation; a peer that has adopted it already may be faster than our plan.
            if message.body.opens_generation:
                return True
            self._early.append(message)
            return False
        if message.generation < self.generation:
            self.dropped["generation"] += 1
            return False
        seen = self._seen.setdefault(message.source, set())
        if message.sequence in seen:
            self.dropped["duplicate"] += 1
            return False
        seen.add(message.sequence)
        if len(seen) > 2 * _REMEMBERED:
            horizon = max(seen) - _REMEMBERED
            self._seen[message.source] = {sequence for sequence in seen if sequence > horizon}
        return True
