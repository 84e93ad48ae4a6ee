"""Engines with some of the experts each, which compute in rounds: as on several GPUs, here in bf16 on a CPU."""

from dataclasses import replace
from pathlib import Path

import pytest
from local_cluster import MODEL, tiny_run, train
from local_server import Heard, LocalServer
from test_elastic_serving import at, kill, requests, scale

from sparseray.actors.peers.in_rounds import RoundsExchange
from sparseray.model.config import DSEConfig
from sparseray.platform.config import ClusterConfig


@pytest.fixture(scope="module")
def trained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = replace(tiny_run(corpus, steps=2), model=replace(MODEL, dse=DSEConfig(layers=())))
    newest = train(tmp_path_factory.mktemp("served"), config).folder.newest_checkpoint()
    assert newest is not None
    return newest


def serve(folder: Path, checkpoint: Path, **cluster: int) -> LocalServer:
    config = ClusterConfig(**{"colocated": True, "device": "cpu", "deadline_s": 5.0, **cluster})  # type: ignore[arg-type]
    return LocalServer(folder, checkpoint, config, is_in_slabs=True)


@pytest.fixture(scope="module")
def one(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Heard]:
    """What one engine that has everything answers, undisturbed."""
    with serve(tmp_path_factory.mktemp("one") / "server", trained) as server:
        return server.ask(requests())


def rounds_of(server: LocalServer) -> list[int]:
    """Rounds of every slot's exchange."""
    exchanges = [slot.roles.exchange for slot in server.fleet.slots.values()]
    return [exchange.begun for exchange in exchanges if isinstance(exchange, RoundsExchange)]


@pytest.mark.parametrize(("attention", "experts", "replication"), [(2, 2, 1), (3, 3, 2), (1, 3, 1), (3, 2, 1)])
def test_engines_that_share_experts_answer_as_one_that_has_them_all(
    attention: int, experts: int, replication: int, trained: Path, one: list[Heard], tmp_path: Path
) -> None:
    roles = {"attention_workers": attention, "expert_shards": experts, "replication": replication}
    with serve(tmp_path / "server", trained, **roles) as server:
        assert server.ask(requests()) == one
        counts = rounds_of(server)
        assert len(counts) == max(attention, experts) and min(counts) > 20


@pytest.mark.parametrize("victim", [0, 2])
def test_a_killed_engine_with_experts_fails_no_request_and_its_replicas_go_on(
    victim: int, trained: Path, one: list[Heard], tmp_path: Path
) -> None:
    roles = {"attention_workers": 3, "expert_shards": 3, "replication": 2}
    with serve(tmp_path / "server", trained, **roles) as server:
        heard = server.ask(requests(), at({40: kill(victim)}))
        assert [h.tokens for h in heard] == [h.tokens for h in one]
        assert server.events.count("lost") == 1
        assert server.ask(requests()) == one
