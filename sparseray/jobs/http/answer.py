"""One request's choices from the engine's events to deltas of text, and what of them is counted.

Between the HTTP endpoints and the `GenerationClient`: one task per choice, one queue for all. Here a choice's end
is known, whether the engine or a stop string ended it, so its tokens, times and reason are recorded here.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from typing import Any, Protocol

from sparseray.actors.serving.text_request import GenerationRequest, TokenEvent
from sparseray.jobs.http.api_error import GenerationError
from sparseray.jobs.http.generation_client import GenerationClient
from sparseray.jobs.http.openai_bodies import ApiRequest
from sparseray.jobs.http.openai_responses import Choice, Renderer, Spent
from sparseray.jobs.http.text_stream import Delta, PromptTokens, TextStream, Vocabulary

PATIENCE = 16
"""Tokens of an answer that is not streamed which are read together."""


class Record(Protocol):
    """Takes a value of a metric (`platform/metrics/registry.py`), of a histogram perhaps several times."""

    def __call__(self, name: str, value: float, times: int = 1, /, **labels: str) -> None: ...


class ChoiceTimes:
    """The times of one choice: records each token, and how the choice ended.

    Args:
        record: where they go.
        arrived_s: when its request came, by `time.perf_counter`.
    """

    def __init__(self, record: Record, arrived_s: float) -> None:
        self._record, self._arrived_s, self._last_s = record, arrived_s, 0.0

    def tokens(self, count: int) -> None:
        """Note tokens that have come together, at equal distances from those before."""
        if not count:
            return
        now = time.perf_counter()
        self._record("generation_tokens_total", count)
        if not self._last_s:
            self._record("time_to_first_token_seconds", now - self._arrived_s)
            self._last_s, count = now, count - 1
        if count:
            self._record("inter_token_latency_seconds", (now - self._last_s) / count, count)
        self._last_s = now

    def end(self, reason: str) -> None:
        """Note the end: "stop", "length", "cancelled" or "error"."""
        self._record("requests_finished_total", 1, finished_reason=reason)
        if reason in ("stop", "length"):
            self._record("request_latency_seconds", time.perf_counter() - self._arrived_s)


class Answer:
    """The choices of one request as they are computed.

    Args:
        client: the engine.
        request: validated.
        vocabulary: of the model.
        record: where its metrics go.
        arrived_s: when it came, by `time.perf_counter`.
    """

    def __init__(
        self,
        client: GenerationClient,
        request: ApiRequest,
        vocabulary: Vocabulary,
        *,
        record: Record,
        arrived_s: float,
    ) -> None:
        self._client, self._request, self._vocabulary = client, request, vocabulary
        self._record, self._arrived_s = record, arrived_s
        self._queue: asyncio.Queue[tuple[int, Delta] | Exception | None] = asyncio.Queue()
        self.spent, self.version = Spent(), ""

    def fail(self, error: Exception) -> None:
        """End the answer early: `deltas` raises the error."""
        self._queue.put_nowait(error)

    async def deltas(self) -> AsyncGenerator[tuple[int, Delta], None]:
        """Yield (choice, delta) as tokens come; leaving early cancels what still runs.

        Raises:
            GenerationError: the engine gave a choice up.
            UserError: the engine refused a choice.
        """
        tasks, open_choices = list[asyncio.Task[None]](), len(self._request.requests)
        try:
            for index, request in enumerate(self._request.requests):
                # The engine hears of it now, not when its task has its turn: others may be parsed before that.
                runs = self._client.generate(request, patience=self._patience)
                tasks.append(asyncio.create_task(self._choice(index, request, runs)))
            while open_choices:
                item = await self._queue.get()
                if isinstance(item, Exception):
                    raise item
                if item is None:
                    open_choices -= 1
                else:
                    yield item
        finally:
            if left := [task for task in tasks if not task.done()]:
                for task in left:
                    task.cancel()
                await asyncio.gather(*left, return_exceptions=True)
            for request in self._request.requests:
                # A task that has not had its turn has not ended anything.
                await self._client.cancel(request.request_id)

    @property
    def _patience(self) -> int:
        """Tokens that may come together: a stop string ends the computation, so it is looked for at once."""
        return 1 if self._request.stream or self._request.stops else PATIENCE

    async def _choice(
        self, index: int, request: GenerationRequest, runs: AsyncGenerator[list[TokenEvent], None]
    ) -> None:
        """Follow one choice to its end."""
        asked = self._request
        stream = TextStream(
            self._vocabulary,
            asked.stops,
            min_tokens=request.min_tokens,
            keep_stop=asked.keep_stop,
            keep_specials=asked.keep_specials,
        )
        times, reason = ChoiceTimes(self._record, self._arrived_s), "cancelled"
        self._record("prompt_tokens_total", len(request.prompt_tokens))
        try:
            async with aclosing(runs):
                async for events in runs:
                    self.version = self._client.version(request.request_id)
                    times.tokens(sum(event.token_id is not None for event in events))
                    for delta in self._read_run(stream, request, events):
                        self._queue.put_nowait((index, delta))
                        if delta.finish_reason is not None:
                            reason = delta.finish_reason
                            break
                    if reason != "cancelled":
                        break
            if reason == "cancelled":
                raise GenerationError("the engine ended the request early")
        except Exception as error:
            reason = "error"
            self._queue.put_nowait(error)
        else:
            self._queue.put_nowait(None)
        finally:
            times.end(reason)

    def _read_run(
        self, stream: TextStream, request: GenerationRequest, events: Sequence[TokenEvent]
    ) -> Iterator[Delta]:
        """The deltas of events that came together; tokens that nobody looks at one by one are one delta."""
        is_whole = not (self._request.stream or self._request.stops or request.logprobs is not None)
        first, last = 0, len(events) - 1
        if is_whole and events[0].index and last:
            plain = [event.token_id for event in events[:last] if event.token_id is not None]
            if len(plain) == last:
                for event in events[:last]:
                    self._count(event)
                yield stream.extend(plain)
                first = last
        for event in events[first:]:
            yield self._read(stream, request, event)

    def _count(self, event: TokenEvent) -> None:
        self.spent.tokens += event.token_id is not None
        self.spent.accepted += event.accepted
        self.spent.rejected += event.rejected

    def _read(self, stream: TextStream, request: GenerationRequest, event: TokenEvent) -> Delta:
        if event.finish_reason == "error":
            raise GenerationError(event.error or "the engine failed")
        self._count(event)
        if event.index:
            return stream.push(event.token_id, event.logprobs, event.finish_reason)
        shown = Delta(text="")
        if self._request.echo:
            wants_logprobs = request.logprobs is not None
            shown = stream.prompt(
                request.prompt_tokens, event.prompt_logprobs or () if wants_logprobs else (), request.logprobs
            )
        first = stream.push(event.token_id, event.logprobs, event.finish_reason)
        return shown.joined(first, PromptTokens(tokens=request.prompt_tokens, logprobs=event.prompt_logprobs))

    async def whole(self, renderer: Renderer) -> dict[str, Any]:
        """Return the body of an answer that is not streamed."""
        choices = [Choice() for _ in self._request.requests]
        async with aclosing(self.deltas()) as deltas:
            async for index, delta in deltas:
                choices[index].add(delta)
        renderer.version = self.version
        return renderer.response(choices, self.spent)
