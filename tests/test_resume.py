"""A run that is killed, stopped or placed anew, whose reader or terminal goes, ends as the undisturbed run does, to the bit.

Real processes and a real Ray; the undisturbed run is one of threads (tests/local_cluster.py).
"""

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from local_cluster import Trained, tiny_run, train
from processes import (
    ROOT,
    environment,
    interrupt,
    kill_all,
    of_mark,
    planting,
    resting,
    run,
    socket_folders,
    start,
    temporary_folder,
    wait_until,
)

from sparseray.platform.config import RunConfig, save_yaml
from sparseray.platform.run import checkpoint

pytestmark = [pytest.mark.ray, pytest.mark.xdist_group("starts")]
STEPS, EVERY = 60, 10
ONE = ["--cluster.colocated=true"]
TWO = [*ONE, "--cluster.attention_workers=2", "--cluster.expert_shards=2", "--cluster.memory_shards=1"]
APART = ["--cluster.attention_workers=1", "--cluster.expert_shards=1", "--cluster.memory_shards=1"]


@pytest.fixture(scope="module")
def config(corpus: Path) -> RunConfig:
    found = tiny_run(corpus, steps=STEPS)
    # Generous: other work on the machine must not make a slot look lost.
    return replace(
        found,
        train=replace(found.train, checkpoint_every=EVERY),
        cluster=replace(found.cluster, deadline_s=60.0),
    )


@pytest.fixture(scope="module")
def undisturbed(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    alone = replace(config, cluster=replace(config.cluster, colocated=True))
    return train(tmp_path_factory.mktemp("undisturbed") / "run", alone)


class Runs:
    """Starts the same run again and again in one folder."""

    def __init__(self, folder: Path, temporary: Path, config: RunConfig) -> None:
        self.temporary = temporary
        self.run_dir, self.log, self.mark = folder / "run", folder / "log.txt", uuid.uuid4().hex
        self.options = ["pretrain", "--config", str(folder / "run.yaml"), f"--run_dir={self.run_dir}"]
        save_yaml(config, folder / "run.yaml")

    def start(self, options: list[str], **changes: str) -> subprocess.Popen[bytes]:
        return start(
            [*self.options, *options],
            self.log,
            TMPDIR=str(self.temporary),
            SPARSERAY_TEST=self.mark,
            **changes,
        )

    def start_unread(self, options: list[str], begin: Path) -> subprocess.Popen[bytes]:
        """Start it rested, and close its output once it has said from which checkpoint it goes on."""
        changes = {"TMPDIR": str(self.temporary), "SPARSERAY_TEST": self.mark, **resting(1.0)}
        process = subprocess.Popen(
            [sys.executable, "-m", "sparseray", *self.options, *options],
            env=environment(**changes),
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        assert process.stdout is not None
        lines = iter(process.stdout.readline, b"")
        assert any(f"going on from {begin}" in line.decode() for line in lines)
        process.stdout.close()
        return process

    def finish(self, options: list[str]) -> None:
        assert self.start(options).wait(120) == 0, self.log.read_text()

    def steps(self) -> list[int]:
        """Steps in metrics.jsonl; a line that is being written does not count."""
        path = self.run_dir / "metrics.jsonl"
        text = path.read_text() if path.exists() else ""
        return [json.loads(line)["step"] for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def reaches(self, step: int, process: subprocess.Popen[bytes]) -> None:
        self.wait(process, lambda: step in self.steps(), f"step {step}")

    def wait(self, process: subprocess.Popen[bytes], condition: Callable[[], bool], what: str) -> None:
        def there() -> bool:
            assert process.poll() is None, self.log.read_text()
            return condition()

        wait_until(there, what)

    def newest(self) -> Path:
        """The last checkpoint that is whole."""
        return checkpoint.list_finished(self.run_dir / "checkpoints")[-1]

    def check(self, undisturbed: Trained) -> None:
        """Each step once, all losses and the last checkpoint as they must be, no trace of disturbances."""
        assert self.steps() == list(range(1, STEPS + 1))
        records = [json.loads(line) for line in (self.run_dir / "metrics.jsonl").read_text().splitlines()]
        assert [(r["loss"], r["aux_loss"], r["grad_norm"]) for r in records] == undisturbed.curve
        newest = checkpoint.read_manifest(self.run_dir / "checkpoints" / f"step_{STEPS}")
        assert newest["digest"] == undisturbed.digest
        assert not list(self.run_dir.rglob("*.unfinished"))
        wait_until(lambda: not of_mark(self.mark), "the end of all processes", 20.0)


@pytest.fixture
def runs(tmp_path: Path, config: RunConfig) -> Iterator[Runs]:
    with temporary_folder() as temporary:
        made = Runs(tmp_path, temporary, config)
        yield made
        left = of_mark(made.mark)
        for process in left:
            process.kill()
        assert left == []
        assert socket_folders(temporary) == []


def test_a_run_that_is_killed_stopped_and_placed_anew_ends_with_the_same_bits(
    runs: Runs, undisturbed: Trained
) -> None:
    # Killed when its second checkpoint is all there but its name.
    first = runs.start(TWO, **planting(SPARSERAY_TEST_HOLD=f"step_{2 * EVERY}"))
    runs.wait(first, (runs.run_dir / "checkpoints" / "held").exists, "the rename of the second checkpoint")
    kill_all(first, runs.mark)
    assert (runs.run_dir / "checkpoints" / f"step_{2 * EVERY}.unfinished" / "manifest.json").exists()
    whole = runs.newest()
    assert whole.name == f"step_{EVERY}"

    # Resumed on other actors: it outlives its reader, keeps its folder, and ends with its terminal by a checkpoint.
    second = runs.start_unread(APART, whole)
    runs.reaches(EVERY + 2, second)
    refused = runs.log.with_name("refused.txt")
    mark = {"TMPDIR": str(runs.temporary), "SPARSERAY_TEST": "refused"}
    assert run([*runs.options, *APART], refused, **mark) == 2
    assert "is in use: process" in refused.read_text()
    before = runs.steps()[-1]
    runs.reaches(before + 1, second)
    os.kill(second.pid, signal.SIGHUP)
    assert second.wait(60) == 130
    stopped_at = runs.steps()[-1]
    assert stopped_at < STEPS, "stopped too late to show anything"
    newest = runs.newest()
    assert newest.name == f"step_{stopped_at}"
    wait_until(lambda: not of_mark(runs.mark), "the end of all processes", 30.0)

    # Two Ctrl-C end it in the midst of a step, without another checkpoint.
    third = runs.start(ONE)
    runs.wait(third, lambda: runs.steps()[-1] > stopped_at, "another step")
    interrupt(third)
    time.sleep(0.05)
    interrupt(third)
    assert third.wait(30) != 0, runs.log.read_text()
    wait_until(lambda: not of_mark(runs.mark), "the end of all processes", 20.0)
    assert f"going on from {newest}" in runs.log.read_text()

    runs.finish(ONE)
    runs.check(undisturbed)
