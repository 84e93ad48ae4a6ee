"""Slots come, go and die while requests are answered: no request fails, and every token is as undisturbed.

Slots are threads here (tests/local_server.py); tests/test_serving_cluster.py has real processes.
"""

import asyncio
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from math import inf
from pathlib import Path
from typing import Any

import httpx
import pytest
from local_cluster import tiny_run, train
from local_server import Heard, LocalServer, slowed, until
from serving_parts import app_of

from sparseray.actors.exchange.answers import Answers
from sparseray.actors.serving.text_request import GenerationRequest
from sparseray.errors import ConfigError
from sparseray.jobs.http.server import HttpServer
from sparseray.platform.composition import Run
from sparseray.platform.config import ClusterConfig
from sparseray.platform.fleet.job import SlotJob

REQUESTS, LENGTH = 6, 20
WIDE = {"attention_workers": 2, "expert_shards": 2, "memory_shards": 2, "replication": 2}
# Slots 0 and 1 are engines, 2 and 3 expert shards, 4 and 5 memory shards, 6 is on standby.


@pytest.fixture(scope="module")
def trained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    newest = train(tmp_path_factory.mktemp("served"), tiny_run(corpus, steps=2)).folder.newest_checkpoint()
    assert newest is not None
    return newest


def requests() -> list[GenerationRequest]:
    return [
        GenerationRequest(
            request_id=f"r{i}",
            prompt_tokens=tuple(range(5 + i, 25 + 2 * i)),
            max_tokens=LENGTH,
            seed=i,
            temperature=0.0 if i % 2 else 1.0,
            logprobs=2 if i % 3 else None,
        )
        for i in range(REQUESTS)
    ]


def serve(
    folder: Path, checkpoint: Path, nodes: dict[int, str] | None = None, **cluster: object
) -> LocalServer:
    config = ClusterConfig(**{**WIDE, "deadline_s": 5.0, **cluster})  # type: ignore[arg-type]
    return LocalServer(folder, checkpoint, config, nodes=nodes)


@pytest.fixture(scope="module")
def undisturbed(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Heard]:
    with serve(tmp_path_factory.mktemp("plain") / "server", trained) as server:
        heard = server.ask(requests())
    assert all(len(h.tokens) == LENGTH and h.finish == "length" for h in heard)
    assert [len(h.logprobs) for h in heard] == [0, LENGTH, LENGTH, 0, LENGTH, LENGTH]
    return heard


def at(changes: dict[int, Callable[[LocalServer], None]]) -> Callable[[int, LocalServer], None]:
    return lambda count, server: changes.get(count, lambda s: None)(server)


def kill(*slots: int) -> Callable[[LocalServer], None]:
    return lambda server: [server.fleet.kill(slot) for slot in slots] and None


def scale(role: str, count: int) -> Callable[[LocalServer], None]:
    return lambda server: server.run.reconciler.request(role, count)


@pytest.mark.one_in(4)
@pytest.mark.parametrize(
    ("victims", "replication", "standby"),
    [
        pytest.param((2,), 2, 1, id="expert shard, a replica answers"),
        pytest.param((4,), 2, 0, id="memory shard, a replica answers"),
        pytest.param((2,), 1, 0, id="expert shard, from the checkpoint"),
        pytest.param((2, 3), 2, 1, id="both expert shards, from the checkpoint"),
        pytest.param((0,), 2, 1, id="engine"),
        pytest.param((1,), 1, 0, id="engine, no slot to spare"),
        pytest.param((0, 1), 2, 2, id="both engines"),
    ],
)
def test_a_kill_fails_no_request_and_changes_no_token(
    victims: tuple[int, ...],
    replication: int,
    standby: int,
    trained: Path,
    undisturbed: list[Heard],
    tmp_path: Path,
) -> None:
    with serve(tmp_path / "server", trained, replication=replication, standby=standby) as server:
        assert server.ask(requests(), at({30: kill(*victims)})) == undisturbed
        assert server.events.count("lost") >= len(victims)
        assert server.ingress.reason == ""
        engines = [slot for slot in server.fleet.slots.values() if slot.roles.engine_role.engine is not None]
        # A change of plan is none of a request's failures.
        assert all(
            slot.roles.engine_role.engine.stats.failed_steps == 0
            for slot in engines
            if slot.roles.engine_role.engine
        )


