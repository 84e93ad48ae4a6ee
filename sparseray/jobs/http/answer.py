"""One request's choices from the engine's events to deltas of text.

Between the HTTP endpoints and the `GenerationClient`: one task per choice, one queue for all.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

from sparseray.actors.serving.text_request import GenerationRequest, TokenEvent
from sparseray.jobs.http.generation_client import GenerationClient
from sparseray.jobs.http.openai_bodies import ApiRequest
from sparseray.jobs.http.openai_responses import Choice, Renderer
from sparseray.jobs.http.text_stream import Delta, TextStream, Vocabulary


class GenerationError(Exception):
    """A request that the engine gave up."""


class Answer:
    """The choices of one request as they are computed; counts the tokens for `usage`."""

    def __init__(self, client: GenerationClient, request: ApiRequest, vocabulary: Vocabulary) -> None:
        self._client, self._request, self._vocabulary = client, request, vocabulary
        self.completion_tokens = 0

    async def deltas(self) -> AsyncGenerator[tuple[int, Delta], None]:
        """Yield (choice, delta) as tokens come; leaving early cancels what still runs.

        Raises:
            GenerationError: the engine gave a choice up.
            OverloadedError, UserError: the engine refused a choice.
        """
        queue: asyncio.Queue[tuple[int, Delta] | Exception | None] = asyncio.Queue()
        requests = self._request.requests
        tasks = [asyncio.create_task(self._choice(i, request, queue)) for i, request in enumerate(requests)]
        open_choices = len(tasks)
        try:
            while open_choices:
                item = await queue.get()
                if isinstance(item, Exception):
                    raise item
                if item is None:
                    open_choices -= 1
                else:
                    yield item
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _choice(
        self,
        index: int,
        request: GenerationRequest,
        queue: asyncio.Queue[tuple[int, Delta] | Exception | None],
    ) -> None:
        """Follow one choice to its end."""
        stream = TextStream(self._vocabulary, self._request.stops)
        finished = False
        try:
            async for event in self._client.generate(request):
                for delta in self._read(stream, request, event):
                    queue.put_nowait((index, delta))
                    finished = delta.finish_reason is not None
                if finished:
                    break
            if not finished:
                raise GenerationError("the engine ended the request early")
        except Exception as error:
            queue.put_nowait(error)
        else:
            queue.put_nowait(None)
        finally:
            await self._client.cancel(request.request_id)

    def _read(self, stream: TextStream, request: GenerationRequest, event: TokenEvent) -> list[Delta]:
        if event.finish_reason == "error":
            raise GenerationError(event.error or "the engine failed")
        deltas = []
        if event.index == 0 and self._request.echo:
            deltas.append(stream.prompt(request.prompt_tokens, event.prompt_logprobs or ()))
        self.completion_tokens += event.token_id is not None
        deltas.append(stream.push(event.token_id, event.logprobs, event.finish_reason))
        return deltas

    async def whole(self, renderer: Renderer) -> dict[str, Any]:
        """Return the body of an answer that is not streamed."""
        choices = [Choice() for _ in self._request.requests]
        deltas = self.deltas()
        try:
            async for index, delta in deltas:
                choices[index].add(delta)
        finally:
            await deltas.aclose()
        return renderer.response(choices, self.completion_tokens)
