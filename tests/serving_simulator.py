"""A made-up server on a made-up clock: engines with a service rate, queues and a start delay, and the real autoscaler.

Requests come at random from a seed. An engine's step takes `fixed_s + per_row_s * batch`, with noise; what it does is
told by the real `Pace`, as a slot would.
"""

import heapq
import itertools
import math
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from sparseray.actors.serving.engine import EngineStats
from sparseray.actors.serving.pace import EVERY_S, Pace
from sparseray.actors.serving.text_request import TokenEvent
from sparseray.platform.autoscaler import Autoscaler, Situation
from sparseray.platform.config import ClusterConfig, ServeConfig
from sparseray.platform.planning.inventory import Inventory, Roles

COLD_FACTOR, COLD = 6.0, 10


@dataclass
class Request:
    name: str
    at: float
    prefills: int
    tokens: int
    made: int = 0
    last: float = 0.0


@dataclass
class MadeEngine:
    """One engine: its queue, its batch and its pace."""

    pace: Pace
    waiting: deque[Request] = field(default_factory=deque)
    running: list[Request] = field(default_factory=list)
    steps: int = 0
    is_stepping: bool = False


@dataclass(frozen=True, kw_only=True)
class Service:
    """What engines can do: step time, requests' sizes, and how long a slot takes to start."""

    fixed_s: float = 0.01
    per_row_s: float = 0.002
    noise: float = 0.1
    cores: int = 1 << 16
    prefills: int = 2
    tokens: int = 30
    standby: int = 1
    enter_s: float = 0.3
    start_s: float = 8.0


