"""How the HTTP server reaches an engine: a protocol, and the client of an engine in this process.

Between the HTTP server and the engine. A remote engine slot implements the same protocol; `LocalClient` runs
an `Engine` in a thread of its own, which alone touches it, and hands its events to the event loop.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Protocol

from sparseray.actors.serving.engine import Engine, EngineStats
from sparseray.actors.serving.text_request import GenerationRequest, TokenEvent
from sparseray.errors import UserError
from sparseray.log import get_logger

logger = get_logger(__name__)


class GenerationClient(Protocol):
    """An engine, near or far. How many requests it gets is the HTTP side's to limit."""

    @property
    def reason(self) -> str:
        """Why no request can be computed now; empty if they can."""
        ...

    @property
    def failure(self) -> str:
        """Why none ever will be; empty while there is hope."""
        ...

    def version(self, request_id: str = "") -> str:
        """Name of the weights that gave a request's last token, or of those in force; empty where it is not known."""
        ...

    def generate(
        self, request: GenerationRequest, *, patience: int = 1
    ) -> AsyncGenerator[list[TokenEvent], None]:
        """Compute a request, event after event; the last has a finish_reason. Closing the iterator cancels.

        It may begin with the call, before anybody iterates: whoever called ends it by `cancel`.

        Args:
            request: what to compute.
            patience: between the first event and the last they may be kept until so many have come together.

        Raises (on the first event):
            UserError: the engine cannot compute this request.
        """
        ...

    async def cancel(self, request_id: str) -> None:
        """Stop computing a request; its iterator ends. Unknown ids are ignored."""
        ...


@dataclass
class _Stream:
    """Where the events of one request go."""

    loop: asyncio.AbstractEventLoop
    events: asyncio.Queue[TokenEvent | BaseException | None] = field(default_factory=asyncio.Queue)

    def put(self, event: TokenEvent | BaseException | None) -> None:
        """Hand over an event from the engine's thread."""
        try:
            self.loop.call_soon_threadsafe(self.events.put_nowait, event)
        except RuntimeError:  # the loop is closed: nobody listens any more
            logger.debug("an event came after the event loop had closed")


class LocalClient:
    """An engine in a thread of this process.

    Args:
        engine: which nobody else touches from now on.
        retry_delay_s: pause after a failed step.
    """

    def __init__(self, engine: Engine, *, retry_delay_s: float = 0.05) -> None:
        self._engine, self._retry_delay_s = engine, retry_delay_s
        self._wake = threading.Condition()
        self._commands: deque[GenerationRequest | str] = deque()
        self._streams: dict[str, _Stream] = {}
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="sparseray-engine", daemon=True)
        self._thread.start()

    @property
    def stats(self) -> EngineStats:
        """The engine's counters."""
        return self._engine.stats

    @property
    def reason(self) -> str:
        """Why the engine computes nothing; empty while its thread lives."""
        return self.failure

    @property
    def failure(self) -> str:
        """The same: its thread does not come back."""
        return "" if self._thread.is_alive() and not self._closing else "the engine has stopped"

    def version(self, request_id: str = "") -> str:
        """See `GenerationClient.version`."""
        return ""

    async def generate(
        self, request: GenerationRequest, *, patience: int = 1
    ) -> AsyncGenerator[list[TokenEvent], None]:
        """See `GenerationClient.generate`."""
        stream = _Stream(asyncio.get_running_loop())
        with self._wake:
            if self._closing or not self._thread.is_alive():
                raise RuntimeError("the engine has stopped")
            if request.request_id in self._streams:
                raise UserError(f"request id {request.request_id} is in use; choose another")
            self._streams[request.request_id] = stream
            self._commands.append(request)
            self._wake.notify()
        try:
            while True:
                event = await stream.events.get()
                if event is None:
                    return
                if isinstance(event, BaseException):
                    raise event
                yield [event]
                if event.finish_reason is not None:
                    return
        finally:
            self._forget(request.request_id)

    async def cancel(self, request_id: str) -> None:
        """See `GenerationClient.cancel`."""
        stream = self._streams.get(request_id)
        self._forget(request_id)
        if stream is not None:
            stream.put(None)

    def close(self) -> None:
        """Stop the thread; requests under way end without an event."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join(timeout=30)

    def __enter__(self) -> LocalClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _forget(self, request_id: str) -> None:
        with self._wake:
            if self._streams.pop(request_id, None) is not None:
                self._commands.append(request_id)
                self._wake.notify()

    def _run(self) -> None:
        while True:
            with self._wake:
                while not (self._commands or self._closing or self._engine.has_work):
                    self._wake.wait()
                if self._closing:
                    break
                commands = list(self._commands)
                self._commands.clear()
            for command in commands:
                self._obey(command)
            self._step()
        for stream in list(self._streams.values()):
            stream.put(RuntimeError("the engine was stopped"))

    def _obey(self, command: GenerationRequest | str) -> None:
        """Add a request, or cancel the one of an id."""
        if isinstance(command, str):
            self._engine.cancel(command)
            return
        try:
            self._engine.add(command)
        except Exception as error:
            self._deliver(command.request_id, error)

    def _step(self) -> None:
        try:
            events = self._engine.step() if self._engine.has_work else []
        except Exception:
            # The engine has put the step's requests back; whatever it was, they get another try.
            logger.exception("a step of the engine failed; its requests are computed again")
            with self._wake:
                self._wake.wait(self._retry_delay_s)
            return
        for event in events:
            self._deliver(event.request_id, event)

    def _deliver(self, request_id: str, event: TokenEvent | BaseException) -> None:
        stream = self._streams.get(request_id)
        if stream is not None:
            stream.put(event)
