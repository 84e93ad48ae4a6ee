"""A server is fed by the slots of the run that it follows: exact versions, no checkpoint, and no bit of the run differs."""

import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from local_cluster import LocalFleet, Trained, tiny_run, train
from local_server import Heard, LocalServer, until

from sparseray.actors.serving.speculative_engine import SpeculativeEngine
from sparseray.actors.serving.text_request import GenerationRequest
from sparseray.errors import OfferGoneError
from sparseray.model.config import ModelConfig, MTPConfig
from sparseray.platform.composition import Run
from sparseray.platform.config import ClusterConfig, RunConfig, ServeConfig
from sparseray.platform.fleet import weights_port
from sparseray.platform.fleet.weights_port import WeightsPort, read_offered, source_of
from sparseray.platform.offers import Offers
from sparseray.platform.run.folder import RunFolder
from sparseray.platform.scheduler import Scheduler
from sparseray.platform.server import Server
from sparseray.platform.serving import Served
from sparseray.platform.trainer import Trainer

STEPS, STEP_S, LENGTH = 400, 0.05, 12
WIDE = {"attention_workers": 2, "expert_shards": 2, "memory_shards": 2, "replication": 2, "standby": 1}
APART = ClusterConfig(attention_workers=1, expert_shards=2, memory_shards=1, standby=1, deadline_s=8.0)
ALONE = ClusterConfig(deadline_s=8.0)
ASKED = ServeConfig(prefill_chunk=8, follow_every=0)
EVERY_THREE = replace(ASKED, follow_every=3)


def config_of(corpus: Path, *, depth: int = 0, **cluster: Any) -> RunConfig:
    config = tiny_run(corpus, steps=STEPS, **(cluster or WIDE), deadline_s=5.0)
    return replace(config, model=replace(config.model, mtp=MTPConfig(depth=depth)))


class Training:
    """A run of threads that goes on until it is told to stop."""

    def __init__(self, run_dir: Path, config: RunConfig) -> None:
        self.run_dir, self.config, self.run = run_dir, config, None
        self.over, self.fleet = threading.Event(), None
        self.server: LocalServer | None = None
        self.trained: Trained | None = None
        self.thread = threading.Thread(target=self._train)
        self.thread.start()
        wait_for(lambda: self.step >= 2)

    def _train(self) -> None:
        self.trained = train(self.run_dir, self.config, at_step=self._at_step, offers=self.engines)

    def _at_step(self, step: int, run: Run, fleet: LocalFleet) -> None:
        self.run, self.fleet = run, fleet
        assert isinstance(run.driver, Trainer)
        run.driver.should_stop = self.over.is_set
        time.sleep(STEP_S)

    @property
    def step(self) -> int:
        return 0 if self.run is None else self.run.driver.step

    def offers(self) -> Offers | None:
        driver = None if self.run is None or self.trained is not None else self.run.driver
        return driver.offers if isinstance(driver, Trainer) else None

    @property
    def model(self) -> ModelConfig:
        """With what follows from the data."""
        return RunFolder(self.run_dir).recorded_config().model

    def engines(self) -> Offers | None:
        """As the platform's scheduler finds them."""
        driver = None if self.server is None else self.server.run.driver
        model, folder = self.model, str(self.run_dir)
        return driver.offers if isinstance(driver, Server) and driver.can_give(model, folder) else None

    def stop(self) -> Trained:
        self.over.set()
        self.thread.join(60.0)
        assert self.trained is not None
        return self.trained


wait_for = partial(until, seconds=30.0)


@pytest.fixture
def training(corpus: Path, tmp_path: Path) -> Iterator[Training]:
    with running(tmp_path, config_of(corpus)) as made:
        yield made


@contextmanager
def running(folder: Path, config: RunConfig) -> Iterator[Training]:
    made = Training(folder / "run", config)
    try:
        yield made
    finally:
        made.over.set()
        made.thread.join(60.0)


@contextmanager
def following(
    training: Training, folder: Path, cluster: ClusterConfig, serve: ServeConfig
) -> Iterator[LocalServer]:
    with LocalServer(
        folder, None, cluster, serve=serve, follows=str(training.run_dir), offers=training.offers
    ) as server:
        yield server


