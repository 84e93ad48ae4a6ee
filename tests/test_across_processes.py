"""Slots that exchange in step, each in a process of its own: what a GPU's slots do, in bf16 on a CPU."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from across_story import told
from local_cluster import tiny_run
from processes import temporary_folder

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]
ROLES = {"attention_workers": 2, "expert_shards": 2, "memory_shards": 2, "replication": 2}


@pytest.fixture
def temporary() -> Iterator[Path]:
    with temporary_folder() as folder:
        yield folder


@pytest.mark.long
@pytest.mark.parametrize(
    ("exchange", "faults"),
    [
        ("peers", ["forward:20:raise", "backward:15:stop", "commit:4:raise"]),
        # While the others are in a collective with it or about to be.
        (
            "collective",
            ["forward:40:kill", "backward:30:kill", "sums:8:kill", "commit:8:kill", "backward:30:stop"],
        ),
    ],
    ids=["peers", "collective"],
)
def test_processes_that_stand_still_lose_their_device_or_are_killed_change_no_bit(
    exchange: str, faults: list[str], corpus: Path, tmp_path: Path, temporary: Path
) -> None:
    config = tiny_run(corpus, steps=100000, colocated=True, exchange=exchange, **ROLES)
    config = replace(config, train=replace(config.train, dtype="bfloat16"))
    with told(config, tmp_path, temporary, faults) as story:
        story.fail()
        story.lose_a_slot()


@pytest.mark.long
def test_processes_that_are_killed_while_state_moves_change_no_bit(
    corpus: Path, tmp_path: Path, temporary: Path
) -> None:
    """One of three that hold everything is lost; then a source of the one that comes, and then another that comes."""
    roles = dict.fromkeys(ROLES, 3)
    config = tiny_run(corpus, steps=100000, colocated=True, **roles)
    config = replace(config, train=replace(config.train, dtype="bfloat16"))
    faults = ["forward:20:kill", "give:3:kill", "forward:100000:kill", "take:9:kill"]
    with told(config, tmp_path, temporary, faults) as story:
        story.wait_events("lost", 3, "the end of the third one")
        story.wait_for(lambda: len(story.targets()) == 3, "three slots again")
        story.wait_steps(3)
        assert story.pulled()["mapped"] > 0 and story.pulled()["message"] == 0


@pytest.mark.long
def test_processes_come_and_go_and_state_moves_through_memory(
    corpus: Path, tmp_path: Path, temporary: Path
) -> None:
    roles = dict.fromkeys(ROLES, 1)
    config = tiny_run(corpus, steps=100000, colocated=True, **roles)
    config = replace(config, train=replace(config.train, dtype="bfloat16"))
    with told(config, tmp_path, temporary) as story:
        story.come_and_go()


@pytest.mark.long
def test_a_killed_process_of_three_comes_again_and_no_bit_differs(
    corpus: Path, tmp_path: Path, temporary: Path
) -> None:
    roles = dict.fromkeys(ROLES, 3) | {"replication": 2}
    config = tiny_run(corpus, steps=100000, colocated=True, exchange="collective", **roles)
    config = replace(config, train=replace(config.train, dtype="bfloat16"))
    with told(config, tmp_path, temporary) as story:
        story.lose_a_slot()
