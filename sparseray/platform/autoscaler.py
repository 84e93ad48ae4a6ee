"""What the slots of a server say of their load, kept for a minute, and what the policy makes of it twice a second.

Between the server's loop (serving.py), which hands on what it hears and carries out what comes of it, and the policy
(planning/autoscale.py), which is pure. Time is passed in.
"""

import math
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from sparseray.actors.serving.messages import EngineLoad, Load
from sparseray.actors.serving.pace import bucket_s
from sparseray.platform.config import ClusterConfig, ServeConfig
from sparseray.platform.planning.autoscale import (
    EngineView,
    Scaling,
    ShardView,
    Speed,
    engines,
    forecast,
    late,
    shards,
)
from sparseray.platform.planning.inventory import Inventory, Roles

ROLES = ("attention", "experts", "memory")
EVERY_S = 0.5
SUDDEN_S, SHORT_S, FIT_S, KEPT_S = 2.0, 5.0, 20.0, 60.0
"""Windows: of a sudden load; of latencies and a load; of an engine's speed; of what a load is at most."""
SILENT_S = 2.0
"""What a slot said so long ago is not what it has at hand now."""
FORGET_S = 1800.0
"""What was seen of another number of engines counts so long: the machine may have changed."""
FEWEST_TOKENS, FEWEST_STEPS = 8, 30
COMPARED = 2.0
"""Engines with a larger mean batch than that are all at work, and show whether they hinder each other."""
SURELY, WITH_QUEUE, SURELY_NOT = 3.0, 2.0, 2.0
"""Standard deviations by which what came by chance is below what is taken for a load, or below where requests wait too; above."""
SHARE = 0.9


@dataclass(frozen=True, kw_only=True)
class Heard:
    """A report: when it came, from whom, under how many engines."""

    at: float
    slot: int
    engines: int
    load: Load


@dataclass(frozen=True, kw_only=True)
class Situation:
    """What is there besides what slots say.

    Args:
        now, wanted: slots of each role that the plan has, and that are wanted.
        room: most slots of each role that the cluster could give.
    """

    now: Roles
    wanted: Roles
    room: Roles


@dataclass(kw_only=True)
class _Seen:
    """Values by number of engines, each forgotten after a while."""

    values: dict[int, tuple[float, float]] = field(default_factory=dict)

    def note(self, count: int, value: float, now: float, better: Callable[[float, float], float]) -> None:
        kept = self.at(now).get(count, value)
        self.values[count] = (better(kept, value), now)

    def at(self, now: float) -> dict[int, float]:
        return {count: value for count, (value, at) in self.values.items() if now - at < FORGET_S}


