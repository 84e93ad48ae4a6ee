"""How many engines and shards a server needs, as a function of what was seen of them; pure: no time, no randomness.

An engine's step takes `fixed_s + per_row_s * batch`, and the requests in a batch follow from what comes in (Little's
law): so what m engines would do at a load can be told before there are m. What was measured corrects the forecast,
more engines are wanted at a load that has surely come, fewer at one that is surely not exceeded; what has been seen to
miss the targets is not tried again at that load.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

FULL = 0.85
"""Share of what engines can do, or of their caches, beyond which queues grow by chance alone."""
MARGIN = 0.7
"""Share of targets and of `FULL` that fewer engines must keep to."""
LEAST_GAIN = 0.1
"""Part of a latency or of the throughput that another engine must improve."""
DRAIN_S = 4.0
"""Seconds in which requests that wait by now are to find a place."""
DOWN_S = 30.0
"""Least seconds between any change and one to fewer."""
SETTLE_S = 3.0
"""Seconds after a change in which latencies are still those from before it."""
SHARD_BUSY, SHARD_IDLE = 0.7, 0.4
"""Share of its time that a shard answers: more than that wants another, less with one shard fewer can spare it."""


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Time of one step of an engine, in seconds: `fixed_s + per_row_s * batch`."""

    fixed_s: float
    per_row_s: float

    @staticmethod
    def fit(samples: Sequence[tuple[int, int, float]]) -> "Speed | None":
        """Least squares over warm samples; None where there is none.

        Batches that hardly differ tell nothing of the slope: then half of the time counts as fixed.

        Args:
            samples: steps, sum of their batches, seconds that they took.
        """
        samples = [sample for sample in samples if sample[0]]
        steps = sum(count for count, _, _ in samples)
        if not steps:
            return None
        mean_batch = sum(rows for _, rows, _ in samples) / steps
        mean_s = sum(seconds for _, _, seconds in samples) / steps
        if not mean_batch:
            return None
        doubt = 0.05 * mean_batch**2
        covariance, variance = doubt * mean_s / (2 * mean_batch), doubt
        for count, rows, seconds in samples:
            apart = rows / count - mean_batch
            covariance += count / steps * apart * (seconds / count - mean_s)
            variance += count / steps * apart**2
        per_row_s = min(max(covariance / variance, 0.0), mean_s / mean_batch)
        return Speed(fixed_s=mean_s - per_row_s * mean_batch, per_row_s=per_row_s)

    def step_s(self, batch: float) -> float:
        """Seconds of a step with so many requests; at least one."""
        return self.fixed_s + self.per_row_s * max(1.0, batch)

    def batch(self, rows_per_s: float) -> float:
        """Requests in the batch of an engine that gets so many rows a second; infinite if it cannot keep up."""
        spare = 1 - rows_per_s * self.per_row_s
        return rows_per_s * self.fixed_s / spare if spare > 0 else math.inf


