"""Training on two GPUs whose slots exchange by NCCL: one is killed, one stands still, and the bits are those of one GPU."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from across_story import told
from processes import temporary_folder
from test_gpu_training import run_on

from sparseray.actors.peers.group import Group

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.ray,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
    pytest.mark.timeout(300),
]
CLUSTER = {
    "attention_workers": 2,
    "expert_shards": 2,
    "memory_shards": 2,
    "replication": 2,
    "exchange": "collective",
}


@pytest.fixture
def temporary() -> Iterator[Path]:
    with temporary_folder() as folder:
        yield folder


def member(rank: int, pipe: Any) -> None:
    """One of two: exchanges, and then waits for the other one, which never comes and is killed."""
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    torch.zeros(1, device=device)
    pipe.recv()
    started = time.perf_counter()
    meeting = "" if rank == 0 else pipe.recv()
    group = Group(rank, 2, device, "127.0.0.1", meeting=meeting, timeout_s=30.0)
    pipe.send(group.meeting)
    while not group.is_formed:
        time.sleep(0.001)
    formed_s = time.perf_counter() - started
    sent = torch.full((3,), rank, dtype=torch.uint8, device=device)
    into = torch.empty(3, dtype=torch.uint8, device=device)
    to, of = ([1, 2], [1, 2]) if rank == 0 else ([2, 1], [2, 1])
    group.start(sent, into, to, of).wait()
    pipe.send((into.tolist(), formed_s))
    if rank == 1:
        time.sleep(1000)
    work = group.start(sent, into, to, of)
    pipe.recv()
    assert not work.is_completed()
    started = time.perf_counter()
    group.abort()
    torch.cuda.synchronize()
    freed_s = time.perf_counter() - started
    assert float(torch.ones(64, 64, device=device).matmul(torch.ones(64, 64, device=device))[0, 0]) == 64
    pipe.send(freed_s)


def test_a_collective_with_a_dead_member_is_freed_on_the_device() -> None:
    start = torch.multiprocessing.get_context("spawn")
    pipes, members = [], []
    for rank in range(2):
        ours, theirs = start.Pipe()
        members.append(start.Process(target=member, args=(rank, theirs), daemon=True))
        pipes.append(ours)
        members[-1].start()
    for pipe in pipes:
        pipe.send("begin")
    meeting = pipes[0].recv()
    pipes[1].send(meeting)
    assert pipes[1].recv() == meeting
    (one, formed_s), (two, _) = (pipe.recv() for pipe in pipes)
    assert (one, two) == ([0, 1, 1], [0, 0, 1])
    time.sleep(0.5)
    members[1].kill()
    members[1].join()
    time.sleep(0.3)
    pipes[0].send("abort")
    freed_s = pipes[0].recv()
    members[0].join(20)
    print(
        f"group of two formed in {formed_s:.2f} s, freed {freed_s:.2f} s after its abort, exit {members[0].exitcode}"
    )
    assert freed_s < 3 and members[0].exitcode == 0


def test_a_killed_gpu_slot_comes_again_and_no_bit_differs(
    corpus: Path, tmp_path: Path, temporary: Path
) -> None:
    with told(run_on("cuda", corpus, steps=100000, cluster=CLUSTER), tmp_path, temporary) as story:
        story.lose_a_slot()


def test_gpu_slots_that_stand_still_or_fail_change_no_bit(
    corpus: Path, tmp_path: Path, temporary: Path
) -> None:
    faults = ["backward:30:stop", "forward:40:illegal", "sums:6:kill"]
    with told(run_on("cuda", corpus, steps=100000, cluster=CLUSTER), tmp_path, temporary, faults) as story:
        story.fail()