class Simulation:
    """A server under a trace.

    Args:
        rate: requests a second at a time.
        serve: targets and bounds.
        service: what engines can do.
        begin: engines at the start.
        room: most engines that the cluster has room for.
        seed: of arrivals, sizes and noise.
        at: what a user does, by time.
    """

    def __init__(
        self,
        rate: Callable[[float], float],
        serve: ServeConfig,
        service: Service = Service(),
        *,
        begin: int = 1,
        room: int = 16,
        seed: int = 0,
        at: dict[float, Callable[["Simulation"], None]] | None = None,
    ) -> None:
        self.rate, self.serve, self.service, self.room = rate, serve, service, room
        self.random = random.Random(seed)
        self.now, self.wanted, self.standby = 0.0, begin, service.standby
        self.engines = {slot: MadeEngine(Pace(0.0)) for slot in range(begin)}
        self.slots, self.names, self.order = itertools.count(begin), itertools.count(), itertools.count()
        self.events: list[tuple[float, int, Callable[[], None]]] = []
        inventory = Inventory(parts=0, moe_layers=1, experts=8, dse_layers=1, buckets=6)
        self.scaler = Autoscaler(serve, ClusterConfig(), inventory)
        self.changes: list[tuple[float, int, int, str]] = []
        self.ttft: list[tuple[float, float]] = []
        self.itl: list[tuple[float, float]] = []
        self.counts: list[tuple[float, int]] = []
        self.lost = 0
        self.pending = 0
        for when, do in (at or {}).items():
            self.after(when, lambda do=do: do(self))  # type: ignore[misc]

    def after(self, seconds: float, do: Callable[[], None]) -> None:
        heapq.heappush(self.events, (self.now + seconds, next(self.order), do))

    def run(self, until: float) -> "Simulation":
        self._next_arrival()
        self.after(EVERY_S, self._look)
        while self.events and self.events[0][0] <= until:
            self.now, _, do = heapq.heappop(self.events)
            do()
        return self

    # -- requests --------------------------------------------------------------------------------------

    def _next_arrival(self) -> None:
        most = 200.0

        def arrive() -> None:
            if self.random.random() < self.rate(self.now) / most:
                size = max(1, round(self.random.expovariate(1 / self.service.tokens)))
                self._give(Request(f"r{next(self.names)}", self.now, self.service.prefills, size))
            self._next_arrival()

        self.after(self.random.expovariate(most), arrive)

    def _give(self, request: Request) -> None:
        slot = min(self.engines, key=lambda s: len(self.engines[s].waiting) + len(self.engines[s].running))
        engine = self.engines[slot]
        engine.pace.arrived(request.name, self.now, is_resumed=request.made > 0)
        request.prefills = self.service.prefills
        engine.waiting.append(request)
        self._begin_step(engine)

    def _begin_step(self, engine: MadeEngine) -> None:
        while engine.waiting and len(engine.running) < self.serve.max_batch:
            engine.running.append(engine.waiting.popleft())
        if engine.is_stepping or not engine.running:
            return
        engine.is_stepping = True
        batch, service = list(engine.running), self.service
        busy = sum(e.is_stepping for e in self.engines.values())
        seconds = service.fixed_s + service.per_row_s * len(batch)
        seconds *= max(1.0, busy / service.cores) * math.exp(self.random.gauss(0.0, service.noise))
        seconds *= COLD_FACTOR if engine.steps < COLD else 1.0
        self.after(seconds, lambda: self._end_step(engine, batch, seconds))

    def _end_step(self, engine: MadeEngine, batch: list[Request], seconds: float) -> None:
        engine.is_stepping = False
        engine.steps += 1
        if engine not in self.engines.values():
            return
        events = []
        for request in batch:
            request.prefills = max(0, request.prefills - 1)
            if request.prefills:
                continue
            (self.itl if request.made else self.ttft).append(
                (self.now, self.now - (request.last or request.at))
            )
            request.made, request.last = request.made + 1, self.now
            finish = "length" if request.made >= request.tokens else None
            events.append(
                TokenEvent(request_id=request.name, index=request.made - 1, token_id=1, finish_reason=finish)
            )
            if finish:
                engine.running.remove(request)
        engine.pace.stepped(seconds, len(batch), events, self.now)
        self._begin_step(engine)

    # -- slots -----------------------------------------------------------------------------------------

    def _look(self) -> None:
        for slot, engine in self.engines.items():
            stats = EngineStats(waiting=len(engine.waiting), running=len(engine.running))
            usage = len(engine.running) / self.serve.max_batch
            self.scaler.hear(slot, engine.pace.take(self.now, stats, usage), self.now)
        there = Situation(
            now=Roles(attention=len(self.engines), experts=1, memory=1),
            wanted=Roles(attention=self.wanted, experts=1, memory=1),
            room=Roles(attention=self.room, experts=1, memory=1),
        )
        decided = self.scaler.decide(there, self.now)["attention"]
        if decided.count != self.wanted:
            self.changes.append((self.now, self.wanted, decided.count, decided.reason))
            self.scale(decided.count)
        self.counts.append((self.now, len(self.engines)))
        self.after(EVERY_S, self._look)

    def scale(self, count: int) -> None:
        self.wanted = count
        while len(self.engines) > count:
            gone = self.engines.pop(max(self.engines))
            self.standby += 1
            for request in (*gone.running, *gone.waiting):
                self._give(request)
        for _ in range(count - len(self.engines) - self.pending):
            is_warm, self.standby = self.standby > 0, max(0, self.standby - 1)
            self.pending += 1
            self.after(self.service.enter_s if is_warm else self.service.start_s, self._enter)

    def _enter(self) -> None:
        self.pending -= 1
        if len(self.engines) < self.wanted:
            self.engines[next(self.slots)] = MadeEngine(Pace(self.now))

    # -- what came of it -------------------------------------------------------------------------------

    def held_since(self, begun: float, *, window_s: float = 1.0, share: float = 0.0) -> float:
        """Seconds after `begun` from which on nine of ten tokens keep their targets in every window of a second.

        Args:
            begun: time.
            window_s: seconds of a window.
            share: of the windows may miss them all the same, by chance.
        """
        missing: set[int] = set()
        targets = (
            (self.ttft, self.serve.target_ttft_ms / 1000),
            (self.itl, self.serve.target_itl_ms / 1000),
        )
        for values, target in targets:
            windows: dict[int, list[float]] = {}
            for when, value in values:
                if when >= begun:
                    windows.setdefault(int((when - begun) / window_s), []).append(value)
            missing |= {n for n, of in windows.items() if sorted(of)[math.ceil(0.9 * len(of)) - 1] > target}
        chance = share * (self.now - begun) / window_s
        for number in sorted(missing, reverse=True):
            if chance < 1:
                return (number + 1) * window_s
            chance -= 1
        return 0.0
