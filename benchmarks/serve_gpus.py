"""A server on several GPUs of one host: tokens per second, and the longest wait for a token when a slot is killed.

For each way of using them `python -m sparseray serve` is started on one checkpoint and asked for streams, three times: to
warm up, undisturbed, and with the SIGKILL of a slot at a third of the tokens. Ways: one engine (1 GPU), two with everything
each (2), two with half of the experts each (2), three with a third and replicas (3). Prints Markdown:

  PYTHONPATH=. python -m benchmarks.serve_gpus --checkpoint runs/1b/checkpoints/step_1 --ways one,whole,half,replicas
"""

import argparse
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks import serve_gpu_engine as here
from benchmarks.processes import end
from benchmarks.serve_gpu import ENVIRONMENT, PROMPT

WAYS: dict[str, tuple[int, int, int]] = {
    "one": (1, 1, 1),
    "whole": (2, 1, 1),
    "half": (2, 2, 1),
    "replicas": (3, 3, 2),
}
"""Attention workers, expert shards and replication of each."""
STREAMS, NEW, LIMIT_S = 16, 768, 120.0


class Server:
    """The command.

    Args:
        checkpoint: that it serves.
        way: how it uses GPUs.
    """

    def __init__(self, checkpoint: Path, way: str) -> None:
        options = {
            "cluster.device": "cuda",
            "cluster.colocated": "true",
            "serve.max_batch": STREAMS,
            "serve.max_model_len": 2048,
        }
        names = ("attention_workers", "expert_shards", "replication")
        options |= {f"cluster.{name}": value for name, value in zip(names, WAYS[way])}
        command = [sys.executable, "-m", "sparseray", "serve", "--checkpoint", str(checkpoint), "--port", "0"]
        command += [word for name, value in options.items() for word in (f"--{name}", str(value))]
        self.process = subprocess.Popen(
            command,
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.port, self.events = 0, list[str]()
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if found := re.search(r" at http://[\d.]+:(\d+)", line):
                self.port = int(found[1])
                break
            print(line.rstrip(), flush=True)
        if not self.port:
            raise SystemExit("serve ended")
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("***"):
                self.events.append(line.rstrip())

    def kill_slot(self) -> None:
        """SIGKILL the last of the workers that Ray names after their class."""
        family = psutil.Process(self.process.pid).children(recursive=True)
        os.kill(max(p.pid for p in family if "SlotActor" in " ".join(p.cmdline())), signal.SIGKILL)

    def close(self) -> None:
        """Ctrl-C, and an end to what does not follow it."""
        end(self.process)


def stream(port: int, index: int, heard: Callable[[], None]) -> tuple[bool, float]:
    """One greedy answer: whether it came whole, and the longest wait between two pieces.

    Args:
        port: of the server.
        index: of the prompt.
        heard: called at each piece.
    """
    prompt = here.request_of(index, PROMPT, NEW).prompt_tokens
    body: dict[str, Any] = {"prompt": prompt, "max_tokens": NEW, "temperature": 0, "ignore_eos": True}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=LIMIT_S)
    connection.request(
        "POST",
        "/v1/completions",
        json.dumps({**body, "stream": True}),
        {"Content-Type": "application/json"},
    )
    gap_s, last_s, finish = 0.0, 0.0, ""
    for line in connection.getresponse():
        if not line.startswith(b"data: {"):
            continue
        now = time.monotonic()
        gap_s, last_s = max(gap_s, now - (last_s or now)), now
        for choice in json.loads(line[6:]).get("choices", ()):
            finish = choice["finish_reason"] or finish
        heard()
    connection.close()
    return finish == "length", gap_s


def ask(server: Server, first: int, kill_at: int = 0) -> tuple[float, int, float]:
    """Tokens per second of all streams together, how many failed, and the longest wait.

    Args:
        server: that is asked.
        first: index of the first prompt.
        kill_at: pieces after which a slot is killed; 0 for never.
    """
    count, lock = 0, threading.Lock()

    def heard() -> None:
        nonlocal count
        with lock:
            count += 1
            is_due = count == kill_at
        if is_due:
            server.kill_slot()

    started = time.monotonic()
    with ThreadPoolExecutor(STREAMS) as pool:
        found = list(pool.map(lambda i: stream(server.port, first + i, heard), range(STREAMS)))
    rate = STREAMS * NEW / (time.monotonic() - started)
    return rate, sum(not is_whole for is_whole, _ in found), max(gap_s for _, gap_s in found)


def main() -> int:
    """Start, ask and kill, one way after another."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--ways", default=",".join(WAYS))
    options = parser.parse_args()
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {STREAMS} streams, {PROMPT} + {NEW} tokens\n"
    )
    print(
        "| way | GPUs | ready s | tokens/s | longest wait ms | with a kill: tokens/s | failed | longest wait ms |"
    )
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for way in options.ways.split(","):
        started = time.monotonic()
        server = Server(options.checkpoint, way)
        ready_s = time.monotonic() - started
        try:
            ask(server, 100)
            rate, _, gap_s = ask(server, 200)
            row = f"| {way} | {max(WAYS[way])} | {ready_s:.0f} | {rate:.0f} | {gap_s * 1e3:.0f} |"
            if way != "one":
                rate, failed, gap_s = ask(server, 300, STREAMS * NEW // 3)
                row += f" {rate:.0f} | {failed} | {gap_s * 1e3:.0f} |"
            print(row, flush=True)
            print("\n".join(server.events), file=sys.stderr, flush=True)
        finally:
            server.close()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
