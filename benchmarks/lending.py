"""Two slots lent from a training run to a server and taken back, again and again: what training and serving see of it.

One platform (`up`) whose CPUs are all taken: a run on 2 + 2 + 2 slots and a server on one. The server is scaled to
three engines, which the run lends it, and back. Losses are compared with those of a run that lends nothing.

  PYTHONPATH=. python benchmarks/lending.py --data data/stdlib --out benchmarks/results/lending_cpu_DATE.md
"""

import argparse
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch

from benchmarks.elastic import run_config
from benchmarks.elastic_run import MARK, ROOT, Training, environment, gaps, median_step
from sparseray.errors import SchedulerLostError
from sparseray.platform.config import ClusterConfig, RunConfig

CPUS = 2.25
"""Of a slot: the platform's 16 logical CPUs hold seven, six for the run and one for the server."""
RETURN_S = 1.0
CALM_STEPS = 10


@dataclass(frozen=True, kw_only=True)
class Change:
    """One loan or return.

    Args:
        seconds: from the server's wish to the plan that has it: engines that answer, or the run whole again.
        pause_s: of training, as the run tells it.
        gap_s: the longest time from one commit to the next meanwhile, of training.
        step_s: the usual time.
    """

    seconds: float
    pause_s: float
    gap_s: float
    step_s: float


class Bench:
    """A platform with a run that lends and a server that borrows.

    Args:
        run: on the platform, running.
    """

    def __init__(self, run: Training) -> None:
        self.run, self.server = run, self._find_server(run)

    @staticmethod
    def _find_server(run: Training) -> Any:
        from sparseray.platform.cluster import JobHandle, ask

        found: list[Any] = []

        def is_there() -> bool:
            jobs = ask(run.scheduler.platform, "jobs")
            found[:] = [job["job"] for job in jobs if job["state"] == "serving"]
            return bool(found)

        run.wait(is_there, "the server")
        return JobHandle(platform=run.scheduler.platform, job=found[0])

    def ask(self, method: str, *arguments: Any) -> Any:
        from sparseray.platform.cluster import ask

        return ask(self.server, method, *arguments)

    def is_served_by(self, engines: int) -> bool:
        """Whether the server's plan has so many engines, and is in force."""
        try:
            status = self.ask("status")
        except SchedulerLostError:
            return False
        return bool(status.get("settled")) and status.get("sizes", "").startswith(f"{engines}+")

    def change(self, engines: int, kind: str) -> Change:
        """Scale the server, and see what that does to training."""
        run = self.run
        step_s = median_step(run.wait_steps(CALM_STEPS))
        known, before, asked = len(run.events()), len(run.records()), time.monotonic()
        refused = self.ask("scale", "attention", engines)
        if refused:
            raise RuntimeError(f"the server's scale to {engines} engines was refused: {refused}")

        def is_done() -> bool:
            kinds = [event["kind"] for event in run.events()[known:]]
            return kind in kinds and "resized" in kinds and self.is_served_by(engines)

        run.wait(is_done, f"{kind} slots", 60.0)
        seconds = time.monotonic() - asked
        run.wait_steps(2)
        resized = next(event for event in run.events()[known:] if event["kind"] == "resized")
        return Change(
            seconds=seconds - (RETURN_S if kind == "returned" else 0.0),
            pause_s=resized["pause"],
            gap_s=max(gaps(run.records()[before - 1 :])),
            step_s=step_s,
        )


def start(arguments: list[str], log: Path, mark: str) -> subprocess.Popen[bytes]:
    """Start a command whose processes carry a mark; its output goes to a file."""
    with log.open("ab") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "sparseray", *arguments],
            cwd=ROOT,
            env={**os.environ, MARK: mark},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def checkpoint_of(config: RunConfig, folder: Path) -> Path:
    """A checkpoint to serve, of a few steps."""
    with Training(config, ClusterConfig(colocated=True), folder, "served") as run:
        run.stop()
    (checkpoint,) = (folder / "served" / "checkpoints").iterdir()
    return checkpoint


