"""The ingress of a server: sends requests to engines, and goes on elsewhere where one is gone or silent.

It keeps what it already handed out of each request. When an engine is lost, is no engine any more, or says nothing
though it has work, the request goes to another one with these tokens as its beginning; the sampler is keyed by
position, so the text goes on as it would have. Which engines there are says the scheduler (`Routes`), who of them
answers is found out here (signs_of_life.py); a token never passes through the scheduler, nor through Ray.
"""

import asyncio
import threading
import time
from collections import Counter
from collections.abc import AsyncGenerator, Iterable
from dataclasses import dataclass, field, replace

from sparseray.actors.serving.messages import Cancel, Generate, Moved, Routes, Tokens
from sparseray.actors.serving.text_request import GenerationRequest, TokenEvent
from sparseray.actors.wire.envelope import INGRESS, Body, Transport
from sparseray.actors.wire.mailbox import Mailbox
from sparseray.actors.wire.messages import Ping
from sparseray.errors import SlotLostError
from sparseray.jobs.http.signs_of_life import SignsOfLife
from sparseray.log import get_logger

log = get_logger(__name__)

LOOK_S = 0.05


@dataclass(kw_only=True, eq=False)
class _Open:
    """A request that is being answered: which engine has it (None while there is none), and its tokens so far.

    `due` and `wake` belong to the event loop.
    """

    request: GenerationRequest
    loop: asyncio.AbstractEventLoop
    since_s: float
    patience: int
    due: list[TokenEvent | SlotLostError] = field(default_factory=list)
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    has_begun: bool = False
    slot: int | None = None
    tokens: list[int] = field(default_factory=list)
    version: str = ""
    was_set_aside: bool = False

    def remaining(self) -> GenerationRequest:
        """The request as another engine must get it: who reads its text already goes before those who wait for a first word."""
        if not self.tokens:
            return self.request
        done, priority = (*self.request.resume_tokens, *self.tokens), self.request.priority - 1
        return replace(self.request, resume_tokens=done, prompt_logprobs=None, priority=priority)

    def put(self, found: TokenEvent | SlotLostError) -> None:
        """Keep what has come; the first event, the last and an error wake who waits, the others do together."""
        self.due.append(found)
        is_plain = isinstance(found, TokenEvent) and found.finish_reason is None and self.has_begun
        if not is_plain or len(self.due) >= self.patience:
            self.has_begun = True
            self.wake.set()

    def fail(self, error: SlotLostError) -> None:
        """Hand an error to who waits for tokens, in another thread."""
        self.loop.call_soon_threadsafe(self.put, error)


def _give(due: list[tuple[_Open, TokenEvent]]) -> None:
    """Hand events to those who wait for them."""
    for found, event in due:
        found.put(event)


