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
    pytest.mark.timeout(600),
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
    """One of a group, and of the next one after it, as told; the first is in a collective when the other is killed."""
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    sent = torch.full((3,), rank, dtype=torch.uint8, device=device)
    into = torch.empty(3, dtype=torch.uint8, device=device)
    to, of = ([1, 2], [1, 2]) if rank == 0 else ([2, 1], [2, 1])
    while (meeting := pipe.recv()) != "end":
        started = time.perf_counter()
        group = Group(rank, 2, device, "127.0.0.1", meeting=meeting, timeout_s=30.0)
        pipe.send(group.meeting)
        while not group.is_formed:
            time.sleep(0.001)
        formed_s = time.perf_counter() - started
        group.start(sent, into.fill_(9), to, of).wait()
        pipe.send((into.tolist(), formed_s))
        if pipe.recv() == "wait":
            work = group.start(sent, into, to, of)
            pipe.send("begun")
            pipe.recv()
            assert not work.is_completed()
        started = time.perf_counter()
        group.abort()
        torch.cuda.synchronize()
        pipe.send(time.perf_counter() - started)
        assert float(torch.ones(64, 64, device=device).matmul(torch.ones(64, 64, device=device))[0, 0]) == 64


def meet(pipes: list[Any]) -> float:
    """Let two form a group and exchange; returns the seconds until it was formed."""
    pipes[0].send("")
    meeting = pipes[0].recv()
    pipes[1].send(meeting)
    assert pipes[1].recv() == meeting
    (one, formed_s), (two, _) = (pipe.recv() for pipe in pipes)
    assert (one, two) == ([0, 1, 1], [0, 0, 1])
    return float(formed_s)


def test_a_collective_with_a_dead_member_is_freed_and_the_next_group_forms_in_the_same_process() -> None:
    start = torch.multiprocessing.get_context("spawn")
    pipes, members = [], []
    for rank in (0, 1, 1):
        ours, theirs = start.Pipe()
        members.append(start.Process(target=member, args=(rank, theirs), daemon=True))
        pipes.append(ours)
        members[-1].start()
    formed = [meet(pipes[:2])]
    pipes[0].send("wait")
    assert pipes[0].recv() == "begun"
    time.sleep(0.3)
    members[1].kill()
    members[1].join()
    time.sleep(0.3)
    pipes[0].send("abort")
    freed_s = pipes[0].recv()
    formed.append(meet([pipes[0], pipes[2]]))
    for pipe in (pipes[0], pipes[2]):
        pipe.send("abort")
        pipe.recv()
        pipe.send("end")
    for process in (members[0], members[2]):
        process.join(20)
    codes = [members[0].exitcode, members[2].exitcode]
    print(f"groups of two formed in {formed} s, freed {freed_s:.2f} s after an abort, exit codes {codes}")
    assert freed_s < 3 and codes == [0, 0]


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