def measure(config: RunConfig, folder: Path, times: int) -> tuple[list[Change], list[Change], Training]:
    """Lend and take back; the loans, the returns, and the run, which has ended."""
    checkpoint, log = checkpoint_of(config, folder), folder / "server.log"
    cluster = ClusterConfig(
        attention_workers=2,
        expert_shards=2,
        memory_shards=2,
        address="auto",
        cpus_per_slot=CPUS,
        lend=True,
        lend_return_s=RETURN_S,
    )
    loans, returns = [], []
    with Training(config, cluster, folder, "lending") as run:
        options = [
            f"--checkpoint={checkpoint}",
            "--port=0",
            "--cluster.address=auto",
            "--cluster.colocated=true",
        ]
        server = start(["serve", *options, f"--cluster.cpus_per_slot={CPUS}"], log, run.mark)
        try:
            bench = Bench(run)
            run.wait(lambda: bench.is_served_by(1), "an engine")
            for _ in range(times):
                loans.append(bench.change(3, "lent"))
                returns.append(bench.change(1, "returned"))
                print(f"lent: {loans[-1]}\nback: {returns[-1]}", flush=True)
        finally:
            server.terminate()
            server.wait(60)
        run.stop(keeps_cluster=True)
    return loans, returns, run


def undisturbed(config: RunConfig, folder: Path, steps: int) -> list[Any]:
    """The curve of a run that lends nothing."""
    cluster = ClusterConfig(attention_workers=2, expert_shards=2, memory_shards=2)
    with Training(config, cluster, folder, "undisturbed") as run:
        run.wait(lambda: len(run.records()) >= steps, f"step {steps}", 60.0 + 2 * steps)
        run.stop()
    return run.curve()[:steps]


def row(what: str, changes: list[Change]) -> str:
    """One line of the table."""
    seconds, pauses = [c.seconds for c in changes], [c.pause_s for c in changes]
    extra = [(c.gap_s - c.step_s) / c.step_s for c in changes]
    return (
        f"| {what} | {statistics.median(seconds):.2f}; {max(seconds):.2f} s | "
        f"{statistics.median(pauses) * 1000:.0f}; {max(pauses) * 1000:.0f} ms | "
        f"{statistics.median(extra):.2f}; {max(extra):.2f} |"
    )


def table(loans: list[Change], returns: list[Change], bits: str) -> str:
    """The result."""
    step_ms = statistics.median(change.step_s for change in loans) * 1000
    return "\n".join(
        [
            "# Slots lent from training to serving and back",
            "",
            f"{os.cpu_count()} logical CPUs, Python {platform.python_version()}, torch {torch.__version__}, ray "
            f"{ray.__version__}; configs/tiny.yaml, steps of {step_ms:.0f} ms, two slots {len(loans)} times. Median; worst.",
            "",
            "| what | from the server's wish to its end | training's pause | longest step beyond the usual, in steps |",
            "|---|---|---|---|",
            row("lent: the server has three engines", loans),
            row(f"returned, after {RETURN_S:g} s of idleness: the run is whole", returns),
            "",
            f"Losses, balance losses and gradient norms against the run that lends nothing: {bits}.",
            "",
        ]
    )


def main() -> int:
    """Measure; 1 when a bit differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of `sparseray data prepare`")
    parser.add_argument("--times", type=int, default=10, help="loans, each with its return")
    parser.add_argument("--out", type=Path, help="file to write the table to")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="sparseray-lending-"))
    config = run_config(options.data, sequences=1, seq_len=96)
    with environment():
        up = [sys.executable, "-m", "sparseray", "up"]
        subprocess.run(up, check=True, cwd=ROOT)
        try:
            loans, returns, run = measure(config, folder, options.times)
        finally:
            subprocess.run([*up[:-1], "down"], check=False, cwd=ROOT)
        curve = run.curve()
        same = curve == undisturbed(config, folder, len(curve))
    bits = f"equal over {len(curve)} steps" if same else "**different**"
    result = table(loans, returns, bits)
    print(result)
    if options.out:
        options.out.write_text(result)
    shutil.rmtree(folder, ignore_errors=True)
    return 0 if same else 1


if __name__ == "__main__":
    raise SystemExit(main())
