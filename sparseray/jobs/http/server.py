"""The OpenAI-compatible HTTP server: starlette on uvicorn, in front of any `GenerationClient`.

Where a request enters and its answer leaves. A body is read within limits and validated before the first
byte of the answer; a client that goes away cancels its request; an error after a stream began is sent as
`data: {"error": ...}` and ends it. It listens on the loopback interface unless told otherwise.
"""

from __future__ import annotations

import asyncio
import functools
import secrets
import socket
import threading
import time
from collections.abc import AsyncGenerator, Callable, Coroutine
from types import TracebackType
from typing import Any, TypeVar

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from sparseray.errors import ConfigError, UserError
from sparseray.jobs.http.answer import Answer, GenerationError
from sparseray.jobs.http.generation_client import ARRIVED_S, GenerationClient, OverloadedError
from sparseray.jobs.http.openai_bodies import ApiError, ApiLimits, ApiRequest, parse_json, parse_request
from sparseray.jobs.http.openai_responses import DONE, Renderer, sse
from sparseray.jobs.http.text_stream import Vocabulary
from sparseray.jobs.signals import stops_noted
from sparseray.log import get_logger

logger = get_logger(__name__)
Result = TypeVar("Result")
CLIENT_GONE = 499


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


def error_response(error: Exception) -> JSONResponse:
    """Return the answer to a request that failed before its first byte."""
    api_error = to_api_error(error)
    headers = {"Retry-After": "1"} if api_error.status == 429 else None
    return JSONResponse(api_error.to_dict(), status_code=api_error.status, headers=headers)


