"""A training run that lends slots and takes them back: as threads, its losses keep every bit."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from local_cluster import LocalFleet, Trained, tiny_run, train

from sparseray.platform.composition import Run
from sparseray.platform.config import RunConfig
from sparseray.platform.planning.lending import Lent

STEPS = 12


def config_of(corpus: Path, **cluster: Any) -> RunConfig:
    wide = {"attention_workers": 2, "expert_shards": 2, "memory_shards": 2, "deadline_s": 5.0}
    return tiny_run(corpus, steps=STEPS, **{**wide, **cluster})


@pytest.fixture(scope="module")
def undisturbed(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return train(tmp_path_factory.mktemp("undisturbed") / "run", config_of(corpus))


def lend(lent: Lent) -> Callable[[Run], None]:
    return lambda run: run.generations.ask(lent=lent)


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    ("cluster", "lent"),
    [
        ({}, Lent(attention=1, experts=1, memory=1)),
        ({"replication": 2, "standby": 1}, Lent(attention=1, standby=1)),
        ({"colocated": True}, Lent(attention=1, experts=1, memory=1)),
    ],
    ids=["one of each role", "a spare one and a worker", "slots with all roles"],
)
def test_slots_that_are_lent_and_come_back_change_no_bit(
    cluster: dict[str, Any], lent: Lent, corpus: Path, undisturbed: Trained, tmp_path: Path
) -> None:
    deeds = {3: lend(lent), 7: lend(Lent())}
    living: dict[int, int] = {}

    def at_step(step: int, run: Run, fleet: LocalFleet) -> None:
        living[step] = len(fleet.members())
        deeds.get(step, lambda run: None)(run)

    trained = train(tmp_path / "run", config_of(corpus, **cluster), at_step=at_step)
    assert trained.curve == undisturbed.curve and trained.digest == undisturbed.digest
    slots = lent.slots(colocated=cluster.get("colocated", False))
    assert living[6] == living[3] - slots and living[STEPS] == living[3]
    assert trained.events.count("resized") == 2 and "lost" not in trained.events


@pytest.mark.long
def test_a_scheduler_that_dies_knows_what_is_lent_and_what_the_run_wished_itself(
    corpus: Path, undisturbed: Trained, tmp_path: Path
) -> None:
    lent, seen = Lent(attention=1), {}

    def at_step(step: int, run: Run, fleet: LocalFleet) -> None:
        if step == 3:
            lend(lent)(run)
        if step == 6:
            # A wish of the user's, for the time when it is whole again.
            run.reconciler.request("experts", 3)
        if step == 8:
            lend(Lent())(run)
        seen[step] = run.generations.wish, run.generations.wanted

    trained = train(tmp_path / "run", config_of(corpus), at_step=at_step, scheduler_dies=(4, 7))
    assert trained.curve == undisturbed.curve and trained.digest == undisturbed.digest
    assert seen[5][0].lent == lent and seen[5][1].attention == 1
    wish, wanted = seen[7]
    assert (wish.roles.attention, wish.roles.experts, wanted.attention, wanted.experts) == (2, 3, 1, 3)
    assert replace(wish, lent=Lent()).roles == seen[STEPS][1]