def requests() -> list[GenerationRequest]:
    return [
        GenerationRequest(
            request_id=f"r{time.monotonic()}{i}",
            prompt_tokens=tuple(range(5 + i, 25 + i)),
            max_tokens=LENGTH,
            seed=i,
        )
        for i in range(3)
    ]


def of_one_version(server: LocalServer) -> tuple[int, list[list[int]]]:
    """Its step, and answers by no other: what a run offered before it ended may be on its way still."""
    while True:
        name, step, answers = server.ingress.version(), step_of(server), server.ask(requests())
        if name == server.ingress.version():
            return step, answers


def step_of(server: LocalServer) -> int:
    driver = server.run.driver
    assert isinstance(driver, Server)
    return driver.serving.state.version.step


def undisturbed(corpus: Path, folder: Path, step: int, *, depth: int = 0) -> list[Heard]:
    """What a server of the checkpoint of a step answers, of a run on one slot that nobody asked anything."""
    trained = train(folder / f"to-{step}", config_of(corpus, depth=depth, colocated=True), stop_after=step)
    with LocalServer(folder / f"of-{step}", trained.folder.newest_checkpoint(), ALONE, serve=ASKED) as server:
        return server.ask(requests())


@pytest.mark.parametrize(
    "cluster", [pytest.param(ALONE, marks=pytest.mark.long), APART], ids=["one slot", "shards"]
)
def test_a_server_begins_with_a_step_that_was_never_on_a_disk_and_goes_over_to_later_ones(
    cluster: ClusterConfig, training: Training, corpus: Path, tmp_path: Path
) -> None:
    with following(training, tmp_path / "s", cluster, ASKED) as server:
        first, answers = step_of(server), server.ask(requests())
        assert first >= 2 and server.ingress.version().startswith(f"step_{first}-")
        assert not list((training.run_dir / "checkpoints").glob("*"))
        driver = server.run.driver
        assert isinstance(driver, Server)
        name = driver.publish("")
        wait_for(lambda: server.ingress.version() == name)
        second, later = step_of(server), server.ask(requests())
        assert second > first
        wait_for(lambda: training.offers()._ready is None)
    trained = training.stop()
    assert answers == undisturbed(corpus, tmp_path, first)
    assert later == undisturbed(corpus, tmp_path, second)
    plain = train(tmp_path / "plain", config_of(corpus, colocated=True), stop_after=len(trained.records))
    assert trained.curve == plain.curve and trained.digest == plain.digest


@pytest.mark.long
@pytest.mark.parametrize("drafts", ["none", "mtp"], ids=["modules left alone", "drafting"])
def test_a_run_with_modules_for_further_tokens_feeds_a_server_that_drafts_or_does_not(
    drafts: Literal["none", "mtp"], corpus: Path, tmp_path: Path
) -> None:
    serve = replace(ASKED, speculate=drafts)
    with (
        running(tmp_path, config_of(corpus, depth=1)) as training,
        following(training, tmp_path / "s", APART, serve) as server,
    ):
        first, answers = step_of(server), server.ask(requests())
        driver = server.run.driver
        assert isinstance(driver, Server)
        name = driver.publish("")
        wait_for(lambda: server.ingress.version() == name)
        second, later = step_of(server), server.ask(requests())
        plan = server.run.generations.plan
        assert second > first and plan is not None
        engine = server.fleet.slots[plan.attention[0]].roles.engine_role.engine
        assert isinstance(engine, SpeculativeEngine) == (drafts == "mtp")
    assert answers == undisturbed(corpus, tmp_path, first, depth=1)
    assert later == undisturbed(corpus, tmp_path, second, depth=1)


@pytest.mark.long
def test_versions_follow_by_themselves_and_the_last_checkpoint_when_the_run_has_ended(
    training: Training, tmp_path: Path
) -> None:
    with following(training, tmp_path / "s", ALONE, EVERY_THREE) as server:
        first = step_of(server)
        wait_for(lambda: server.events.count("published") >= 2)
        assert step_of(server) >= first + 6
        training.stop()
        # It stopped before its last step: what is there is a checkpoint like any other.
        newest = training.trained.folder.newest_checkpoint()
        due = int(newest.name.removeprefix("step_")) >= step_of(server) + 3
        if due:
            wait_for(lambda: server.ingress.version().startswith(f"{newest.name}-"))
        server.ask(requests())
        assert "refused" not in server.events


