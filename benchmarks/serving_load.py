"""Streams against a server, and what a client sees of each: tokens, their times, and how it ended.

Plain sockets and few lines, so that a hundred streams cost the machine little.
"""

import asyncio
import json
import random
import time
from collections import defaultdict
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field

PROMPT = "def main(arguments):\n    "


@dataclass(kw_only=True)
class Answer:
    """One stream.

    Args:
        seed: that it was asked with.
        asked: when, `time.monotonic`.
        tokens: ids.
        times: `time.monotonic` of each token.
        error: why it failed; empty for one that ended as it should.
    """

    seed: int
    asked: float = 0.0
    tokens: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    error: str = "it did not end"

    @property
    def worst_gap_s(self) -> float:
        """Longest time between two of its tokens."""
        return max((b - a for a, b in zip(self.times, self.times[1:])), default=0.0)


@dataclass(kw_only=True)
class Load:
    """Streams that are open side by side.

    Args:
        port: of the server.
        max_tokens: of each stream.
        at: number of tokens of all streams to what happens then, in a thread.
    """

    port: int
    max_tokens: int
    at: Mapping[int, Callable[[], object]] = field(default_factory=dict)
    count: int = 0
    _happening: list[asyncio.Future[object]] = field(default_factory=list, init=False)

    def ask(self, seeds: Sequence[int]) -> list[Answer]:
        """Answer a stream of each seed, all at once.

        Raises:
            Exception: what was to happen at some token failed.
        """

        async def everything() -> list[Answer]:
            return list(await asyncio.gather(*(self._stream(seed) for seed in seeds)))

        return self._run(everything())

    def keep(self, streams: int, seeds: Sequence[int], seconds: float) -> list[Answer]:
        """Keep some streams open for a while, each followed by the next.

        Args:
            streams: at once.
            seeds: that they take in turn.
            seconds: after which no new one begins.
        """
        found: list[Answer] = []
        end = time.monotonic() + seconds

        async def one(first: int) -> None:
            turn = first
            while time.monotonic() < end:
                found.append(await self._stream(seeds[turn % len(seeds)]))
                turn += streams

        async def everything() -> list[Answer]:
            await asyncio.gather(*(one(first) for first in range(streams)))
            return found

        return self._run(everything())

    def arrive(self, per_s: float, seconds: float, source: random.Random) -> list[Answer]:
        """Ask at random moments, however many are open by then.

        Args:
            per_s: requests a second, on average.
            seconds: in which they come.
            source: of the moments.
        """

        async def everything() -> list[Answer]:
            streams, due = list[asyncio.Task[Answer]](), time.monotonic()
            end = due + seconds
            while (due := due + source.expovariate(per_s)) < end:
                await asyncio.sleep(max(0.0, due - time.monotonic()))
                streams.append(asyncio.create_task(self._stream(len(streams))))
            return list(await asyncio.gather(*streams))

        return self._run(everything())

    def _run(self, streams: Coroutine[object, object, list[Answer]]) -> list[Answer]:
        """Answer streams, and wait for what happened beside them."""

        async def everything() -> list[Answer]:
            found = await streams
            await asyncio.gather(*self._happening)
            return found

        self._happening.clear()
        return asyncio.run(everything())

    async def _stream(self, seed: int) -> Answer:
        answer = Answer(seed=seed, asked=time.monotonic())
        body = {
            "prompt": PROMPT + "x = " * (seed % 7),
            "max_tokens": self.max_tokens,
            "seed": seed,
            "stream": True,
            "ignore_eos": True,
            "return_token_ids": True,
        }
        data = json.dumps(body).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
            writer.write(head.encode() + data)
            async with asyncio.timeout(180.0):
                await self._read(reader, answer)
            writer.close()
        except (OSError, TimeoutError, asyncio.IncompleteReadError) as error:
            answer.error = repr(error)
        return answer

    async def _read(self, reader: asyncio.StreamReader, answer: Answer) -> None:
        status = await reader.readline()
        if b" 200 " not in status:
            answer.error = (status + await reader.read(2000)).decode(errors="replace")[:300]
            return
        while line := await reader.readline():
            if line.startswith(b"data: [DONE]"):
                return
            if line.startswith(b"data: "):
                self._take(json.loads(line[6:]), answer)

    def _take(self, event: dict[str, object], answer: Answer) -> None:
        if "error" in event:
            answer.error = str(event["error"])
            return
        choices = event["choices"]
        assert isinstance(choices, list)
        tokens = choices[0].get("token_ids") or []
        answer.tokens += tokens
        answer.times += [time.monotonic()] * len(tokens)
        if choices[0]["finish_reason"] == "length":
            answer.error = ""
        for _ in tokens:
            self.count += 1
            if self.count in self.at:
                loop = asyncio.get_running_loop()
                self._happening.append(loop.run_in_executor(None, self.at[self.count]))


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What clients saw in one measurement.

    Args:
        streams: how many.
        failed: how many did not end as they should, and why the first did not.
        other: how many had other tokens than undisturbed.
        worst_gap_s: longest wait for a token.
        tokens_per_s: of all streams.
    """

    streams: int
    failed: int
    why: str
    other: int
    worst_gap_s: float
    tokens_per_s: float


def compare(answers: Sequence[Answer], expected: dict[int, list[int]]) -> Seen:
    """Compare answers with undisturbed ones.

    Args:
        answers: to all requests.
        expected: tokens by seed.
    """
    failed = [answer for answer in answers if answer.error]
    times = [time for answer in answers for time in answer.times]
    return Seen(
        streams=len(answers),
        failed=len(failed),
        why=failed[0].error[:200] if failed else "",
        other=sum(answer.tokens != expected[answer.seed] for answer in answers if not answer.error),
        worst_gap_s=max(answer.worst_gap_s for answer in answers),
        tokens_per_s=len(times) / max(1e-9, max(times, default=0.0) - min(times, default=0.0)),
    )


def held_from(answers: Sequence[Answer], target_s: float, begun: float) -> float:
    """Seconds from which on nine of ten requests of every second had their first token in time.

    Args:
        answers: to requests that came one after another.
        target_s: to the first token.
        begun: when they began to come, `time.monotonic`.
    """
    by_second: dict[int, list[bool]] = defaultdict(list)
    for answer in answers:
        first = answer.times[0] if answer.times else float("inf")
        by_second[int(answer.asked - begun)].append(first - answer.asked <= target_s)
    missed = [second for second, kept in by_second.items() if sum(kept) < 0.9 * len(kept)]
    return float(max(missed, default=-1) + 1)
