"""New weights come into a server that answers: no request fails, each says whose tokens it got, and mistakes are told."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from local_cluster import tiny_run, train
from local_server import Heard, LocalServer

from sparseray.actors.serving.paged_engine import PagedEngine
from sparseray.actors.serving.staging import Staging
from sparseray.actors.serving.text_request import GenerationRequest, TokenEvent
from sparseray.errors import ConfigError, UserError
from sparseray.jobs.serve import main
from sparseray.platform.config import ClusterConfig, ServeConfig
from sparseray.platform.publishing import Publisher
from sparseray.platform.run.folder import RunFolder
from sparseray.platform.server import Server

LENGTH, REQUESTS, STEP_S = 30, 4, 0.03
WIDE = ClusterConfig(attention_workers=2, expert_shards=2, memory_shards=2, replication=2, deadline_s=8.0)
ALONE = ClusterConfig(deadline_s=8.0)
PLAIN = ServeConfig(prefill_chunk=8)
SWITCH, ASKED, EVERY_THREE = (
    replace(PLAIN, in_flight="switch"),
    replace(PLAIN, follow_every=0),
    replace(PLAIN, follow_every=3),
)


@pytest.fixture(scope="module")
def run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run with checkpoints of the steps 2, 4 and 6."""
    config = tiny_run(corpus, steps=6)
    every_two = replace(config, train=replace(config.train, checkpoint_every=2, keep_checkpoints=9))
    return train(tmp_path_factory.mktemp("run") / "run", every_two).folder