@pytest.mark.long
def test_what_the_server_has_lost_of_a_step_that_nobody_keeps_comes_anew_and_whole(
    training: Training, corpus: Path, tmp_path: Path
) -> None:
    with following(training, tmp_path / "s", APART, ASKED) as server:
        first = step_of(server)
        wait_for(lambda: training.offers()._ready is None)
        wait_for(lambda: training.step > first + 1)
        plan = server.run.generations.plan
        assert plan is not None
        server.fleet.kill(plan.expert_primaries[0])
        wait_for(lambda: "restored" in server.events)
        wait_for(lambda: step_of(server) > first)
        second, answers = step_of(server), server.ask(requests())
    training.stop()
    assert answers == undisturbed(corpus, tmp_path, second)


@pytest.mark.long
def test_a_slot_of_the_run_that_dies_spoils_no_version(
    training: Training, corpus: Path, tmp_path: Path
) -> None:
    with following(training, tmp_path / "s", ALONE, EVERY_THREE) as server:
        for _ in range(2):
            seen = server.events.count("published")
            plan = training.run.generations.plan
            training.fleet.kill(plan.expert_primaries[0])
            training.fleet.start(1)
            wait_for(lambda seen=seen: server.events.count("published") > seen)
        last = step_of(server)
        training.stop()
        step, answers = of_one_version(server)
        assert step >= last
    assert answers == undisturbed(corpus, tmp_path, step)


def test_a_port_gives_the_step_that_it_is_asked_for_or_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = WeightsPort(tmp_path), WeightsPort()
    tensors = {f"t{i}": torch.full((3, 5), float(i)) for i in range(100)}
    names = sorted(tensors)
    halves = [{n: tensors[n] for n in names[:50]}, {n: tensors[n] for n in names[50:]}]
    source = source_of(7, [first.offer(7, halves[0]), second.offer(7, halves[1])])
    found = read_offered(source, names)
    assert all(torch.equal(found[name], tensors[name]) for name in names)
    second.offer(8, halves[1])
    with pytest.raises(OfferGoneError, match="of step 7 any more"):
        read_offered(source, names)
    wrong = source.replace(source.split("@")[0].split(":")[-1].split(",")[0], "0" * 16)
    monkeypatch.setattr(weights_port, "ANSWER_MS", 300)
    with pytest.raises(OfferGoneError):
        read_offered(wrong, names[:1])
    for port in (first, second):
        port.close()
    assert not list(tmp_path.iterdir())


@pytest.mark.long
def test_a_server_that_lost_an_engine_and_gave_a_slot_back_takes_the_last_checkpoint(
    training: Training, corpus: Path, tmp_path: Path
) -> None:
    both = ClusterConfig(
        attention_workers=2,
        expert_shards=2,
        memory_shards=2,
        replication=2,
        colocated=True,
        deadline_s=8.0,
    )
    with following(training, tmp_path / "s", both, ASKED) as server:
        server.run.reconciler.request("attention", 3)
        generations = server.run.generations
        wait_for(lambda: len(generations.plan.attention) == 3)
        server.fleet.kill(generations.plan.attention[0])
        wait_for(lambda: "recovered" in server.events)
        server.run.reconciler.request("attention", 2)
        wait_for(lambda: len(generations.plan.attention) == 2 and len(server.fleet.members()) == 2)
        newest = training.stop().folder.newest_checkpoint()
        assert newest is not None
        driver = server.run.driver
        assert isinstance(driver, Server)
        name = driver.publish(str(newest))
        wait_for(lambda: server.ingress.version() == name)
        answers = server.ask(requests())
    assert answers == undisturbed(corpus, tmp_path, int(newest.name.removeprefix("step_")))


def from_engines(corpus: Path) -> RunConfig:
    config = config_of(corpus)
    return replace(config, train=replace(config.train, restore_from="engines"))


