"""Nodes that Ray drains: what the policy decides, and that training loses no step.

Slots are threads here, on nodes that are made up; tests/test_elastic_serving.py drains a server's, and
tests/test_drains_ray.py a node of a real Ray.
"""

from dataclasses import replace
from math import inf
from pathlib import Path
from typing import Any

import pytest
from local_cluster import LocalFleet, Trained, tiny_run, train
from test_policy import ROLES, carry_out, view

from sparseray.jobs import status
from sparseray.platform.composition import Run
from sparseray.platform.planning.inventory import Roles
from sparseray.platform.planning.policy import HURRY_S, Noop, Resize, Start, decide

NODES = {slot: "ab"[slot % 2] for slot in range(6)} | dict.fromkeys(range(6, 12), "c")
WIDE = {"attention_workers": 2, "expert_shards": 2, "memory_shards": 2, "replication": 2}
GONE = {0: 60.0, 2: 60.0}
"""An attention worker and an expert shard are on a node that is gone in a minute."""


def test_others_are_started_elsewhere_before_slots_leave() -> None:
    seen = view(draining=GONE, free_slots=5, colocated=False)
    assert decide(seen) == Start(2)
    waiting = carry_out(seen)
    assert decide(waiting) == Noop(), "they play their roles until the others are there"
    there = replace(waiting, starting=0, ready=(6, 7))
    assert decide(there) == Resize(ROLES, without=(0, 2))
    after = carry_out(there)
    assert not after.plan.holders & {0, 2}
    assert (len(after.plan.attention), len(after.plan.expert_primaries)) == (2, 2)
    assert decide(after) == Noop()


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"free_slots": 0}, id="no room"),
        pytest.param({"free_slots": 0, "starting": 2, "waiting": 2}, id="asked for, and no room"),
        pytest.param({"starting": 2, "draining": {0: HURRY_S - 1, 2: inf}}, id="no time"),
    ],
)
def test_the_slots_that_stay_take_over_where_nothing_comes_in_time(changes: dict[str, Any]) -> None:
    seen = view(**{"draining": GONE, "colocated": False, **changes})
    assert decide(seen) == Resize(ROLES, without=(0, 2))
    after = carry_out(seen)
    assert not after.plan.holders & {0, 2} and after.plan.attention == (1,)
    assert not isinstance(decide(after), Resize), "it is done once"


def test_slots_stay_where_there_is_no_other_node() -> None:
    assert decide(view(draining=dict.fromkeys(range(6), 1.0))) == Noop()
    assert decide(view(draining={6: 1.0})) == Noop(), "a spare one has nothing to leave with"


def test_a_smaller_wish_is_met_by_those_that_leave() -> None:
    smaller = Roles(attention=1, experts=1, memory=2)
    seen = view(draining=GONE, roles=smaller, free_slots=5, colocated=False)
    assert decide(seen) == Resize(smaller, without=(0, 2))
    after = carry_out(seen).plan
    assert (after.attention, after.expert_primaries) == ((1,), (3,))


def test_a_backup_leaves_too() -> None:
    few = Roles(attention=2, experts=1, memory=1)
    seen = view(roles=few)
    seen = replace(seen, plan=carry_out(seen).plan)
    backups = seen.plan.holders - {
        *seen.plan.attention,
        *seen.plan.expert_primaries,
        *seen.plan.memory_primaries,
    }
    slot = min(backups)
    there = replace(seen, draining={slot: inf})
    assert decide(there) == Resize(few, without=(slot,))
    assert slot not in carry_out(there).plan.holders


@pytest.fixture(scope="module")
def undisturbed(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return train(tmp_path_factory.mktemp("undisturbed"), tiny_run(corpus, steps=12))


@pytest.mark.one_in(2)
@pytest.mark.parametrize("most", [pytest.param(12, id="room"), pytest.param(6, id="no room")])
def test_training_leaves_a_node_by_a_planned_change_and_loses_no_step(
    most: int, corpus: Path, undisturbed: Trained, tmp_path: Path
) -> None:
    left: list[set[str]] = []

    def at_step(step: int, run: Run, fleet: LocalFleet) -> None:
        if step == 4:
            fleet.drained["a"], fleet.most = 60.0, most
        elif step == 11:
            left.append({member.node for member in fleet.members().values()})

    trained = train(tmp_path / "run", tiny_run(corpus, steps=12, **WIDE), nodes=NODES, at_step=at_step)
    assert trained.curve == undisturbed.curve and trained.digest == undisturbed.digest
    told = trained.folder.event_lines()
    assert [e["text"] for e in told if e["kind"] == "draining"] == [
        "slot 0, 2, 4 must leave: Ray drains the node, which is gone in 60 s"
    ]
    assert (
        len([e for e in told if e["kind"] == "drained" and e["text"].startswith("slot 0, 2, 4 left, ")]) == 1
    )
    assert not {"lost", "recovered", "restored"} & set(trained.events)
    assert left == [{"b", "c"}] if most == 12 else left[0] <= {"b", "c"}


def test_status_says_which_slots_must_leave_and_by_when() -> None:
    found = {"run_dir": "/runs/a", "state": "training", "records": [], "steps": 9, "events": []}
    assert "drains" not in status.head(found | {"draining": {}}).plain
    one = status.head(found | {"draining": {"3": None}}).plain
    assert "draining  slot 3 is on a node that Ray drains" in one and "gone" not in one
    two = status.head(found | {"draining": {"3": 28, "4": None}}).plain
    assert "draining  slots 3, 4 are on a node that Ray drains, the first is gone in 28 s" in two
