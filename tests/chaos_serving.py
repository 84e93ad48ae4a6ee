"""Random faults against a real server, from a seed; no stream may fail or have another token than undisturbed.

As a test it runs for a minute (tests/test_chaos.py); by hand for as long as one likes:

  PYTHONPATH=.:tests python tests/chaos_serving.py --minutes 60 --seed 7 --data DIR
"""

import argparse
import dataclasses
import json
import re
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import httpx
from chaos import HANG_S, Chaos, Watched
from local_cluster import tiny_run, train
from processes import interrupt, of_mark

from sparseray.platform.run.registry import RegisteredRun, registered_runs

STREAMS, TOKENS, SEEDS = 8, 40, 24
WIDE = {"attention_workers": 2, "expert_shards": 2, "memory_shards": 2, "replication": 2, "standby": 1}


@dataclass
class WatchedServer(Watched):
    """A server of its own process, with streams that are compared with undisturbed ones."""

    checkpoint: Path = Path()

    def start(self, *options: str) -> None:
        """Start the command."""
        cluster = dataclasses.asdict(self.config.cluster)
        roles = [f"--cluster.{name}={cluster[name]}".lower() for name in (*WIDE, "colocated", "hang_s")]
        arguments = [
            "serve",
            "--checkpoint",
            str(self.checkpoint),
            "--port",
            "0",
            "--serve.drain_s",
            "20",
            *roles,
        ]
        self.command(*arguments, *options)
        self.answered, self.failures = 0, list[str]()
        self.expected: dict[int, list[int]] = {}
        self.ending = threading.Event()

    def attach(self) -> None:
        """Connect to the server's cluster, and learn what its streams say undisturbed."""
        self.wait(lambda: "Ctrl-C stops" in self.log.read_text(), "the server's first word")
        found = re.search(r"at (http://127\.0\.0\.1:\d+) ", self.log.read_text())
        assert found is not None
        self.url = found[1]
        self.find()
        self.expected = {seed: self.stream(seed) for seed in range(SEEDS)}
        self.threads = [threading.Thread(target=self._keep, args=(first,)) for first in range(STREAMS)]
        for thread in self.threads:
            thread.start()

    def registered(self) -> list[RegisteredRun]:
        """The server among what goes on."""
        return [run for run in registered_runs() if "/servers/" in run.run_dir]

    def stream(self, seed: int) -> list[int]:
        """The tokens of one stream, which must end as it should."""
        body = {"prompt": "rain river " * (seed % 5 + 1), "max_tokens": TOKENS, "seed": seed, "stream": True}
        body |= {"ignore_eos": True, "return_token_ids": True}
        tokens: list[int] = []
        with httpx.stream("POST", f"{self.url}/v1/completions", json=body, timeout=60.0) as answer:
            assert answer.status_code == 200, answer.read()
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    event = json.loads(line.removeprefix("data: "))
                    assert "error" not in event, event
                    tokens += event["choices"][0]["token_ids"]
        assert len(tokens) == TOKENS, f"{len(tokens)} tokens"
        return tokens

    def _keep(self, first: int) -> None:
        """Ask one stream after another until the end."""
        seed = first
        while not self.ending.is_set():
            try:
                if self.stream(seed % SEEDS) != self.expected[seed % SEEDS]:
                    self.failures.append(f"stream {seed}: other tokens")
            except Exception as error:
                self.failures.append(f"stream {seed}: {error!r}")
            self.answered, seed = self.answered + 1, seed + STREAMS

    def steps(self) -> int:
        """Streams that have ended."""
        return self.answered

    def finish(self, limit_s: float = 60.0) -> None:
        """End the streams, then the server by Ctrl-C."""
        self.ending.set()
        for thread in self.threads:
            thread.join(limit_s)
        assert self.process is not None
        interrupt(self.process)
        self.wait_for_end(0, limit_s)

    def check(self) -> int:
        """Every stream ended with the tokens that it has undisturbed; returns how many."""
        assert not self.failures, self.failures
        return self.answered


def chaos_serving(folder: Path, data: Path, *, seed: int, seconds: float) -> list[str]:
    """Serve with random faults for a while; returns what was done.

    Raises:
        AssertionError: a stream failed or differs; the message holds seed, faults and the server's words.
    """
    config = tiny_run(data, steps=2, **WIDE, hang_s=HANG_S)
    checkpoint = train(folder / "trained", tiny_run(data, steps=2)).folder.newest_checkpoint()
    assert checkpoint is not None
    run = WatchedServer(folder / "disturbed", config, checkpoint=checkpoint)
    faults = Chaos(run, seed)
    try:
        run.start()
        run.attach()
        end = time.monotonic() + seconds
        while time.monotonic() < end and not run.failures:
            faults.strike()
        run.settled()
        run.detach()
        run.finish()
        faults.done.append(f"{run.check()} streams, every token as undisturbed")
        left = [process.cmdline() for process in of_mark(run.mark)]
        assert not left, left
    except BaseException as error:
        words = run.log.read_text()[-4000:]
        raise AssertionError(
            f"{error}\n\nfaults:\n" + "\n".join(faults.done) + f"\n\nlog:\n{words}"
        ) from error
    finally:
        run.ending.set()
        run.detach()
        run.close()
    return faults.done


def main() -> int:
    """Run by hand."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--data", required=True, help="folder made by `data prepare --vocab_size 300`")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        done = chaos_serving(
            Path(folder), Path(options.data), seed=options.seed, seconds=options.minutes * 60
        )
    print("\n".join(done))
    return 0


if __name__ == "__main__":
    sys.exit(main())
