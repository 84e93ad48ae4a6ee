"""Weights of committed steps that a job's slots keep aside in their memory: a training run for servers that follow it, and
such a server for a run that has lost its own.

Servers ask from threads of their own; the run's thread looks between two steps whether somebody waits (trainer.py). Every
slot copies what is primary there as part of one open step, so all pieces are of the commit before it; while a server
reads them nothing else is offered. An offer that a change of plan cuts off is made again at a later step.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from sparseray.actors.state.assignment import Plan
from sparseray.actors.wire.messages import Offer, Offered, Withdraw
from sparseray.platform.fleet.control import Control
from sparseray.platform.fleet.weights_port import source_of

OFFER_S = 20.0
HELD_S = 60.0
"""A server that has not asked for so long is gone."""
AGAIN_S = 5.0
"""Seconds after which an offer that is not complete is made again."""
LOOK_S = 0.05


@dataclass(frozen=True, kw_only=True)
class Weights:
    """What is offered.

    Args:
        step: that all of it is of.
        source: where it is read.
        run: of the job that made it.
    """

    step: int
    source: str
    run: str


class Offers:
    """What one run offers.

    Args:
        run: identifier of its job.
    """

    def __init__(self, run: str) -> None:
        self.run, self.newest = run, -1
        """The last step that could be offered."""
        self._lock = threading.Lock()
        self._ready: Weights | None = None
        self._wanted: dict[str, int] = {}
        self._held: dict[str, float] = {}
        self._waiting: set[int] = set()
        self._addresses: list[str] = []
        self._begun: tuple[int, float] | None = None

    # -- servers' threads --------------------------------------------------------------------------

    def ask(self, who: str, least: int) -> Weights | None:
        """The weights of a step that is late enough, kept for the asker until `release`; None while there are none.

        Args:
            who: identifier of the asker, who asks again.
            least: step that they must be of, or of a later one.
        """
        with self._lock:
            if self._ready is not None and self._ready.step >= least:
                self._wanted.pop(who, None)
                self._held[who] = time.monotonic()
                return self._ready
            self._wanted[who] = least
            return None

    def wait(self, who: str, least: int, limit_s: float, is_over: Callable[[], bool]) -> Weights | None:
        """As `ask`, waiting for them; None where they do not come.

        Args:
            who, least: as in `ask`.
            limit_s: seconds to wait.
            is_over: asked meanwhile whether to give up.
        """
        deadline = time.monotonic() + limit_s
        while (found := self.ask(who, least)) is None and time.monotonic() < deadline and not is_over():
            time.sleep(LOOK_S)
        if found is None:
            self.release(who)
        return found

    def keep(self, who: str) -> None:
        """Say that what is kept for an asker is still needed."""
        with self._lock:
            if who in self._held:
                self._held[who] = time.monotonic()

    def release(self, who: str) -> None:
        """Want and read nothing any more."""
        with self._lock:
            self._held.pop(who, None)
            self._wanted.pop(who, None)

    # -- the run's thread --------------------------------------------------------------------------

    def look(self, step: int, plan: Plan, control: Control) -> None:
        """Begin an offer where one is wanted, and end what nobody reads; between two steps.

        Args:
            step: the last committed one.
            plan: in force.
            control: of the slots.
        """
        now, self.newest = time.monotonic(), step
        with self._lock:
            self._held = {who: at for who, at in self._held.items() if now - at < HELD_S}
            is_idle = self._ready is not None and not self._held
            is_wanted = not self._held and any(step >= least for least in self._wanted.values())
            if is_idle:
                self._ready = None
            is_late = self._begun is not None and now - self._begun[1] > AGAIN_S
            begins = is_wanted and (self._begun is None or is_late)
            if begins:
                self._waiting = {plan.dense[0], *plan.expert_primaries, *plan.memory_primaries}
                self._addresses, self._begun = [], (step, now)
            slots = sorted(self._waiting)
        if begins:
            # As a part of the open step, so that a slot that has not applied the last commit yet keeps it back.
            control.post(slots, Offer(), step=step + 1)
        elif is_idle:
            control.post(sorted(plan.addresses), Withdraw(), step=step + 1)

    def hear(self, slot: int, body: Offered) -> None:
        """Take note that a slot has copied its part.

        Args:
            slot: which.
            body: what it says.
        """
        with self._lock:
            if self._begun is None or body.step != self._begun[0]:
                return
            if slot in self._waiting:
                self._waiting.discard(slot)
                self._addresses.append(body.address)
            if not self._waiting:
                step, self._begun = self._begun[0], None
                source = source_of(step, self._addresses)
                self._ready = Weights(step=step, source=source, run=self.run)
                for who in [who for who, least in self._wanted.items() if step >= least]:
                    del self._wanted[who]
                    self._held[who] = time.monotonic()

    def forget(self) -> None:
        """Take note that slots may be gone: what was offered may not be whole any more."""
        with self._lock:
            self._ready = self._begun = None
            self._waiting = set()
