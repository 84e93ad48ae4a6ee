"""Real processes, signals, nodes and Ray's own head: the run goes on and ends with the undisturbed run's bits."""

import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from chaos import ENDLESS, HANG_S, Watched
from local_cluster import tiny_run
from processes import of_mark, resting, wait_until

from sparseray.platform.config import RunConfig

pytestmark = [pytest.mark.ray, pytest.mark.timeout(280)]


def config_of(corpus: Path) -> RunConfig:
    sizes = {"attention_workers": 1, "expert_shards": 2, "memory_shards": 2, "replication": 2, "standby": 1}
    run = tiny_run(corpus, steps=ENDLESS, **sizes, hang_s=HANG_S)
    return replace(run, train=replace(run.train, checkpoint_every=50))


@pytest.fixture
def run(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Watched]:
    # `Watched` sets these for the processes that it starts; they must not reach other tests.
    monkeypatch.setenv("SPARSERAY_STATE_DIR", "")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    # Slots load beside the run, each for itself, and the test waits for them: the run leaves them the processors.
    for name, value in resting(1.0).items():
        monkeypatch.setenv(name, value)
    made = Watched(tmp_path / "watched", config_of(corpus))
    yield made
    made.detach()
    made.close()


def slot_of(status: dict[str, Any], role: str) -> dict[str, Any]:
    found: dict[str, Any] = next(slot for slot in status["slots"] if role in slot["roles"])
    return found


def count(run: Watched, kind: str) -> int:
    return [event["kind"] for event in run.events()].count(kind)


@pytest.fixture
def cluster(run: Watched, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """Three nodes on this machine; the head keeps its state in RocksDB."""
    from ray.cluster_utils import Cluster

    for name, value in {
        "SPARSERAY_TEST": run.mark,
        "TMPDIR": str(run.temporary),
        "SPARSERAY_STATE_DIR": str(run.folder / "state"),
        "RAY_gcs_storage": "rocksdb",
        "RAY_gcs_storage_path": str(tmp_path / "gcs"),
        "RAY_worker_niceness": "0",
        # A node that is gone is known to be after 2.5 s, not 15; one that is only busy has 10 s for each answer.
        "RAY_health_check_period_ms": "500",
    }.items():
        monkeypatch.setenv(name, value)
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 4, "include_dashboard": False})
    for _ in range(2):
        made.add_node(num_cpus=4)
    yield made
    run.detach()
    made.shutdown()
    for process in of_mark(run.mark):
        process.kill()


def test_slots_a_node_the_head_the_scheduler_and_the_driver_die(run: Watched, cluster: Any) -> None:
    address = f"--cluster.address={cluster.address}"
    run.start(address)
    run.attach()
    for done, (role, number) in enumerate(
        (("expert", signal.SIGKILL), ("attention", signal.SIGSTOP)), start=1
    ):
        run.signal(slot_of(run.settled(), role)["pid"], number)
        run.wait(lambda done=done: count(run, "recovered") == done, f"recovery {done}")
    run.settled()

    # A node that does not hold the scheduler (a worker's parent is its raylet).
    own = psutil.Process(run.scheduler_pid()).ppid()
    victim = next(n for n in cluster.worker_nodes if n.all_processes["raylet"][0].process.pid != own)
    cluster.remove_node(victim, allow_graceful=False)
    wait_until(lambda: count(run, "recovered") > 2, "the recovery from the node's death")
    run.settled()
    # Else the head would come back with a node that it believes in, and start slots there.
    import ray

    wait_until(lambda: sum(node["Alive"] for node in ray.nodes()) == 2, "Ray's word of the node's death")

    head = cluster.head_node
    head.kill_gcs_server()
    before = run.steps()
    wait_until(lambda: run.steps() >= before + 3, "steps without Ray's head", 30.0)
    head.start_gcs_server()
    # A new slot can be had again: the policy makes up for one that dies now.
    status, recovered = run.settled(), count(run, "recovered")
    run.signal(slot_of(status, "memory")["pid"])
    wait_until(lambda: count(run, "recovered") > recovered, "the recovery from a slot's death")
    run.settled()

    os.kill(run.scheduler_pid(), signal.SIGKILL)
    run.wait(lambda: count(run, "scheduler") == 2, "the next scheduler's first step")
    from sparseray.jobs.scale import scale

    assert scale(run.scheduler, "memory", 3)["sizes"] == "1+2+3"

    assert run.process is not None
    run.process.kill()
    run.process.wait()
    before = run.steps()
    wait_until(lambda: run.steps() >= before + 3, "steps without the driver", 30.0)
    run.detach()
    run.start(address)
    run.wait(lambda: "this run is going on already" in run.log.read_text(), "the second driver")
    before = run.steps()
    run.wait(lambda: run.steps() > before, "another step")
    run.finish()
    assert "this run is going on already" in run.log.read_text()
    run.check()
    assert count(run, "restored") == 0
