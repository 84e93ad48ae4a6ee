"""The endpoints that generate: a body is read, validated and answered, whole or as a stream.

Where a request enters and its answer leaves. A place among the open requests is taken when the body is there, and
freed when the last byte is sent; a client that goes away cancels its request; an error after a stream began is
sent as `data: {"error": ...}`, and `[DONE]` ends the stream.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from sparseray.jobs.http.answer import Answer, Record
from sparseray.jobs.http.api_error import (
    ApiError,
    OverloadedError,
    error_response,
    failure_reason,
    to_api_error,
)
from sparseray.jobs.http.constraints import COMPILED_FIELDS
from sparseray.jobs.http.event_stream import BodyReader, EventStream, anext_or_close, while_connected
from sparseray.jobs.http.fields import parse_json
from sparseray.jobs.http.generation_client import GenerationClient
from sparseray.jobs.http.openai_bodies import ApiRequest, ServedModel, parse_request
from sparseray.jobs.http.openai_responses import DONE, Renderer, sse

Read = TypeVar("Read")
SMALL_BODY_BYTES, SMALL_IDS_BYTES = 2048, 32768
"""Bodies up to which a thread costs more than it saves: with texts, which are tokenised, and with a list of ids."""


class GenerateEndpoints:
    """`/v1/completions` and `/v1/chat/completions`, and how many of their requests are open.

    Args:
        client: the engine.
        served: the model.
        record: where metrics go.
    """

    def __init__(self, client: GenerationClient, served: ServedModel, record: Record) -> None:
        self._client, self._served, self._record = client, served, record
        self._bodies = BodyReader(served.limits)
        self._answers: set[Answer] = set()
        self._open = 0
        self.refusal = ""
        """Why no more requests are taken; empty while they are."""
        # Tokenising gives the interpreter's lock up: two threads read bodies while the event loop serves.
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="sparseray-bodies")

    @property
    def num_open(self) -> int:
        """Requests that are being answered."""
        return self._open

    def end_answers(self) -> int:
        """End every open answer with an error, as the server stops; return how many there were."""
        for answer in self._answers:
            answer.fail(ApiError(503, "the server is stopping; ask again", code="server_stopping"))
        return len(self._answers)

    async def completion(self, request: Request) -> Response:
        """Answer a completion."""
        return await self._generate(request, is_chat=False)

    async def chat(self, request: Request) -> Response:
        """Answer a chat completion."""
        return await self._generate(request, is_chat=True)

    async def read(self, request: Request, read: Callable[[Mapping[str, Any]], Read]) -> Read:
        """Return what a function reads from a body, in a thread."""
        data = await self._bodies.read(request)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, lambda: read(parse_json(data)))

    async def _generate(self, request: Request, *, is_chat: bool) -> Response:
        """Answer; the place that the request takes is freed when its last byte is sent."""
        response: Response | None = None
        is_counted = False
        arrived_s = time.perf_counter()
        try:
            data = await self._bodies.read(request)
            if self.refusal:
                headers = {"Retry-After": "1"}
                raise ApiError(503, f"{self.refusal}; ask another", code="draining", headers=headers)
            limit = self._served.limits.max_requests
            if self._open >= limit:
                raise OverloadedError(
                    f"{limit} requests are open, as many as this server accepts; try again later"
                )
            is_counted = True
            self._count(1)
            response = await self._answer(request, data, is_chat, arrived_s)
        except Exception as error:
            self._count_failure(error)
            return error_response(error)
        finally:
            if is_counted and not isinstance(response, EventStream):
                self._count(-1)
        return response

    def _count(self, change: int) -> None:
        self._open += change
        self._record("requests_open", self._open)

    def _count_failure(self, error: Exception) -> None:
        reason = failure_reason(error)
        if reason is not None:
            self._record("requests_failed_total", 1, reason=reason)

    async def _parse(self, data: bytes, is_chat: bool, number: str) -> ApiRequest:
        """Read a body in a thread, or at once where that takes less time than to ask a thread."""

        def read(body: Mapping[str, Any]) -> ApiRequest:
            return parse_request(body, is_chat=is_chat, served=self._served, request_id=number)

        body = parse_json(data) if len(data) <= SMALL_IDS_BYTES else None
        if body is not None and not body.keys() & COMPILED_FIELDS:
            prompt = body.get("prompt")
            are_ids = isinstance(prompt, list) and bool(prompt) and type(prompt[0]) is int
            if are_ids or len(data) <= SMALL_BODY_BYTES:
                return read(body)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(
            self._threads, lambda: read(parse_json(data) if body is None else body)
        )

    async def _answer(self, request: Request, data: bytes, is_chat: bool, arrived_s: float) -> Response:
        number = secrets.token_hex(12)
        parsed = await self._parse(data, is_chat, number)
        name = request.scope.get("state", {}).get("request_id", number)
        renderer = Renderer(
            parsed,
            response_id=f"{'chatcmpl' if is_chat else 'cmpl'}-{name}",
            created_s=int(time.time()),
            vocabulary=self._served.vocabulary,
        )
        answer = Answer(
            self._client, parsed, self._served.vocabulary, record=self._record, arrived_s=arrived_s
        )
        self._answers.add(answer)
        if not parsed.stream:
            try:
                return JSONResponse(await while_connected(request, answer.whole(renderer)))
            finally:
                self._answers.discard(answer)
        events = self._events(answer, renderer, parsed)
        try:
            # Awaited here, so that an engine that refuses gives a status, not a broken stream.
            first = await while_connected(request, anext_or_close(events))
        except BaseException:
            self._answers.discard(answer)
            raise

        def release() -> None:
            self._answers.discard(answer)
            self._count(-1)

        return EventStream(first, events, send_timeout_s=self._served.limits.send_timeout_s, release=release)

    async def _events(
        self, answer: Answer, renderer: Renderer, parsed: ApiRequest
    ) -> AsyncGenerator[bytes, None]:
        """Yield the server-sent events of an answer; raises only before the first."""
        is_started = False
        try:
            async with aclosing(answer.deltas()) as deltas:
                async for index, delta in deltas:
                    renderer.version = answer.version
                    chunk = renderer.chunk(index, delta, answer.spent)
                    if chunk is not None:
                        yield sse(chunk)
                        is_started = True
            if parsed.include_usage:
                yield sse(renderer.usage_chunk(answer.spent))
        except Exception as error:
            if not is_started:
                raise
            self._count_failure(error)
            yield sse(to_api_error(error).to_dict())
        yield DONE
