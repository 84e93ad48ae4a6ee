"""Where the ingress sends requests, and whose tokens it believes: engines here are what a test says in their names."""

import asyncio
import queue
import time
from collections.abc import AsyncGenerator, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from sparseray.actors.serving.messages import Cancel, Generate, Moved, Routes, Tokens
from sparseray.actors.serving.text_request import GenerationRequest, TokenEvent
from sparseray.actors.wire.envelope import SCHEDULER, Body, Message, decode, encode
from sparseray.actors.wire.messages import Ping, Pong
from sparseray.errors import SlotLostError
from sparseray.jobs.http.ingress import Ingress

DEADLINE_S, PLACES = 1.0, 2


@dataclass
class Engines:
    """Both transports of an ingress: what it sends is kept, pings are answered by those who are not mute."""

    address: str = "fake://"
    mute: set[int] = field(default_factory=set)
    ended: set[int] = field(default_factory=set)
    sent: list[tuple[int, Body]] = field(default_factory=list)
    incoming: "queue.Queue[list[Any]]" = field(default_factory=queue.Queue)
    sequence: int = 0

    def connect(self, peers: dict[int, str]) -> None:
        """Nothing to do."""

    def send(self, slot: int, frames: Sequence[Any]) -> None:
        message = decode(frames, "job")
        assert message is not None
        if not isinstance(message.body, Ping):
            self.sent.append((slot, message.body))
        elif slot not in self.mute:
            self.say(slot, Pong(), reply_to=message.sequence)

    def gone(self, slots: Collection[int]) -> list[int]:
        return [slot for slot in slots if slot in self.ended]

    def receive(self, timeout_s: float) -> list[Any] | None:
        try:
            return self.incoming.get(timeout=max(0.001, timeout_s))
        except queue.Empty:
            return None

    def close(self) -> None:
        """Nothing to do."""

    def say(self, slot: int, body: Body, reply_to: int = 0) -> None:
        """A message of a slot, or of the scheduler."""
        self.sequence += 1
        message = Message(body=body, source=slot, generation=0, sequence=self.sequence, reply_to=reply_to)
        self.incoming.put(encode(message, "job"))

    def tokens(self, slot: int, name: str, *indices: int, end: bool = False) -> None:
        """Tokens of a request, each ten times its index."""
        events = [TokenEvent(request_id=name, index=i, token_id=10 * i) for i in indices]
        events += [TokenEvent(request_id=name, index=indices[-1] + 1, finish_reason="length")] if end else []
        self.say(slot, Tokens.of(events))

    def routes(self, *slots: int, draining: tuple[int, ...] = ()) -> None:
        engines = {slot: f"fake://{slot}" for slot in slots}
        self.say(SCHEDULER, Routes(generation=1, engines=engines, draining=draining))

    def given(self, slot: int) -> list[GenerationRequest]:
        """Requests that a slot was given."""
        return [body.request for to, body in list(self.sent) if to == slot and isinstance(body, Generate)]


@pytest.fixture
def engines() -> Engines:
    return Engines()


@pytest.fixture
def ingress(engines: Engines) -> Iterator[Ingress]:
    found = Ingress("job", engines, engines, DEADLINE_S, places=PLACES)
    engines.routes(0, 1)
    wait(lambda: not found.reason)
    yield found
    found.close()


