"""How requests reach their engine when many come at once, and what is left of those whose client has gone by then."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from serving_parts import app_of
from starlette.requests import ClientDisconnect, Request

from sparseray.actors.serving.text_request import GenerationRequest, TokenEvent
from sparseray.jobs.http import endpoints
from sparseray.jobs.http.event_stream import while_connected

BODY = b'{"prompt": "a", "max_tokens": 2, "n": 2}'


class Noting:
    """A client that notes what it is told, and answers two tokens of each request, or nothing."""

    reason = failure = ""

    def __init__(self, *, is_mute: bool = False) -> None:
        self.said, self.is_mute = list[str](), is_mute

    def generate(
        self, request: GenerationRequest, *, patience: int = 1
    ) -> AsyncGenerator[list[TokenEvent], None]:
        self.said.append("sent")
        return self._runs(request.request_id)

    async def _runs(self, name: str) -> AsyncGenerator[list[TokenEvent], None]:
        if self.is_mute:
            await asyncio.Event().wait()
        yield [TokenEvent(request_id=name, index=0, token_id=66)]
        yield [TokenEvent(request_id=name, index=1, token_id=66, finish_reason="length")]

    def version(self, request_id: str = "") -> str:
        return ""

    async def cancel(self, request_id: str) -> None:
        self.said.append("cancelled")


async def post(client: Noting, *, is_gone: bool = False) -> int:
    """The status of one request; 0 where nobody was left to hear it."""
    said: list[Any] = [{"type": "http.request", "body": BODY}]
    said += [{"type": "http.disconnect"}] if is_gone else []
    status = 0

    async def receive() -> Any:
        return said.pop(0) if said else await asyncio.Event().wait()

    async def send(message: Any) -> None:
        nonlocal status
        status = message.get("status", status)

    headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": headers}
    await app_of(client).asgi(scope | {"query_string": b"", "http_version": "1.1"}, receive, send)
    return status


def test_an_engine_hears_of_a_request_before_the_next_one_is_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    client, parse = Noting(), endpoints.parse_request

    def parsed(*arguments: Any, **options: Any) -> Any:
        client.said.append("parsed")
        return parse(*arguments, **options)

    monkeypatch.setattr(endpoints, "parse_request", parsed)

    async def story() -> list[int]:
        return list(await asyncio.gather(*(post(client) for _ in range(3))))

    assert asyncio.run(story()) == [200] * 3
    assert [word for word in client.said if word != "cancelled"] == ["parsed", "sent", "sent"] * 3


def test_a_client_that_has_gone_when_its_request_is_sent_leaves_nothing() -> None:
    client = Noting(is_mute=True)
    asyncio.run(asyncio.wait_for(post(client, is_gone=True), 10.0))
    assert client.said.count("sent") == client.said.count("cancelled") == 2


def test_work_for_a_client_ends_with_it_and_with_whoever_waits_for_it() -> None:
    gone, ended = asyncio.Event(), list[str]()

    async def receive() -> Any:
        await gone.wait()
        return {"type": "http.disconnect"}

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("work")

    async def story() -> None:
        request = Request({"type": "http"}, receive)
        task = asyncio.create_task(while_connected(request, work()))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        task = asyncio.create_task(while_connected(request, work()))
        await asyncio.sleep(0)
        gone.set()
        with pytest.raises(ClientDisconnect):
            await task
        assert not task.cancelling()

    asyncio.run(asyncio.wait_for(story(), 10.0))
    assert ended == ["work"] * 2
