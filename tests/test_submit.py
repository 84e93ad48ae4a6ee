"""`sparseray submit` against a real Ray head that asks for a token."""

import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from background import Background, end_leftovers, environment, free_ports, sparseray
from local_cluster import tiny_run
from watching import MISSING, PROMETHEUS, PROMTOOL, Prometheus

from sparseray.errors import ConfigError
from sparseray.jobs.submit import ANSWER_S, entrypoint, main, submit
from sparseray.platform.config import save_yaml
from sparseray.platform.run.folder import RunFolder

TOKEN = "0123456789abcdef" * 3


@dataclass(frozen=True, kw_only=True)
class Head:
    """A running Ray head: its dashboard, and the environment of those who may use it."""

    address: str
    gcs: str
    env: dict[str, str]


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """A head with four CPUs and token authentication, in a folder and on ports of its own."""
    # A Unix socket's path has at most 107 bytes, and Ray's own part of it is long.
    folder = tempfile.mkdtemp(prefix="sr-", dir="/tmp")
    env = environment(RAY_AUTH_TOKEN=TOKEN, HOME=folder, RAY_TMPDIR=folder)
    names = ("--port", "--dashboard-port", "--dashboard-agent-listen-port", "--ray-client-server-port")
    ports = dict(zip(names, free_ports(len(names))))
    options = [f"{name}={port}" for name, port in ports.items()]
    options += ["--node-ip-address=127.0.0.1", "--num-cpus=4", "--object-store-memory=100000000"]
    options += [
        f"--temp-dir={folder}",
        "--disable-usage-stats",
        "--include-dashboard=true",
        "--head",
        "--block",
    ]
    ray = str(Path(sys.executable).with_name("ray"))
    # Metrics are otherwise reported every ten seconds.
    own = {"RAY_AUTH_MODE": "token", "RAY_metrics_report_interval_ms": "1000"}
    process = Background([ray, "start", *options], env | own)
    try:
        process.wait_for("will now block forever", 60.0)
        yield Head(
            address=f"http://127.0.0.1:{ports['--dashboard-port']}",
            gcs=f"127.0.0.1:{ports['--port']}",
            env=env,
        )
    finally:
        process.terminate()
        left = end_leftovers(env)
        shutil.rmtree(folder, ignore_errors=True)
    assert not left


