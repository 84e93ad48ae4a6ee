"""torchrun's restarts and torchft beside this project, on the GPUs of one machine: a worker is killed (SIGKILL).

This project trains its mixture of experts with every piece twice. The peers train a dense network of as many parameters
as one token uses there, whose steps wait until they are as long, data parallel with a worker for each GPU: `torchrun
--max-restarts` with DistributedDataParallel and checkpoints, and torchft with a replica group for each worker. Both peers run
at the same time: what they do not wait for is little. Prints a line as each is known, and a table as Markdown:

  PYTHONPATH=. python -m benchmarks.elastic_gpu_peers --data data/stdlib --out benchmarks/results/elastic_peers_GPU_DATE.md
  PYTHONPATH=. python -m benchmarks.elastic_gpu_peers --data data/stdlib --device cpu --config tiny
"""

import argparse
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from benchmarks.elastic_peers import Kill, Peer, a_peer, start_torchft
from benchmarks.elastic_run import ROOT, RunDied, Training, environment, median_step
from sparseray.model.counts import count_parameters
from sparseray.platform.config import ClusterConfig, RunConfig, load_yaml

HEAD = (
    "| | kills | first step that began after it | first new step | steps computed again | batch meanwhile"
    " | all workers again |",
    "|---|---|---|---|---|---|---|",
)