@pytest.fixture
def slowly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps take so long that requests are open still when the version has come."""
    quick = PagedEngine.step

    def slow(engine: PagedEngine) -> list[TokenEvent]:
        time.sleep(STEP_S)
        return quick(engine)

    monkeypatch.setattr(PagedEngine, "step", slow)


def step(run: RunFolder, number: int) -> Path:
    return run.checkpoints / f"step_{number}"


def requests(prefix: str = "r") -> list[GenerationRequest]:
    return [
        GenerationRequest(
            request_id=f"{prefix}{i}", prompt_tokens=tuple(range(5 + i, 25 + i)), max_tokens=LENGTH, seed=i
        )
        for i in range(REQUESTS)
    ]


@pytest.fixture(scope="module")
def undisturbed(run: RunFolder, tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[Heard]]:
    """What each version answers."""
    found = {}
    for number in (2, 6):
        with LocalServer(tmp_path_factory.mktemp("plain") / "s", step(run, number), ALONE) as server:
            found[number] = server.ask(requests())
    assert found[2] != found[6]
    return found


def publisher_of(server: LocalServer) -> Publisher:
    driver = server.run.driver
    assert isinstance(driver, Server)
    return driver.publisher


def publish(checkpoint: Path) -> Callable[[LocalServer], None]:
    return lambda server: publisher_of(server).publish(str(checkpoint)) and None


def noting(
    both: list[bool], changes: dict[int, Callable[[LocalServer], None]]
) -> Callable[[int, LocalServer], None]:
    """As `at`; at every token, whether two versions are served."""

    def look(count: int, server: LocalServer) -> None:
        both.append(publisher_of(server).weights.earlier is not None)
        changes.get(count, lambda s: None)(server)

    return look


def wait_for(server: LocalServer, condition: Callable[[], bool]) -> None:
    for _ in range(1000):
        if condition():
            return
        server.stopping.wait(0.02)
    raise AssertionError(server.events)


@pytest.mark.parametrize(
    "cluster", [pytest.param(ALONE, marks=pytest.mark.long), WIDE], ids=["one slot", "shards and replicas"]
)
@pytest.mark.usefixtures("slowly")
def test_open_requests_finish_with_their_version_and_new_ones_get_the_next(
    cluster: ClusterConfig, run: RunFolder, undisturbed: dict[int, list[Heard]], tmp_path: Path
) -> None:
    both: list[bool] = []
    with LocalServer(tmp_path / "s", step(run, 2), cluster) as server:
        assert server.ask(requests(), noting(both, {8: publish(step(run, 6))})) == undisturbed[2]
        assert any(both)
        wait_for(server, lambda: "published" in server.events)
        assert server.ask(requests("n")) == undisturbed[6]
        assert server.ingress.version().startswith("step_6-")
        weights = publisher_of(server).weights
        wait_for(server, lambda: weights.earlier is None)
        wait_for(server, lambda: all(slot.roles.earlier is None for slot in server.fleet.slots.values()))


@pytest.mark.long
@pytest.mark.parametrize("cluster", [ALONE, WIDE], ids=["one slot", "shards and replicas"])
@pytest.mark.usefixtures("slowly")
def test_open_requests_go_on_with_the_new_version_where_that_is_wanted(
    cluster: ClusterConfig, run: RunFolder, undisturbed: dict[int, list[Heard]], tmp_path: Path
) -> None:
    both: list[bool] = []
    with LocalServer(tmp_path / "s", step(run, 2), cluster, serve=SWITCH) as server:
        heard = server.ask(requests(), noting(both, {48: publish(step(run, 6))}))
        assert not any(both)
        assert all(len(h.tokens) == LENGTH and h.finish == "length" for h in heard)
        # They began as with the old weights, and went another way.
        for h, before in zip(heard, undisturbed[2], strict=True):
            assert h.tokens[:1] == before.tokens[:1]
        assert all(h.tokens != before.tokens for h, before in zip(heard, undisturbed[2], strict=True))
        wait_for(server, lambda: "published" in server.events)
        assert server.ask(requests("n")) == undisturbed[6]


@pytest.mark.long
@pytest.mark.usefixtures("slowly")
def test_a_slot_dies_while_two_versions_are_served_and_no_request_fails(
    run: RunFolder, undisturbed: dict[int, list[Heard]], tmp_path: Path
) -> None:
    both: list[bool] = []

    def kill(server: LocalServer) -> None:
        wait_for(server, lambda: publisher_of(server).weights.version.step == 6)
        server.fleet.kill(2)

    with LocalServer(tmp_path / "s", step(run, 2), replace(WIDE, standby=1)) as server:
        heard = server.ask(requests(), noting(both, {8: publish(step(run, 6)), 12: kill}))
        assert any(both) and not both[-1] and "lost" in server.events
        assert all(len(h.tokens) == LENGTH and h.finish == "length" for h in heard)
        assert server.ask(requests("n")) == undisturbed[6]


def test_a_new_scheduler_goes_on_with_the_version_that_was_published(
    run: RunFolder, undisturbed: dict[int, list[Heard]], tmp_path: Path
) -> None:
    with LocalServer(tmp_path / "s", step(run, 2), WIDE) as server:
        server.ask(requests()[:1])
        publish(step(run, 6))(server)
        wait_for(server, lambda: "published" in server.events)
        server.dying.set()
        wait_for(server, lambda: "scheduler" in server.events)
        assert server.ask(requests("n")) == undisturbed[6]
        assert publisher_of(server).weights.version.step == 6


def test_an_older_checkpoint_can_be_published_and_the_same_one_changes_nothing(
    run: RunFolder, undisturbed: dict[int, list[Heard]], tmp_path: Path
) -> None:
    with LocalServer(tmp_path / "s", step(run, 6), ALONE) as server:
        server.ask(requests()[:1])
        publish(step(run, 6))(server)
        publish(step(run, 2))(server)
        wait_for(server, lambda: "published" in server.events)
        assert server.ask(requests("n")) == undisturbed[2]
        assert server.events.count("published") == 1


def test_a_checkpoint_of_another_model_is_refused_with_what_differs(
    run: RunFolder, corpus: Path, tmp_path: Path
) -> None:
    config = tiny_run(corpus, steps=1)
    other = train(tmp_path / "other", replace(config, model=replace(config.model, ffn_dim=40))).folder
    newest = other.newest_checkpoint()
    assert newest is not None
    with LocalServer(tmp_path / "s", step(run, 2), ALONE) as server:
        server.ask(requests()[:1])
        with pytest.raises(
            ConfigError, match=r"of another model: model\.ffn_dim is 40 and the server's is 48"
        ):
            publish(newest)(server)
        with pytest.raises(UserError, match="is not a checkpoint"):
            publish(tmp_path)(server)
        with pytest.raises(ConfigError, match="follows no run; name a checkpoint"):
            publisher_of(server).publish("")
        assert "published" not in server.events


def test_what_was_read_counts_for_its_own_checkpoint_alone_and_a_failure_is_told() -> None:
    staging, told, read = Staging(), list[str](), list[Any]()

    def reads(what: str) -> Callable[[], Any]:
        def run() -> Any:
            if what == "broken":
                raise OSError("a disk that is gone")
            read.append(what)
            return what

        return run

    staging.start((3, "a"), reads("a"), told.append)
    assert staging.take((3, "b")) is None
    staging.start((3, "b"), reads("b"), told.append)
    assert staging.take((3, "b")) == "b" and staging.take((3, "b")) is None
    assert read == ["a", "b"] and told == ["", ""]
    staging.start((4, "broken"), reads("broken"), told.append)
    assert staging.take((4, "broken")) is None
    for _ in range(500):
        if len(told) == 3:
            break
        time.sleep(0.01)
    assert "a disk that is gone" in told[-1]


def test_what_cannot_be_followed_is_told_in_a_sentence(
    run: RunFolder, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "young").mkdir()
    (tmp_path / "young" / "config.yaml").write_text("")
    for arguments, what, cure in (
        (["--run", str(tmp_path / "none")], "there is no run", "run_dir of `pretrain`"),
        (["--run", str(tmp_path / "young")], "no checkpoint yet", "wait for its first"),
        (["--run", str(run.path)], "has ended with step_6", "--checkpoint"),
        ([], "give either --checkpoint", "--run RUN"),
        (["--run", str(run.path), "--checkpoint", "x"], "give either", "--run RUN"),
    ):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert what in error and cure in error and error.count("\n") == 1, error


@pytest.mark.long
def test_where_the_run_has_removed_what_is_served_its_newest_checkpoint_takes_the_place(
    run: RunFolder, undisturbed: dict[int, list[Heard]], tmp_path: Path
) -> None:
    growing = RunFolder(tmp_path / "growing")
    growing.checkpoints.mkdir(parents=True)
    served = growing.checkpoints / "step_2"
    served.symlink_to(step(run, 2))
    cluster = replace(ALONE, expert_shards=2, standby=1)
    with LocalServer(tmp_path / "s", served, cluster, follows=str(growing.path), serve=ASKED) as server:
        assert server.ask(requests()) == undisturbed[2]
        (growing.checkpoints / "step_6").symlink_to(step(run, 6))
        served.unlink()
        plan = server.run.generations.plan
        assert plan is not None
        server.fleet.kill(plan.expert_primaries[0])
        wait_for(server, lambda: "restored" in server.events)
        assert server.ask(requests("n")) == undisturbed[6]


@pytest.mark.long
def test_a_run_that_is_followed_brings_its_next_checkpoints(
    run: RunFolder, undisturbed: dict[int, list[Heard]], tmp_path: Path
) -> None:
    growing = RunFolder(tmp_path / "growing")
    growing.checkpoints.mkdir(parents=True)
    (growing.checkpoints / "step_2").symlink_to(step(run, 2))
    with LocalServer(
        tmp_path / "s", growing.checkpoints / "step_2", ALONE, follows=str(growing.path), serve=EVERY_THREE
    ) as server:
        server.ask(requests()[:1])
        (growing.checkpoints / "step_4").symlink_to(step(run, 4))
        server.stopping.wait(1.5)
        assert "published" not in server.events
        (growing.checkpoints / "step_6").symlink_to(step(run, 6))
        wait_for(server, lambda: "published" in server.events)
        (line,) = [e for e in server.run.folder.event_lines() if e["kind"] == "published"]
        assert "follows step_2-" in line["text"]
        assert server.ask(requests("n")) == undisturbed[6]
        # What a user publishes stays until the run has something newer.
        publish(step(run, 2))(server)
        wait_for(server, lambda: server.events.count("published") == 2)
        server.stopping.wait(1.5)
        assert publisher_of(server).weights.version.step == 2 and server.events.count("published") == 2
