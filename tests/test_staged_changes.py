"""Resizes whose state moves in stages between which training goes on: slots die, wishes change, and no bit differs."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from faulty_transport import Faults
from local_cluster import LocalFleet, Trained, tiny_run, train
from test_elastic import KillAt

from sparseray.actors.state.assignment import Plan
from sparseray.platform.composition import Run
from sparseray.platform.config import RunConfig
from sparseray.platform.generations import Generations
from sparseray.platform.planning import stages
from sparseray.platform.planning.inventory import Roles
from sparseray.platform.planning.moves import Moves, holdings

STEPS, BUDGET = 40, 60_000
ONE = {"attention_workers": 1, "expert_shards": 1, "memory_shards": 1}
Change = Callable[[Run, LocalFleet], None]


def config_of(corpus: Path, **cluster: object) -> RunConfig:
    run = tiny_run(corpus, steps=STEPS, **{**ONE, "deadline_s": 3.0, **cluster})
    model = replace(run.model, dse=replace(run.model.dse, rows_per_head=997))
    return replace(run, model=model, train=replace(run.train, checkpoint_every=10))


@pytest.fixture(scope="module")
def undisturbed(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return train(tmp_path_factory.mktemp("undisturbed") / "run", config_of(corpus, colocated=True))


@pytest.fixture(autouse=True)
def small_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bucket has 25 kB here, an expert 18; a stage comes with every step."""
    monkeypatch.setattr(stages, "LEAST_BYTES", BUDGET)
    monkeypatch.setattr(stages, "PAUSE_S", 0.0)
    monkeypatch.setattr(stages, "REST", 0.0)


