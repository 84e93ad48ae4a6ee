"""The HTTP server: routes, streaming and errors around any `GenerationClient`.

`/v1/models`, `/v1/completions`, `/v1/chat/completions`, `/health`, `/metrics`. A request that goes
wrong gets the OpenAI error object and costs nobody else anything.
"""

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Callable, Iterator
from typing import Any, Protocol

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send
from tokenizers import Tokenizer

from sparseray.actors.generation import GenerationRequest, TokenEvent, TokenLogprobs
from sparseray.jobs import openai_api as api
from sparseray.jobs.openai_api import APIError, Limits, Parsed, TextBuilder
from sparseray.log import get_logger

log = get_logger(__name__)

MAX_BODY_BYTES = 4 << 20


class GenerationClient(Protocol):
    """Where tokens come from."""

    def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenEvent, None]:
        """Yield the events of one request; closing the iterator cancels it."""


def build_app(
    client: GenerationClient,
    tokenizer: Tokenizer,
    *,
    limits: Limits,
    max_waiting: int,
    metrics: Callable[[], bytes],
) -> Starlette:
    """Return the ASGI application.

    Args:
        client: generates.
        tokenizer: of the model.
        limits: model name, vocabulary, length.
        max_waiting: open requests before new ones get 429.
        metrics: Prometheus text of this process.
    """
    server = _Server(client, tokenizer, limits, max_waiting)
    routes = [
        Route("/v1/models", server.models),
        Route("/v1/completions", server.completions, methods=["POST"]),
        Route("/v1/chat/completions", server.chat, methods=["POST"]),
        Route("/health", lambda _: Response()),
        Route("/metrics", lambda _: Response(metrics(), media_type="text/plain; version=0.0.4")),
    ]
    handlers: Any = {APIError: _api_error, HTTPException: _http_error, Exception: _unexpected}
    return Starlette(routes=routes, exception_handlers=handlers)


def _api_error(_: Request, error: APIError) -> Response:
    return JSONResponse(error.body, error.status)


def _http_error(request: Request, error: HTTPException) -> Response:
    message = f"{request.method} {request.url.path}: {error.detail}"
    return JSONResponse(APIError(message, status=error.status_code).body, error.status_code)


def _unexpected(request: Request, error: Exception) -> Response:
    log.error("%s %s failed: %s: %s", request.method, request.url.path, type(error).__name__, error)
    return JSONResponse(APIError(f"{type(error).__name__}: {error}", status=500).body, 500)


