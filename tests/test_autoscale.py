"""The autoscaler on simulated traces: targets hold again in time, nothing swings, bounds are kept; and single decisions."""

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from serving_simulator import Service, Simulation

from sparseray.errors import ConfigError
from sparseray.platform.config import ServeConfig
from sparseray.platform.planning.autoscale import EngineView, ShardView, Speed, engines, shards, waiting_s

SERVE = ServeConfig(target_ttft_ms=200, target_itl_ms=40, max_engines=8, max_batch=16)
# One engine keeps to 40 ms a token up to 15 requests in its batch: 375 rows a second, some twelve requests.


def counts(sim: Simulation) -> list[int]:
    return [after for _, _, after, _ in sim.changes]


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    "rate", [4.0, 30.0, *(pytest.param(rate, marks=pytest.mark.long) for rate in (1.0, 9.0, 14.0))]
)
@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.long)])
def test_a_steady_load_finds_its_engines_and_then_nothing_swings(rate: float, seed: int) -> None:
    sim = Simulation(lambda t: rate, SERVE, seed=seed).run(400.0)
    # A queue from the start may have asked for more than the load takes: these go, and none comes back.
    assert all(after < before for at, before, after, _ in sim.changes if at > 60.0), sim.changes
    assert not [change for change in sim.changes if change[0] > 300.0], sim.changes
    assert sim.held_since(60.0, share=0.02) == 0.0


@pytest.mark.parametrize("seed", [1, *(pytest.param(seed, marks=pytest.mark.long) for seed in (2, 3))])
def test_four_times_the_load_is_held_within_five_seconds_and_then_nothing_changes(seed: int) -> None:
    sim = Simulation(lambda t: 4.0 if t < 60 else 16.0, SERVE, Service(standby=1), seed=seed).run(400.0)
    assert sim.held_since(60.0, share=0.02) <= 5.0, sim.changes
    assert not [change for change in sim.changes if change[0] > 75.0], sim.changes
    assert 60.0 < sim.changes[0][0] < 64.0


@pytest.mark.long
def test_a_ramp_is_followed_up_without_a_step_back() -> None:
    sim = Simulation(lambda t: 1 + t / 10, SERVE, Service(standby=1, start_s=4.0), seed=1).run(400.0)
    assert counts(sim) == sorted(counts(sim)) and 4 <= sim.wanted <= 8
    assert len(sim.changes) <= 8


def test_a_burst_is_met_and_its_engines_go_one_by_one_afterwards() -> None:
    sim = Simulation(lambda t: 30.0 if 100 < t < 115 else 3.0, SERVE, Service(standby=4), seed=1).run(500.0)
    most = max(counts(sim))
    assert 2 <= most <= 8 and sim.wanted == 1
    down = [(at, before, after) for at, before, after, _ in sim.changes if after < before]
    assert [before - after for _, before, after in down] == [1] * (most - 1)
    assert all(later[0] - earlier[0] >= 30.0 for earlier, later in itertools.pairwise(down))


@pytest.mark.long  # A ramp and a burst show the same within a third of the time.
def test_a_day_is_followed_up_and_down() -> None:
    sim = Simulation(lambda t: 12 - 10 * math.cos(t / 1200 * 2 * math.pi), SERVE, seed=1).run(1200.0)
    assert max(counts(sim)) >= 3 and sim.wanted == 1
    turns = sum((b > a) != (c > b) for a, b, c in zip(counts(sim), counts(sim)[1:], counts(sim)[2:]))
    assert turns <= 1, sim.changes


def test_no_traffic_goes_down_to_the_least_and_stays_there() -> None:
    serve = replace(SERVE, min_engines=2)
    sim = Simulation(lambda t: 25.0 if t < 60 else 0.0, serve, begin=5, seed=1).run(500.0)
    assert sim.wanted == 2 and len(sim.engines) == 2
    assert min(counts(sim)) == 2
    idle = Simulation(lambda t: 0.0, SERVE, begin=3).run(300.0)
    assert counts(idle) == [2, 1]


def test_bounds_and_room_are_never_left() -> None:
    sim = Simulation(lambda t: 150.0 if t > 20 else 0.0, replace(SERVE, max_engines=4), seed=1).run(90.0)
    assert set(counts(sim)) <= {2, 3, 4} and sim.wanted == 4
    sim = Simulation(lambda t: 150.0, SERVE, room=3, seed=1).run(60.0)
    assert sim.wanted == 3


def test_a_slot_that_never_starts_blocks_nothing() -> None:
    stuck = Service(standby=0, start_s=1e9)
    sim = Simulation(lambda t: 25.0 if t < 40 else 0.5, SERVE, stuck, seed=1).run(400.0)
    assert max(counts(sim)) >= 3, sim.changes
    assert sim.wanted == 1 and len(sim.engines) == 1


@pytest.mark.long
def test_engines_that_share_cores_are_not_added_once_they_were_seen_to_do_no_more() -> None:
    def rate(t: float) -> float:
        return min(60.0, 5 + t / 3)

    sim = Simulation(rate, SERVE, Service(standby=8, cores=2), seed=1).run(240.0)
    assert sim.wanted <= 4, sim.changes
    assert Simulation(rate, SERVE, Service(standby=8), seed=1).run(240.0).wanted >= 5