class Autoscaler:
    """Decides how many engines and shards a server shall have.

    Args:
        serve: targets and bounds.
        cluster: slots of each role that the server began with: the least of shards.
        inventory: what there is to place: the most of shards.
    """

    def __init__(self, serve: ServeConfig, cluster: ClusterConfig, inventory: Inventory) -> None:
        self.serve, self.least, self.inventory = serve, inventory.roles(cluster), inventory
        self._heard: deque[Heard] = deque()
        self._seen, self._missed = _Seen(), _Seen()
        self._counts: dict[str, tuple[int, int]] = {}
        self._changed = dict.fromkeys(ROLES, -math.inf)

    def hear(self, slot: int, load: Load, now: float) -> None:
        """Take note of what a slot says.

        Args:
            slot: which.
            load: what it did.
            now: time.
        """
        count, _ = self._counts.get("attention", (0, 0))
        self._heard.append(Heard(at=now, slot=slot, engines=count, load=load))

    def decide(self, there: Situation, now: float) -> dict[str, Scaling]:
        """Return what is wanted of each role that the server scales by itself, changed or not.

        Args:
            there: slots of each role.
            now: time.
        """
        while self._heard and now - self._heard[0].at > KEPT_S:
            self._heard.popleft()
        for role in ROLES:
            counts = (getattr(there.now, role), getattr(there.wanted, role))
            if counts != self._counts.get(role):
                self._counts[role] = counts
                self._changed[role] = now
        found = {}
        if self.serve.max_engines:
            found["attention"] = self._decide_engines(there, now)
        for role, most in (
            ("experts", self.serve.max_expert_shards),
            ("memory", self.serve.max_memory_shards),
        ):
            if most and getattr(self.least, role):
                found[role] = shards(self._shards(role, most, there, now))
        return found

    # -- engines ---------------------------------------------------------------------------------------

    def _decide_engines(self, there: Situation, now: float) -> Scaling:
        speed = self._speed(there.now.attention, now)
        view = self.view(there, now)
        if speed is not None and view.batch >= COMPARED:
            half = view.max_batch / 2
            self._seen.note(view.now, view.now * half / speed.step_s(half), now, lambda _, new: new)
            view = replace(view, seen=self._seen.at(now))
        found = engines(view)
        is_missing = found.count > view.wanted == view.now or (late(view) and view.since_change_s > SHORT_S)
        if is_missing and view.rows_at_most:
            self._missed.note(view.now, view.rows_at_most, now, min)
        return found

    def view(self, there: Situation, now: float) -> EngineView:
        """What the policy sees of the engines.

        Args:
            there: slots of each role.
            now: time.
        """
        serve, count = self.serve, there.now.attention
        latest = self._latest(now)
        # What was before the last change tells nothing of what is, nor does the second in which it happens.
        since = now - self._changed["attention"] - 1.0
        warm = self._engine(min(SHORT_S, since), now, is_warm=True)
        steps, rows = sum(e.steps for e in warm), sum(e.rows for e in warm)
        per_request, prefill_steps = self._sizes(now)
        waiting = sum(e.waiting for e in latest)
        queued = any(e.waiting for e in self._engine(SUDDEN_S, now))
        at_least, at_most = self._arrivals(now, WITH_QUEUE if queued else SURELY)
        return EngineView(
            now=count,
            wanted=there.wanted.attention,
            least=serve.min_engines,
            most=min(serve.max_engines, there.room.attention),
            max_batch=serve.max_batch,
            target_ttft_s=serve.target_ttft_ms / 1000,
            target_itl_s=serve.target_itl_ms / 1000,
            waiting=waiting,
            running=sum(e.running for e in latest),
            cache_per_request=max((e.cache_usage / e.running for e in latest if e.running), default=0.0),
            ttft_s=_nine_of_ten([e.ttft for e in warm]),
            itl_s=_nine_of_ten([e.itl for e in warm]),
            batch=rows / steps if steps else 0.0,
            rows_at_least=at_least * per_request,
            rows_at_most=at_most * per_request,
            rows_per_request=per_request,
            prefill_steps=prefill_steps,
            speed=self._speed(count, now) or self._speed(None, now),
            seen=self._seen.at(now),
            missed=self._missed.at(now),
            since_change_s=now - self._changed["attention"],
        )

    def _speed(self, count: int | None, now: float) -> Speed | None:
        """Of warm engines while there were so many, or of late whatever their number; None where they did too little."""
        heard = self._engine(KEPT_S if count is None else FIT_S, now, is_warm=True, count=count)
        if count is not None and sum(e.steps for e in heard) < FEWEST_STEPS:
            return None
        return Speed.fit([(e.steps, e.rows, e.busy_s) for e in heard])

    def _sizes(self, now: float) -> tuple[float, float]:
        """Rows of a request, prompt included, and steps from its place in a batch to its first token."""
        kept = self._engine(KEPT_S, now)
        ended, begun = sum(e.finished for e in kept), sum(sum(e.ttft.values()) for e in kept)
        if not begun:
            return 1.0, 1.0
        tokens = sum(e.tokens for e in kept)
        chunks = max(0.0, (sum(e.rows for e in kept) - tokens) / begun)
        length = sum(e.finished_tokens for e in kept) / ended if ended else tokens / begun
        return max(1.0, length + chunks), 1 + chunks

    def _engine(
        self, window_s: float, now: float, *, is_warm: bool = False, count: int | None = None
    ) -> list[EngineLoad]:
        """What engines said within a window."""
        return [
            heard.load.engine
            for heard in self._heard
            if now - heard.at <= window_s
            and heard.load.engine is not None
            and not (is_warm and heard.load.engine.is_cold)
            and count in (None, heard.engines)
        ]

    def _latest(self, now: float) -> list[EngineLoad]:
        """The last word of every engine that is not silent."""
        last = {heard.slot: heard for heard in self._heard if now - heard.at <= SILENT_S}
        return [heard.load.engine for heard in last.values() if heard.load.engine is not None]

    def _arrivals(self, now: float, surely: float) -> tuple[float, float]:
        """Requests a second that surely come, and that are surely not exceeded.

        Args:
            now: time.
            surely: standard deviations by which chance may have added to what came.
        """
        at_least, at_most = 0.0, 0.0
        started = self._heard[0].at if self._heard else now
        for window_s in (SUDDEN_S, SHORT_S, KEPT_S):
            seconds = min(window_s, max(SUDDEN_S, now - started))
            arrived = sum(e.arrived for e in self._engine(window_s, now))
            spread = math.sqrt(arrived)
            if window_s < KEPT_S:
                at_least = max(at_least, (arrived - surely * spread) / seconds)
            if window_s > SUDDEN_S:
                at_most = max(at_most, (arrived + SURELY_NOT * spread) / seconds)
        return at_least, at_most

    # -- shards ----------------------------------------------------------------------------------------

    def _shards(self, role: str, most: int, there: Situation, now: float) -> ShardView:
        pieces = self.inventory.experts if role == "experts" else self.inventory.buckets
        wanted: int = getattr(there.wanted, role)
        count: int = getattr(there.now, role)
        shares = [self._busy(role, count, at, now) for at in (SHORT_S, KEPT_S / 2)]
        changed = self._changed[role]
        return ShardView(
            now=count,
            wanted=wanted,
            least=getattr(self.least, role),
            most=min(most, pieces, getattr(there.room, role)),
            busy=shares[0] if now - changed > SHORT_S else None,
            busy_at_most=max(share or 0.0 for share in shares),
            since_change_s=now - changed,
        )

    def _busy(self, role: str, count: int, window_s: float, now: float) -> float | None:
        """Mean share of their time that the shards of a role answered within a window."""
        heard = [h for h in self._heard if now - h.at <= window_s]
        if not heard:
            return None
        answered = sum(h.load.answered_s.get(role, 0.0) for h in heard)
        seconds: dict[int, float] = {}
        for h in heard:
            seconds[h.slot] = seconds.get(h.slot, 0.0) + h.load.seconds
        return answered / (count * max(seconds.values()))

    def show(self, there: Situation, now: float, record: Callable[..., None]) -> None:
        """Record as metrics what is seen, whether or not anything is scaled by it.

        Args:
            there: slots of each role.
            now: time.
            record: takes name, value and labels.
        """
        view = self.view(there, now)
        record("autoscale_latency_seconds", view.ttft_s or 0.0, token="first")
        record("autoscale_latency_seconds", view.itl_s or 0.0, token="next")
        record("autoscale_target_seconds", view.target_ttft_s, token="first")
        record("autoscale_target_seconds", view.target_itl_s, token="next")
        rows_per_s = sum(e.rows for e in self._engine(SHORT_S, now)) / SHORT_S
        busy = forecast(view, view.now, rows_per_s).busy if view.now else 0.0
        record("autoscale_busy_ratio", min(1.0, busy), role="attention")
        for role in ROLES[1:]:
            count: int = getattr(there.now, role)
            if count:
                record("autoscale_busy_ratio", self._busy(role, count, SHORT_S, now) or 0.0, role=role)
        for role in ROLES:
            record("autoscale_wanted_slots", getattr(there.wanted, role), role=role)


def _nine_of_ten(counts: list[dict[int, int]]) -> float | None:
    """Seconds within which nine of ten latencies were; None where there are too few."""
    total: Counter[int] = Counter()
    for one in counts:
        total.update(one)
    whole, below = sum(total.values()), 0
    if whole < FEWEST_TOKENS:
        return None
    for number in sorted(total):
        below += total[number]
        if below >= SHARE * whole:
            break
    return bucket_s(number)
