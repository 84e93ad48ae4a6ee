"""Slots come, go, hang and die in training, and every loss and the last checkpoint stay equal to the bit.

Slots are threads here (tests/local_cluster.py), so that a fault can be put at an exact message of an
exact step; tests/test_elastic_ray.py has real processes, nodes and signals.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from faulty_transport import Faults, Sent
from local_cluster import LocalFleet, Trained, tiny_run, train

from sparseray.actors.exchange.local import LocalExchange
from sparseray.actors.state.assignment import Plan
from sparseray.actors.wire.envelope import SCHEDULER
from sparseray.errors import ConfigError, FencedError, StateLostError
from sparseray.platform.composition import Run
from sparseray.platform.config import RunConfig
from sparseray.platform.planning.inventory import Roles
from sparseray.platform.run.history import Wish
from sparseray.platform.run.journal import Journal
from sparseray.platform.run.machines import kind_here

STEPS, KILLED = 10, 6
"""Of a run, and of one that loses slots once and is compared after that."""
WIDE = {"attention_workers": 2, "expert_shards": 2, "memory_shards": 2, "replication": 2}
# Slots 0 and 1 are attention workers, 2 and 3 expert shards, 4 and 5 memory shards, 6 is on standby.


def config_of(corpus: Path, **cluster: object) -> RunConfig:
    run = tiny_run(corpus, steps=STEPS, **{**WIDE, "deadline_s": 3.0, **cluster})
    return replace(run, train=replace(run.train, checkpoint_every=4))


@pytest.fixture(scope="module")
def undisturbed(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Trained]:
    """One slot that has everything, by the number of steps."""
    folder, roles = tmp_path_factory.mktemp("undisturbed"), dict.fromkeys(WIDE, 1)
    config = config_of(corpus, colocated=True, **roles)
    return {steps: train(folder / str(steps), config, stop_after=steps) for steps in (STEPS, KILLED)}


def check(trained: Trained, undisturbed: dict[int, Trained], steps: int = STEPS) -> None:
    assert [r["step"] for r in trained.records] == list(range(1, steps + 1))
    assert trained.curve == undisturbed[steps].curve
    assert trained.digest == undisturbed[steps].digest


class KillAt:
    """Kills slots when one of them is about to send a message of a kind in a step."""

    def __init__(self, victims: tuple[int, ...], source: int, kind: str, step: int) -> None:
        self.victims, self.source, self.kind, self.step, self.done = victims, source, kind, step, False

    def __call__(self, sent: Sent, fleet: LocalFleet) -> None:
        if not self.done and (sent.source, sent.kind) == (self.source, self.kind) and sent.step >= self.step:
            self.done = True
            for victim in self.victims:
                fleet.kill(victim)


MOMENTS = {
    "attention, forward": KillAt((0,), 0, "expert_forward", 3),
    "attention, backward": KillAt((1,), 1, "expert_backward", 3),
    "attention, first reducer, sums": KillAt((0,), 1, "dense_nodes", 3),
    "attention, prepared": KillAt((0,), 0, "prepared", 3),
    "expert, reply": KillAt((2,), 2, "expert_rows", 3),
    "expert, sum for the backup": KillAt((3,), 3, "expert_reduced", 3),
    "expert, prepared": KillAt((2,), 2, "prepared", 3),
    "memory, rows": KillAt((4,), 4, "memory_rows", 1),
    "memory, rows read without asking": KillAt((4,), 0, "expert_forward", 3),
    "memory, sum for the backup": KillAt((5,), 5, "rows_reduced", 3),
    "any, at the commit": KillAt((2,), SCHEDULER, "commit", 3),
    "two different ones": KillAt((0, 3), 1, "expert_forward", 3),
    "expert and memory": KillAt((2, 5), 0, "expert_backward", 3),
    "in a checkpoint": KillAt((2,), 2, "saved", 3),
    "standby": KillAt((6,), 0, "expert_forward", 3),
}


# Without a standby slot survivors take over: another plan, after the same notice; one moment shows it, one of each role
# by hand.
ALONE = [
    pytest.param(m, 0, marks=pytest.mark.long)
    for m in ("attention, backward", "expert, reply", "memory, rows")
]


@pytest.mark.one_in(5)
@pytest.mark.parametrize(
    ("moment", "standby"), [*((m, 1) for m in MOMENTS), ("two different ones", 0), *ALONE]
)
def test_a_kill_at_any_moment_changes_no_bit_and_loses_no_step(
    moment: str, standby: int, corpus: Path, undisturbed: dict[int, Trained], tmp_path: Path
) -> None:
    fault = MOMENTS[moment]
    fault.done = False
    config = config_of(corpus, standby=standby)
    trained = train(tmp_path / "run", config, faults=Faults(on_send=fault), stop_after=KILLED)
    assert fault.done
    check(trained, undisturbed, KILLED)
    assert trained.events.count("lost") == len(fault.victims)
    if moment != "standby":
        assert "recovered" in trained.events
    assert "restored" not in trained.events


def test_a_slot_that_dies_while_state_moves_is_left_out_of_the_next_generation(
    corpus: Path, undisturbed: dict[int, Trained], tmp_path: Path
) -> None:
    # Slot 6 takes over from 2 and dies before it has its state; 3 holds everything still.
    first, second = KillAt((2,), 0, "expert_forward", 3), KillAt((6,), 6, "pull", 3)

    def both(sent: Sent, fleet: LocalFleet) -> None:
        first(sent, fleet)
        second(sent, fleet)

    config = config_of(corpus, standby=1)
    trained = train(tmp_path / "run", config, faults=Faults(on_send=both), stop_after=KILLED)
    assert first.done and second.done
    check(trained, undisturbed, KILLED)


def plan_of(run: Run) -> Plan:
    assert run.generations.plan is not None
    return run.generations.plan


def at(
    changes: dict[int, Callable[[Run, LocalFleet], None]],
) -> Callable[[int, Run, LocalFleet], None]:
    return lambda step, run, fleet: changes.get(step, lambda r, f: None)(run, fleet)


def scale(role: str, count: int) -> Callable[[Run, LocalFleet], None]:
    return lambda run, fleet: run.reconciler.request(role, count)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("replication", [1, 2])
def test_roles_grow_and_shrink_while_training(
    replication: int, corpus: Path, undisturbed: dict[int, Trained], tmp_path: Path
) -> None:
    def several(run: Run, fleet: LocalFleet) -> None:
        run.reconciler.request("attention", 1)
        run.reconciler.request("experts", 2)
        run.reconciler.request("memory", 3)

    changes = at({1: scale("experts", 4), 3: scale("attention", 4), 5: several, 7: scale("memory", 1)})
    trained = train(tmp_path / "run", config_of(corpus, replication=replication), at_step=changes)
    check(trained, undisturbed)
    assert trained.events.count("resized") >= 4
    last = trained.folder.event_lines()[-1]
    assert (last["attention"], last["experts"], last["memory"], last["standby"]) == (1, 2, 1, 0)


def test_what_cannot_be_is_refused_with_the_reason(
    corpus: Path, undisturbed: dict[int, Trained], tmp_path: Path
) -> None:
    told: list[str] = []

    def refuse(run: Run, fleet: LocalFleet) -> None:
        fleet.most = 7
        for role, count in (("experts", 9), ("experts", 0), ("attention", 4), ("memory", 99), ("gpu", 1)):
            with pytest.raises(ConfigError) as error:
                run.reconciler.request(role, count)
            told.append(str(error.value))

    check(train(tmp_path / "run", config_of(corpus), at_step=at({2: refuse})), undisturbed)
    assert "8 experts per layer" in told[0] and "room for 1" in told[2] and "no role 'gpu'" in told[4]


def test_a_scheduler_that_dies_undoes_no_wish_and_forgets_no_load(
    corpus: Path, undisturbed: dict[int, Trained], tmp_path: Path
) -> None:
    hot = ((100.0, *[1.0] * 7), (1.0, 60.0, 60.0, *[1.0] * 5))
    seen: dict[int, tuple[Wish, list[list[float]]]] = {}

    def wish(run: Run, fleet: LocalFleet) -> None:
        run.reconciler.request("experts", 4)
        run.generations.ask(packed_by=hot)

    def note(step: int, run: Run, fleet: LocalFleet) -> None:
        if step == 4:
            wish(run, fleet)
        seen[step] = (run.generations.wish, run.reconciler.load.tolist())

    trained = train(tmp_path / "run", config_of(corpus), at_step=note, scheduler_dies=(4, 6))
    check(trained, undisturbed)
    assert trained.events.count("scheduler") == 2 * 2  # it took over; it is back
    roles = Roles(attention=2, experts=4, memory=2)
    assert {seen[step][0] for step in range(5, STEPS + 1)} == {Wish(roles=roles, packed_by=hot)}
    assert trained.folder.event_lines()[-1]["experts"] == 4
    # What the second scheduler knew after its last commit, the third knew before its first.
    fresh = np.array(trained.records[5]["expert_load"])
    np.testing.assert_allclose(seen[7][1], 0.9 * np.array(seen[6][1]) + 0.1 * fresh)


def test_without_replicas_the_last_checkpoint_is_computed_on_to_the_same_bits(
    corpus: Path, undisturbed: dict[int, Trained], tmp_path: Path
) -> None:
    fault = KillAt((2,), 0, "expert_forward", 7)
    trained = train(
        tmp_path / "run", config_of(corpus, replication=1, standby=1), faults=Faults(on_send=fault)
    )
    check(trained, undisturbed)
    restored = next(e for e in trained.folder.event_lines() if e["kind"] == "restored")
    assert restored["step"] == 4 and "step_4" in restored["text"]


def test_before_the_first_checkpoint_it_starts_from_the_seed_again(
    corpus: Path, undisturbed: dict[int, Trained], tmp_path: Path
) -> None:
    fault = KillAt((4,), 0, "expert_forward", 3)
    config = config_of(corpus, replication=1)
    trained = train(tmp_path / "run", config, faults=Faults(on_send=fault), stop_after=KILLED)
    check(trained, undisturbed, KILLED)
    assert "restored" in trained.events


def test_when_all_replicas_are_gone_it_says_what_and_where_to_go_on(
    corpus: Path, undisturbed: dict[int, Trained], tmp_path: Path
) -> None:
    fault = KillAt((2, 3), 0, "expert_forward", 7)
    with pytest.raises(StateLostError, match=r"all 2 replicas of expert 0\.0.*step_4, 2 steps back"):
        train(tmp_path / "run", config_of(corpus, standby=1), faults=Faults(on_send=fault))
    check(train(tmp_path / "run", config_of(corpus)), undisturbed)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("victim", [0, 2, 4])
def test_a_slot_that_was_thought_dead_and_comes_back_changes_nothing(
    victim: int, corpus: Path, undisturbed: dict[int, Trained], tmp_path: Path
) -> None:
    changes = at(
        {
            4: lambda run, fleet: fleet.partition(victim),
            7: lambda run, fleet: fleet.heal(victim),
        }
    )
    trained = train(tmp_path / "run", config_of(corpus, standby=1), at_step=changes)
    check(trained, undisturbed)
    assert trained.events.count("lost") == 1


@pytest.mark.parametrize("seed", [1, *(pytest.param(seed, marks=pytest.mark.long) for seed in (2, 3))])
def test_repeated_late_and_overtaking_messages_apply_every_step_once(
    seed: int, corpus: Path, undisturbed: dict[int, Trained], tmp_path: Path
) -> None:
    faults = Faults(repeat=0.2, delay=0.2, seed=seed)
    trained = train(tmp_path / "run", config_of(corpus), faults=faults)
    check(trained, undisturbed)
    assert "lost" not in trained.events


@pytest.mark.long
def test_dropped_messages_cost_time_and_nothing_else(
    corpus: Path, undisturbed: dict[int, Trained], tmp_path: Path
) -> None:
    dropped: list[str] = []

    def drop(sent: Sent, fleet: LocalFleet) -> None:
        # The transport is told to drop exactly this message.
        wanted = {(0, "dense_nodes"), (1, "dense_nodes"), (SCHEDULER, "commit"), (2, "prepared")}
        transport = fleet.transports.get(sent.source)
        faults = fleet.faults
        faults.drop = 0.0
        if sent.step == 3 + 2 * len(dropped) and (sent.source, sent.kind) in wanted - set(seen):
            seen.append((sent.source, sent.kind))
            dropped.append(sent.kind)
            faults.drop = 1.0
        assert transport is not None or sent.source == SCHEDULER

    seen: list[tuple[int, str]] = []
    trained = train(tmp_path / "run", config_of(corpus, deadline_s=1.0), faults=Faults(on_send=drop))
    assert dropped
    check(trained, undisturbed)


def test_replicas_lie_on_different_nodes_and_a_whole_node_may_go(
    corpus: Path, undisturbed: dict[int, Trained], tmp_path: Path
) -> None:
    nodes = {slot: f"node-{slot % 2}" for slot in range(12)}

    def lose_node(run: Run, fleet: LocalFleet) -> None:
        fleet.most = 3
        for slot in (1, 3, 5):
            fleet.kill(slot)

    trained = train(tmp_path / "run", config_of(corpus), nodes=nodes, at_step=at({5: lose_node}))
    check(trained, undisturbed)
    assert "restored" not in trained.events


@pytest.mark.long
def test_machines_of_several_kinds_are_told_at_start_and_on_resume(corpus: Path, tmp_path: Path) -> None:
    def kinds(*names: str) -> dict[int, str]:
        return {slot: names[slot % len(names)] for slot in range(12)}

    def told(run_dir: Path, names: tuple[str, ...], stop_after: int) -> list[str]:
        found = train(run_dir, tiny_run(corpus, steps=4), stop_after=stop_after, machines=kinds(*names))
        return [event["text"] for event in found.folder.event_lines() if event["kind"] == "machine"]

    assert told(tmp_path / "one", ("zen 4",), 2) == []
    assert told(tmp_path / "one", ("zen 4",), 3) == []
    (resumed,) = told(tmp_path / "one", ("zen 5",), 4)
    assert "zen 5" in resumed and "so far it was zen 4" in resumed and "last bits" in resumed
    (mixed,) = told(tmp_path / "two", ("zen 4", "zen 5"), 2)
    assert "zen 4 and on zen 5" in mixed


def test_a_slot_names_what_decides_about_its_bits() -> None:
    assert f"torch {torch.__version__}" in kind_here() and "threads" in kind_here()


def test_of_two_schedulers_only_the_last_can_decide(tmp_path: Path) -> None:
    old, new = Journal(tmp_path / "journal.sqlite"), Journal(tmp_path / "journal.sqlite")
    old.lead()
    old.append("commit", generation=1, step=1)
    new.lead()
    with pytest.raises(FencedError):
        old.append("commit", generation=1, step=2)
    new.append("commit", generation=2, step=2)
    assert [entry["generation"] for entry in new.read("commit")] == [2, 1]


def test_busy_experts_are_spread_by_the_policy_alone(
    corpus: Path, undisturbed: dict[int, Trained], tmp_path: Path
) -> None:
    config = config_of(corpus, rebalance_above=1.02, rebalance_every=2)
    trained = train(tmp_path / "run", config)
    check(trained, undisturbed)
    assert "rebalanced" in trained.events


@pytest.mark.one_in(2)
@pytest.mark.parametrize("replication", [1, 2])
def test_hot_experts_computed_by_several_holders_change_no_bit(
    replication: int, corpus: Path, undisturbed: dict[int, Trained], tmp_path: Path
) -> None:
    spread: list[tuple[tuple[int, ...], ...]] = []

    def heat(run: Run, fleet: LocalFleet) -> None:
        generations = run.generations
        hot = ((100.0, *[1.0] * 7), (1.0, 60.0, 60.0, *[1.0] * 5))
        generations.ask(packed_by=hot)
        plan = generations.replanned(generations.wanted)
        run.reconciler.change("rebalanced", "as if two experts were hot", run.driver.step, plan)

    def lose(run: Run, fleet: LocalFleet) -> None:
        # Here and not in `heat`: a slot that was late for the plan is left out, and the next one has this spread, too.
        spread.append(plan_of(run).spread)
        if replication > 1:
            fleet.kill(plan_of(run).experts[0][0][1])

    config = config_of(corpus, replication=replication, expert_shards=4)
    trained = train(tmp_path / "run", config, at_step=at({3: heat, 6: lose}))
    check(trained, undisturbed)
    assert spread[0][0][0] == 4 and max(spread[0][1]) >= 2


def test_a_plan_ends_the_step_that_a_slot_computes_and_a_ping_is_answered_meanwhile(
    corpus: Path, undisturbed: dict[int, Trained], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # One slot with all roles waits for nobody. Its operations take so long in step 5 that the scheduler asks for a
    # sign of life and starts another generation: the plan must end the step at its next operation.
    slow: list[int] = []
    plain = LocalExchange.forward_rows

    def forward_rows(self: LocalExchange, *arguments: Any, **options: Any) -> Any:
        generation = self.reduction.plan.generation
        if trained_steps == [1, 2, 3, 4] and generation == (slow or [generation])[0]:
            slow.append(generation)
            time.sleep(0.6)
        return plain(self, *arguments, **options)

    trained_steps: list[int] = []
    monkeypatch.setattr(LocalExchange, "forward_rows", forward_rows)
    config = config_of(
        corpus,
        attention_workers=1,
        expert_shards=1,
        memory_shards=1,
        replication=1,
        colocated=True,
        deadline_s=0.5,
    )
    trained = train(tmp_path / "run", config, at_step=lambda step, trainer, fleet: trained_steps.append(step))
    check(trained, undisturbed)
    # Three layers and four parts would be eight or more of them; no slot was given up.
    assert 1 <= len(slow) <= 6
    assert [event["text"] for event in trained.folder.event_lines() if event["kind"] == "lost"] != []
    assert all("slot" not in e["text"] for e in trained.folder.event_lines() if e["kind"] == "lost")