@pytest.mark.long
@pytest.mark.parametrize("role", ["expert_primaries", "memory_primaries", "dense"])
def test_a_run_that_lost_all_replicas_goes_on_with_the_weights_of_engines(
    role: str, corpus: Path, tmp_path: Path
) -> None:
    with (
        running(tmp_path, from_engines(corpus)) as training,
        following(training, tmp_path / "s", APART, ASKED) as server,
    ):
        served = step_of(server)
        training.server = server
        # The offer that the server read is withdrawn; what it gives back is its own.
        wait_for(lambda: training.offers()._ready is None)
        wait_for(lambda: training.step > served + 3)
        plan = training.run.generations.plan
        for slot in getattr(plan, role):
            training.fleet.kill(slot)
        training.fleet.start(2)
        wait_for(lambda: "restored" in [e["kind"] for e in training.run.folder.event_lines()])
        wait_for(lambda: training.step > served + 6)
        answers = server.ask(requests())
        trained = training.stop()
    (told,) = [e for e in trained.folder.event_lines() if e["kind"] == "restored"]
    assert told["step"] == served and "bits differ from here on" in told["text"], told
    assert [r["step"] for r in trained.records] == list(range(1, len(trained.records) + 1))
    plain = train(tmp_path / "plain", config_of(corpus, colocated=True), stop_after=served + 3)
    # The first step after it sees just the weights of the step that was served, and no moments.
    assert trained.curve[: served + 1] == plain.curve[: served + 1]
    assert trained.curve[served + 1] != plain.curve[served + 1]
    assert answers == undisturbed(corpus, tmp_path, served), "the server noticed nothing"


@pytest.mark.long
def test_a_run_that_starts_again_takes_what_engines_have_and_its_checkpoint_has_not(
    corpus: Path, tmp_path: Path
) -> None:
    with (
        running(tmp_path, from_engines(corpus)) as training,
        following(training, tmp_path / "s", APART, ASKED) as server,
    ):
        served = step_of(server)
        newest = training.stop().folder.newest_checkpoint()
        assert newest is not None
        training.server = server
        engines = training.engines
        # A checkpoint that is newer than what is served wins, to the bit.
        later = train(
            training.run_dir,
            from_engines(corpus),
            stop_after=len(training.trained.records) + 1,
            offers=engines,
        )
        assert "restored" not in later.events
        for folder in newest.parent.iterdir():
            shutil.rmtree(folder)
        again = train(training.run_dir, from_engines(corpus), stop_after=served + 2, offers=engines)
        driver = server.run.driver
        assert isinstance(driver, Server) and driver.can_give(training.model, str(training.run_dir))
        assert not driver.can_give(training.model, str(tmp_path / "other"))
        assert not driver.can_give(replace(training.model, vocab_size=301), str(training.run_dir))
    assert again.events.count("restored") == 1 and len(again.records) == served + 2
    plain = train(tmp_path / "plain", config_of(corpus, colocated=True), stop_after=served + 2)
    assert again.curve[: served + 1] == plain.curve[: served + 1] and again.curve != plain.curve


def test_a_platform_brings_a_run_and_the_server_that_follows_it_together(tmp_path: Path) -> None:
    """Only the task, the folder and the driver of a job decide."""
    config, folder = RunConfig(), RunFolder(tmp_path / "run")
    trainer, server = object.__new__(Trainer), object.__new__(Server)
    trainer.offers, server.offers = Offers("run"), Offers("server")
    server.can_give = lambda model, run: model == config.model and run == str(folder.path)  # type: ignore[method-assign]

    def job(task: object, driver: object, path: Path) -> Any:
        run = SimpleNamespace(driver=driver)
        return SimpleNamespace(task=task, run=run, is_running=True, folder=RunFolder(path), config=config)

    follows = Served(checkpoint="", ingress="", run=str(folder.path))
    runs, serves = job(None, trainer, folder.path), job(follows, server, tmp_path / "server")
    other = job(Served(checkpoint="c", ingress=""), None, tmp_path / "other")
    platform: Any = SimpleNamespace(_running=lambda: [other, runs, serves])
    assert Scheduler._offers(platform, serves) is trainer.offers
    assert Scheduler._offers(platform, runs) is server.offers
    assert Scheduler._offers(platform, other) is None
    runs.is_running = False
    assert Scheduler._offers(platform, serves) is None
