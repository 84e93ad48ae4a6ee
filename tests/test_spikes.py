"""Loss spikes: what stands out, and that a step left out is left out to the bit, wherever and how often it is decided."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from faulty_transport import Faults, Sent
from local_cluster import LocalFleet, Trained, tiny_run, train

from sparseray.actors.training.token_data import Batch, TokenBatches
from sparseray.errors import ConfigError, UserError
from sparseray.platform.config import RunConfig, TrainConfig
from sparseray.platform.planning.spikes import LEAST, Reading, find_spike
from sparseray.platform.run import checkpoint

STEPS = 24
WIDE = {"attention_workers": 2, "expert_shards": 2, "memory_shards": 2, "replication": 2, "standby": 1}
BAD = {18: 1000.0, 21: math.nan, 22: math.inf}
"""Steps whose batch was planted, and the weight of its tokens."""


def readings(*losses: float) -> list[Reading]:
    return [Reading(loss=loss, norm=1.0) for loss in losses]


def test_what_stands_out_is_far_above_the_median_in_robust_deviations() -> None:
    calm = readings(*(3.0 + 0.1 * (-1) ** i for i in range(40)))
    assert not find_spike(Reading(loss=3.5, norm=1.0), calm, 8.0)
    assert "the loss is 6" in find_spike(Reading(loss=6.0, norm=1.0), calm, 8.0)
    assert "gradient norm is 50" in find_spike(Reading(loss=3.0, norm=50.0), calm, 8.0)
    assert not find_spike(Reading(loss=0.1, norm=0.01), calm, 8.0), "downwards nothing stands out"
    # A flat stretch has no deviation of its own: a hundredth of the median is one.
    flat = readings(*[2.0] * 40)
    assert not find_spike(Reading(loss=2.1, norm=1.0), flat, 8.0)
    assert find_spike(Reading(loss=2.2, norm=1.0), flat, 8.0)


def test_spikes_in_the_window_do_not_hide_the_next_one() -> None:
    recent = readings(*[3.0, 3.1, 2.9, 3.05] * 10, *[40.0] * 6)
    assert find_spike(Reading(loss=40.0, norm=1.0), recent, 8.0)


def test_at_the_beginning_only_what_is_not_finite_stands_out() -> None:
    few = readings(*[3.0] * (LEAST - 1))
    assert not find_spike(Reading(loss=300.0, norm=1.0), few, 8.0)
    for loss, norm in ((math.nan, 1.0), (math.inf, 1.0), (3.0, math.nan), (3.0, math.inf)):
        assert find_spike(Reading(loss=loss, norm=norm), [], 8.0)


def spiked(data: Path, reaction: str, *, every: int = 0, **cluster: Any) -> RunConfig:
    config = tiny_run(data, steps=STEPS, **cluster)
    found = {"spike": reaction, "spike_deviations": 30.0, "checkpoint_every": every}
    found |= {"logical_shards": 2, "sequences_per_shard": 1}
    return replace(config, train=replace(config.train, **found))


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> dict[int, float]:
    """Batches of some steps are bad: their tokens weigh too much, or their weights are no numbers."""
    steps, plain = dict(BAD), TokenBatches.__call__

    def bad(self: TokenBatches, step: int, part: int) -> Batch:
        found = plain(self, step, part)
        if self.is_fixed or step not in steps:
            return found
        weights = torch.ones(found.targets_BT.shape)
        weights[0, 0] = steps[step] * found.targets_BT.numel()
        return replace(found, weights_BT=weights)

    monkeypatch.setattr(TokenBatches, "__call__", bad)
    return steps


def left_out(trained: Trained) -> list[int]:
    return [record["step"] for record in trained.records if "spike" in record]


class KillAt:
    """Kills a slot when another one sends a message of a kind in a step."""

    def __init__(self, victim: int, kind: str, step: int) -> None:
        self.victim, self.kind, self.step, self.done = victim, kind, step, False

    def __call__(self, sent: Sent, fleet: LocalFleet) -> None:
        if not self.done and (sent.kind, sent.step) == (self.kind, self.step):
            self.done = True
            fleet.kill(self.victim)


@pytest.mark.one_in(2)
@pytest.mark.parametrize(("reaction", "every"), [("skip", 0), ("rollback", 8)])
def test_planted_bad_batches_are_left_out_alike_on_any_slots_and_through_any_loss(
    reaction: str, every: int, corpus: Path, tmp_path: Path, planted: dict[int, float]
) -> None:
    """One slot; six with a slot killed at the spike and the scheduler after it; stopped after it and started again."""
    one = train(tmp_path / "one", spiked(corpus, reaction, every=every, colocated=True))
    assert left_out(one) == sorted(planted) and one.events.count("spike") == len(planted)
    assert one.records[-1]["loss"] < one.records[16]["loss"] + 0.3, "the run goes on as if nothing had been"
    for line in one.folder.metrics.read_text().splitlines():
        json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    kill = KillAt(2, "commit", 18)
    wide = train(
        tmp_path / "wide",
        spiked(corpus, reaction, every=every, **WIDE),
        faults=Faults(on_send=kill),
        scheduler_dies=(18, 21),
    )
    assert kill.done and "scheduler" in wide.events
    config = spiked(corpus, reaction, every=every, attention_workers=2)
    train(tmp_path / "stopped", config, stop_after=20)
    stopped = train(tmp_path / "stopped", config)
    for other in (wide, stopped):
        assert left_out(other) == left_out(one)
        assert other.curve == one.curve
        assert other.digest == one.digest


@pytest.mark.long
def test_a_step_left_out_changes_no_weight_and_a_rollback_brings_old_ones(
    corpus: Path, tmp_path: Path, planted: dict[int, float]
) -> None:
    def digest_after(name: str, reaction: str, stop: int, every: int) -> str:
        return train(
            tmp_path / name, spiked(corpus, reaction, every=every, colocated=True), stop_after=stop
        ).digest

    before, after = (digest_after(f"skip{stop}", "skip", stop, 0) for stop in (17, 18))
    assert before == after
    scheduled, back = (digest_after(f"back{stop}", "rollback", stop, 8) for stop in (16, 18))
    assert scheduled == back != before
    kept = [checkpoint.step_of(p) for p in checkpoint.list_finished(tmp_path / "back18" / "checkpoints")]
    assert kept == [8, 16, 18]


@pytest.mark.long
def test_the_checkpoint_that_a_rollback_needs_outlives_those_that_stops_leave(
    corpus: Path, tmp_path: Path, planted: dict[int, float]
) -> None:
    config = spiked(corpus, "rollback", every=8, colocated=True)
    config = replace(config, train=replace(config.train, keep_checkpoints=1))
    straight = train(tmp_path / "straight", config)
    train(tmp_path / "stopped", config, stop_after=17)
    stopped = train(tmp_path / "stopped", config)
    assert stopped.curve == straight.curve and stopped.digest == straight.digest


@pytest.mark.long
def test_before_the_first_checkpoint_a_rollback_leaves_the_step_out(
    corpus: Path, tmp_path: Path, planted: dict[int, float]
) -> None:
    skipped = train(tmp_path / "skip", spiked(corpus, "skip", colocated=True), stop_after=20)
    rolled = train(
        tmp_path / "rollback", spiked(corpus, "rollback", every=1000, colocated=True), stop_after=20
    )
    assert rolled.curve == skipped.curve and rolled.digest == skipped.digest


def test_without_a_reaction_what_is_not_finite_ends_the_run_and_the_cure_goes_on(
    corpus: Path, tmp_path: Path, planted: dict[int, float]
) -> None:
    del planted[18]
    with pytest.raises(
        UserError, match=r"the loss is nan at step 21.*--train.spike=skip leaves such steps out"
    ):
        train(tmp_path / "run", spiked(corpus, "off", every=10, colocated=True))
    cured = train(tmp_path / "run", spiked(corpus, "skip", every=10, colocated=True))
    assert cured.records[-1]["step"] == STEPS and left_out(cured) == [21, 22]


@pytest.mark.long
def test_one_slot_with_slabs_leaves_steps_out_and_goes_back_too(
    corpus: Path, tmp_path: Path, planted: dict[int, float]
) -> None:
    config = spiked(corpus, "rollback", every=8, colocated=True)
    config = replace(config, train=replace(config.train, dtype="bfloat16"))
    straight = train(tmp_path / "straight", config)
    train(tmp_path / "stopped", config, stop_after=20)
    stopped = train(tmp_path / "stopped", config)
    assert left_out(straight) == sorted(planted)
    assert stopped.curve == straight.curve and stopped.digest == straight.digest


def test_what_never_comes_down_again_ends_the_run(
    corpus: Path, tmp_path: Path, planted: dict[int, float]
) -> None:
    planted |= dict.fromkeys(range(5, STEPS + 1), math.nan)
    with pytest.raises(UserError, match=r"8 steps before it were left out.*--optim.lr=0\.0002 "):
        train(tmp_path / "run", spiked(corpus, "skip"))


def test_rolling_back_needs_checkpoints() -> None:
    with pytest.raises(ConfigError, match=r"set train.checkpoint_every to 50"):
        TrainConfig(spike="rollback", checkpoint_every=0)
    TrainConfig(spike="rollback", checkpoint_every=50)