@pytest.fixture(autouse=True)
def entered(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Pieces and bytes that each generation moved, whatever its cause."""
    found, enter = list[tuple[int, int]](), Generations._enter

    def noted(me: Generations, new: Plan, step: int, *, restore: Any, pulls: Moves | None) -> None:
        if pulls is not None:
            pieces = [p for sources in pulls.pulls.values() for ps in sources.values() for p in ps]
            found.append((len(pieces), pulls.num_bytes(me.size)))
        enter(me, new, step, restore=restore, pulls=pulls)

    monkeypatch.setattr(Generations, "_enter", noted)
    return found


def is_little(entered: list[tuple[int, int]]) -> bool:
    return all(num_bytes <= BUDGET or pieces == 1 for pieces, num_bytes in entered)


def plan_of(run: Run) -> Plan:
    assert run.generations.plan is not None
    return run.generations.plan


def want(attention: int = 1, experts: int = 1, memory: int = 1) -> Change:
    roles = Roles(attention=attention, experts=experts, memory=memory)
    return lambda run, fleet: run.generations.ask(roles=roles)


class Watched:
    """Does something after some steps, and once after so many stages; keeps what was seen of every step."""

    def __init__(self, changes: dict[int, Change], at_stage: int = 0, change: Change | None = None) -> None:
        self.changes, self.at_stage, self.change = changes, at_stage, change
        self.plans: list[Plan] = []
        self.settled: list[bool] = []

    def __call__(self, step: int, run: Run, fleet: LocalFleet) -> None:
        if step in self.changes:
            self.changes[step](run, fleet)
        self.plans.append(plan_of(run))
        self.settled.append(run.reconciler.is_settled())
        if self.change is not None and self.num_stages(run) >= self.at_stage:
            change, self.change = self.change, None
            change(run, fleet)

    @staticmethod
    def num_stages(run: Run) -> int:
        return sum(event["kind"] == "staged" for event in run.folder.event_lines())


def check(found: Trained, undisturbed: Trained, roles: tuple[int, int, int], replication: int = 1) -> None:
    assert [r["step"] for r in found.records] == list(range(1, STEPS + 1))
    assert found.curve == undisturbed.curve and found.digest == undisturbed.digest
    assert "restored" not in found.events
    last = found.folder.event_lines()[-1]
    assert (last["attention"], last["experts"], last["memory"]) == roles


def pauses(found: Trained, kind: str) -> list[dict[str, Any]]:
    return [event for event in found.folder.event_lines() if event["kind"] == kind]


@pytest.mark.parametrize("replication", [2, pytest.param(1, marks=pytest.mark.long)])
def test_memory_and_experts_move_in_stages_while_training_goes_on(
    replication: int, corpus: Path, undisturbed: Trained, tmp_path: Path
) -> None:
    watched = Watched({2: want(memory=2), 10: want(memory=3, experts=2), 26: want(memory=1)})
    found = train(tmp_path / "run", config_of(corpus, replication=replication), at_step=watched)
    check(found, undisturbed, (1, 1, 1))
    staged, resized = pauses(found, "staged"), pauses(found, "resized")
    assert len(resized) == 3 and len(staged) >= 6
    assert all(event["moved"] <= BUDGET for event in [*staged, *resized])
    # A stage is no end: nobody may lend or borrow slots until the wish is met.
    after = {event["step"] for event in staged}
    assert not any(watched.settled[step] for step in after)
    assert all(
        len(holders) == replication for p, holders in holdings(watched.plans[-1]).items() if p[0] != "dense"
    )


def kill(of: Callable[[Plan], int]) -> Change:
    return lambda run, fleet: fleet.kill(of(plan_of(run)))


def new_holder(plan: Plan) -> int:
    """Whoever has pieces ahead of its role."""
    (slot, *_) = sorted(plan.holders - {*plan.attention, *plan.expert_primaries, *plan.memory_primaries})
    return slot


def old_holder(plan: Plan) -> int:
    return plan.memory_primaries[0]


@pytest.mark.long
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("victim", [new_holder, old_holder])
def test_a_kill_in_any_stage_changes_no_bit_and_loses_no_step(
    victim: Callable[[Plan], int],
    stage: int,
    corpus: Path,
    undisturbed: Trained,
    tmp_path: Path,
    entered: list[tuple[int, int]],
) -> None:
    """Those who are left go on with what they have, and what is lacking comes in stages, too."""
    watched = Watched({2: want(experts=2, memory=3)}, stage, kill(victim))
    found = train(tmp_path / "run", config_of(corpus, replication=2, standby=1), at_step=watched)
    check(found, undisturbed, (1, 2, 3), 2)
    assert watched.change is None and "lost" in found.events and "recovered" in found.events
    assert is_little(entered)
    assert all(len(holders) >= 2 for holders in holdings(watched.plans[-1]).values())


@pytest.mark.long
@pytest.mark.parametrize("victim", [2, 3])
def test_a_slot_that_dies_while_a_stage_moves_changes_no_bit(
    victim: int, corpus: Path, undisturbed: Trained, tmp_path: Path, entered: list[tuple[int, int]]
) -> None:
    """The one that gives, or the one that is given: as the latter is about to say that it has all."""
    fault = KillAt((victim,), 3, "installed", 3)
    watched = Watched({2: want(experts=2, memory=2)})
    config = config_of(corpus, replication=2)
    found = train(tmp_path / "run", config, at_step=watched, faults=Faults(on_send=fault))
    check(found, undisturbed, (1, 2, 2), 2)
    assert fault.done and pauses(found, "staged") and is_little(entered)
    assert found.events.count("lost") == 1


@pytest.mark.long
@pytest.mark.parametrize(
    ("victim", "standby"),
    [(0, 1), (1, 0), (0, 0), (1, 1), (2, 0), (2, 1)],
)
def test_replicas_that_were_lost_come_again_in_stages(
    victim: int,
    standby: int,
    corpus: Path,
    undisturbed: Trained,
    tmp_path: Path,
    entered: list[tuple[int, int]],
) -> None:
    """The attention worker, the expert shard or the memory shard is killed, each of which backs up what others have."""
    watched = Watched({4: lambda run, fleet: fleet.kill(victim)})
    found = train(tmp_path / "run", config_of(corpus, replication=2, standby=standby), at_step=watched)
    check(found, undisturbed, (1, 1, 1), 2)
    assert is_little(entered) and "recovered" in found.events
    # The dense weights are one piece, and a spare slot lacks nothing else.
    assert pauses(found, "staged") or (victim, standby) == (0, 1)
    assert all(len(holders) >= 2 for holders in holdings(watched.plans[-1]).values())
    assert watched.settled[-1] and not watched.settled[5]


@pytest.mark.long
@pytest.mark.parametrize("stage", [3, 1])
def test_a_wish_that_is_taken_back_half_way_leaves_nothing_behind(
    stage: int, corpus: Path, undisturbed: Trained, tmp_path: Path
) -> None:
    watched = Watched({2: want(memory=2, experts=2)}, stage, want())
    found = train(tmp_path / "run", config_of(corpus), at_step=watched)
    check(found, undisturbed, (1, 1, 1))
    assert watched.change is None and watched.settled[-1]
    assert all(len(holders) == 1 for holders in holdings(watched.plans[-1]).values())
    # Slots that nobody needs are ended, those that had pieces ahead of their roles among them.
    assert found.folder.event_lines()[-1]["standby"] == 0


@pytest.mark.long
def test_another_wish_half_way_is_the_one_that_counts(
    corpus: Path, undisturbed: Trained, tmp_path: Path
) -> None:
    watched = Watched({2: want(memory=2)}, 2, want(experts=3, memory=3))
    found = train(tmp_path / "run", config_of(corpus), at_step=watched)
    check(found, undisturbed, (1, 3, 3))
    assert watched.change is None


@pytest.mark.long
def test_a_scheduler_that_dies_half_way_goes_on_with_the_wish(
    corpus: Path, undisturbed: Trained, tmp_path: Path, entered: list[tuple[int, int]]
) -> None:
    watched = Watched({2: want(experts=2, memory=3)})
    found = train(tmp_path / "run", config_of(corpus, replication=2), at_step=watched, scheduler_dies=(5,))
    check(found, undisturbed, (1, 2, 3), 2)
    assert found.events.count("scheduler") == 2 and is_little(entered)
    assert sum(event["step"] < 5 for event in pauses(found, "staged")) > 0


@pytest.mark.long
def test_a_node_that_is_drained_is_left_in_stages(corpus: Path, undisturbed: Trained, tmp_path: Path) -> None:
    def drain(run: Run, fleet: LocalFleet) -> None:
        fleet.drained["b"] = 1e6

    nodes = {slot: "ab"[slot == 2] for slot in range(12)}
    watched = Watched({2: drain})
    found = train(tmp_path / "run", config_of(corpus), at_step=watched, nodes=nodes)
    check(found, undisturbed, (1, 1, 1))
    (left,) = pauses(found, "drained")
    assert len(pauses(found, "staged")) >= 1 and left["moved"] <= BUDGET
    assert 2 not in watched.plans[-1].holders


@pytest.mark.long
def test_a_node_that_is_gone_in_a_moment_is_left_at_once(
    corpus: Path, undisturbed: Trained, tmp_path: Path
) -> None:
    def drain(run: Run, fleet: LocalFleet) -> None:
        fleet.drained["b"] = 9.0

    nodes = {slot: "ab"[slot == 2] for slot in range(12)}
    found = train(tmp_path / "run", config_of(corpus), at_step=Watched({2: drain}), nodes=nodes)
    check(found, undisturbed, (1, 1, 1))
    # What they lack then comes in stages again, once others have started.
    first = next(e for e in found.folder.event_lines() if e["kind"] in ("staged", "drained"))
    assert first["kind"] == "drained" and first["moved"] > BUDGET


@pytest.mark.long
def test_experts_that_are_packed_by_load_move_in_stages_to_the_end(
    corpus: Path, undisturbed: Trained, tmp_path: Path
) -> None:
    config = config_of(corpus, expert_shards=3, replication=2, rebalance_above=1.02, rebalance_every=12)
    watched = Watched({})
    found = train(tmp_path / "run", config, at_step=watched)
    check(found, undisturbed, (1, 3, 1), 2)
    packed, staged = pauses(found, "rebalanced"), pauses(found, "staged")
    assert packed and staged and staged[0]["step"] < packed[0]["step"]
    assert all(event["moved"] <= BUDGET for event in [*packed, *staged])
