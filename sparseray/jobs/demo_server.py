"""The demo's server: a `serve` command of its own on the same platform, asked over HTTP as any client would."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from sparseray.errors import UserError

START_DEADLINE_S, ANSWER_S, STOP_S = 90.0, 90.0, 20.0
SLOTS, MOST_ENGINES, MAX_BATCH, CLIENTS = 2, 3, 2, 12
TARGET_MS = 100
"""To a first token: with a queue of two rounds no engine keeps it."""
OPTIONS = (
    "--cluster.colocated=true",
    f"--cluster.attention_workers={SLOTS}",
    f"--cluster.expert_shards={SLOTS}",
    f"--cluster.memory_shards={SLOTS}",
    f"--cluster.replication={SLOTS}",
    "--cluster.hang_s=5",
    f"--serve.max_batch={MAX_BATCH}",
    f"--serve.min_engines={SLOTS}",
    f"--serve.max_engines={MOST_ENGINES}",
    f"--serve.target_ttft_ms={TARGET_MS}",
    "--serve.follow_every=0",
)


@dataclass(frozen=True, kw_only=True)
class Heard:
    """A streamed answer.

    Args:
        text: all of it.
        gaps_s: seconds between two pieces of it.
        version: of the weights that gave its last token.
    """

    text: str
    gaps_s: list[float]
    version: str


class DemoServer:
    """The command, from its start to its end.

    Args:
        run: folder of the run that it serves.
        address: of the platform.
        log: file for what it says.
    """

    def __init__(self, run: Path, address: str, log: Path) -> None:
        self.run, self.address, self.log = run, address, log
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        self.url = f"http://127.0.0.1:{self.port}"
        self.folder = ""
        """Of the server itself, once it is known."""
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, and return when it answers.

        Raises:
            UserError: it ended, or did not answer in time.
        """
        command = [
            sys.executable,
            "-m",
            "sparseray",
            "serve",
            "--run",
            str(self.run),
            "--port",
            str(self.port),
        ]
        command += [f"--cluster.address={self.address}", *OPTIONS]
        with self.log.open("wb") as file:
            self._process = subprocess.Popen(
                command, env=os.environ, start_new_session=True, stdout=file, stderr=subprocess.STDOUT
            )
        deadline = time.monotonic() + START_DEADLINE_S
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise UserError(f"the server ended with status {self._process.returncode}; see {self.log}")
            try:
                with urllib.request.urlopen(f"{self.url}/ready", timeout=2):
                    return
            except (urllib.error.URLError, TimeoutError, ConnectionError):
                time.sleep(0.1)
        raise UserError(f"the server did not answer at {self.url}/ready within {START_DEADLINE_S:g} s")

    def close(self) -> None:
        """Stop it as Ctrl-C does."""
        if self._process is None:
            return
        self._process.send_signal(signal.SIGINT)
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)

    def stream(
        self, prompt: str, tokens: int, seed: int, at: Callable[[int], None] = lambda count: None
    ) -> Heard:
        """Ask for a streamed completion.

        Args:
            prompt: its beginning.
            tokens: to draw, whatever they are.
            seed: of the draws.
            at: called with the number of pieces at every piece.

        Raises:
            UserError: it did not come to its end.
        """
        body: dict[str, Any] = {"prompt": prompt, "max_tokens": tokens, "temperature": 0.7, "seed": seed}
        body |= {"stream": True, "ignore_eos": True}
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.url}/v1/completions", json.dumps(body).encode(), headers)
        pieces, times, version = list[str](), list[float](), ""
        with urllib.request.urlopen(request, timeout=ANSWER_S) as answer:
            for line in answer:
                if line.startswith(b"data: {"):
                    event = json.loads(line[6:])
                    if "error" in event:
                        raise UserError(f"the server ended a stream: {event['error']['message']}")
                    pieces.append(event["choices"][0].get("text", ""))
                    times.append(time.monotonic())
                    at(len(pieces))
                    version = event.get("system_fingerprint") or version
        gaps_s = [after - before for before, after in pairwise(times)]
        return Heard(text="".join(pieces), gaps_s=gaps_s, version=version)

    def streams(
        self, prompt: str, tokens: int, seed: int, count: int, at: Callable[[int], None]
    ) -> list[Heard]:
        """The same stream several times at once.

        Args:
            prompt, tokens, seed, at: as in `stream`.
            count: how many.

        Raises:
            UserError: one did not come to its end.
        """
        with ThreadPoolExecutor(count) as pool:
            return list(pool.map(lambda _: self.stream(prompt, tokens, seed, at), range(count)))

    @contextmanager
    def load(self) -> Iterator[list[str]]:
        """Have clients ask one thing after another while the body runs; gives what failed."""
        over, failed = threading.Event(), list[str]()

        def ask(number: int) -> None:
            while not over.is_set():
                try:
                    self.stream("class ", 24, number)
                except (UserError, OSError) as error:
                    failed.append(str(error))

        clients = [threading.Thread(target=ask, args=(n,), daemon=True) for n in range(CLIENTS)]
        for client in clients:
            client.start()
        try:
            yield failed
        finally:
            over.set()
            for client in clients:
                client.join(ANSWER_S)