class Ingress:
    """`GenerationClient` of the HTTP server, played by the engines of a plan.

    Args:
        job: identifier of the job.
        inbox, outbox: transports of its own; the inbox' address is what slots and scheduler are told.
        deadline_s: seconds without any progress after which a request is given up.
        places: requests that an engine computes at once; what it has beyond waits.
        number: its slot id; that of one of several is given by the scheduler (`join`).
    """

    def __init__(
        self,
        job: str,
        inbox: Transport,
        outbox: Transport,
        deadline_s: float,
        *,
        places: int,
        number: int = INGRESS,
    ) -> None:
        # ZeroMQ sockets belong to one thread at a time: one mailbox receives in a thread, the other sends under a lock.
        self._inbox, self._outbox = Mailbox(inbox, number, job), Mailbox(outbox, number, job)
        self._deadline_s, self._places = deadline_s, places
        self._lock = threading.RLock()
        self._open: dict[str, _Open] = {}
        self._load: Counter[int] = Counter()
        self._routes = Routes(generation=0, engines={}, reason="no engine has started yet")
        self._engines: set[int] = set()
        self._life = SignsOfLife()
        self._worked_s: dict[int, float] = {}
        self._running = True
        self.failure = ""
        self._thread = threading.Thread(target=self._receive, daemon=True, name="ingress")
        self._thread.start()

    @property
    def address(self) -> str:
        """Of the inbox."""
        return self._inbox.transport.address

    @property
    def reason(self) -> str:
        """Why no engine answers, empty if one does."""
        if self.failure:
            return self.failure
        if not self._engines:
            return self._routes.reason or "no engine is left"
        silent = self._engines & self._life.silent
        return f"no answer from the engines in slots {sorted(silent)}" if silent == self._engines else ""

    @property
    def draining(self) -> tuple[int, ...]:
        """Engines that finish what they have and get no new request."""
        return self._routes.draining

    def version(self, request_id: str = "") -> str:
        """See `GenerationClient.version`."""
        found = self._open.get(request_id)
        return found.version if found is not None else next(reversed(self._routes.versions.values()), "")

    def fail(self, why: str) -> None:
        """Take note that the job is over: nobody will answer any more."""
        with self._lock:
            self.failure, self._engines = why, set()
            for found in self._open.values():
                found.fail(SlotLostError(why))

    # -- what comes in -------------------------------------------------------------------------------

    def _receive(self) -> None:
        looked_s = 0.0
        while self._running:
            message = self._inbox.next(LOOK_S)
            now = time.monotonic()
            with self._lock:
                if message is not None:
                    self._life.heard(message.source, now)
                    self._take(message.source, message.body, now)
                if now - looked_s > LOOK_S:
                    looked_s = now
                    self._look(now)

    def _take(self, source: int, body: Body, now: float) -> None:
        if isinstance(body, Tokens):
            self._worked_s[source] = now
            version = self._routes.versions.get(body.version, "")
            due = [(o, e) for e in body.events() if (o := self._taker(source, e, version, now)) is not None]
            for loop in {found.loop for found, _ in due}:
                # An event loop is woken once for all of a step's tokens.
                loop.call_soon_threadsafe(_give, [found for found in due if found[0].loop is loop])
        elif isinstance(body, Moved):
            # Until the scheduler says otherwise, it is no engine.
            if not body.stays:
                self._engines.discard(source)
            self._move([o for i in body.request_ids if (o := self._open.get(i)) and o.slot == source])
        elif isinstance(body, Routes) and body.generation >= self._routes.generation:
            # They come again and again, so that one that is lost, or that a late `Moved` contradicts, does no harm.
            self._routes, self._engines = body, set(body.engines)
            self._outbox.transport.connect(body.engines)
            self._ping(now)
            self._move([o for o in self._open.values() if o.slot not in self._engines])

    def _taker(self, source: int, event: TokenEvent, version: str, now: float) -> _Open | None:
        """Who waits for an event; nobody if it comes again, or from an engine that has no part in the request."""
        found = self._open.get(event.request_id)
        if found is None or found.slot != source:
            return None
        if event.index != len(found.request.resume_tokens) + len(found.tokens):
            return None
        if event.token_id is not None:
            found.tokens.append(event.token_id)
            found.version = version or found.version
        found.since_s = now
        return found

    # -- who is silent -------------------------------------------------------------------------------

    def _ping(self, now: float) -> None:
        for slot in self._life.look(sorted(self._engines), now):
            self._outbox.post(slot, Ping(address=self.address))

    def _look(self, now: float) -> None:
        """Move what silent engines have to those that answer, and give up what nobody goes on with."""
        self._ping(now)
        # The kernel says at once that a process has ended; the scheduler's next plan takes longer.
        self._life.silent |= set(self._outbox.transport.gone(sorted(self._engines)))
        silent = self._engines & self._life.silent
        if silent and silent != self._engines:
            self._move([o for o in self._open.values() if o.slot in silent])
        self._level()
        for found in list(self._open.values()):
            worked_s = 0.0 if found.slot is None else self._worked_s.get(found.slot, 0.0)
            # A request that waits for a place in a batch that moves is not lost.
            if now - max(found.since_s, worked_s) > self._deadline_s:
                self._set_aside(found, now)

    def _set_aside(self, found: _Open, now: float) -> None:
        """Try another engine, once; then the request is lost."""
        if found.slot is not None and len(self._targets() - {found.slot}) and not found.was_set_aside:
            found.was_set_aside, found.since_s = True, now
            self._move([found], without=found.slot)
            return
        why = self.reason or f"slot {found.slot} made no progress for {self._deadline_s:g} s"
        found.since_s = now
        found.fail(SlotLostError(why))

    # -- what goes out -------------------------------------------------------------------------------

    def _targets(self) -> set[int]:
        """Engines that requests go to: those that answer and stay, or else whoever there is."""
        answering = self._engines - self._life.silent
        return answering - set(self._routes.draining) or answering or self._engines

    def _level(self) -> None:
        """Move what waits at an engine to one that has a place or a shorter queue: one that is new, above all."""
        targets = self._targets()
        # The latest are the last in their queue.
        for found in reversed(self._open.values() if targets else ()):
            if found.slot is not None and not found.tokens:
                emptiest = min(self._load[slot] for slot in targets)
                if self._load[found.slot] > max(self._places, emptiest + 1):
                    self._move([found])

    def _move(self, requests: Iterable[_Open], *, without: int | None = None) -> None:
        """Give requests to the engines with the fewest; to none while there is none.

        Args:
            requests: to place.
            without: an engine that shall not have them.
        """
        for found in requests:
            before = found.slot
            self._place(found, None)
            targets = sorted(self._targets() - {without})
            slot = min(targets, key=lambda s: self._load[s], default=None)
            if before in self._engines and before is not None and before != slot:
                self._outbox.post(before, Cancel(request_id=found.request.request_id))
            self._place(found, slot)
            if slot is not None:
                self._outbox.post(slot, Generate(request=found.remaining()))
            if before is not None:
                name, done = found.request.request_id, len(found.tokens)
                log.info("request %s goes on at slot %s after %d tokens", name, slot, done)

    def _place(self, found: _Open, slot: int | None) -> None:
        """Note which engine has a request, and how many each has."""
        if found.slot is not None:
            self._load[found.slot] -= 1
        if slot is not None:
            self._load[slot] += 1
        found.slot = slot

    def generate(
        self, request: GenerationRequest, *, patience: int = 1
    ) -> AsyncGenerator[list[TokenEvent], None]:
        """Send a request to an engine and yield its tokens as they come; closing the generator cancels it.

        Args:
            request, patience: as of `GenerationClient`.

        Raises:
            SlotLostError: no engine answers.
        """
        loop = asyncio.get_running_loop()
        found = _Open(request=request, loop=loop, since_s=time.monotonic(), patience=patience)
        with self._lock:
            self._open[request.request_id] = found
            self._move([found])
        return self._runs(found)

    async def _runs(self, found: _Open) -> AsyncGenerator[list[TokenEvent], None]:
        """The events of a request that was sent."""
        is_ended = False
        try:
            while not is_ended:
                await found.wake.wait()
                found.wake.clear()
                due, found.due = found.due, []
                events = [event for event in due if isinstance(event, TokenEvent)]
                is_ended = any(event.finish_reason not in (None, "error") for event in events)
                if events:
                    yield events
                for error in due:
                    if isinstance(error, SlotLostError) and not is_ended:
                        raise error
        finally:
            self._forget(found, is_ended=is_ended)

    async def cancel(self, request_id: str) -> None:
        """End a request at its engine; unknown ones are ignored."""
        if found := self._open.get(request_id):
            self._forget(found, is_ended=False)

    def _forget(self, found: _Open, *, is_ended: bool) -> None:
        """Wait for no more of a request, and free its place."""
        with self._lock:
            self._open.pop(found.request.request_id, None)
            if not is_ended and found.slot in self._engines and found.slot is not None:
                self._outbox.post(found.slot, Cancel(request_id=found.request.request_id))
            self._place(found, None)

    def close(self) -> None:
        """Stop receiving and release the sockets."""
        self._running = False
        self._thread.join(2.0)
        self._inbox.transport.close()
        self._outbox.transport.close()
