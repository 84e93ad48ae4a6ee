"""`publish` and `serve` as processes: a server is given other weights, and says so in answers, models and status."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from background import Background, end_leftovers, environment, free_ports
from local_cluster import tiny_run, train

from sparseray.platform.run.folder import RunFolder

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run with checkpoints of the steps 2 and 4."""
    config = tiny_run(corpus, steps=4)
    every_two = replace(config, train=replace(config.train, checkpoint_every=2))
    return train(tmp_path_factory.mktemp("run") / "run", every_two).folder


def command(env: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sparseray", *words], env=env, capture_output=True, text=True, timeout=60.0
    )


def complete(url: str) -> dict[str, Any]:
    body = {"model": "sparseray", "prompt": "rain river", "max_tokens": 4, "ignore_eos": True}
    found: dict[str, Any] = httpx.post(f"{url}/v1/completions", json=body, timeout=30.0).json()
    return found


def test_a_server_takes_other_weights_and_its_answers_name_them(run: RunFolder, tmp_path: Path) -> None:
    env, (port,) = environment(), free_ports(1)
    first, last = (str(run.checkpoints / f"step_{n}") for n in (2, 4))
    words = [sys.executable, "-m", "sparseray", "serve", "--checkpoint", first, "--port", str(port)]
    server = Background(words, env)
    try:
        server.wait_for("Ctrl-C stops", 90.0)
        url = f"http://127.0.0.1:{port}"
        assert complete(url)["system_fingerprint"].startswith("step_2-")
        done = command(env, "publish", "--checkpoint", str(tmp_path))
        assert done.returncode == 2 and "is not a checkpoint" in done.stderr, done.stderr
        done = command(env, "publish", "--checkpoint", last)
        assert done.returncode == 0 and done.stdout.startswith("step_4-"), done.stdout + done.stderr
        server.wait_for("*** published: step_4-", 30.0)
        assert complete(url)["system_fingerprint"].startswith("step_4-")
        (model,) = httpx.get(f"{url}/v1/models").json()["data"]
        assert model["version"].startswith("step_4-")
        status = json.loads(command(env, "status", "--json").stdout)
        assert [name.partition("-")[0] for name in status["versions"]] == ["step_4"]
        assert server.interrupt() == 0, server.output
        assert "ERROR" not in server.output, server.output
        done = command(env, "publish", "--checkpoint", last)
        assert done.returncode == 2 and "no server runs" in done.stderr, done.stderr
    finally:
        server.terminate()
        left = end_leftovers(env)
    assert not left