def to_api_error(error: Exception) -> ApiError:
    """Turn any exception into an API error; defects of ours are logged and not shown."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, str(error.detail), code=str(error.status_code))
    if isinstance(error, OverloadedError):
        return ApiError(429, str(error), code="overloaded")
    if isinstance(error, UserError):
        return ApiError(400, str(error))
    if isinstance(error, ClientDisconnect):
        return ApiError(CLIENT_GONE, "the client closed the connection")
    if isinstance(error, GenerationError):
        logger.warning("a request failed: %s", error)
        return ApiError(500, "the engine could not finish the request; try again", code="engine_error")
    logger.error("a request failed", exc_info=error)
    return ApiError(500, "internal error", code="internal_error")


async def read_body(request: Request, limits: ApiLimits) -> bytes:
    """Return the body.

    Raises:
        ApiError: 413, longer than the limit; 408, not there in time.
    """
    data = bytearray()
    try:
        async with asyncio.timeout(limits.body_timeout_s):
            async for piece in request.stream():
                data += piece
                if len(data) > limits.max_body_bytes:
                    message = f"the body exceeds {limits.max_body_bytes} bytes"
                    raise ApiError(413, message, code="body_too_large")
    except TimeoutError as error:
        raise ApiError(408, f"the body was not sent within {limits.body_timeout_s} s") from error
    return bytes(data)


async def while_connected(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """Run `work`, and cancel it if the client goes away.

    Raises:
        ClientDisconnect: it went away.
    """

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, watcher = asyncio.create_task(work), asyncio.create_task(watch())
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
        watcher.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


class Api:
    """The endpoints.

    Args:
        client: the engine.
        vocabulary: of the model.
        model: name that is served.
        limits: of the server.
        metrics: gives the Prometheus exposition text.
        health: whether requests can be served.
    """

    def __init__(
        self,
        client: GenerationClient,
        vocabulary: Vocabulary,
        *,
        model: str,
        limits: ApiLimits,
        metrics: Callable[[], bytes],
        health: Callable[[], bool],
    ) -> None:
        self._client, self._vocabulary, self._model, self._limits = client, vocabulary, model, limits
        self._metrics, self._health = metrics, health
        self._created_s, self._active = int(time.time()), 0

    def routes(self) -> list[Route]:
        """Return the routes."""
        return [
            Route("/v1/completions", functools.partial(self._generate, is_chat=False), methods=["POST"]),
            Route("/v1/chat/completions", functools.partial(self._generate, is_chat=True), methods=["POST"]),
            Route("/v1/models", self._models, methods=["GET"]),
            Route("/v1/models/{model:path}", self._one_model, methods=["GET"]),
            Route("/health", self._healthy, methods=["GET"]),
            Route("/metrics", self._scrape, methods=["GET"]),
        ]

    def _card(self) -> dict[str, Any]:
        card = {"id": self._model, "object": "model", "created": self._created_s, "owned_by": "sparseray"}
        return {**card, "max_model_len": self._limits.max_model_len}

    async def _models(self, _: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def _one_model(self, request: Request) -> Response:
        if request.path_params["model"] != self._model:
            return error_response(ApiError(404, "no such model", param="model", code="model_not_found"))
        return JSONResponse(self._card())

    async def _healthy(self, _: Request) -> Response:
        is_healthy = self._health()
        return JSONResponse(
            {"status": "ok" if is_healthy else "down"}, status_code=200 if is_healthy else 503
        )

    async def _scrape(self, _: Request) -> Response:
        try:
            data = await asyncio.to_thread(self._metrics)
        except Exception as error:
            return error_response(error)
        return Response(data, media_type="text/plain; version=0.0.4; charset=utf-8")

    async def _generate(self, request: Request, *, is_chat: bool) -> Response:
        """Answer a completion; the place it takes is freed when its last byte is sent."""
        if self._active >= self._limits.max_requests:
            return error_response(OverloadedError(f"{self._active} requests are under way; try again later"))
        self._active += 1
        ARRIVED_S.set(time.perf_counter())
        response: Response | None = None
        try:
            response = await self._answer(request, is_chat)
        except Exception as error:
            return error_response(error)
        finally:
            if not isinstance(response, EventStream):
                self._active -= 1
        return response

    async def _answer(self, request: Request, is_chat: bool) -> Response:
        body = parse_json(await read_body(request, self._limits))
        response_id = f"{'chatcmpl' if is_chat else 'cmpl'}-{secrets.token_hex(12)}"
        parsed = await asyncio.to_thread(
            parse_request,
            body,
            is_chat=is_chat,
            model=self._model,
            vocabulary=self._vocabulary,
            limits=self._limits,
            request_id=response_id,
        )
        created_s = int(time.time())
        renderer = Renderer(parsed, response_id=response_id, created_s=created_s, vocabulary=self._vocabulary)
        answer = Answer(self._client, parsed, self._vocabulary)
        if not parsed.stream:
            return JSONResponse(await while_connected(request, answer.whole(renderer)))
        events = self._events(answer, renderer, parsed)
        # The first event is awaited here, so that an engine that refuses gives a status, not a broken stream.
        first = await while_connected(request, anext_or_close(events))
        timeout_s = self._limits.send_timeout_s
        return EventStream(first, events, send_timeout_s=timeout_s, release=self._release)

    def _release(self) -> None:
        self._active -= 1

    async def _events(
        self, answer: Answer, renderer: Renderer, parsed: ApiRequest
    ) -> AsyncGenerator[bytes, None]:
        """Yield the server-sent events of an answer; raises only before the first."""
        is_started = False
        deltas = answer.deltas()
        try:
            async for index, delta in deltas:
                chunk = renderer.chunk(index, delta)
                if chunk is not None:
                    yield sse(chunk)
                    is_started = True
            if parsed.include_usage:
                yield sse(renderer.usage_chunk(answer.completion_tokens))
            yield DONE
        except Exception as error:
            if not is_started:
                raise
            yield sse(to_api_error(error).to_dict())
        finally:
            await deltas.aclose()


async def anext_or_close(events: AsyncGenerator[bytes, None]) -> bytes:
    """Return the first event; free the generator if there is none."""
    try:
        return await anext(events)
    except BaseException:
        await events.aclose()
        raise


def create_app(
    client: GenerationClient,
    vocabulary: Vocabulary,
    *,
    model: str,
    limits: ApiLimits,
    metrics: Callable[[], bytes] = bytes,
    health: Callable[[], bool] = lambda: True,
) -> Starlette:
    """Return the ASGI application.

    Args:
        client: the engine, near or far.
        vocabulary: of the model.
        model: name that is served.
        limits: of one request, and of all.
        metrics: gives the Prometheus exposition text for `/metrics`; runs in a thread.
        health: whether requests can be served, for `/health`.
    """

    async def refuse(_: Request, error: Exception) -> Response:
        return error_response(error)

    api = Api(client, vocabulary, model=model, limits=limits, metrics=metrics, health=health)
    return Starlette(routes=api.routes(), exception_handlers={HTTPException: refuse, Exception: refuse})


class HttpServer:
    """An application on a socket.

    Args:
        app: from `create_app`.
        host: address to listen on; the loopback interface unless the server is meant for others.
        port: 0 for a free one.

    Raises:
        ConfigError: the address cannot be listened on.
    """

    def __init__(self, app: Starlette, *, host: str = "127.0.0.1", port: int = 0) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            self._socket = socket.create_server((host, port), family=family, backlog=512)
        except (OSError, OverflowError) as error:
            raise ConfigError(f"cannot listen on {host} port {port}: {error}; choose another port") from error
        # Inherited by connections. asyncio sets it only on sockets that name their protocol, and without it the
        # tokens after the first wait 40 ms for the client's acknowledgement.
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.port: int = self._socket.getsockname()[1]
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{self.port}"
        self._server = uvicorn.Server(
            uvicorn.Config(
                app,
                http="h11",
                lifespan="off",
                log_level="warning",
                access_log=False,
                server_header=False,
                timeout_keep_alive=30,
                timeout_graceful_shutdown=5,
            )
        )
        self._thread: threading.Thread | None = None

    def run(self, announce: Callable[[], None]) -> None:
        """Serve in the main thread until SIGINT or SIGTERM; a second SIGINT does not wait for open streams.

        Args:
            announce: called once either signal stops the server cleanly. Before that point, and in the moments
                in which uvicorn and asyncio install handlers of their own, an interrupt would be raised wherever
                the interpreter is, a finalizer that swallows it included.
        """
        with stops_noted(self._server.handle_exit):
            announce()
            self._server.run(sockets=[self._socket])

    def close(self) -> None:
        """Stop a server that runs in the background, open streams after a few seconds."""
        self._server.should_exit = True
        if self._thread is not None:
            self._thread.join(timeout=30)
        self._socket.close()

    def __enter__(self) -> HttpServer:
        self._thread = threading.Thread(
            target=self._server.run, args=([self._socket],), name="sparseray-http", daemon=True
        )
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