def test_a_target_that_no_number_can_hold_adds_nothing() -> None:
    sim = Simulation(lambda t: 1.0, replace(SERVE, target_itl_ms=5.0), seed=1).run(120.0)
    assert sim.changes == []


def test_what_a_user_sets_counts_at_once_and_the_policy_goes_on_from_there() -> None:
    at: dict[float, Callable[[Simulation], None]] = {50.0: lambda sim: sim.scale(4)}
    sim = Simulation(lambda t: 4.0, SERVE, Service(standby=4), seed=1, at=at).run(300.0)
    assert counts(sim) == [3, 2, 1] and 79.0 < sim.changes[0][0] < 85.0


# -- single decisions --------------------------------------------------------------------------------


def seen(**fields: Any) -> EngineView:
    plain: dict[str, Any] = {
        "now": 2, "wanted": 2, "least": 1, "most": 8, "max_batch": 16,
        "target_ttft_s": 0.2, "target_itl_s": 0.04, "speed": Speed(fixed_s=0.01, per_row_s=0.002),
        "batch": 4.0, "itl_s": 0.018, "running": 8, "rows_per_request": 30.0, "prefill_steps": 2.0,
        "rows_at_least": 440.0, "rows_at_most": 480.0,
    }  # fmt: skip
    return EngineView(**{**plain, **fields})


def test_decisions_have_their_reason_in_words() -> None:
    assert engines(seen(rows_at_least=1600.0)).count > 3
    assert "2 engines at 1600 rows/s would" in engines(seen(rows_at_least=1600.0)).reason
    queue = engines(seen(waiting=60))
    assert queue.count == 3 and "busy" in queue.reason
    late = engines(seen(itl_s=0.05, batch=12.0, running=24, rows_at_least=0.0))
    assert late.count == 3 and "nine of ten next tokens took 50 ms (target 40)" in late.reason
    assert engines(seen(itl_s=0.05, batch=12.0, since_change_s=1.0, rows_at_least=0.0)).count == 2
    assert engines(seen(rows_at_most=100.0, rows_at_least=80.0)).count == 1
    held = engines(seen(rows_at_most=100.0, rows_at_least=80.0, missed={1: 110.0}))
    assert held.count == 2 and "were seen to miss" in held.reason
    assert engines(seen(rows_at_most=100.0, rows_at_least=80.0, since_change_s=10.0)).count == 2
    assert engines(seen(speed=None)).count == 2
    full = engines(seen(rows_at_least=1600.0, most=2))
    assert full.count == 2 and "no more than 2" in full.reason
    flat = engines(seen(rows_at_least=1600.0, seen={1: 400.0, 2: 410.0}))
    assert flat.count == 2 and "1 did 400 rows/s and 2 do 410" in flat.reason


def test_the_time_of_a_step_is_fitted_and_a_single_size_of_batch_counts_as_half_fixed() -> None:
    fit = Speed.fit([(100, 100, 1.2), (50, 800, 2.1), (80, 320, 1.44)])
    assert fit is not None
    assert fit.fixed_s == pytest.approx(0.01, rel=0.1) and fit.per_row_s == pytest.approx(0.002, rel=0.1)
    flat = Speed.fit([(10, 40, 0.2)])
    assert (
        flat is not None and flat.fixed_s == pytest.approx(0.01) and flat.per_row_s == pytest.approx(0.0025)
    )
    assert Speed.fit([]) is None and Speed.fit([(0, 0, 0.0)]) is None
    assert Speed(fixed_s=0.01, per_row_s=0.002).batch(500.0) == math.inf


def shard_view(**fields: Any) -> ShardView:
    return ShardView(
        **{"now": 2, "wanted": 2, "least": 1, "most": 8, "busy": 0.5, "busy_at_most": 0.5, **fields}
    )


def test_shards_scale_by_the_share_of_their_time_that_they_answer() -> None:
    assert shards(shard_view()).count == 2
    assert shards(shard_view(busy=0.95)).count == 3
    assert shards(shard_view(busy=0.95, wanted=3)).count == 3
    assert shards(shard_view(busy=0.1, busy_at_most=0.15)).count == 1
    assert shards(shard_view(busy=0.1, busy_at_most=0.3)).count == 2
    assert shards(shard_view(busy=0.1, busy_at_most=0.1, since_change_s=5.0)).count == 2
    assert shards(shard_view(busy=None)).count == 2
    assert shards(shard_view(wanted=9)).count == 8
    assert "95%" in shards(shard_view(busy=0.95)).reason


def test_bounds_that_exclude_each_other_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"serve\.min_engines=3 is above serve\.max_engines=2"):
        ServeConfig(min_engines=3, max_engines=2)


def test_waiting_for_a_place_is_erlangs() -> None:
    # One place is M/M/1: nine of ten wait less than ln(10 load) / (1 - load) stays.
    assert waiting_s(1, 0.5, 2.0) == pytest.approx(2.0 * math.log(5.0) / 0.5)
    # Two places, 1.6 taken: somebody waits in 71 of 100 cases (tables of Erlang's C).
    assert waiting_s(2, 1.6, 1.0) == pytest.approx(math.log(7.111) / 0.4, rel=1e-3)
    assert waiting_s(64, 20.0, 1.0) == 0.0
    assert waiting_s(2, 2.0, 1.0) == math.inf