@pytest.mark.parametrize(
    "silent",
    [
        pytest.param({30: 2}, id="expert shard", marks=pytest.mark.long),
        pytest.param({0: 5, 30: 3}, id="memory and expert"),
    ],
)
def test_a_shard_that_hangs_is_replaced_by_its_replica_before_anybody_calls_it_lost(
    silent: dict[int, int], trained: Path, undisturbed: list[Heard], tmp_path: Path
) -> None:
    """A slot's process stands still, and the scheduler of this test never finds out."""
    with serve(tmp_path / "server", trained, deadline_s=20.0) as server:
        hang = {
            count: lambda s, slot=slot: s.fleet.transports[slot].hung.set() for count, slot in silent.items()
        }
        hang.pop(0, lambda s: None)(server)
        heard = server.ask(requests(), at(hang))
        assert heard == undisturbed
        # Long before its deadline; how long is a benchmark's to say.
        assert max(h.gap_s for h in heard) < 10.0
        engines = [server.fleet.slots[slot].roles for slot in (0, 1)]
        assert all(set(roles.patience.silent) & set(silent.values()) for roles in engines)
        for slot in silent.values():
            server.fleet.heal(slot)
        assert server.ask(requests()) == undisturbed
        # What they said late was dropped, and showed that they are there again.
        assert all(roles.patience.silent == () for roles in engines)
        assert "lost" not in server.events
        for roles in engines:
            assert roles.engine_role.engine is not None and roles.engine_role.engine.stats.failed_steps == 0


def test_an_engine_keeps_its_caches_over_changes_of_plan(
    trained: Path, undisturbed: list[Heard], tmp_path: Path
) -> None:
    kept: list[int] = []

    def note(server: LocalServer) -> None:
        kept.extend(id(server.fleet.slots[slot].roles.engine_role.engine) for slot in (0, 1))

    changes = {15: note, 20: kill(2), 50: scale("experts", 3), 80: scale("memory", 1)}
    with serve(tmp_path / "server", trained, standby=1) as server:
        assert server.ask(requests(), at(changes)) == undisturbed
        engines = [server.fleet.slots[slot].roles.engine_role.engine for slot in (0, 1)]
        assert [id(engine) for engine in engines] == kept
        for engine in engines:
            assert engine is not None and engine.stats.failed_steps == 0
            # Nothing was read twice: every prompt token once.
        read = sum(engine.stats.prompt_tokens for engine in engines if engine is not None)
        assert read == sum(len(request.prompt_tokens) for request in requests())


def test_engines_are_added_and_taken_away_while_they_answer(
    trained: Path, undisturbed: list[Heard], tmp_path: Path
) -> None:
    changes = {10: scale("attention", 3), 40: scale("attention", 1), 80: scale("attention", 2)}
    with serve(tmp_path / "server", trained) as server:
        with slowed(engines_of(server), 0.05):
            assert server.ask(requests(), at(changes)) == undisturbed
        assert server.events.count("resized") >= 2
        with pytest.raises(ConfigError, match="needs an engine"):
            server.run.reconciler.request("attention", 0)


