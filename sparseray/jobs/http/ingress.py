"""The ingress of a server: sends requests to engines, and goes on elsewhere where one is gone.

It keeps what it already handed out of each request. When an engine is lost, or is no engine any more, the request
goes to another one with these tokens as its beginning; the sampler is keyed by position, so the text goes on as it
would have. Which engines there are says the scheduler (`Routes`); a token never passes through it, nor through Ray.
"""

import asyncio
import threading
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field, replace

from sparseray.actors.serving.messages import Cancel, Generate, Moved, Routes, Tokens
from sparseray.actors.serving.text_request import GenerationRequest, TokenEvent
from sparseray.actors.wire.envelope import INGRESS, Body, Transport
from sparseray.actors.wire.mailbox import Mailbox
from sparseray.errors import SlotLostError
from sparseray.log import get_logger

log = get_logger(__name__)


@dataclass(kw_only=True)
class _Open:
    """A request that is being answered: which engine has it (None while there is none), and its tokens so far."""

    request: GenerationRequest
    loop: asyncio.AbstractEventLoop
    events: "asyncio.Queue[TokenEvent]" = field(default_factory=asyncio.Queue)
    slot: int | None = None
    tokens: list[int] = field(default_factory=list)
    moves: int = 0

    def remaining(self) -> GenerationRequest:
        """The request as another engine must get it."""
        if not self.tokens:
            return self.request
        done = (*self.request.resume_tokens, *self.tokens)
        return replace(self.request, resume_tokens=done, prompt_logprobs=None)


class Ingress:
    """`GenerationClient` of the HTTP server, played by the engines of a plan.

    Args:
        job: identifier of the job.
        inbox, outbox: transports of its own; the inbox' address is what slots and scheduler are told.
        deadline_s: seconds without any word after which a request is given up.
    """

    def __init__(self, job: str, inbox: Transport, outbox: Transport, deadline_s: float) -> None:
        # ZeroMQ sockets belong to one thread at a time: one mailbox receives in a thread, the other sends under a lock.
        self._inbox, self._outbox = Mailbox(inbox, INGRESS, job), Mailbox(outbox, INGRESS, job)
        self._deadline_s = deadline_s
        self._lock = threading.RLock()
        self._open: dict[str, _Open] = {}
        self._routes = Routes(generation=0, engines={}, reason="no engine has started yet")
        self._engines: set[int] = set()
        self._heard_s: dict[int, float] = {}
        self._failure = ""
        self._running = True
        self._thread = threading.Thread(target=self._receive, daemon=True, name="ingress")
        self._thread.start()

    @property
    def address(self) -> str:
        """Of the inbox."""
        return self._inbox.transport.address

    @property
    def reason(self) -> str:
        """Why no engine answers, empty if one does."""
        if self._failure:
            return self._failure
        return "" if self._engines else self._routes.reason or "no engine is left"

    def fail(self, why: str) -> None:
        """Take note that the job is over: nobody will answer any more."""
        with self._lock:
            self._failure = why
            self._engines = set()

    # -- what comes in -------------------------------------------------------------------------------

    def _receive(self) -> None:
        while self._running:
            message = self._inbox.next(0.2)
            if message is not None:
                with self._lock:
                    self._heard_s[message.source] = time.monotonic()
                    self._take(message.source, message.body)

    def _take(self, source: int, body: Body) -> None:
        if isinstance(body, Tokens):
            for event in body.events:
                self._hand_on(source, event)
        elif isinstance(body, Moved):
            # Until the scheduler says otherwise, it is no engine.
            self._engines.discard(source)
            self._move([o for i in body.request_ids if (o := self._open.get(i)) and o.slot == source])
        elif isinstance(body, Routes) and body.generation >= self._routes.generation:
            # They come again and again, so that one that is lost, or that a late `Moved` contradicts, does no harm.
            self._routes, self._engines = body, set(body.engines)
            self._outbox.transport.connect(body.engines)
            self._move([o for o in self._open.values() if o.slot not in self._engines])

    def _hand_on(self, source: int, event: TokenEvent) -> None:
        """Give an event to who waits for it, unless it comes again or from an engine that has no part in it."""
        found = self._open.get(event.request_id)
        if found is None or found.slot != source:
            return
        if event.index != len(found.request.resume_tokens) + len(found.tokens):
            return
        if event.token_id is not None:
            found.tokens.append(event.token_id)
        found.loop.call_soon_threadsafe(found.events.put_nowait, event)

    # -- what goes out -------------------------------------------------------------------------------

    def _move(self, requests: list[_Open]) -> None:
        """Give requests to the engines with the fewest; to none while there is none."""
        for found in requests:
            load = dict.fromkeys(self._engines, 0)
            for other in self._open.values():
                if other.slot in load and other is not found:
                    load[other.slot] += 1
            before, found.slot = found.slot, min(load, key=lambda s: (load[s], s), default=None)
            if found.slot is not None:
                self._outbox.post(found.slot, Generate(request=found.remaining()))
            if before is not None:
                found.moves += 1
                log.info(
                    "request %s goes on at slot %s after %d tokens",
                    found.request.request_id,
                    found.slot,
                    len(found.tokens),
                )

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenEvent, None]:
        """Yield a request's tokens as they come; closing the generator cancels it.

        Raises:
            SlotLostError: no engine answers.
        """
        found = _Open(request=request, loop=asyncio.get_running_loop())
        with self._lock:
            self._open[request.request_id] = found
            self._move([found])
        is_ended = False
        try:
            while not is_ended:
                event = await self._next_event(found)
                is_ended = event.finish_reason not in (None, "error")
                yield event
        finally:
            with self._lock:
                self._open.pop(request.request_id, None)
                if not is_ended:
                    self._cancel(found)

    async def _next_event(self, found: _Open) -> TokenEvent:
        while True:
            try:
                return await asyncio.wait_for(found.events.get(), self._deadline_s)
            except TimeoutError:
                with self._lock:
                    heard_s = self._heard_s.get(found.slot, 0.0) if found.slot is not None else 0.0
                    # A request that waits for a place in a batch that moves is not lost.
                    if found.slot in self._engines and time.monotonic() - heard_s < self._deadline_s:
                        continue
                    why = self.reason or f"slot {found.slot} sent nothing for {self._deadline_s:g} s"
                raise SlotLostError(why) from None

    async def cancel(self, request_id: str) -> None:
        """End a request at its engine; unknown ones are ignored."""
        with self._lock:
            if found := self._open.get(request_id):
                self._cancel(found)

    def _cancel(self, found: _Open) -> None:
        if found.slot in self._engines and found.slot is not None:
            self._outbox.post(found.slot, Cancel(request_id=found.request.request_id))

    def close(self) -> None:
        """Stop receiving and release the sockets."""
        self._running = False
        self._thread.join(2.0)
        self._inbox.transport.close()
        self._outbox.transport.close()
