"""Serving on two GPUs through the command: one engine's process is killed under load, and no answer is another."""

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
from processes import ROOT, kill_all, of_mark, start, temporary_folder, wait_until
from test_gpu_training import GPU_MODEL, run_on

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.ray,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
    pytest.mark.timeout(600),
]
PROMPTS = ["def main(", "import os\n", "class Node:\n", "for i in range(", "return ", "if x:", "try:\n", "# "]
LENGTH, KILL_AT, LIMIT_S = 1500, 600, 240.0


@pytest.fixture(scope="module")
def checkpoint(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = run_on("cuda", corpus, steps=2)
    config = replace(config, model=replace(GPU_MODEL, max_seq_len=2048))
    newest = train(tmp_path_factory.mktemp("served") / "run", config).folder.newest_checkpoint()
    torch.cuda.empty_cache()
    assert newest is not None
    return newest


@dataclass(frozen=True)
class Answer:
    """A text, how it ended, and the longest wait between two pieces of it."""

    text: str
    finish: str | None
    gap_s: float


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
        text, finish, gap_s, last_s = "", None, 0.0, 0.0
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
        return Answer(text, finish, gap_s)

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
    paths = f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"
    with temporary_folder() as temporary:
        process = start(arguments, log, TMPDIR=str(temporary), SPARSERAY_TEST=mark, PYTHONPATH=paths)
        try:
            found = Served(f"http://127.0.0.1:{port}", process, mark, log)
            found.wait_for("Ctrl-C stops")
            yield found
        finally:
            kill_all(process, mark)


def test_a_killed_engine_fails_no_request_and_another_comes_in_its_place(
    checkpoint: Path, tmp_path: Path
) -> None:
    with served(checkpoint, tmp_path) as server:
        slots = server.slots()
        assert len(slots) == 2
        undisturbed = server.ask()
        again = server.ask()
        assert [a.text for a in again] == [a.text for a in undisturbed]

        def kill(count: int) -> None:
            if count == KILL_AT:
                os.kill(slots[1], signal.SIGKILL)

        answers = server.ask(kill)
        print(
            f"longest waits: {max(a.gap_s for a in again):.3f} s, with a kill {max(a.gap_s for a in answers):.3f} s"
        )
        assert all(a.finish == "length" for a in answers)
        different = [i for i, (a, b) in enumerate(zip(answers, undisturbed)) if a.text != b.text]
        assert not different
        server.wait_for("*** resized")
        assert [a.text for a in server.ask()] == [a.text for a in undisturbed]
        print(server.log.read_text()[-1500:])
