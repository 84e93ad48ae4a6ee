"""The pace of a slot that serves: what its engine and its shards did since it was last told.

The engine's role (engine_role.py) notes requests, steps and answers here; twice a second all of it goes to the
scheduler as one `Load`, from which the autoscaler makes its forecasts. Time is passed in.
"""

import math
from collections import Counter
from collections.abc import Sequence

from sparseray.actors.serving.engine import EngineStats
from sparseray.actors.serving.messages import EngineLoad, Load
from sparseray.actors.serving.text_request import TokenEvent

EVERY_S = 0.5
COLD_STEPS = 16
"""First steps of an engine, in which loops are compiled and caches are cold; what they take tells nothing."""
_STEP = math.log(1.1)


def bucket(seconds: float) -> int:
    """Number of the bucket of a latency; buckets are 10 % apart."""
    return round(math.log(max(seconds, 1e-5)) / _STEP)


def bucket_s(number: int) -> float:
    """Seconds in the middle of a bucket."""
    return math.exp(number * _STEP)


class Pace:
    """Adds up what a slot does between two reports.

    Args:
        now: of the first interval's start, seconds of the clock that all times come from.
    """

    def __init__(self, now: float) -> None:
        self._since, self._steps_ever = now, 0
        self._open: dict[str, tuple[float, bool, int]] = {}
        self._answered_s: dict[str, float] = {}
        self._clear()

    def _clear(self) -> None:
        self._steps = self._rows = self._arrived = self._tokens = self._finished = self._finished_tokens = 0
        self._busy_s, self._is_cold = 0.0, self._steps_ever < COLD_STEPS
        self._ttft, self._itl = Counter[int](), Counter[int]()

    def is_due(self, now: float) -> bool:
        """Whether it is time to report."""
        return now - self._since >= EVERY_S

    def arrived(self, request_id: str, now: float, *, is_resumed: bool) -> None:
        """Take note of a request.

        Args:
            request_id: of it.
            now: time.
            is_resumed: whether another engine had begun it: it is no new load.
        """
        self._arrived += not is_resumed
        self._open[request_id] = (now, is_resumed, 0)

    def left(self, request_id: str) -> None:
        """Take note that a request is here no longer, without an end of its own."""
        self._open.pop(request_id, None)

    def stepped(self, seconds: float, batch: int, events: Sequence[TokenEvent], now: float) -> None:
        """Take note of a step of the engine.

        Args:
            seconds: that it took.
            batch: requests in it; 0 where it came to nothing.
            events: what it gave.
            now: time.
        """
        if batch:
            self._steps_ever += 1
            self._steps += 1
            self._rows += batch
            self._busy_s += seconds
        for event in events:
            self._token(event, now)

    def _token(self, event: TokenEvent, now: float) -> None:
        found = self._open.get(event.request_id)
        if found is None:
            return
        at, has_begun, tokens = found
        if event.token_id is not None:
            tokens += 1
            self._tokens += 1
            (self._itl if has_begun else self._ttft)[bucket(now - at)] += 1
            self._open[event.request_id] = (now, True, tokens)
        if event.finish_reason is not None:
            del self._open[event.request_id]
            self._finished += 1
            self._finished_tokens += tokens

    def answered(self, role: str, seconds: float) -> None:
        """Take note of time that a shard took to answer.

        Args:
            role: experts or memory.
            seconds: spent.
        """
        self._answered_s[role] = self._answered_s.get(role, 0.0) + seconds

    def new_engine(self) -> None:
        """Take note that the engine is another one, and cold."""
        self._steps_ever = 0
        self._is_cold = True

    def take(
        self,
        now: float,
        stats: EngineStats | None,
        cache_usage: float,
        *,
        version: int = 0,
        num_earlier: int = 0,
    ) -> Load:
        """Return what happened since the last call.

        Args:
            now: time.
            stats: of the engine; None where there is none.
            cache_usage: of the engine.
            version: of the weights that the slot serves.
            num_earlier: requests that it has of the version before.
        """
        engine = None
        if stats is not None:
            engine = EngineLoad(
                is_cold=self._is_cold,
                waiting=stats.waiting,
                running=stats.running,
                cache_usage=float(cache_usage),
                arrived=self._arrived,
                finished=self._finished,
                finished_tokens=self._finished_tokens,
                tokens=self._tokens,
                steps=self._steps,
                rows=self._rows,
                busy_s=self._busy_s,
                ttft=dict(self._ttft),
                itl=dict(self._itl),
            )
        found = Load(
            seconds=now - self._since,
            answered_s=dict(self._answered_s),
            engine=engine,
            version=version,
            num_earlier=num_earlier,
        )
        self._since = now
        self._answered_s.clear()
        self._clear()
        return found