@pytest.mark.long
def test_no_request_waits_for_a_shard_that_is_slow_to_get_what_a_plan_gives_it(
    trained: Path, undisturbed: list[Heard], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those who have it answer until then, whoever it is read or copied from."""

    said, goal = 0, inf

    def held(function: Callable[..., Any]) -> Callable[..., Any]:
        """Nothing is read or copied before requests have got further."""

        def call(*arguments: Any) -> Any:
            nonlocal goal
            goal = min(goal, said + 12)
            until(lambda: said >= goal, 60.0)
            return function(*arguments)

        return call

    def note(change: Callable[[LocalServer], None], count: int, server: LocalServer) -> None:
        nonlocal said
        said = count
        if count == 10:
            change(server)

    with serve(tmp_path / "server", trained, standby=1) as server:
        monkeypatch.setattr(SlotJob, "read", held(SlotJob.read))
        monkeypatch.setattr(Answers, "_pull", held(Answers._pull))
        for role, change in (("experts", "2+3+2"), ("memory", "2+3+3")):
            resized, said, goal = server.events.count("resized"), 0, inf

            with slowed(engines_of(server), 0.08):
                assert server.ask(requests(), partial(note, scale(role, 3))) == undisturbed
            # It came while they were open.
            assert server.events.count("resized") > resized and server.run.reconciler.sizes() == change
            assert goal < inf
            server.fleet.start(1)


def test_what_can_be_read_nowhere_comes_from_peers(
    trained: Path, undisturbed: list[Heard], tmp_path: Path
) -> None:
    copy = tmp_path / trained.name
    shutil.copytree(trained, copy)
    with serve(tmp_path / "server", copy) as server:
        for weights in copy.glob("*.safetensors"):
            weights.unlink()
        for role in ("experts", "memory", "attention"):
            scale(role, 3)(server)
        until(lambda: server.run.reconciler.sizes() == "3+3+3", 30.0)
        assert server.ask(requests()) == undisturbed


def hang(slot: int) -> Callable[[LocalServer], None]:
    return lambda server: server.fleet.transports[slot].hung.set()


def engines_of(server: LocalServer) -> list[Any]:
    return [server.fleet.slots[slot].roles.engine_role.engine for slot in (0, 1)]


def test_requests_of_an_engine_that_hangs_go_on_elsewhere_before_anybody_calls_it_lost(
    trained: Path, undisturbed: list[Heard], tmp_path: Path
) -> None:
    with serve(tmp_path / "server", trained, deadline_s=20.0) as server:
        engines = engines_of(server)
        heard = server.ask(requests(), at({30: hang(0)}))
        assert heard == undisturbed
        assert max(h.gap_s for h in heard) < 5.0
        assert "lost" not in server.events and server.ingress.reason == ""
        hang(1)(server)
        until(lambda: "no answer from the engines in slots [0, 1]" in server.ingress.reason)
        for slot in (0, 1):
            server.fleet.heal(slot)
        # What it had is forgotten; what it says of it is nobody's to hear.
        until(lambda: not any(engine.has_work for engine in engines) and not server.ingress.reason)
        assert server.ask(requests()) == undisturbed
        assert engines_of(server) == engines and "lost" not in server.events


def test_an_engine_that_is_planned_to_go_finishes_what_it_has(
    trained: Path, undisturbed: list[Heard], tmp_path: Path
) -> None:
    with serve(tmp_path / "server", trained) as server:
        engines = engines_of(server)
        assert server.ask(requests(), at({20: scale("attention", 1)})) == undisturbed
        # Nothing was computed twice, and the one that went had something to finish.
        assert sum(engine.stats.generated_tokens for engine in engines) == REQUESTS * LENGTH
        assert all(engine.stats.generated_tokens > 0 for engine in engines)
        until(lambda: "resized" in server.events)
        # A wish that is taken back lets it stay; one whose time is up moves what is left.
        scale("attention", 2)(server)
        until(lambda: server.events.count("resized") == 2)
        # Requests that come before the new engine answers all go to the other, and then nobody has to be waited for.
        until(lambda: server.ingress._engines == {0, 1} and not server.ingress._life.silent)
        changes = {20: scale("attention", 1), 40: scale("attention", 2)}
        with slowed(engines_of(server), 0.05):
            assert server.ask(requests(), at(changes)) == undisturbed
        until(lambda: server.ingress.draining == ())
        assert server.events.count("resized") == 2
        server.run.generations.workload.drains.limit_s = 0.0  # type: ignore[attr-defined]
        assert server.ask(requests(), at({20: scale("attention", 1)})) == undisturbed
        until(lambda: server.events.count("resized") == 3)


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    ("left_s", "most"),
    [
        pytest.param(60.0, 12, id="time and room"),
        pytest.param(inf, 6, id="no room"),
        pytest.param(0.5, 12, id="no time"),
    ],
)
def test_engines_on_a_node_that_is_drained_finish_what_they_have(
    left_s: float, most: int, trained: Path, undisturbed: list[Heard], tmp_path: Path
) -> None:
    nodes = {slot: "ab"[slot % 2] for slot in range(6)}
    with serve(tmp_path / "server", trained, nodes=nodes) as server:
        engines = engines_of(server)

        def drain(server: LocalServer) -> None:
            server.fleet.drained["a"], server.fleet.most = left_s, most

        with slowed(engines, 0.03):
            assert server.ask(requests(), at({30: drain})) == undisturbed
        until(lambda: "drained" in server.events)
        until(lambda: not {0, 2, 4} & set(server.fleet.members()))
        read = sum(engine.stats.prompt_tokens for engine in engines)
        # Who moves to another engine is read there once more; with no time left that is what happens.
        assert (read > sum(len(r.prompt_tokens) for r in requests())) == (left_s < 1.0)
        assert server.ask(requests()) == undisturbed
        assert not {"lost", "recovered"} & set(server.events)


def test_an_engine_on_a_node_that_is_drained_gets_nothing_new_while_others_start(
    trained: Path, undisturbed: list[Heard], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve(tmp_path / "server", trained, nodes={0: "a", 1: "b"}) as server:
        leaving, staying = engines_of(server)
        monkeypatch.setattr(server.fleet, "starting", lambda: 1)
        server.fleet.drained["a"] = inf
        until(lambda: server.ingress.draining == (0,))
        assert server.ask(requests()) == undisturbed
        assert (leaving.stats.generated_tokens, staying.stats.generated_tokens) == (0, REQUESTS * LENGTH)
        assert "drained" not in server.events and not server.run.reconciler.is_settled()
        monkeypatch.undo()
        until(lambda: "drained" in server.events)


def test_a_client_that_goes_away_frees_its_place_at_once(trained: Path, tmp_path: Path) -> None:
    async def leave(server: LocalServer) -> None:
        stream = server.ingress.generate(replace(requests()[0], max_tokens=40))
        async for run in stream:
            if run[-1].index >= 3:
                break
        await stream.aclose()

    with serve(tmp_path / "server", trained) as server:
        asyncio.run(leave(server))
        until(lambda: not any(engine.has_work for engine in engines_of(server)), 1.0)
        assert sum(engine.stats.generated_tokens for engine in engines_of(server)) < 40


def test_a_scheduler_that_dies_is_noticed_by_no_request(
    trained: Path, undisturbed: list[Heard], tmp_path: Path
) -> None:
    def die(server: LocalServer) -> None:
        server.run.reconciler.request("experts", 3)
        server.dying.set()

    with serve(tmp_path / "server", trained) as server:
        assert server.ask(requests(), at({20: die})) == undisturbed
        assert "scheduler" in server.events
        assert server.run.generations.wanted.experts == 3


def test_a_scheduler_that_dies_with_all_slots_starts_others(
    trained: Path, undisturbed: list[Heard], tmp_path: Path
) -> None:
    def die(server: LocalServer) -> None:
        again = server._open

        def reopened() -> Run:
            kill(*server.fleet.members())(server)
            return again()

        server._open = reopened  # type: ignore[method-assign]
        server.dying.set()

    with serve(tmp_path / "server", trained) as server:
        assert server.ask(requests(), at({20: die})) == undisturbed
        assert server.events.count("start") == 2


def test_without_any_slot_readiness_says_so_until_others_have_started(trained: Path, tmp_path: Path) -> None:
    with ExitStack() as stack:
        server = stack.enter_context(serve(tmp_path / "server", trained))
        assert server.ask(requests()[:1])[0].finish == "length"
        server.fleet.most = 0
        seen: list[str] = []
        http = stack.enter_context(HttpServer(app_of(server.ingress)))
        assert httpx.get(f"{http.url}/ready").json() == {"status": "ok"}
        kill(*server.fleet.members())(server)
        for _ in range(400):
            if reason := server.ingress.reason:
                seen.append(reason)
                break
            server.stopping.wait(0.01)
        assert "every slot was lost" in seen[0]
        down = httpx.get(f"{http.url}/ready")
        assert (down.status_code, down.json()) == (503, {"status": "down", "reason": seen[0]})
        assert httpx.get(f"{http.url}/health").json() == {"status": "ok"}
        server.fleet.most = 12
        assert server.ask(requests()[:1])[0].finish == "length"
        assert server.ingress.reason == ""
        server.ingress.fail("the job is over")
        assert httpx.get(f"{http.url}/health").json() == {"status": "down", "reason": "the job is over"}
