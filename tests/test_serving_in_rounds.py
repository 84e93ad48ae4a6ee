"""Engines with some of the experts each, which compute in rounds: as on several GPUs, here in slabs on a CPU."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from local_cluster import MODEL, tiny_run, train
from local_server import Heard, LocalServer, slabs_in_fp32
from processes import wait_until
from test_elastic_serving import at, kill, requests, scale

from sparseray.actors.peers.in_rounds import RoundsExchange, is_in_rounds
from sparseray.actors.state.assignment import Plan
from sparseray.errors import ConfigError
from sparseray.model.config import DSEConfig
from sparseray.platform.config import ClusterConfig
from sparseray.platform.planning.inventory import Inventory
from sparseray.platform.planning.replan import make_plan
from sparseray.platform.planning.shrink import after_loss


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


@pytest.mark.one_in(6)
@pytest.mark.parametrize(
    ("attention", "experts", "replication"), [(2, 2, 1), (3, 3, 2), (1, 3, 1), (3, 2, 1)]
)
def test_engines_that_share_experts_answer_as_one_that_has_them_all(
    attention: int, experts: int, replication: int, trained: Path, one: list[Heard], tmp_path: Path
) -> None:
    roles = {"attention_workers": attention, "expert_shards": experts, "replication": replication}
    with serve(tmp_path / "server", trained, **roles) as server:
        assert server.ask(requests()) == one
        counts = rounds_of(server)
        assert len(counts) == max(attention, experts) and min(counts) > 20


@pytest.mark.one_in(2)
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


@pytest.mark.long
def test_after_a_loss_nothing_moves_before_those_who_are_left_go_on(
    trained: Path, one: list[Heard], tmp_path: Path
) -> None:
    """What the lost one held second comes back by a planned change, with the slot that takes its place."""
    roles = {"attention_workers": 3, "expert_shards": 3, "replication": 2}
    with serve(tmp_path / "server", trained, **roles) as server:
        before = server.run.generations.plan
        assert before is not None
        seen: list[Plan] = []

        def note(count: int, server: LocalServer) -> None:
            plan = server.run.generations.plan
            if plan is not None and 1 not in plan.addresses:
                seen.append(plan)

        def kill_and_note(count: int, server: LocalServer) -> None:
            if count == 40:
                server.fleet.kill(1)
            note(count, server)

        assert [h.tokens for h in server.ask(requests(), kill_and_note)] == [h.tokens for h in one]
        assert seen and seen[0].attention == (0, 2)
        for slot in (0, 2):
            assert seen[0].pieces_of(slot) == before.pieces_of(slot)
        wait_until(lambda: "resized" in server.events, "the third engine", 20.0)
        after = server.run.generations.plan
        assert after is not None and len(after.attention) == 3
        assert all(len(holders) == 2 for row in after.experts for holders in row)
        assert server.ask(requests()) == one


@pytest.mark.long
def test_a_slot_that_hangs_is_gone_as_soon_as_it_is_silent(
    trained: Path, one: list[Heard], tmp_path: Path
) -> None:
    roles = {"attention_workers": 3, "expert_shards": 3, "replication": 2}
    with serve(tmp_path / "server", trained, **roles) as server:

        def hang(server: LocalServer) -> None:
            server.fleet.transports[2].hung.set()

        heard = server.ask(requests(), at({40: hang}))
        assert [h.tokens for h in heard] == [h.tokens for h in one]
        server.fleet.heal(2)


def test_engines_come_and_go_in_rounds(trained: Path, one: list[Heard], tmp_path: Path) -> None:
    with serve(tmp_path / "server", trained, attention_workers=2, expert_shards=2) as server:
        changes = {10: scale("attention", 3), 50: scale("experts", 3), 90: scale("attention", 1)}
        assert [h.tokens for h in server.ask(requests(), at(changes))] == [h.tokens for h in one]
        with pytest.raises(ConfigError, match="4 can"):
            server.run.reconciler.request("attention", 5)


@pytest.mark.long
def test_a_killed_engine_without_replicas_is_made_up_for_from_the_checkpoint(
    trained: Path, one: list[Heard], tmp_path: Path
) -> None:
    with serve(tmp_path / "server", trained, attention_workers=2, expert_shards=2) as server:
        assert [h.tokens for h in server.ask(requests(), at({40: kill(1)}))] == [h.tokens for h in one]
        assert "restored" in server.events


def test_the_plan_after_a_loss_gives_nobody_anything_and_shares_out_what_was_computed() -> None:
    inventory = Inventory(parts=0, moe_layers=2, experts=8, dse_layers=0, buckets=0, in_slabs=True)
    cluster = ClusterConfig(attention_workers=3, expert_shards=3, replication=2, colocated=True)
    addresses = dict.fromkeys(range(3), "")
    plan = make_plan(
        generation=1,
        addresses=addresses,
        inventory=inventory,
        roles=inventory.roles(cluster),
        replication=2,
        colocated=True,
    )
    left = {slot: SimpleNamespace(address="") for slot in (0, 2)}
    found = after_loss(plan, left, inventory, 2)
    assert found is not None and (found.generation, found.attention, found.dense) == (2, (0, 2), (0, 2))
    for slot in left:
        assert found.pieces_of(slot) == plan.pieces_of(slot)
        assert 3 <= sum(holders[0] == slot for holders in found.experts[0]) <= 5
    assert is_in_rounds(plan) and is_in_rounds(found)
    # Nobody has what both had; and on CPUs, where reading is quick, a loss is made up for at once.
    assert after_loss(found, {0: left[0]}, inventory, 3) is None
    assert after_loss(plan, left, replace(inventory, in_slabs=False), 2) is None
