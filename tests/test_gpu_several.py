"""Training on two GPUs through the command: one is killed and comes again, and the bits are those of one GPU.

Where there are fewer GPUs than slots, all slots share the first one, each in its turn: slow, but all of it is run.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from across_story import told
from processes import temporary_folder
from test_gpu_training import run_on

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.ray,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.timeout(600),
]


@pytest.fixture
def temporary() -> Iterator[Path]:
    with temporary_folder() as folder:
        yield folder


def test_a_killed_gpu_slot_comes_again_and_no_bit_differs(
    corpus: Path, tmp_path: Path, temporary: Path
) -> None:
    roles = {"attention_workers": 2, "expert_shards": 2, "memory_shards": 2, "replication": 2}
    with told(run_on("cuda", corpus, steps=100000, cluster=roles), tmp_path, temporary) as story:
        story.lose_a_slot()


@pytest.mark.parametrize(
    "faults",
    [
        ["part:24:illegal", "sums:7:stop", "commit:8:illegal"],
        ["sums:7:illegal", "part:24:stop", "commit:8:stop"],
    ],
    ids=["illegal first", "stopped last"],
)
def test_gpu_slots_that_stand_still_or_write_to_nobodys_memory_change_no_bit(
    faults: list[str], corpus: Path, tmp_path: Path, temporary: Path
) -> None:
    """A kernel's illegal access ends its process's use of the GPU: the others go on, and another slot comes.

    Before a part that others replay and wait in, and when all parts have been.
    """
    roles = {"attention_workers": 2, "expert_shards": 2, "memory_shards": 2, "replication": 2}
    with told(run_on("cuda", corpus, steps=100000, cluster=roles), tmp_path, temporary, faults) as story:
        story.fail()


def test_gpu_slots_come_and_go_and_state_moves_through_memory(
    corpus: Path, tmp_path: Path, temporary: Path
) -> None:
    """1-2-1: experts and half of the tables go to the second and come back, dense weights are copied to it."""
    with told(run_on("cuda", corpus, steps=100000), tmp_path, temporary) as story:
        story.come_and_go()


@pytest.mark.parametrize(("slots", "parts"), [(2, 2), (2, 4), (4, 4)])
def test_parts_of_several_gpus_are_replayed_and_their_bits_are_those_of_one(
    slots: int, parts: int, corpus: Path, tmp_path: Path, temporary: Path
) -> None:
    roles = dict.fromkeys(("attention_workers", "expert_shards", "memory_shards"), slots)
    config = run_on("cuda", corpus, steps=100000, cluster=roles, logical_shards=parts, eval_every=4)
    with told(config, tmp_path, temporary) as story:
        story.wait_steps(12)
        assert story.logged("parts run as one CUDA graph") == slots
        assert story.logged("without a CUDA graph") == 0


def test_roles_in_gpus_of_their_own_change_no_bit(corpus: Path, tmp_path: Path, temporary: Path) -> None:
    config = run_on("cuda", corpus, steps=100000)
    apart = replace(config, cluster=replace(config.cluster, colocated=False))
    with told(apart, tmp_path, temporary) as story:
        story.wait_steps(10)