@pytest.fixture(scope="module")
def config(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    save_yaml(tiny_run(corpus, steps=3, colocated=True), path)
    return path


@pytest.mark.ray
@pytest.mark.xdist_group("starts")
def test_a_submitted_run_trains_on_the_cluster_and_its_log_and_status_come_back(
    head: Head, config: Path, tmp_path: Path
) -> None:
    options = ["pretrain", "--config", str(config), "--run_dir", str(tmp_path / "run")]
    found = sparseray("submit", *options, "--address", head.address, env=head.env)
    assert found.returncode == 0, found.stdout + found.stderr
    line = [
        "ray",
        "job",
        "submit",
        "--address",
        head.address,
        "--",
        sys.executable,
        "-m",
        "sparseray",
        *options,
    ]
    assert found.stdout.splitlines()[0] == shlex.join([*line, "--cluster.address", "auto"])
    assert "step 3/3" in found.stdout and "SUCCEEDED" in found.stdout
    records = RunFolder(tmp_path / "run").records()
    assert [record["step"] for record in records] == [1, 2, 3]
    newest = RunFolder(tmp_path / "run").newest_checkpoint()
    assert newest is not None and newest.name == "step_3"


@pytest.mark.long
@pytest.mark.ray
@pytest.mark.xdist_group("starts")
def test_a_job_that_fails_hands_its_exit_status_back(head: Head, config: Path) -> None:
    options = ["--config", str(config), "--train.stepz", "3", "--address", head.address]
    found = sparseray("submit", "pretrain", *options, env=head.env)
    assert found.returncode == 2, found.stdout + found.stderr
    assert "unknown option --train.stepz; did you mean 'train.steps'?" in found.stdout
    assert "Traceback" not in found.stdout + found.stderr


@pytest.mark.ray
@pytest.mark.xdist_group("starts")
def test_a_wrong_token_is_told_in_one_line(head: Head, config: Path) -> None:
    for token, word in (("f" * 48, "RAY_AUTH_TOKEN"), (None, "RAY_AUTH_TOKEN")):
        env = {name: value for name, value in head.env.items() if name != "RAY_AUTH_TOKEN"}
        env |= {"RAY_AUTH_TOKEN": token} if token else {}
        found = sparseray("submit", "pretrain", "--config", str(config), "--address", head.address, env=env)
        assert found.returncode == 2, found.stdout + found.stderr
        assert found.stderr.count("\n") == 1 and word in found.stderr, found.stderr


@pytest.mark.parametrize("path", ["", "/auth/401"])
def test_a_head_that_is_not_there_is_told_in_one_line(config: Path, path: str) -> None:
    address = f"http://127.0.0.1:{free_ports(1)[0]}{path}"
    started = time.monotonic()
    found = sparseray("submit", "pretrain", "--config", str(config), "--address", address)
    assert found.returncode == 2, found.stdout + found.stderr
    assert found.stderr.count("\n") == 1 and address in found.stderr, found.stderr
    assert "check the address" in found.stderr
    assert time.monotonic() - started < 30.0


def test_a_head_that_is_silent_is_told_within_ten_seconds(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sparseray.jobs.submit.ANSWER_S", 0.5)
    assert ANSWER_S <= 8.0
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        assert main(["pretrain", "--config", str(config), "--address", address]) == 2
    _, err = capsys.readouterr()
    assert address in err and "timed out" in err and err.count("\n") == 1


def test_paths_become_absolute_unless_the_cluster_gets_the_folder() -> None:
    rest = ["--config", "a.yaml", "--run_dir=runs/x", "--train.steps", "3"]
    expected = [f"--config {Path('a.yaml').absolute()}", f"--run_dir={Path('runs/x').absolute()}"]
    words = entrypoint("pretrain", rest, keep_paths=False)
    assert (
        shlex.join(words)
        == f"{shlex.quote(sys.executable)} -m sparseray pretrain {' '.join(expected)} --train.steps 3 --cluster.address auto"
    )
    kept = entrypoint("pretrain", [*rest, "--cluster.address=x:1"], keep_paths=True)
    assert kept == [sys.executable, "-m", "sparseray", "pretrain", *rest, "--cluster.address=x:1"]


def test_a_missing_file_is_found_before_anything_is_submitted(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="nothing was submitted"):
        submit("pretrain", ["--config", "nowhere.yaml"], "http://127.0.0.1:1", None, wait=True)
    assert main(["pretrain", "--data.path=nowhere"]) == 2
    assert "--data.path nowhere does not exist" in capsys.readouterr().err


@pytest.mark.long
@pytest.mark.ray
@pytest.mark.xdist_group("starts")
@pytest.mark.skipif(PROMETHEUS is None, reason=MISSING)
def test_a_prometheus_of_ours_scrapes_rays_own_targets_with_the_token(head: Head, tmp_path: Path) -> None:
    token, other = tmp_path / "token", tmp_path / "other"
    token.write_text(TOKEN)
    other.write_text("wrong")
    env = {name: value for name, value in head.env.items() if name != "RAY_AUTH_TOKEN"}
    env["SPARSERAY_STATE_DIR"] = str(tmp_path / "state")
    command = ["dashboard", "prometheus", "--out", str(tmp_path / "out"), "--ray", head.address]
    refused = sparseray(*command, env=env)
    assert refused.returncode == 2 and "answers 401" in refused.stderr, refused.stdout + refused.stderr
    refused = sparseray(*command, env=env | {"RAY_AUTH_TOKEN_PATH": str(other)})
    assert refused.returncode == 2 and "answers 403" in refused.stderr, refused.stdout + refused.stderr
    assert "set RAY_AUTH_TOKEN" in refused.stderr
    made = sparseray(*command, env=env | {"RAY_AUTH_TOKEN_PATH": str(token)})
    assert made.returncode == 0, made.stderr
    config = tmp_path / "out" / "prometheus.yml"
    assert yaml.safe_load(config.read_text())["scrape_configs"][1]["http_sd_configs"] == [
        {
            "url": f"{head.address}/api/prometheus/sd",
            "refresh_interval": "5s",
            "authorization": {"type": "Bearer", "credentials_file": str(token)},
        }
    ]
    if PROMTOOL is not None:
        assert subprocess.run([PROMTOOL, "check", "config", str(config)], capture_output=True).returncode == 0
    prometheus = Prometheus(config, tmp_path / "out" / "data")
    try:
        prometheus.wait_for('up{job="ray"} == 1', 60.0)
        prometheus.wait_for('{job="ray",__name__=~"ray_.+"}', 60.0)
    finally:
        prometheus.close()


def pretrain_on(head: Head, folder: Path, corpus: Path, **changes: str) -> str:
    """Ask the cluster for more than it has; returns what the command, which fails, says."""
    save_yaml(tiny_run(corpus, steps=2, expert_shards=3, address=head.gcs), folder / "run.yaml")
    run_dir = folder / "run"
    options = ["pretrain", "--config", str(folder / "run.yaml"), "--run_dir", str(run_dir)]
    found = sparseray(*options, env=head.env | {"RAY_AUTH_MODE": "token"} | changes)
    said = found.stdout + found.stderr
    assert found.returncode == 2 and "Traceback" not in said, said
    assert not run_dir.exists()
    return said


@pytest.mark.long
@pytest.mark.ray
@pytest.mark.xdist_group("starts")
def test_too_few_free_cpus_on_an_external_ray_says_what_is_there(
    head: Head, corpus: Path, tmp_path: Path
) -> None:
    said = pretrain_on(head, tmp_path, corpus)
    assert "5 slots of 1 CPU ask for 5 CPUs, and 4 of the cluster's 4 are free" in said


@pytest.mark.ray
@pytest.mark.xdist_group("starts")
@pytest.mark.long  # Ray's own client tries for twenty seconds.
def test_ray_that_refuses_the_token_says_how_to_give_it(head: Head, corpus: Path, tmp_path: Path) -> None:
    said = pretrain_on(head, tmp_path, corpus, RAY_AUTH_TOKEN="b" * 32)
    assert "RAY_AUTH_MODE=token" in said.splitlines()[-1]
