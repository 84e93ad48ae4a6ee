"""Between a request and its connection: a body within limits, work while somebody listens, server-sent events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from sparseray.jobs.http.api_error import ApiError, OverloadedError
from sparseray.jobs.http.limits import ApiLimits
from sparseray.log import get_logger

logger = get_logger(__name__)
Result = TypeVar("Result")


class EventStream(StreamingResponse):
    """Server-sent events that free their source whatever happens to the connection."""

    media_type = "text/event-stream"

    def __init__(
        self,
        first: bytes,
        rest: AsyncGenerator[bytes, None],
        *,
        send_timeout_s: float,
        release: Callable[[], None],
    ) -> None:
        async def events() -> AsyncGenerator[bytes, None]:
            yield first
            async for event in rest:
                yield event

        super().__init__(events(), headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._rest, self._send_timeout_s, self._release = rest, send_timeout_s, release

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events; a client that stops reading is dropped after a while."""

        async def timed_send(message: Message) -> None:
            async with asyncio.timeout(self._send_timeout_s):
                await send(message)

        try:
            await super().__call__(scope, receive, timed_send)
        except (TimeoutError, OSError, ClientDisconnect) as error:
            logger.info("a streaming client is gone: %r", error)
        finally:
            await self._rest.aclose()
            self._release()


class BodyReader:
    """Reads bodies, and knows how much of all of them is held.

    Args:
        limits: of one body, and of all.
    """

    def __init__(self, limits: ApiLimits) -> None:
        self._limits, self._held = limits, 0

    async def read(self, request: Request) -> bytes:
        """Return a body.

        Raises:
            ApiError: 413, longer than the limit; 408, not there in time.
            OverloadedError: too many bodies are being read.
        """
        limits, data = self._limits, bytearray()
        announced = request.headers.get("content-length", "")
        if announced.isdigit() and int(announced) > limits.max_body_bytes:
            raise self._too_large()
        try:
            async with asyncio.timeout(limits.body_timeout_s):
                async for piece in request.stream():
                    data += piece
                    self._held += len(piece)
                    if len(data) > limits.max_body_bytes:
                        raise self._too_large()
                    if self._held > limits.max_buffered_bytes:
                        raise OverloadedError("too many bodies are being sent; try again later")
        except TimeoutError as error:
            raise ApiError(408, f"the body was not sent within {limits.body_timeout_s:g} s") from error
        finally:
            self._held -= len(data)
        return bytes(data)

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body exceeds {self._limits.max_body_bytes} bytes", code="body_too_large")


async def while_connected(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """Run `work` in the task of the caller, so that it begins at once, and cancel it if the client goes away.

    Raises:
        ClientDisconnect: it went away.
    """

    task, is_gone = asyncio.current_task(), False
    assert task is not None

    async def watch() -> None:
        nonlocal is_gone
        while (await request.receive())["type"] != "http.disconnect":
            pass
        is_gone = True
        task.cancel()

    watcher = asyncio.create_task(watch())
    try:
        return await work
    except asyncio.CancelledError:
        if not is_gone or task.uncancel():
            raise
        raise ClientDisconnect from None
    finally:
        watcher.cancel()


async def anext_or_close(events: AsyncGenerator[bytes, None]) -> bytes:
    """Return the first event; free the generator if there is none."""
    try:
        return await anext(events)
    except BaseException:
        await events.aclose()
        raise
