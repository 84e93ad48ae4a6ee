"""Ray Train v2 elastic and torchft beside this project: one worker is killed, three times each.

Same machine, same call, a network of as many parameters as the tiny model and the same step time;
data-parallel with three workers, which is what both offer. A peer that is not installed is a line that says so.
"""

import contextlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks.elastic_parts import Bench, Row
from benchmarks.elastic_run import MARK, ROOT
from sparseray.model.counts import count_parameters

JOBS = ROOT / "benchmarks" / "elastic_peer_jobs.py"
STEPS_BEFORE = 25
LIMIT_S = 150.0
REPEATS = 3
NEEDED = {"Ray Train v2": "import ray.train.torch, ray.train.v2", "torchft": "import torchft.coordination"}


@dataclass(frozen=True, kw_only=True)
class Kill:
    """One killed worker.

    Args:
        seconds: from the kill to the first finished step that began after it.
        past_s: from the kill to the first step that none had finished before it.
        lost: steps that had been finished and were computed again.
        workers: that took part in that first step.
        whole_s: from the kill (torchft: from the new worker's start) to the first step of all workers again.
    """

    seconds: float
    past_s: float
    lost: int
    workers: int
    whole_s: float


class Peer:
    """Processes of one peer in a folder of their own.

    Args:
        python: interpreter that has the peer.
        folder: where workers write their lines.
        arguments: that every process gets.
        path: where that interpreter finds more packages.
        until: time (`time.monotonic`) after which nothing is waited for.
    """

    def __init__(
        self,
        python: str,
        folder: Path,
        arguments: Sequence[str],
        path: str = "",
        until: float = float("inf"),
    ) -> None:
        self.python, self.folder, self.arguments = python, folder, arguments
        self.path, self.until = path, until
        self.mark = f"{os.getpid()}-{folder.name}"
        folder.mkdir(parents=True)
        self.log = folder / "log"
        self.temporary = Path(tempfile.mkdtemp(prefix="sr-", dir="/tmp"))
        self.started: list[subprocess.Popen[bytes]] = []

    def start(self, job: str, *more: str, launcher: Sequence[str] = ()) -> subprocess.Popen[bytes]:
        """Start a process of benchmarks/elastic_peer_jobs.py.

        Args:
            job, more: of its command line.
            launcher: what the interpreter runs that starts it.
        """
        command = [self.python, *launcher, str(JOBS), job, "--folder", str(self.folder)]
        command += [*self.arguments, *more]
        environment = {**os.environ, MARK: self.mark, "TMPDIR": str(self.temporary), "OMP_NUM_THREADS": "1"}
        # The project is not part of what the peers run.
        environment["PYTHONPATH"] = self.path
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        self.started.append(process)
        return process

    def end(self) -> None:
        """SIGKILL every process of the peer, by id."""
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                if process.environ().get(MARK) == self.mark:
                    process.kill()
        for each in self.started:
            each.wait(30.0)
        shutil.rmtree(self.temporary, ignore_errors=True)

    def lines(self) -> list[dict[str, Any]]:
        """All finished steps of all workers, in the order of their ends."""
        found = []
        for path in self.folder.glob("worker-*.jsonl"):
            text = path.read_text()
            found += [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
        return sorted(found, key=lambda line: line["time"])

    def wait(self, condition: Callable[[], object], what: str) -> None:
        """Wait for what the workers do."""
        deadline = min(self.until, time.monotonic() + LIMIT_S)
        while not condition():
            ended = any(process.poll() not in (None, -signal.SIGKILL) for process in self.started)
            if ended or time.monotonic() > deadline:
                last = self.log.read_text(errors="replace").splitlines()[-3:]
                raise RuntimeError(
                    f"{what} did not come {'from a job that ended' if ended else 'in time'}: {' / '.join(last)[:300]}"
                )
            time.sleep(0.05)

    def wait_whole(self, workers: int) -> None:
        """Wait until all workers have made steps together for a while."""
        since = time.time()

        def is_whole() -> bool:
            together = [line for line in self.lines() if line["workers"] == workers and line["began"] > since]
            return len(together) > STEPS_BEFORE * workers

        self.wait(is_whole, f"{STEPS_BEFORE} steps of {workers} workers")

    def kill_one(self, workers: int, again: Callable[[int], object]) -> Kill:
        """Kill a worker that is not the first; `again` is given its rank and starts it anew where that is needed."""
        newest = max(line["step"] for line in self.lines())
        victim = next(line for line in reversed(self.lines()) if line["rank"] == workers - 1)
        struck = time.time()
        os.kill(victim["pid"], signal.SIGKILL)

        def after(least: int = 0, by: int = 1) -> list[dict[str, Any]]:
            return [
                line
                for line in self.lines()
                if line["began"] >= struck and line["step"] > least and line["workers"] >= by
            ]

        self.wait(after, "a step after the kill")
        self.wait(lambda: after(least=newest), "a step beyond the kill")
        done = max(line["step"] for line in self.lines() if line["time"] <= struck)
        first, past = after()[0], after(least=done)[0]
        restarted = time.time() if again(victim["rank"]) else struck
        self.wait(lambda: [a for a in after(by=workers) if a["began"] >= restarted], "a step of all workers")
        whole = next(a for a in after(by=workers) if a["began"] >= restarted)
        return Kill(
            seconds=first["time"] - struck,
            past_s=past["time"] - struck,
            lost=max(0, done - first["step"] + 1),
            workers=first["workers"],
            whole_s=whole["time"] - restarted,
        )


@contextlib.contextmanager
def a_peer(
    python: str, folder: Path, arguments: Sequence[str], path: str = "", until: float = float("inf")
) -> Iterator[Peer]:
    """A peer that is ended afterwards.

    Args:
        python, folder, arguments, path, until: of `Peer`.
    """
    peer = Peer(python, folder, arguments, path, until)
    try:
        yield peer
    finally:
        peer.end()


def peers(bench: Bench, python: str, step_s: float) -> None:
    """Kill one worker of three, with each peer.

    Args:
        bench: where the lines go.
        python: interpreter that has the peers.
        step_s: seconds of a step.
    """
    parameters = count_parameters(bench.config.model)["total"]
    arguments = ["--parameters", str(parameters), "--step_s", str(step_s)]
    if _has(bench, "Ray Train v2", python):
        with a_peer(python, bench.folder / "ray-train", arguments) as peer:
            peer.start("ray_train")
            peer.wait(peer.lines, "the first step of Ray Train")
            kills = []
            for _ in range(REPEATS):
                peer.wait_whole(3)
                kills.append(peer.kill_one(3, again=lambda _rank: None))
        _report(
            bench, "Ray Train v2, elastic from 1 to 3 workers, a checkpoint every 10 steps", kills, step_s
        )
    if _has(bench, "torchft", python):
        for join_timeout_ms in (1000, 200):
            with a_peer(python, bench.folder / f"torchft-{join_timeout_ms}", arguments) as peer:
                start = start_torchft(peer, 3, join_timeout_ms)
                name = f"torchft, 3 replica groups of one worker, join timeout {join_timeout_ms} ms"
                _measure(bench, name, peer, step_s, again=start)


def start_torchft(peer: Peer, workers: int, join_timeout_ms: int) -> Callable[[int], object]:
    """Start torchft's lighthouse and its workers.

    Args:
        peer: whose processes they are.
        workers: each a replica group.
        join_timeout_ms: of the lighthouse.

    Returns:
        What starts a worker again.
    """
    peer.start("lighthouse", "--join_timeout_ms", str(join_timeout_ms))
    address = peer.folder / "lighthouse"
    peer.wait(address.exists, "torchft's lighthouse")

    def start(rank: int) -> object:
        return peer.start("torchft", "--rank", str(rank), "--lighthouse", address.read_text())

    for rank in range(workers):
        start(rank)
    return start


def _measure(bench: Bench, name: str, peer: Peer, step_s: float, again: Callable[[int], object]) -> None:
    """Kill workers and add the line; a peer that does not go on is a line too."""
    kills: list[Kill] = []
    failure = ""
    try:
        for _ in range(REPEATS):
            peer.wait_whole(3)
            kills.append(peer.kill_one(3, again))
    except RuntimeError as error:
        failure = " ".join(str(error).split()).replace("|", "/")
    if kills:
        _report(bench, name, kills, step_s)
    if failure:
        bench.add(Row(part="peers", what=f"{name}: stopped after {len(kills)} kills", measured=failure[:300]))


def _has(bench: Bench, name: str, python: str) -> bool:
    done = subprocess.run(
        [python, "-c", NEEDED[name]], capture_output=True, text=True, timeout=120, check=False
    )
    if done.returncode:
        why = done.stderr.strip().splitlines()[-1:] or ["unknown"]
        bench.add(Row(part="peers", what=name, measured=f"not installed ({why[0][:120]})"))
    return not done.returncode


def _report(bench: Bench, name: str, kills: Sequence[Kill], step_s: float) -> None:
    def spread(values: Sequence[float]) -> str:
        return f"median {statistics.median(values):.2f} s, max {max(values):.2f} s"

    workers = sorted({kill.workers for kill in kills})
    batch = "kept" if workers == [3] else f"shrunk to {'/'.join(map(str, workers))} of 3 workers"
    bench.add(
        Row(
            part="peers",
            what=f"{name}, steps of {step_s * 1e3:.0f} ms, one worker killed, {len(kills)} times",
            measured=f"next finished step {spread([kill.seconds for kill in kills])}; first new step "
            f"{spread([kill.past_s for kill in kills])}; steps lost {'/'.join(str(kill.lost) for kill in kills)}; "
            f"batch of the first step {batch}; all workers again {spread([kill.whole_s for kill in kills])}",
        )
    )
