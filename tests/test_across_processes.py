"""Slots that exchange through shared memory, each in a process of its own: what a GPU's slots do, in bf16 on a CPU."""

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


def test_processes_that_stand_still_lose_their_device_or_are_killed_change_no_bit(
    corpus: Path, tmp_path: Path, temporary: Path
) -> None:
    config = tiny_run(corpus, steps=100000, colocated=True, **ROLES)
    config = replace(config, train=replace(config.train, dtype="bfloat16"))
    faults = ["forward:20:raise", "backward:15:stop", "commit:4:raise"]
    with told(config, tmp_path, temporary, faults) as story:
        story.fail()
        story.lose_a_slot()
