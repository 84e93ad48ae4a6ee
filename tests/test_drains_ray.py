"""A node of a real Ray is drained under a training run and under streams: no step is lost, and nothing is cut."""

import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from chaos import ENDLESS, HANG_S, Watched
from chaos_serving import WatchedServer
from local_cluster import tiny_run, train
from processes import of_mark, resting, wait_until

# Two jobs on two nodes, whose slots load one by one; the run is computed again, undisturbed.
pytestmark = [pytest.mark.ray, pytest.mark.long, pytest.mark.timeout(400)]
BOTH = {"attention_workers": 2, "expert_shards": 2, "memory_shards": 2, "replication": 2, "colocated": True}
LEFT_S = 60


@pytest.fixture
def run(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Watched]:
    # `Watched` sets these for the processes that it starts; they must not reach other tests.
    monkeypatch.setenv("SPARSERAY_STATE_DIR", "")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    config = tiny_run(corpus, steps=ENDLESS, **BOTH, standby=0, hang_s=HANG_S)
    config = replace(config, train=replace(config.train, checkpoint_every=ENDLESS))
    made = Watched(tmp_path / "watched", config)
    yield made
    made.detach()
    made.close()


@pytest.fixture
def cluster(run: Watched, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A head and another node on this machine, with room for what is started here and two slots more."""
    from ray.cluster_utils import Cluster

    changes = {"SPARSERAY_TEST": run.mark, "TMPDIR": str(run.temporary), "RAY_worker_niceness": "0"}
    for name, value in {**changes, **resting(0.2)}.items():
        monkeypatch.setenv(name, value)
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 4, "include_dashboard": False})
    made.add_node(num_cpus=2)
    yield made
    run.detach()
    made.shutdown()
    for process in of_mark(run.mark):
        process.kill()


def drain(address: str, node: str, left_s: float) -> None:
    """What `ray drain-node` does, without another second of imports."""
    from ray._raylet import GcsClient
    from ray.core.generated.autoscaler_pb2 import DrainNodeReason

    reason = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    deadline_ms = int((time.time() + left_s) * 1e3)
    is_accepted, why = GcsClient(address=address).drain_node(node, reason, "a spot notice", deadline_ms)
    assert is_accepted, why


def test_a_node_that_is_drained_is_left_without_a_lost_step_or_a_cut_stream(
    run: Watched, cluster: Any, corpus: Path
) -> None:
    checkpoint = train(run.folder / "served", tiny_run(corpus, steps=2)).folder.newest_checkpoint()
    assert checkpoint is not None
    serves = WatchedServer(
        run.folder / "server",
        tiny_run(corpus, steps=2, **BOTH, standby=0, hang_s=HANG_S),
        address=cluster.address,
        state=Path(os.environ["SPARSERAY_STATE_DIR"]),
        mark=run.mark,
        checkpoint=checkpoint,
    )
    run.address = cluster.address
    (victim,) = cluster.worker_nodes
    try:
        from sparseray.platform.cluster import connect

        run.start()
        wait_until(lambda: run.steps() > 0, "the first step")
        connect(cluster.address)
        run.attach()
        serves.start()
        serves.attach()
        raylet = victim.all_processes["raylet"][0].process
        # A worker's parent is its raylet; where the scheduler starts is up to Ray.
        is_there = psutil.Process(run.scheduler_pid()).ppid() == raylet.pid
        for job in (run, serves):
            assert {slot["node"] for slot in job.settled()["slots"]} > {victim.node_id}, "one slot on each"
        before = run.steps()
        drain(cluster.address, victim.node_id, LEFT_S)
        wait_until(lambda: serves.status()["draining"], "the notice", 5.0)

        def has_left(job: Watched) -> bool:
            found = job.settled()
            return {slot["node"] for slot in found["slots"]} == {cluster.head_node.node_id}

        for job in (run, serves):
            wait_until(lambda job=job: has_left(job), f"{job.folder.name} on the other node", LEFT_S)
        # Nothing is left there, not even the scheduler: Ray ends the node by itself.
        wait_until(lambda: raylet.poll() is not None, "the end of the node", 20.0)
        after = run.steps()
        wait_until(lambda: run.steps() > after + 3 and serves.steps() > 20, "more of both")
        kinds = [event["kind"] for event in run.events()]
        assert kinds.count("draining") == kinds.count("drained") == 1 and after > before
        assert ("scheduler" in kinds) == is_there
        assert not {"lost", "recovered", "restored"} & set(kinds)
        run.detach()
        serves.finish()
        said = serves.log.read_text()
        assert "*** drained: slot" in said and "*** lost" not in said, said
        assert serves.check() > 20
        run.finish()
        run.check()
    finally:
        serves.ending.set()
        serves.close()
