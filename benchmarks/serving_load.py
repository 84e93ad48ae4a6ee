"""Streams against a server, and what a client sees of each: tokens, their times, and how it ended.

Plain sockets and few lines, so that a hundred streams cost the machine little.
"""

import asyncio
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

PROMPT = "def main(arguments):\n    "


@dataclass(kw_only=True)
class Answer:
    """One stream.

    Args:
        seed: that it was asked with.
        tokens: ids.
        times: `time.monotonic` of each token.
        error: why it failed; empty for one that ended as it should.
    """

    seed: int
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

    def ask(self, seeds: Sequence[int]) -> list[Answer]:
        """Answer a stream of each seed, all at once."""

        async def everything() -> list[Answer]:
            return list(await asyncio.gather(*(self._stream(seed) for seed in seeds)))

        return asyncio.run(everything())

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

        async def everything() -> None:
            await asyncio.gather(*(one(first) for first in range(streams)))

        asyncio.run(everything())
        return found

    async def _stream(self, seed: int) -> Answer:
        answer = Answer(seed=seed)
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
                asyncio.get_running_loop().run_in_executor(None, self.at[self.count])


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
