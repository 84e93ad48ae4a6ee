"""The mailbox of a slot, whose control thread reads for its work thread.

The control thread answers pings at once and hands everything else over; a plan of a later generation goes before all
that waits, and ends what the work thread is in. The work thread may send too: a transport takes frames from several
threads. A slot that computes for minutes gives its signs of life, and one that waits hears of the plan at once.
"""

import queue
import time
from collections.abc import Callable

from sparseray.actors.wire.envelope import Body, Message, Transport
from sparseray.actors.wire.mailbox import Mailbox
from sparseray.actors.wire.messages import Ping, Pong
from sparseray.errors import SlotLostError, SupersededError

POLL_S = 0.1
WATCH_S = 0.02


class SlotMailbox(Mailbox):
    """A mailbox between two threads: `read` runs in the control thread, the rest belongs to the work thread.

    Args:
        transport, slot, job: as in `Mailbox`.
    """

    def __init__(self, transport: Transport, slot: int, job: str) -> None:
        super().__init__(transport, slot, job)
        # Not a SimpleQueue: in CPython 3.11 its `get` waits for ever where it is interrupted for longer than its timeout.
        self._handed: queue.Queue[Message[Body] | None] = queue.Queue()
        self._plan: Message[Body] | None = None
        self._failure: BaseException | None = None
        self._is_open, self.is_stopped = True, False
        self._abort: Callable[[], None] = lambda: None

    # -- the control thread ------------------------------------------------------------------------

    def read(self, abort: Callable[[], None]) -> None:
        """Hand over what comes until `close`; a failure is raised in the work thread.

        Args:
            abort: ends what the work thread computes, at its next operation.
        """
        self._abort = abort
        try:
            while self._is_open:
                message = super().next(POLL_S)
                if message is not None:
                    self._deliver(message)
        except BaseException as error:
            self._failure = error
            abort()
            self._handed.put(None)

    def _deliver(self, message: Message[Body]) -> None:
        """Sort one message."""
        if isinstance(message.body, Ping):
            # A sign of life is of no generation: the scheduler may have entered one whose plan waits here.
            if message.source < 0:
                if message.body.address:
                    self.transport.reach(message.source, message.body.address)
                self.post(message.source, Pong(), reply_to=message.sequence, generation=message.generation)
        elif message.body.opens_generation and message.generation > self.generation:
            with self._lock:
                if self._plan is None or message.generation >= self._plan.generation:
                    self._plan = message
            self._abort()
            self._handed.put(None)
        else:
            self._handed.put(message)

    def stop(self) -> None:
        """End `read`, and what the work thread is in, as a later plan would; called from any thread."""
        self._failure = SupersededError()
        self.is_stopped = True
        self._is_open = False
        self._abort()
        self._handed.put(None)

    # -- the work thread ---------------------------------------------------------------------------

    @property
    def is_superseded(self) -> bool:
        """Whether a plan of a later generation waits, or the control thread has ended."""
        plan = self._plan
        return self._failure is not None or (plan is not None and plan.generation > self.generation)

    def next(self, timeout_s: float) -> Message[Body] | None:
        """Return the plan that waits, or else the next message, or None when none came in time."""
        deadline = time.monotonic() + timeout_s
        while True:
            if self._failure is not None:
                raise self._failure
            with self._lock:
                plan, self._plan = self._plan, None
            if plan is not None:
                return plan
            left = deadline - time.monotonic()
            message = self._pop(left)
            if message is not None or left <= 0:
                return message

    def _pop(self, timeout_s: float) -> Message[Body] | None:
        """Take one message; None after the time, when the control thread wakes us, or for one of an old generation."""
        try:
            message = self._handed.get(timeout_s > 0, max(0.0, timeout_s))
        except queue.Empty:
            return None
        is_due = message is not None and (
            message.generation == self.generation or message.body.is_of_any_generation
        )
        return message if is_due else None

    def wait(
        self,
        sequences: dict[int, int],
        deadline_s: float,
        serve: Callable[[Message[Body]], None],
        *,
        watch: bool = False,
        only_first: bool = False,
    ) -> dict[int, Message[Body]]:
        """Wait for the replies to `sequences` and serve everything else meanwhile.

        Args:
            sequences: sequence of a request to the slot that was asked.
            deadline_s: seconds without any reply after which the silent slots count as lost.
            serve: handles messages that are not among the awaited replies.
            watch: do not wait for slots whose process has ended.
            only_first: wait for any of them; the others are to be waited for next, before anything else.

        Returns:
            sequence to reply.

        Raises:
            SlotLostError: a slot did not answer in time.
            SupersededError: a plan of a later generation came; `next` gives it.
        """
        replies: dict[int, Message[Body]] = {}
        deadline = time.monotonic() + deadline_s
        while len(replies) < (1 if only_first else len(sequences)):
            if self.is_superseded:
                raise SupersededError
            left = deadline - time.monotonic()
            message = self._pop(min(left, WATCH_S) if watch else left)
            if message is not None and message.reply_to in sequences:
                replies[message.reply_to] = message
                deadline = time.monotonic() + deadline_s
            elif message is not None:
                serve(message)
            else:
                silent = sorted({slot for seq, slot in sequences.items() if seq not in replies})
                if watch and (gone := self.transport.gone(silent)):
                    raise SlotLostError(f"slot {self.slot} sees the end of slots {gone}", gone)
                if left <= 0:
                    text = f"slot {self.slot} got no answer from slots {silent} within {deadline_s:.3g} s"
                    raise SlotLostError(text, silent)
        return replies

    def serve_until(
        self,
        is_done: Callable[[], bool],
        deadline_s: float,
        serve: Callable[[Message[Body]], None],
        *,
        poll_s: float,
    ) -> bool:
        """Serve what comes until something has happened that no message tells of; False where it does not.

        Args:
            is_done: whether it has.
            deadline_s: seconds to wait for it.
            serve: handles messages.
            poll_s: seconds between two looks; 0 looks all the time.

        Raises:
            SupersededError: a plan of a later generation came; `next` gives it.
        """
        deadline = time.monotonic() + deadline_s
        while not is_done():
            if self.is_superseded:
                raise SupersededError
            message = self._pop(poll_s)
            if message is not None:
                serve(message)
            elif time.monotonic() > deadline:
                return False
        return True

    def close(self) -> None:
        """Let `read` end."""
        self._is_open = False
