"""Serving on several GPUs through the command: one slot's process is killed under load, and no answer is another.

Where there are fewer GPUs than slots, all slots share the first one, each in its turn: slow, but all of it is run.
"""

import json
import os
import signal
import subprocess
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from background import free_ports
from local_cluster import train
from processes import for_slots, kill_all, of_mark, start, temporary_folder, wait_until, with_last_words
from test_gpu_training import GPU_MODEL, run_on

from sparseray.model.config import DSEConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.ray,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.timeout(600),
]
PROMPTS = ["def main(", "import os\n", "class Node:\n", "for i in range(", "return ", "if x:", "try:\n", "# "]
MANY = torch.cuda.device_count() >= 3
LENGTH = 1500 if MANY else 100
KILL_AT, LIMIT_S = LENGTH * len(PROMPTS) // 3, 240.0


@pytest.fixture(scope="module")
def checkpoint(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = run_on("cuda", corpus, steps=2)
    config = replace(config, model=replace(GPU_MODEL, max_seq_len=2048, dse=DSEConfig(layers=())))
    newest = train(tmp_path_factory.mktemp("served") / "run", config).folder.newest_checkpoint()
    torch.cuda.empty_cache()
    assert newest is not None
    return newest


@dataclass(frozen=True)
class Answer:
    """A text, how it ended, the longest wait between two pieces of it, and the time of all."""

    text: str
    finish: str | None
    gap_s: float
    seconds: float


class Served:
    """The command, and what is asked of it.

    Args:
        url: where it listens.
        process, mark, log: of the command.
    """

    def __init__(self, url: str, process: "subprocess.Popen[bytes]", mark: str, log: Path) -> None:
        self.url, self.process, self.mark, self.log = url, process, mark, log

    def wait_for(self, text: str) -> None:
        """Wait until the command has said something."""

        def is_said() -> bool:
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            return text in self.log.read_text()

        wait_until(is_said, text, LIMIT_S)

    def slots(self) -> list[int]:
        """Processes of slots: the workers whose title Ray sets to their class."""
        return sorted(p.pid for p in of_mark(self.mark) if "SlotActor" in " ".join(p.cmdline()))

    def stream(self, prompt: str, heard: Callable[[], None]) -> Answer:
        """A greedy answer.

        Args:
            prompt: of it.
            heard: called at each piece.
        """
        body = {"prompt": prompt, "max_tokens": LENGTH, "temperature": 0, "stream": True, "ignore_eos": True}
        request = urllib.request.Request(
            f"{self.url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        text, finish, gap_s, last_s, started = "", None, 0.0, 0.0, time.monotonic()
        with urllib.request.urlopen(request, timeout=LIMIT_S) as response:
            for line in response:
                if not line.startswith(b"data: {"):
                    continue
                now = time.monotonic()
                gap_s, last_s = max(gap_s, now - (last_s or now)), now
                piece = json.loads(line[6:])
                assert "error" not in piece, piece
                for choice in piece["choices"]:
                    text, finish = text + choice["text"], choice["finish_reason"] or finish
                heard()
        return Answer(text, finish, gap_s, time.monotonic() - started)

    def ask(self, at: Callable[[int], None] = lambda count: None) -> list[Answer]:
        """All prompts side by side.

        Args:
            at: called at each piece of any answer with how many there were.
        """
        count = 0

        def heard() -> None:
            nonlocal count
            count += 1
            at(count)

        with ThreadPoolExecutor(len(PROMPTS)) as pool:
            return list(pool.map(lambda prompt: self.stream(prompt, heard), PROMPTS))


@contextmanager
def served(checkpoint: Path, folder: Path, **options: str) -> Iterator[Served]:
    """The command with two GPUs, in fp32: what is read as a prompt and what was decoded differ by rounding alone."""
    mark, (port,), log = uuid.uuid4().hex, free_ports(1), folder / "log.txt"
    named = {
        "cluster.device": "cuda",
        "cluster.colocated": "true",
        "cluster.attention_workers": "2",
        "serve.dtype": "float32",
        "serve.cache_gib": "1",
        **options,
    }
    arguments = ["serve", "--checkpoint", str(checkpoint), "--port", str(port)]
    arguments += [word for name, value in named.items() for word in (f"--{name}", value)]
    with temporary_folder() as temporary:
        process = start(
            arguments,
            log,
            **{
                "TMPDIR": str(temporary),
                "SPARSERAY_TEST": mark,
                **for_slots(int(named["cluster.attention_workers"])),
            },
        )
        try:
            found = Served(f"http://127.0.0.1:{port}", process, mark, log)
            with with_last_words(log, temporary):
                found.wait_for("Ctrl-C stops")
                yield found
        finally:
            kill_all(process, mark)


def story(server: Served, slots: int) -> None:
    """Answers; the same while a slot is killed, while another comes in its place, and once it has."""
    assert len(server.slots()) == slots
    undisturbed = server.ask()
    again = server.ask()
    assert [a.text for a in again] == [a.text for a in undisturbed]

    def kill(count: int) -> None:
        if count == KILL_AT:
            os.kill(server.slots()[-1], signal.SIGKILL)

    answers = server.ask(kill)
    tokens = LENGTH * len(PROMPTS)
    print(f"{slots} slots: {tokens / max(a.seconds for a in again):.0f} tokens/s of {len(PROMPTS)} streams; longest waits"
          f" {max(a.gap_s for a in again):.3f} s, with a kill {max(a.gap_s for a in answers):.3f} s")  # fmt: skip
    assert all(a.finish == "length" for a in answers)
    assert [a.text for a in answers] == [a.text for a in undisturbed]
    gap_s, deadline = 0.0, time.monotonic() + LIMIT_S
    while "*** resized" not in server.log.read_text():
        assert time.monotonic() < deadline, "no other slot came"
        answers = server.ask()
        assert [a.text for a in answers] == [a.text for a in undisturbed]
        gap_s = max(gap_s, *(a.gap_s for a in answers))
    print(f"longest wait until another has come {gap_s:.3f} s")
    print("\n".join(line for line in server.log.read_text().splitlines() if line.startswith("***")))
    assert [a.text for a in server.ask()] == [a.text for a in undisturbed]


def test_a_killed_engine_with_all_experts_fails_no_request_and_another_comes(
    checkpoint: Path, tmp_path: Path
) -> None:
    with served(checkpoint, tmp_path) as server:
        story(server, 2)


def test_a_killed_engine_with_half_of_the_experts_fails_no_request_and_another_comes(
    checkpoint: Path, tmp_path: Path
) -> None:
    """Without replicas: the other one reads what it lacks from the checkpoint."""
    with served(checkpoint, tmp_path, **{"cluster.expert_shards": "2"}) as server:
        story(server, 2)


def test_replicas_go_on_for_a_killed_engine_with_a_third_of_the_experts(
    checkpoint: Path, tmp_path: Path
) -> None:
    roles = {"attention_workers": "3", "expert_shards": "3", "replication": "2"}
    with served(
        checkpoint, tmp_path, **{f"cluster.{name}": value for name, value in roles.items()}
    ) as server:
        story(server, 3)