@dataclass(frozen=True, kw_only=True)
class EngineView:
    """What the policy may look at. A row is one request's part of one engine step.

    Args:
        now, wanted: engines that answer, and those asked for; the difference is pending and blocks nothing.
        least, most: bounds, of the settings and of the room that there is.
        max_batch: requests that fit into a batch.
        target_ttft_s, target_itl_s: seconds in which nine of ten first and next tokens shall come; 0 for any.
        waiting, running: requests at all engines.
        cache_per_request: share of an engine's cache that a request in its batch has reserved, 0 to 1.
        ttft_s, itl_s: seconds in which nine of ten came of late, of warm engines; None where too few came.
        batch: mean batch of warm engines of late; 0 where none computed.
        rows_at_least, rows_at_most: load, in rows a second, that has surely come and is surely not exceeded.
        rows_per_request: of a request, prompt included.
        prefill_steps: steps from a place in the batch to the first token.
        speed: of a warm engine, in the present company; None where none has computed.
        seen: rows a second that so many engines together would do with half full batches, as they were seen at work.
        missed: by number of engines, the least load in rows a second at which they were seen to miss the targets.
        since_change_s: seconds since the number of engines changed.
    """

    now: int
    wanted: int
    least: int
    most: int
    max_batch: int
    target_ttft_s: float = 0.0
    target_itl_s: float = 0.0
    waiting: int = 0
    running: int = 0
    cache_per_request: float = 0.0
    ttft_s: float | None = None
    itl_s: float | None = None
    batch: float = 0.0
    rows_at_least: float = 0.0
    rows_at_most: float = 0.0
    rows_per_request: float = 1.0
    prefill_steps: float = 1.0
    speed: Speed | None = None
    seen: Mapping[int, float] = field(default_factory=dict)
    missed: Mapping[int, float] = field(default_factory=dict)
    since_change_s: float = math.inf


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """Wanted number of slots of a role, and why."""

    count: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What a number of engines would do at a load.

    Args:
        busy: share of what they can do, without bound.
        batch: requests in each one's batch.
        ttft_s, itl_s: seconds in which nine of ten tokens would come.
        cache_usage: of each.
    """

    busy: float
    batch: float
    ttft_s: float
    itl_s: float
    cache_usage: float


def engines(view: EngineView) -> Scaling:
    """Return the number of engines that shall be there."""
    n = view.wanted
    if n < view.least:
        return Scaling(count=view.least, reason=f"serve.min_engines is {view.least}")
    if n > view.most >= view.least:
        return Scaling(count=view.most, reason=f"serve.max_engines or the cluster's room is {view.most}")
    load = view.rows_at_least + view.waiting * view.rows_per_request / DRAIN_S
    if view.speed is None and load:
        return Scaling(count=n, reason="no engine that is warm has computed anything yet")
    if why := complaint(view, n, load):
        return _more(view, load, why)
    if why := late(view):
        return _one_more(view, why)
    return _fewer(view)


def forecast(view: EngineView, count: int, rows_per_s: float) -> Forecast:
    """Tell what so many engines would do.

    Args:
        view: what was seen.
        count: engines.
        rows_per_s: load of all of them together.
    """
    speed, each = view.speed or Speed(fixed_s=0.0, per_row_s=0.0), rows_per_s / count
    batch = speed.batch(each)
    itl_s = speed.step_s(batch)
    waits = waiting_s(count * view.max_batch, count * batch, view.rows_per_request * itl_s)
    if view.itl_s is not None and view.batch:
        # What nine of ten keep to is above the mean, and the machine may have changed.
        itl_s *= view.itl_s / speed.step_s(view.batch)
    return Forecast(
        busy=max(each * speed.per_row_s, batch / view.max_batch),
        batch=batch,
        ttft_s=waits + (view.prefill_steps + 0.5) * itl_s,
        itl_s=itl_s,
        cache_usage=view.cache_per_request * batch if view.cache_per_request else 0.0,
    )


def waiting_s(places: int, taken: float, stay_s: float) -> float:
    """Seconds in which nine of ten requests find a place: Erlang's C formula, of random arrivals and stays (M/M/c).

    Args:
        places: of all engines together.
        taken: of them, on average.
        stay_s: of a request in its place, on average.
    """
    if taken >= places:
        return math.inf
    lost = 1.0  # Erlang's B formula, by its recursion over the number of places.
    for number in range(1, places + 1):
        lost = taken * lost / (number + taken * lost)
    has_to_wait = lost / (1 - taken / places * (1 - lost))
    return stay_s * math.log(max(has_to_wait, 0.1) / 0.1) / (places - taken)


def complaint(view: EngineView, count: int, rows_per_s: float, margin: float = 1.0) -> str:
    """Say which target so many engines would miss; empty where they would hold all of them.

    Args:
        view: what was seen.
        count: engines.
        rows_per_s: load of all of them together.
        margin: share of every target that must not be exceeded.
    """
    found = forecast(view, count, rows_per_s)
    who = f"{count} engine{'s' * (count > 1)} at {rows_per_s:.0f} rows/s would"
    if found.busy > FULL * margin:
        return f"{who} be {min(found.busy, 9.99):.0%} busy"
    if found.cache_usage > FULL * margin:
        return f"{who} fill {found.cache_usage:.0%} of their caches"
    for what, value, target in (
        ("first", found.ttft_s, view.target_ttft_s),
        ("next", found.itl_s, view.target_itl_s),
    ):
        if target and value > target * margin:
            return f"{who} take {value * 1000:.0f} ms to a {what} token (target {target * 1000:.0f})"
    return ""


def late(view: EngineView) -> str:
    """Say which target is missed by now; empty where all hold."""
    for what, value, target in (
        ("first", view.ttft_s, view.target_ttft_s),
        ("next", view.itl_s, view.target_itl_s),
    ):
        if target and value is not None and value > target:
            return f"nine of ten {what} tokens took {value * 1000:.0f} ms (target {target * 1000:.0f})"
    return ""


def _more(view: EngineView, load: float, why: str) -> Scaling:
    """As few more engines as hold the targets; as many as are allowed if none do and they help."""
    n = view.wanted
    for count in range(n + 1, view.most + 1):
        if not complaint(view, count, load):
            return _if_worth(view, count, why)
    if n == view.most:
        return Scaling(count=n, reason=f"{why}; there may be no more than {view.most}")
    now, then = forecast(view, n, load), forecast(view, view.most, load)
    if now.busy <= FULL and not _is_faster(now, then):
        return Scaling(count=n, reason=f"{why}; {view.most} would do no better")
    return _if_worth(view, view.most, why)


def _one_more(view: EngineView, why: str) -> Scaling:
    """Another engine, if sharing out the requests that are there would help."""
    n = view.wanted
    if view.since_change_s < SETTLE_S or view.now < n:
        return Scaling(count=n, reason=f"{why}; the last change has yet to show")
    if n >= view.most:
        return Scaling(count=n, reason=f"{why}; there may be no more than {view.most}")
    assert view.speed is not None or not view.batch
    here = (view.running + view.waiting) / n
    speed = view.speed or Speed(fixed_s=0.0, per_row_s=0.0)
    shared = speed.step_s(here * n / (n + 1))
    if not view.waiting and shared > (1 - LEAST_GAIN) * speed.step_s(here):
        return Scaling(count=n, reason=f"{why}; another engine would take the same time")
    return _if_worth(view, n + 1, why)


def _if_worth(view: EngineView, count: int, why: str) -> Scaling:
    """More engines, unless the last ones that were added were seen to do nothing more together."""
    n = view.wanted
    # Far enough apart that an engine's share is more than what is measured wrongly.
    fewer = max((k for k in view.seen if 3 * k <= 2 * n), default=0)
    if n in view.seen and fewer:
        gain = (view.seen[n] - view.seen[fewer]) / (n - fewer)
        if gain < LEAST_GAIN * view.seen[n] / n:
            seen = f"{fewer} did {view.seen[fewer]:.0f} rows/s and {n} do {view.seen[n]:.0f}"
            return Scaling(count=n, reason=f"{why}; more would not help: {seen}")
    return Scaling(count=count, reason=why)


def _is_faster(now: Forecast, then: Forecast) -> bool:
    return then.itl_s < (1 - LEAST_GAIN) * now.itl_s or then.ttft_s < (1 - LEAST_GAIN) * now.ttft_s


def _fewer(view: EngineView) -> Scaling:
    """One engine less, if the rest would hold the targets at the most that the load may be."""
    n, load = view.wanted, view.rows_at_most
    if n <= view.least or view.since_change_s < DOWN_S:
        return Scaling(count=n, reason="the targets hold")
    if (why := complaint(view, n - 1, load, MARGIN)) or (view.speed is None and load):
        return Scaling(count=n, reason=f"the targets hold, and {why or 'the load of one less is not known'}")
    if load >= MARGIN * min((rows for k, rows in view.missed.items() if k >= n - 1), default=math.inf):
        return Scaling(count=n, reason=f"the targets hold, and {n - 1} were seen to miss them at such a load")
    return Scaling(count=n - 1, reason=f"{n - 1} hold the targets at {load:.0f} rows/s as well")


# -- shards ------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ShardView:
    """What the policy may look at for the shards of the experts, or of the memory.

    Args:
        now, wanted, least, most: as for engines.
        busy: mean share of their time that shards answer, of late; None where they have said nothing.
        busy_at_most: the largest such share in a longer time.
        since_change_s: seconds since their number changed.
    """

    now: int
    wanted: int
    least: int
    most: int
    busy: float | None
    busy_at_most: float
    since_change_s: float = math.inf


def shards(view: ShardView) -> Scaling:
    """Return the number of shards that shall be there."""
    n, most = view.wanted, max(view.least, view.most)
    if not view.least <= n <= most:
        return Scaling(count=min(max(n, view.least), most), reason=f"there may be {view.least} to {most}")
    if view.busy is None:
        return Scaling(count=n, reason="nothing was heard of late")
    does = f"{view.now} answer for {view.busy:.0%} of their time"
    # What they do now, shared out among other numbers of them.
    work, work_at_most = view.busy * view.now, view.busy_at_most * view.now
    if work / n > SHARD_BUSY and n < most:
        return Scaling(count=min(most, math.ceil(work / SHARD_BUSY)), reason=does)
    if n > view.least and view.since_change_s >= DOWN_S and work_at_most / (n - 1) < SHARD_IDLE:
        return Scaling(count=n - 1, reason=f"{does}, {view.busy_at_most:.0%} at most")
    return Scaling(count=n, reason=does)