def wait(condition: Any, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def request(name: str = "a") -> GenerationRequest:
    return GenerationRequest(request_id=name, prompt_tokens=(1, 2), max_tokens=20, priority=3)


async def take(stream: AsyncGenerator[list[TokenEvent], None], count: int) -> list[int | None]:
    found: list[TokenEvent] = []
    while len(found) < count:
        found += await asyncio.wait_for(anext(stream), 10.0)
    assert len(found) == count
    return [event.token_id for event in found]


async def until(condition: Any) -> None:
    await asyncio.to_thread(wait, condition)


def test_what_an_engine_says_after_its_request_has_moved_is_dropped(
    engines: Engines, ingress: Ingress
) -> None:
    async def story() -> list[int | None]:
        stream = ingress.generate(request())
        first = asyncio.create_task(take(stream, 2))
        await until(lambda: engines.given(0))
        engines.tokens(0, "a", 0, 1)
        found = await first
        engines.mute.add(0)
        rest = asyncio.create_task(take(stream, 3))
        await until(lambda: engines.given(1))
        (moved,) = engines.given(1)
        # It goes on after the tokens that it has, before those who wait for a first one; and the old engine forgets it.
        assert (moved.resume_tokens, moved.priority) == ((0, 10), 2)
        assert (0, Cancel(request_id="a")) in engines.sent
        engines.tokens(0, "a", 2, 3)
        engines.tokens(1, "a", 1, 2)
        engines.tokens(1, "a", 2, 3, end=True)
        return found + await rest

    assert asyncio.run(story()) == [0, 10, 20, 30, None]


@pytest.mark.parametrize("how", ["ended", "moved", "gone from the routes"])
def test_a_request_leaves_an_engine_that_is_none_any_more(
    engines: Engines, ingress: Ingress, how: str
) -> None:
    async def story() -> list[int | None]:
        rest = asyncio.create_task(take(ingress.generate(request()), 2))
        await until(lambda: engines.given(0))
        if how == "ended":
            engines.ended.add(0)
        elif how == "moved":
            engines.say(0, Moved(request_ids=("a",)))
        else:
            engines.routes(1)
        await asyncio.to_thread(wait, lambda: engines.given(1), 0.5)
        engines.tokens(1, "a", 0, end=True)
        return await rest

    assert asyncio.run(story()) == [0, None]


def test_an_engine_that_drains_gets_nothing_new_unless_there_is_no_other(
    engines: Engines, ingress: Ingress
) -> None:
    async def begin(name: str) -> asyncio.Task[Any]:
        task = asyncio.create_task(take(ingress.generate(request(name)), 2))
        await until(lambda: name in [r.request_id for slot in (0, 1) for r in engines.given(slot)])
        return task

    async def story() -> None:
        engines.routes(0, 1, draining=(0,))
        await until(lambda: ingress.draining == (0,))
        tasks = [await begin(name) for name in "abc"]
        assert [r.request_id for r in engines.given(1)] == ["a", "b", "c"]
        engines.routes(0, draining=(0,))
        await until(lambda: len(engines.given(0)) == 3)
        for name in "abc":
            engines.tokens(0, name, 0, end=True)
        assert [await task for task in tasks] == [[0, None]] * 3

    asyncio.run(story())


def test_an_engine_that_answers_pings_and_makes_no_progress_loses_a_request_once(
    engines: Engines, ingress: Ingress
) -> None:
    async def story() -> None:
        rest = asyncio.create_task(take(ingress.generate(request()), 1))
        await until(lambda: engines.given(1))
        with pytest.raises(SlotLostError, match=r"slot 1 made no progress for 1 s"):
            await rest
        assert len(engines.given(0)) == len(engines.given(1)) == 1

    asyncio.run(story())


def test_steps_without_a_token_are_progress(engines: Engines, ingress: Ingress) -> None:
    async def story() -> list[int | None]:
        rest = asyncio.create_task(take(ingress.generate(request()), 2))
        await until(lambda: engines.given(0))
        for _ in range(10):
            await asyncio.sleep(DEADLINE_S / 5)
            engines.say(0, Tokens())
        engines.tokens(0, "a", 0, end=True)
        return await rest

    assert asyncio.run(story()) == [0, None]


def test_a_request_is_sent_at_once_and_ends_without_a_reader(engines: Engines, ingress: Ingress) -> None:
    async def story() -> None:
        stream = ingress.generate(request())
        assert [found.request_id for found in engines.given(0) + engines.given(1)] == ["a"]
        for _ in range(2):
            await ingress.cancel("a")
        assert [body for _, body in engines.sent if isinstance(body, Cancel)] == [Cancel(request_id="a")]
        assert not ingress._open and not ingress._load.total()
        await stream.aclose()

    asyncio.run(story())


def test_a_patient_reader_gets_the_first_token_at_once_and_the_others_together(
    engines: Engines, ingress: Ingress
) -> None:
    async def story() -> list[list[int]]:
        stream, runs = ingress.generate(request(), patience=3), list[list[int]]()

        async def read() -> None:
            async for run in stream:
                runs.append([event.index for event in run])

        reader = asyncio.create_task(read())
        await until(lambda: engines.given(0))
        engines.tokens(0, "a", 0)
        await until(lambda: len(runs) == 1)
        for index in (1, 2):
            engines.tokens(0, "a", index)
        await asyncio.sleep(0.1)
        assert len(runs) == 1
        engines.tokens(0, "a", 3)
        await until(lambda: len(runs) == 2)
        engines.tokens(0, "a", 4, end=True)
        await asyncio.wait_for(reader, 10.0)
        return runs

    assert asyncio.run(story()) == [[0], [1, 2, 3], [4, 5]]


def test_the_end_of_the_job_ends_every_request_with_its_reason(engines: Engines, ingress: Ingress) -> None:
    async def story() -> None:
        rest = asyncio.create_task(take(ingress.generate(request()), 1))
        await until(lambda: engines.given(0))
        ingress.fail("the journal is gone")
        with pytest.raises(SlotLostError, match="the journal is gone"):
            await rest

    asyncio.run(story())
    assert ingress.reason == ingress.failure == "the journal is gone"


@pytest.fixture
def one_engine(engines: Engines) -> Iterator[Ingress]:
    """A patient ingress that knows engine 0 alone."""
    found = Ingress("job", engines, engines, 20 * DEADLINE_S, places=PLACES)
    engines.routes(0)
    wait(lambda: not found.reason)
    yield found
    found.close()


def test_what_waits_at_a_full_engine_goes_to_a_new_one_the_latest_first(
    engines: Engines, one_engine: Ingress
) -> None:
    async def story() -> None:
        open_ = {name: one_engine.generate(request(name)) for name in "abcdef"}
        streams = {name: asyncio.create_task(take(stream, 1)) for name, stream in open_.items()}
        await until(lambda: len(engines.given(0)) == 6)
        engines.tokens(0, "a", 0)
        engines.tokens(0, "f", 0)
        await asyncio.wait([streams["a"], streams["f"]])
        engines.routes(0, 1)
        await until(lambda: len(engines.given(1)) == 3)
        # Those that were begun stay, and so does what then has no more than its share in front of it.
        assert [found.request_id for found in engines.given(1)] == ["e", "d", "c"]
        assert [body.request_id for to, body in engines.sent if isinstance(body, Cancel)] == ["e", "d", "c"]
        await asyncio.sleep(0.3)
        assert len(engines.given(1)) == 3 and len(engines.given(0)) == 6
        for name in "bcde":
            engines.tokens(0 if name == "b" else 1, name, 0)
        await asyncio.gather(*streams.values())

    asyncio.run(story())


def test_what_an_engine_has_places_for_stays_there(engines: Engines, one_engine: Ingress) -> None:
    async def story() -> None:
        streams = [asyncio.create_task(take(one_engine.generate(request(name)), 1)) for name in "ab"]
        await until(lambda: len(engines.given(0)) == 2)
        engines.routes(0, 1)
        await asyncio.sleep(0.3)
        assert not engines.given(1)
        for name in "ab":
            engines.tokens(0, name, 0)
        await asyncio.gather(*streams)

    asyncio.run(story())
