"""The ingress as a Ray Serve deployment: requests are shared out, and a replica that is killed takes no other's with it."""

import contextlib
import json
import os
import re
import signal
import subprocess
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest
from background import free_ports
from local_cluster import tiny_run, train
from processes import interrupt, kill_all, of_mark, start, temporary_folder, wait_until

from sparseray.errors import ConfigError
from sparseray.jobs.http.access import AccessRules
from sparseray.jobs.http.options import HttpOptions
from sparseray.jobs.http.ray_ingress import check_options

STREAMS, TOKENS = 16, 40
OPTIONS = HttpOptions(model_names=("m",), rules=AccessRules())


class Served:
    """A server with two replicas of its ingress."""

    def __init__(self, process: "subprocess.Popen[bytes]", url: str, mark: str) -> None:
        self.process, self.url, self.mark = process, url, mark

    def replicas(self) -> list[psutil.Process]:
        found = []
        for process in of_mark(self.mark):
            # HAProxy starts and ends processes of its own all the time.
            with contextlib.suppress(psutil.NoSuchProcess):
                if "ServeReplica" in " ".join(process.cmdline()):
                    found.append(process)
        return found

    def stream(self, seed: int) -> list[int]:
        """The tokens of one stream; fewer where its connection broke."""
        body = {"prompt": "rain river", "max_tokens": TOKENS, "seed": seed, "stream": True}
        body |= {"ignore_eos": True, "return_token_ids": True}
        tokens: list[int] = []
        try:
            with httpx.stream("POST", f"{self.url}/v1/completions", json=body, timeout=60.0) as answer:
                for line in answer.iter_lines():
                    if line.startswith("data: {") and "choices" in (event := json.loads(line[6:])):
                        tokens += event["choices"][0]["token_ids"]
        except httpx.HTTPError:
            pass
        return tokens

    def load(self) -> int:
        """Open requests of the replica that answers."""
        return int(httpx.get(f"{self.url}/load", timeout=10.0).json()["server_load"])


@pytest.fixture
def served(corpus: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Served]:
    """A server behind the proxy that the parameter names: Ray's own, or HAProxy."""
    pytest.importorskip("fastapi", reason="needs `pip install 'sparseray[ingress]'`")
    checkpoint = train(tmp_path / "run", tiny_run(corpus, steps=2)).folder.newest_checkpoint()
    (port,), mark, log = free_ports(1), uuid.uuid4().hex, tmp_path / "log.txt"
    with temporary_folder() as temporary:
        arguments = ["serve", f"--checkpoint={checkpoint}", f"--port={port}", "--serve.ingress=ray"]
        changes = {
            "TMPDIR": str(temporary),
            "SPARSERAY_TEST": mark,
            "SPARSERAY_STATE_DIR": str(tmp_path / "state"),
        }
        if request.param == "haproxy":
            changes["RAY_SERVE_ENABLE_HA_PROXY"] = "1"
        process = start([*arguments, "--cluster.attention_workers=2", "--cluster.hang_s=5"], log, **changes)

        def ready() -> bool:
            assert process.poll() is None, log.read_text()
            return "Ctrl-C stops" in log.read_text()

        try:
            wait_until(ready, "the server", 110.0)
            found = re.search(r"at (http://127\.0\.0\.1:\d+) ", log.read_text())
            assert found is not None
            assert ("haproxy" in {process.name() for process in of_mark(mark)}) == (
                request.param == "haproxy"
            )
            yield Served(process, found[1], mark)
            interrupt(process)
            assert process.wait(90) == 0, log.read_text()
            wait_until(lambda: not of_mark(mark), "the end of all processes", 30.0)
        finally:
            kill_all(process, mark)


@pytest.mark.ray
@pytest.mark.timeout(290)
@pytest.mark.parametrize("served", ["own"], indirect=True)
def test_a_replica_that_is_killed_takes_no_other_ones_requests_with_it(served: Served) -> None:
    wait_until(lambda: len(served.replicas()) == 2, "two replicas")
    plain = {seed: served.stream(seed) for seed in range(STREAMS)}
    assert all(len(tokens) == TOKENS for tokens in plain.values())
    heard: list[tuple[float, float, int, list[int]]] = []
    ending = threading.Event()

    def keep(seed: int) -> None:
        while not ending.is_set():
            begun = time.monotonic()
            tokens = served.stream(seed)
            heard.append((begun, time.monotonic(), seed, tokens))

    threads = [threading.Thread(target=keep, args=(seed,)) for seed in range(STREAMS)]
    for thread in threads:
        thread.start()
    loads: list[int] = []
    for _ in range(10):
        time.sleep(0.1)
        loads.append(served.load())
    before = {replica.pid for replica in served.replicas()}
    killed = time.monotonic()
    os.kill(min(before), signal.SIGKILL)
    time.sleep(3.0)
    ending.set()
    for thread in threads:
        thread.join(60.0)
    open_ = [(seed, tokens) for begun, ended, seed, tokens in heard if begun < killed < ended]
    broken = [seed for seed, tokens in open_ if len(tokens) < TOKENS]
    # Both had some of them, and who was asked for its load had not all.
    assert 0 < len(broken) < len(open_) and max(loads) < STREAMS
    for _, _, seed, tokens in heard:
        assert tokens == plain[seed][: len(tokens)]
    # Another one comes, and what nobody reads any more frees its place in the batch.
    wait_until(lambda: len({p.pid for p in served.replicas()} - before) == 1, "a replica in its place", 60.0)
    started = time.monotonic()
    assert served.stream(0) == plain[0]
    assert time.monotonic() - started < 30.0


@pytest.mark.ray
@pytest.mark.long
@pytest.mark.timeout(290)
@pytest.mark.parametrize("served", ["haproxy"], indirect=True)
def test_haproxy_changes_no_token_of_streams_side_by_side(served: Served) -> None:
    """How it shares them out is its own affair: of two replicas one may have all."""
    wait_until(lambda: len(served.replicas()) == 2, "two replicas")
    plain = [served.stream(seed) for seed in range(STREAMS)]
    with ThreadPoolExecutor(STREAMS) as pool:
        assert list(pool.map(served.stream, range(STREAMS))) == plain
    assert all(len(tokens) == TOKENS for tokens in plain)


def test_without_ray_serve_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'sparseray\[ingress\]'"):
        check_options(OPTIONS)
    monkeypatch.undo()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    with pytest.raises(ConfigError, match="--admin_port belongs to one process"):
        check_options(HttpOptions(model_names=("m",), rules=AccessRules(), admin_port=0))
