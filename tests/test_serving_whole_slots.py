"""Engines that hold everything each, as on several GPUs, here in slabs on a CPU: one is killed, others come and go."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from local_cluster import MODEL, tiny_run, train
from local_server import Heard, LocalServer, slabs_in_fp32
from test_elastic_serving import at, kill, requests, scale

from sparseray.model.config import DSEConfig
from sparseray.platform.config import ClusterConfig
from sparseray.platform.planning.inventory import Inventory, Roles
from sparseray.platform.planning.replan import make_plan, replan


@pytest.fixture(scope="module", autouse=True)
def _in_fp32() -> Iterator[None]:
    with slabs_in_fp32():
        yield


@pytest.fixture(scope="module")
def trained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = replace(tiny_run(corpus, steps=2), model=replace(MODEL, dse=DSEConfig(layers=())))
    newest = train(tmp_path_factory.mktemp("served"), config).folder.newest_checkpoint()
    assert newest is not None
    return newest


def serve(folder: Path, checkpoint: Path, engines: int, **cluster: int) -> LocalServer:
    config = ClusterConfig(attention_workers=engines, colocated=True, device="cpu", deadline_s=5.0, **cluster)  # type: ignore[arg-type]
    return LocalServer(folder, checkpoint, config, is_in_slabs=True)


@pytest.fixture(scope="module")
def one(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Heard]:
    """What one engine answers, undisturbed."""
    with serve(tmp_path_factory.mktemp("one") / "server", trained, 1) as server:
        return server.ask(requests())


def whole(server: LocalServer) -> list[int]:
    """Engines, each of which has everything."""
    plan = server.run.generations.plan
    assert plan is not None
    every = plan.pieces_of(plan.attention[0])
    assert len(every) == 1 + sum(map(len, plan.experts)) + sum(map(len, plan.buckets))
    assert all(plan.pieces_of(slot) == every for slot in plan.attention)
    assert set(plan.attention) == plan.holders
    return sorted(plan.attention)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("standby", [0, 1])
def test_a_killed_engine_fails_no_request_and_changes_no_token(
    standby: int, trained: Path, one: list[Heard], tmp_path: Path
) -> None:
    with serve(tmp_path / "server", trained, 2, standby=standby) as server:
        assert whole(server) == [0, 1]
        heard = server.ask(requests(), at({40: kill(1)}))
        assert [h.tokens for h in heard] == [h.tokens for h in one]
        assert server.events.count("lost") == 1
        assert server.ask(requests()[:2]) == one[:2]
        assert "restored" not in server.events


def test_engines_come_and_go(trained: Path, one: list[Heard], tmp_path: Path) -> None:
    with serve(tmp_path / "server", trained, 1) as server:
        changes = {10: scale("attention", 3), 70: scale("attention", 2)}
        heard = server.ask(requests(), at(changes))
        assert [h.tokens for h in heard] == [h.tokens for h in one]
        assert "resized" in server.events


def test_every_engine_holds_everything_in_every_plan() -> None:
    inventory = Inventory(parts=0, moe_layers=2, experts=8, dse_layers=1, buckets=6, is_whole=True)
    roles = inventory.roles(ClusterConfig(attention_workers=3))
    assert roles == Roles(attention=3, experts=3, memory=3)
    addresses = dict.fromkeys(range(4), "")
    plan = make_plan(
        generation=1,
        addresses=addresses,
        inventory=inventory,
        roles=roles,
        replication=inventory.replicas(roles, 1),
        colocated=True,
    )
    every = plan.pieces_of(0)
    assert [plan.pieces_of(slot) for slot in range(4)] == [every, every, every, []]
    # The third is lost, and the one on standby takes its place.
    again = replan(
        plan,
        generation=2,
        addresses=dict.fromkeys((0, 1, 3), ""),
        roles=roles,
        replication=3,
        colocated=True,
        parts=3,
    )
    assert [again.pieces_of(slot) for slot in (0, 1, 3)] == [every] * 3
