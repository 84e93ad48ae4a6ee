"""A platform by itself: `up`, several jobs on its slots, its scheduler killed, slots lent, `down`; real processes."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from background import free_ports
from local_cluster import tiny_run, train
from processes import environment, of_mark, start, temporary_folder, wait_until

from sparseray.platform.config import RunConfig, save_yaml

# Minutes: every step of the runs is computed again, undisturbed.
pytestmark = [pytest.mark.ray, pytest.mark.long, pytest.mark.timeout(900)]
STEPS = 4000
"""More than a run makes here."""


def config_of(corpus: Path, **cluster: Any) -> RunConfig:
    # Generous: other work on the machine must not make a slot look lost.
    run = tiny_run(corpus, steps=STEPS, **{"deadline_s": 60.0, "hang_s": 20.0, **cluster})
    return replace(run, train=replace(run.train, sequences_per_shard=16, checkpoint_every=STEPS))


class Platform:
    """A platform, and commands that know of no other."""

    def __init__(self, folder: Path, temporary: Path) -> None:
        self.folder, self.mark = folder, uuid.uuid4().hex
        self.changes = {
            "SPARSERAY_TEST": self.mark,
            "TMPDIR": str(temporary),
            "SPARSERAY_STATE_DIR": str(folder / "state"),
        }
        self.jobs: list[subprocess.Popen[bytes]] = []

    def command(self, *arguments: str, **changes: str) -> tuple[int, str]:
        """Run a command to its end, with changes to its environment; its exit code, and all that it said."""
        done = subprocess.run(
            [sys.executable, "-m", "sparseray", *arguments],
            env={k: v for k, v in environment(**self.changes, **changes).items() if v},
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
        return done.returncode, done.stdout + done.stderr

    def up(self, *options: str) -> str:
        """Start it, and connect this process to it."""
        from sparseray.platform.cluster import connect, find_platform

        code, said = self.command("up", *options)
        assert code == 0, said
        connect(said.split("at ", 1)[1].split(",")[0])
        self.handle = find_platform()
        return said

    def down(self) -> None:
        from sparseray.platform.cluster import detach

        detach()
        code, said = self.command("down")
        assert code == 0 and "is down" in said, said
        wait_until(lambda: not of_mark(self.mark), "the end of all processes", 20.0)

    def job(self, name: str) -> Any:
        from sparseray.platform.cluster import JobHandle, ask

        found = ask(self.handle, "find", str(self.folder / name))
        assert found, f"{name} does not run"
        return JobHandle(platform=self.handle, job=found)

    def status(self, name: str) -> dict[str, Any]:
        from sparseray.platform.cluster import ask

        return dict(ask(self.job(name), "status"))

    def start(self, name: str, *arguments: str) -> subprocess.Popen[bytes]:
        self.jobs.append(start([*arguments], self.folder / f"{name}.txt", **self.changes))
        return self.jobs[-1]

    def pretrain(self, name: str, config: RunConfig) -> subprocess.Popen[bytes]:
        save_yaml(config, self.folder / f"{name}.yaml")
        return self.start(
            name,
            "pretrain",
            f"--config={self.folder / name}.yaml",
            f"--run_dir={self.folder / name}",
            "--cluster.address=auto",
        )

    def records(self, name: str) -> list[dict[str, Any]]:
        path = self.folder / name / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def events(self, name: str) -> list[str]:
        path = self.folder / name / "events.jsonl"
        return [json.loads(line)["kind"] for line in path.read_text().splitlines()] if path.exists() else []

    def reaches(self, name: str, step: int) -> None:
        def there() -> bool:
            ended = [job for job in self.jobs if job.poll() not in (None, 0, 130)]
            assert not ended, (self.folder / f"{name}.txt").read_text()
            return len(self.records(name)) >= step

        wait_until(there, f"step {step} of {name}")

    def more(self, name: str, steps: int = 5) -> None:
        """Wait until a run has made some more steps."""
        self.reaches(name, len(self.records(name)) + steps)

    def scheduler(self) -> int:
        found = [p.pid for p in of_mark(self.mark) if "ray::Scheduler" in " ".join(p.cmdline())]
        assert len(found) == 1
        return found[0]

    def check(self, name: str, corpus: Path) -> None:
        """Every step once, with the losses of a run of threads that nothing disturbs."""
        records = self.records(name)
        assert [r["step"] for r in records] == list(range(1, len(records) + 1))
        curve = [(r["loss"], r["aux_loss"], r["grad_norm"]) for r in records]
        undisturbed = train(self.folder / f"{name}-again", config_of(corpus), stop_after=len(records))
        assert curve == undisturbed.curve


@pytest.fixture
def platform(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Platform]:
    from sparseray.platform.cluster import detach

    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with temporary_folder() as temporary:
        made = Platform(tmp_path, temporary)
        yield made
        detach()
        left = of_mark(made.mark)
        for process in left:
            with contextlib.suppress(Exception):
                process.kill()
        assert left == []


def test_several_jobs_share_a_platform_whose_scheduler_may_die(platform: Platform, corpus: Path) -> None:
    said = platform.up("--slots", "2")
    assert "2 warm slots" in said and "sparseray down" in said
    code, said = platform.command("up", "--slots", "9")
    assert code == 0 and "is up already" in said
    first = platform.pretrain("first", config_of(corpus))
    second = platform.pretrain("second", config_of(corpus, colocated=True))
    platform.more("first")
    platform.more("second")
    code, said = platform.command("scale", "experts", "2")
    assert code == 2 and "2 runs are going on" in said and str(platform.folder / "first") in said
    code, said = platform.command("scale", "first", "experts", "2")
    assert code == 0 and "1+2+1" in said, said
    assert platform.status("second")["sizes"] == "1+1+1"

    os.kill(platform.scheduler(), signal.SIGKILL)
    for name in ("first", "second"):
        wait_until(lambda name=name: platform.events(name).count("scheduler") == 2, f"a scheduler for {name}")
        platform.more(name)
    assert platform.status("first")["sizes"] == "1+2+1" and platform.status("second")["state"] == "training"

    # One that ends leaves the other alone.
    second.send_signal(signal.SIGINT)
    assert second.wait(60) == 130, (platform.folder / "second.txt").read_text()
    platform.more("first")
    platform.down()
    assert first.wait(60) == 0, (platform.folder / "first.txt").read_text()
    for name in ("first", "second"):
        platform.check(name, corpus)
        assert "lost" not in platform.events(name) and list(
            (platform.folder / name / "checkpoints").iterdir()
        )
    code, said = platform.command("down")
    assert code == 2 and "no platform is up" in said


def test_a_run_lends_slots_and_gives_weights_to_a_server_and_gets_the_slots_back(
    platform: Platform, corpus: Path
) -> None:
    platform.up()
    wide = {"attention_workers": 2, "expert_shards": 2, "memory_shards": 2, "cpus_per_slot": 2.5}
    platform.pretrain("run", config_of(corpus, **wide, lend=True, lend_return_s=1.0))
    platform.more("run")
    assert platform.status("run")["room"] == 0
    (port,) = free_ports(1)
    # The run has no checkpoint: its slots give the server its weights, before any of them is lent.
    server = platform.start(
        "server",
        "serve",
        f"--run={platform.folder / 'run'}",
        "--serve.follow_every=5",
        f"--port={port}",
        "--cluster.address=auto",
        "--cluster.cpus_per_slot=2.5",
        "--cluster.hang_s=20",
    )
    wait_until(lambda: "lent" in platform.events("run"), "a loan")
    wait_until(lambda: "Ctrl-C stops" in (platform.folder / "server.txt").read_text(), "the server", 90.0)
    lent = platform.status("run")
    assert (lent["sizes"], lent["lent"]) == ("1+1+1", 3)
    body = {"prompt": "rain", "max_tokens": 4, "model": "sparseray"}
    answer = httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=body, timeout=30.0)
    assert answer.status_code == 200, answer.text
    assert answer.json()["system_fingerprint"].startswith("step_")
    assert not list((platform.folder / "run" / "checkpoints").glob("step_*"))
    wait_until(lambda: "*** published: step_" in (platform.folder / "server.txt").read_text(), "a later step")
    platform.more("run")
    server.send_signal(signal.SIGINT)
    assert server.wait(60) == 0, (platform.folder / "server.txt").read_text()
    wait_until(lambda: platform.status("run")["sizes"] == "2+2+2", "the return")
    platform.down()
    platform.check("run", corpus)
    assert "lost" not in platform.events("run") and "returned" in platform.events("run")


def test_a_platform_with_a_token_takes_those_who_have_it(platform: Platform, corpus: Path) -> None:
    home = platform.folder / "home"
    home.mkdir()
    own = {"RAY_AUTH_MODE": "token", "HOME": str(home)}
    code, said = platform.command("up", "--slots=1", "--cpus_per_slot=0.5", "--threads_per_slot=1", **own)
    assert code == 0 and "--cluster.cpus_per_slot 0.5" in said, said
    assert len((home / ".ray" / "auth_token").read_text()) >= 32
    save_yaml(config_of(corpus, cpus_per_slot=0.5, colocated=True), platform.folder / "run.yaml")
    pretrain = [
        "pretrain",
        f"--config={platform.folder}/run.yaml",
        "--cluster.address=auto",
        "--train.steps=3",
    ]
    # The mode comes with the platform's entry; the token is the user's.
    token = {"RAY_AUTH_MODE": "", "HOME": str(home)}
    code, said = platform.command(*pretrain, f"--run_dir={platform.folder}/run", **token)
    assert code == 0 and "step_3" in said, said
    other = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "b" * 32, "HOME": str(home)}
    code, said = platform.command(*pretrain, f"--run_dir={platform.folder}/other", **other)
    assert code == 2 and "RAY_AUTH_MODE=token" in said.splitlines()[-1], said
    code, said = platform.command("down", **token)
    assert code == 0 and "is down" in said, said
    wait_until(lambda: not of_mark(platform.mark), "the end of all processes", 20.0)
