"""What the scheduler sees of its slots: who is there, who is gone and why, and how to start or end one.

`Fleet` is the seam: ray_fleet.py plays it with Ray actors, tests with threads. `Control` is the
scheduler's mailbox over a fleet: every wait in it ends with a message, a loss, or a probe.
"""

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from sparseray.actors.wire.envelope import Body, Message
from sparseray.actors.wire.mailbox import Mailbox
from sparseray.actors.wire.messages import Failed, Ping, Pong, Silent
from sparseray.errors import SlotsLostError, UserError

POLL_S = 0.01


@dataclass(frozen=True, kw_only=True)
class Member:
    """A slot that is started and warm.

    Args:
        slot: slot id; never used twice in a job.
        address: of its inbox.
        node: of the cluster; replicas are kept on different ones where there are several.
        metrics: host and port of its `/metrics`, empty for none.
        pid: of its process.
        machine: kind of processor and libraries, empty where unknown.
        namespace: set of processes within which its process id means the same, and memory can be mapped.
    """

    slot: int
    address: str
    node: str = ""
    metrics: str = ""
    pid: int = 0
    machine: str = ""
    namespace: str = ""


@dataclass(frozen=True, kw_only=True)
class Loss:
    """A slot that is gone.

    Args:
        slot: which.
        cause: for people.
        noticed: when that was known, `time.monotonic`.
        silent_s: seconds between its last sign of life and that.
    """

    slot: int
    cause: str
    noticed: float
    silent_s: float = 0.0


class Fleet(Protocol):
    """The slots of one job."""

    def members(self) -> dict[int, Member]:
        """Slots that are warm and not known to be gone."""

    def starting(self) -> int:
        """Slots that were asked for and are not warm yet."""

    def waiting(self) -> int:
        """Slots among them for which there is no process yet."""

    def room(self) -> int:
        """How many more slots the cluster can give."""

    def draining(self) -> dict[int, float]:
        """Members on nodes that are to be drained, and seconds until these are gone; infinite where nobody says."""

    def losses(self) -> list[Loss]:
        """Losses since the last call."""

    def ages(self) -> dict[int, float]:
        """Seconds since each member's last sign of life."""

    def start(self, count: int) -> None:
        """Start slots in the background."""

    def withdraw(self, count: int) -> None:
        """Ask no longer for the latest of those that wait.

        Args:
            count: how many, at most.
        """

    def retire(self, slot: int) -> None:
        """End a slot that has no role any more; that is no loss."""

    def give_up(self, slot: int, cause: str) -> None:
        """Count a slot as lost and end its process, if it can be reached.

        Args:
            slot: its id.
            cause: for the run's events.
        """


class StalledError(RuntimeError):
    """No slot is gone and yet nothing moves: a message was lost on the way."""


class Control:
    """The scheduler's side of the conversation with its slots.

    Args:
        mailbox: the scheduler's.
        fleet: the slots.
        deadline_s: seconds without any message after which all slots are probed.
    """

    def __init__(self, mailbox: Mailbox, fleet: Fleet, deadline_s: float) -> None:
        self.mailbox, self.fleet, self.deadline_s = mailbox, fleet, deadline_s
        self.needed: set[int] = set()
        self.idle_losses: list[Loss] = []
        self._lost_since: int | None = None
        """The commit after which a slot last lost its device."""

    def post(self, slots: Iterable[int], body: Body, *, step: int) -> None:
        """Send the same message to several slots, those that are gone left out.

        Args:
            slots: slot ids.
            body: what to say.
            step: that it belongs to, -1 for none.
        """
        members = self.fleet.members()
        for slot in slots:
            if slot in members:
                self.mailbox.post(slot, body, step=step)

    def check(self) -> None:
        """Raise SlotsLostError when a needed slot is gone; a loss of others is kept for later."""
        losses = self.fleet.losses()
        needed = [loss for loss in losses if loss.slot in self.needed]
        self.idle_losses += [loss for loss in losses if loss.slot not in self.needed]
        if needed:
            raise SlotsLostError(needed)

    def messages(self, *kinds: type[Body], deadline_s: float | None = None) -> Iterator[Message[Any]]:
        """Yield messages of the given kinds, each within a deadline of the one before.

        Args:
            kinds: types of body.
            deadline_s: seconds between two of them; None for the usual.

        Raises:
            SlotsLostError: a needed slot is gone.
            StalledError: nobody is gone, and nothing came.
            UserError, RuntimeError: what a slot reports as its failure.
        """
        limit = self.deadline_s if deadline_s is None else deadline_s
        deadline = time.monotonic() + limit
        while True:
            message = self.mailbox.next(POLL_S)
            self.check()
            if message is None:
                if time.monotonic() > deadline:
                    self.probe(f"no {' or '.join(kind.kind for kind in kinds)} message for {limit:g} s")
                continue
            body = message.body
            if isinstance(body, Failed) and self._is_accident(body, message.step):
                self.fleet.give_up(message.source, f"its device failed ({body.error})")
                self.check()
                continue
            if isinstance(body, Failed):
                error = UserError if body.user else RuntimeError
                raise error(f"slot {message.source}: {body.error}")
            if isinstance(body, Silent):
                self.probe(body.error)
            if isinstance(body, kinds):
                deadline = time.monotonic() + limit
                yield message

    def _is_accident(self, failed: Failed, step: int) -> bool:
        """Whether a slot has lost its device, and that is not the second loss since the same commit: it would come again."""
        if not failed.lost or step == self._lost_since:
            return False
        self._lost_since = step
        return True

    def probe(self, why: str) -> None:
        """Ask every needed slot for a sign of life; give up those that give none.

        Raises:
            SlotsLostError: some give none.
            StalledError: all do.
        """
        waiting, deadline = set(self.needed), time.monotonic() + max(1.0, self.deadline_s / 3)
        self.post(sorted(waiting), Ping(), step=-1)
        while waiting and time.monotonic() < deadline:
            message = self.mailbox.next(POLL_S)
            self.check()
            if message is not None and isinstance(message.body, Pong):
                waiting.discard(message.source)
        for slot in sorted(waiting):
            self.fleet.give_up(slot, f"it did not answer a probe ({why})")
        self.check()
        raise StalledError(why)