HEARTBEAT_MS = 1000


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all rows share.

    Args:
        config: of this project's run.
        folder: for everything.
        device: cpu or cuda.
        workers: of each row.
        python, path: interpreter of the peers, and where it finds their packages.
        kills: of each peer.
        until: time (`time.monotonic`) after which nothing of the peers is waited for.
    """

    config: RunConfig
    folder: Path
    device: Literal["cpu", "cuda"]
    workers: int
    python: str
    path: str
    kills: int
    until: float


def row(name: str, kills: Sequence[Kill], step_s: float, workers: int, failure: str = "") -> str:
    """A line of the table; times are beyond the step itself.

    Args:
        name: of what is measured.
        kills: of it.
        step_s: seconds of a step.
        workers: that there are.
        failure: why there are no more of them.
    """
    failure = " ".join(failure.split()).replace("|", "/")[:400]
    if not kills:
        return f"| {name} | 0 | {failure or 'nothing'} | | | | |"

    def times(of: Callable[[Kill], float]) -> str:
        values = [of(kill) for kill in kills]
        return f"{statistics.median(values):.2f} s" + (
            f", at most {max(values):.2f}" if len(values) > 1 else ""
        )

    least = min(kill.workers for kill in kills)
    cells = [
        name,
        str(len(kills)),
        times(lambda kill: kill.seconds - step_s),
        times(lambda kill: kill.past_s - step_s),
        "/".join(str(kill.lost) for kill in kills),
        "kept" if least == workers else f"{least} of {workers} workers",
        times(lambda kill: kill.whole_s) + (f"; then: {failure}" if failure else ""),
    ]
    return f"| {' | '.join(cells)} |"


def ours(setting: Setting, count: int) -> tuple[str, float]:
    """This project's row, and the seconds of its step.

    Args:
        setting: of all rows.
        count: kills.
    """
    cluster = ClusterConfig(
        attention_workers=setting.workers,
        expert_shards=setting.workers,
        replication=2,
        colocated=True,
        device=setting.device,
    )
    kills: list[Kill] = []
    usual, failure = 0.0, ""
    try:
        with Training(setting.config, cluster, setting.folder, "ours") as run:
            for _ in range(count):
                run.wait_calm(steps=6)
                usual = usual or median_step(run.records()[-6:])
                repeated = run.repeated_steps()
                struck, victim = time.time(), run.slots("expert")[-1]["pid"]
                seconds = run.signal([victim], signal.SIGKILL, "a slot").seconds
                run.wait(lambda: len(run.slots("expert")) == setting.workers, "a slot in its place")
                lost, whole_s = run.repeated_steps() - repeated, time.time() - struck
                kill = Kill(
                    seconds=seconds, past_s=seconds, lost=lost, workers=setting.workers, whole_s=whole_s
                )
                kills.append(kill)
                print(f"ours: {kill}, a step {usual:.3f} s", flush=True)
    except RunDied as error:
        failure = str(error)
    return row(
        "this project, every piece twice, none on standby", kills, usual, setting.workers, failure
    ), usual


def torchrun(setting: Setting, step_s: float, every: int) -> str:
    """The row of torchrun's restarts.

    Args:
        setting: of all rows.
        step_s: seconds of a step.
        every: steps from a checkpoint to the next.
    """
    # Otherwise workers that are started again find the addresses of those before them, and every second start fails.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    with _peer(setting, "torchrun", _arguments(setting, step_s)) as peer:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(setting.workers)]
        launcher += ["--max-restarts", "100", "--monitor-interval", "0.1", "--local-addr", "127.0.0.1"]
        peer.start("ddp", "--checkpoint_every", str(every), launcher=launcher)
        name = f"torchrun --max-restarts, DDP, a checkpoint every {every} steps"
        return _struck(setting, name, peer, step_s, again=lambda _rank: None)


def torchft(setting: Setting, step_s: float, collective_s: float) -> str:
    """torchft's row.

    Args:
        setting: of all rows.
        step_s: seconds of a step.
        collective_s: after which a sum is given up.
    """
    arguments = [*_arguments(setting, step_s), "--collective_s", str(collective_s)]
    # Of two workers one is no majority until the other's heartbeat counts no more; the default is 5000 ms.
    arguments += ["--heartbeat_ms", str(HEARTBEAT_MS)]
    name = f"torchft, sums given up after {collective_s:g} s, heartbeats after {HEARTBEAT_MS} ms, join timeout 200 ms"
    with _peer(setting, "torchft", arguments) as peer:
        try:
            again = start_torchft(peer, setting.workers, join_timeout_ms=200)
        except RuntimeError as error:
            return row(name, [], step_s, setting.workers, str(error))
        return _struck(setting, name, peer, step_s, again)


def _arguments(setting: Setting, step_s: float) -> list[str]:
    parameters = count_parameters(setting.config.model)["active"]
    return ["--parameters", str(parameters), "--step_s", f"{step_s:.4f}", "--device", setting.device]


def _peer(setting: Setting, name: str, arguments: Sequence[str]) -> AbstractContextManager[Peer]:
    return a_peer(setting.python, setting.folder / name, arguments, setting.path, setting.until)


def _struck(setting: Setting, name: str, peer: Peer, step_s: float, again: Callable[[int], object]) -> str:
    """Kill workers; a peer that does not go on is a row too."""
    kills: list[Kill] = []
    failure = ""
    try:
        peer.wait(peer.lines, "the first step")
        for _ in range(setting.kills):
            peer.wait_whole(setting.workers)
            kills.append(peer.kill_one(setting.workers, again))
            print(f"{name}: {kills[-1]}", flush=True)
    except RuntimeError as error:
        failure = str(error)
        print(f"{name}: {failure}", flush=True)
    return row(name, kills, step_s, setting.workers, failure)


def main() -> int:
    """Measure this project first, whose step's time the peers take."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of `sparseray data prepare`")
    parser.add_argument("--rows", default="ours,torchrun,torchft")
    parser.add_argument("--config", default="1b_full")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--sequences", type=int, default=8, help="of each worker in a step of this project")
    parser.add_argument("--kills", type=int, default=2, help="of each peer")
    parser.add_argument("--own_kills", type=int, default=1, help="of this project")
    parser.add_argument(
        "--limit_s", type=float, default=600.0, help="seconds after which no peer is waited for"
    )
    parser.add_argument("--step_s", type=float, default=0.2, help="of the peers where `ours` is not measured")
    parser.add_argument("--checkpoint_every", type=int, default=20, help="steps, of torchrun")
    parser.add_argument("--collective_s", type=float, default=2.0, help="of torchft")
    parser.add_argument("--python", default=sys.executable, help="interpreter that has torch and torchft")
    parser.add_argument(
        "--path", default=os.environ.get("PYTHONPATH", ""), help="PYTHONPATH of that interpreter"
    )
    parser.add_argument("--out", type=Path, help="file to write the table to")
    options = parser.parse_args()
    config, rows = load_yaml(ROOT / "configs" / f"{options.config}.yaml"), options.rows.split(",")
    train = replace(
        config.train, steps=100_000, logical_shards=options.workers, sequences_per_shard=options.sequences
    )
    config = replace(config, train=train, data=replace(config.data, path=str(Path(options.data).absolute())))
    lines, step_s = [], options.step_s
    paths = os.environ.get("PYTHONPATH", "")
    with tempfile.TemporaryDirectory(prefix="sr-p-", dir="/tmp") as folder, environment():
        os.environ["PYTHONPATH"] = f"{ROOT}{os.pathsep}{paths}"
        setting = Setting(
            config=config,
            folder=Path(folder),
            device=options.device,
            workers=options.workers,
            python=options.python,
            path=options.path,
            kills=options.kills,
            until=time.monotonic() + options.limit_s,
        )
        if "ours" in rows:
            line, found = ours(setting, options.own_kills)
            lines.append(line)
            step_s = found or step_s
        with ThreadPoolExecutor(2) as pool:
            wanted = {
                "torchrun": lambda: torchrun(setting, step_s, options.checkpoint_every),
                "torchft": lambda: torchft(setting, step_s, options.collective_s),
            }
            lines += list(pool.map(lambda name: wanted[name](), [name for name in wanted if name in rows]))
    text = "\n".join([*_title(setting, step_s), *HEAD, *lines, ""])
    print(text, flush=True)
    if options.out:
        options.out.write_text(text)
    return 0


def _title(setting: Setting, step_s: float) -> list[str]:
    device = torch.cuda.get_device_name() if setting.device == "cuda" else "CPU"
    counts = count_parameters(setting.config.model)
    return [
        "# A worker is killed: this project, torchrun, torchft",
        "",
        f"{setting.workers} workers, {device}, torch {torch.__version__}. This project: {counts['total'] / 1e6:.0f} M"
        f" parameters, {counts['active'] / 1e6:.0f} M for a token; the peers: a dense network of as many. A step takes all"
        f" {step_s * 1e3:.0f} ms; times are beyond that.",
        "",
    ]


if __name__ == "__main__":
    raise SystemExit(main())