class _Server:
    def __init__(
        self, client: GenerationClient, tokenizer: Tokenizer, limits: Limits, max_waiting: int
    ) -> None:
        self.client, self.tokenizer, self.limits, self.max_waiting = client, tokenizer, limits, max_waiting
        self.open = 0

    def models(self, _: Request) -> Response:
        entry = {
            "id": self.limits.model_name,
            "object": "model",
            "created": 0,
            "owned_by": "sparseray",
            "max_model_len": self.limits.max_model_len,
        }
        return JSONResponse({"object": "list", "data": [entry]})

    async def completions(self, request: Request) -> Response:
        return await self._answer(request, is_chat=False)

    async def chat(self, request: Request) -> Response:
        return await self._answer(request, is_chat=True)

    async def _answer(self, request: Request, *, is_chat: bool) -> Response:
        body = await _json_body(request)
        parsed = api.parse(body, self.tokenizer, self.limits, is_chat=is_chat)
        if self.open + len(parsed.requests) > self.max_waiting:
            raise APIError(
                f"{self.open} requests are open and {self.max_waiting} are allowed; try again later",
                status=429,
                code="too_many_requests",
            )
        self.open += len(parsed.requests)
        if parsed.is_stream:
            return _EventStream(self._stream(parsed), lambda: self._release(parsed))
        try:
            return await self._whole(request, parsed)
        finally:
            self._release(parsed)

    def _release(self, parsed: Parsed) -> None:
        self.open -= len(parsed.requests)

    async def _whole(self, request: Request, parsed: Parsed) -> Response:
        """Collect all choices; a client that goes away cancels them."""
        work = asyncio.ensure_future(self._collect_all(parsed))
        gone = asyncio.create_task(_disconnected(request))
        waited: set[asyncio.Future[Any]] = {work, gone}
        try:
            await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                work.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await work
                return Response(status_code=499)
            choices, counts = zip(*work.result())
        finally:
            gone.cancel()
        usage = api.usage(parsed.prompt_tokens, sum(counts))
        return JSONResponse(
            {**api.envelope(parsed, is_chunk=False), "choices": list(choices), "usage": usage}
        )

    async def _collect_all(self, parsed: Parsed) -> list[tuple[dict[str, Any], int]]:
        work = [asyncio.create_task(self._collect(parsed, i)) for i in range(len(parsed.requests))]
        try:
            return await asyncio.gather(*work)
        finally:
            # One choice that fails ends the answer; the others would generate for nobody.
            for task in work:
                task.cancel()
            await asyncio.gather(*work, return_exceptions=True)

    async def _collect(self, parsed: Parsed, index: int) -> tuple[dict[str, Any], int]:
        text, reason = "", None
        events: list[TokenEvent] = []
        async with contextlib.aclosing(self._pieces(parsed, index)) as pieces:
            async for piece, event, finish in pieces:
                text += piece
                events += [event] if event is not None else []
                reason = finish or reason
        echo, offset = self._echo(parsed, index)
        logprobs = api.event_logprobs(parsed, self.tokenizer, events, offset)
        if parsed.echo and parsed.num_logprobs >= 0:
            scored: list[TokenLogprobs | None] = [None, *events[0].prompt_logprobs]
            scored += [event.logprobs for event in events if event.logprobs is not None]
            tokens = [*parsed.requests[index].prompt, *(e.token for e in events if e.token >= 0)]
            logprobs = api.completion_logprobs(self.tokenizer, scored, tokens)
        made = sum(event.token >= 0 for event in events)
        return api.choice(parsed, index, echo + text, reason, logprobs, is_chunk=False), made

    def _echo(self, parsed: Parsed, index: int) -> tuple[str, int]:
        if not parsed.echo:
            return "", 0
        text: str = self.tokenizer.decode(list(parsed.requests[index].prompt), skip_special_tokens=False)
        return text, len(text)

    async def _pieces(
        self, parsed: Parsed, index: int
    ) -> AsyncGenerator[tuple[str, TokenEvent | None, str | None], None]:
        """Yield (text that became certain, event, finish reason) of one choice."""
        request = parsed.requests[index]
        builder = TextBuilder(self.tokenizer, parsed.stops)
        async with contextlib.aclosing(self.client.generate(request)) as events:
            async for event in events:
                is_last = event.finish_reason is not None
                is_text = event.token >= 0 and event.token not in request.stop_token_ids
                text = (
                    builder.add(event.token, is_last=is_last)
                    if is_text
                    else builder.finish()
                    if is_last
                    else ""
                )
                reason = "stop" if builder.is_stopped else event.finish_reason
                yield text, event, reason
                if builder.is_stopped:
                    return

    async def _stream(self, parsed: Parsed) -> AsyncGenerator[bytes, None]:
        """Yield server-sent events of all choices as they come."""
        queue: asyncio.Queue[tuple[int, str, TokenEvent | None, str | None] | Exception | None] = (
            asyncio.Queue()
        )

        async def pump(index: int) -> None:
            try:
                async with contextlib.aclosing(self._pieces(parsed, index)) as pieces:
                    async for text, event, reason in pieces:
                        queue.put_nowait((index, text, event, reason))
            except Exception as error:
                queue.put_nowait(error)
            queue.put_nowait(None)

        tasks = [asyncio.create_task(pump(index)) for index in range(len(parsed.requests))]
        made, left = 0, len(tasks)
        offsets = [-1] * len(tasks)
        try:
            for index in range(len(tasks)):
                first = self._first_chunk(parsed, index)
                if first is not None:
                    yield first
            while left:
                item = await queue.get()
                if item is None:
                    left -= 1
                elif isinstance(item, Exception):
                    log.error("a stream broke: %s: %s", type(item).__name__, item)
                    yield _event(APIError(str(item), status=500).body)
                    return
                else:
                    made += item[2] is not None and item[2].token >= 0
                    for chunk in self._chunks(parsed, offsets, *item):
                        yield chunk
            if parsed.include_usage:
                usage = api.usage(parsed.prompt_tokens, made)
                yield _event({**api.envelope(parsed, is_chunk=True), "choices": [], "usage": usage})
            yield b"data: [DONE]\n\n"
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _first_chunk(self, parsed: Parsed, index: int) -> bytes | None:
        """The role of a chat answer, or the echoed prompt if no scores of it have to be waited for."""
        if parsed.is_chat:
            delta = {"index": index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
            return _event({**api.envelope(parsed, is_chunk=True), "choices": [delta]})
        if parsed.echo and parsed.num_logprobs < 0:
            return self._chunk(parsed, index, self._echo(parsed, index)[0], None, None)
        return None

    def _chunks(
        self,
        parsed: Parsed,
        offsets: list[int],
        index: int,
        text: str,
        event: TokenEvent | None,
        reason: str | None,
    ) -> Iterator[bytes]:
        """Yield what one event of a choice sends; `offsets` holds where its next token's text begins, -1 before any."""
        if parsed.num_logprobs < 0 or event is None:
            if text or reason:
                yield self._chunk(parsed, index, text, reason, None)
            return
        is_first, offsets[index] = offsets[index] < 0, max(0, offsets[index])
        if is_first and parsed.echo:
            prompt = parsed.requests[index].prompt
            scored = [None, *event.prompt_logprobs]
            logprobs = api.completion_logprobs(self.tokenizer, scored, prompt)
            yield self._chunk(parsed, index, self._echo(parsed, index)[0], None, logprobs)
            offsets[index] = sum(len(one) for one in logprobs["tokens"])
        scores = api.event_logprobs(parsed, self.tokenizer, [event], offsets[index])
        yield self._chunk(parsed, index, text, reason, scores)
        offsets[index] += len(api.token_text(self.tokenizer, event.token)) if event.token >= 0 else 0

    def _chunk(
        self, parsed: Parsed, index: int, text: str, reason: str | None, logprobs: dict[str, Any] | None
    ) -> bytes:
        entry = api.choice(parsed, index, text, reason, logprobs, is_chunk=True)
        return _event({**api.envelope(parsed, is_chunk=True), "choices": [entry]})


class _EventStream(StreamingResponse):
    """Server-sent events; however the connection ends, the events are closed and the places given back."""

    def __init__(self, events: AsyncGenerator[bytes, None], release: Callable[[], None]) -> None:
        super().__init__(events, media_type="text/event-stream")
        self._events, self._release = events, release

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with contextlib.aclosing(self._events):
                await super().__call__(scope, receive, send)
        finally:
            self._release()


def _event(body: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(body).encode() + b"\n\n"


async def _json_body(request: Request) -> object:
    """Read the body, bounded, as JSON."""
    content = b""
    async for part in request.stream():
        content += part
        if len(content) > MAX_BODY_BYTES:
            raise APIError(f"the body exceeds {MAX_BODY_BYTES} bytes", status=413)
    try:
        found: object = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise APIError(f"the body is not JSON: {error}") from None
    return found


async def _disconnected(request: Request) -> None:
    while not await request.is_disconnected():
        await asyncio.sleep(0.1)


def serve_app(app: Starlette, host: str, port: int) -> None:
    """Serve until SIGINT or SIGTERM; open streams get a second to end."""
    config = uvicorn.Config(app, host=host, port=port, log_level="warning", timeout_graceful_shutdown=1)
    # uvicorn raises the signal again once it has shut down; here the stop is clean.
    with contextlib.suppress(KeyboardInterrupt):
        uvicorn.Server(config).run()
