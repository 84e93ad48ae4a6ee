"""Slots that exchange in step, each in a process of its own: what a GPU's slots do, in bf16 on a CPU."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from across_story import fail, live
from local_cluster import tiny_run
from processes import temporary_folder

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]
ROLES = {"attention_workers": 2, "expert_shards": 2, "memory_shards": 2, "replication": 2}


@pytest.fixture
def temporary() -> Iterator[Path]:
    with temporary_folder() as folder:
        yield folder


@pytest.mark.parametrize(("slots", "exchange"), [(2, "peers"), (3, "collective")])
def test_a_killed_process_comes_again_and_no_bit_differs(
    slots: int, exchange: str, corpus: Path, tmp_path: Path, temporary: Path
) -> None:
    roles = dict.fromkeys(ROLES, slots) | {"replication": 2}
    config = tiny_run(corpus, steps=100000, colocated=True, exchange=exchange, **roles)
    live(replace(config, train=replace(config.train, dtype="bfloat16")), tmp_path, temporary)


def test_processes_that_stand_still_or_lose_their_device_change_no_bit(
    corpus: Path, tmp_path: Path, temporary: Path
) -> None:
    config = tiny_run(corpus, steps=100000, colocated=True, **ROLES)
    faults = ["forward:40:raise", "backward:30:stop", "commit:8:raise"]
    fail(replace(config, train=replace(config.train, dtype="bfloat16")), tmp_path, temporary, faults)


def test_processes_that_exchange_by_collectives_change_no_bit(
    corpus: Path, tmp_path: Path, temporary: Path
) -> None:
    """A killed one, and one that stands still, while the others are in a collective with it or about to be."""
    config = tiny_run(corpus, steps=100000, colocated=True, exchange="collective", **ROLES)
    faults = ["forward:40:kill", "backward:30:kill", "sums:8:kill", "commit:8:kill", "backward:30:stop"]
    fail(replace(config, train=replace(config.train, dtype="bfloat16")), tmp_path, temporary, faults)
