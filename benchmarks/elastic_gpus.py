"""Training on several GPUs of one host while they are killed, stopped, lose their context, and come and go.

Parts: `cost` (two GPUs with every expert once, and twice, at the same time where there are four), `faults` (two GPUs with
replicas and one on standby: SIGKILL, SIGSTOP, a kernel that writes to memory of nobody), `resize` (1-2-4-3-2 GPUs, or
1-2-1-2 where there are two). A pause is the longest time from one commit to the next around what happened, less a step. Prints a
line as each is known, and a table as Markdown:

  PYTHONPATH=. python -m benchmarks.elastic_gpus --data data/stdlib --out benchmarks/results/elastic_gpus_GPU_DATE.md
"""

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from benchmarks.elastic_run import ROOT, RunDied, Training, environment, gaps, median_step
from sparseray.platform.config import ClusterConfig, RunConfig, load_yaml

KILL_S, STOP_S, ILLEGAL_S, RESIZE_S, COST = 0.8, 1.5, 1.0, 0.5, 0.08
PARTS = 4
AGAIN = ("resized", "mended")
"""After a loss those who are left go on; later a spare slot has all that was lost."""


@dataclass
class Bench:
    """What the parts share.

    Args:
        config: model and data.
        folder: of all runs.
        data: as on the command line.
        gpus: that there are.
    """

    config: RunConfig
    folder: Path
    data: str
    gpus: int
    rows: list[str] = field(default_factory=list)

    def add(self, what: str, measured: float, target: float, unit: str, note: str = "") -> None:
        """Take a line and show it at once."""
        verdict = "yes" if measured <= target else "**no**"
        row = f"| {what} | {measured:.3g} {unit} | {target:g} {unit} | {verdict} | {note} |"
        print(f"{time.strftime('%H:%M:%S')} {row}", flush=True)
        self.rows.append(row)

    def run(self, name: str, gpus: int, replication: int, standby: int) -> Training:
        """A run whose roles share so many GPUs."""
        cluster = ClusterConfig(
            attention_workers=gpus,
            expert_shards=gpus,
            replication=replication,
            standby=standby,
            colocated=True,
            device="cuda",
        )
        return Training(self.config, cluster, self.folder, name)


def pause(run: Training, first: int, usual_s: float) -> float:
    """Longest time from one commit to the next since a record, beyond a step's usual time."""
    return max(gaps(run.records()[max(0, first - 1) :])) - usual_s


def spare_comes(run: Training, known_events: int, usual_s: float) -> float:
    """The pause in which a spare slot takes the place of a lost one, after training has gone on without both."""
    back = len(run.records())
    run.wait(lambda: any(e["kind"] in AGAIN for e in run.events()[known_events:]), "the spare slot")
    run.wait_steps(3)
    return pause(run, back, usual_s)


def faults(bench: Bench) -> None:
    """SIGKILL, SIGSTOP and an illegal access of one of two GPUs' slots, with a third on standby."""
    blows = bench.folder / "blows"
    blows.mkdir()
    os.environ["SPARSERAY_TEST_FAULT_FOLDER"] = str(blows)
    path = os.environ["PYTHONPATH"]
    os.environ["PYTHONPATH"] = f"{ROOT / 'tests' / 'planted'}:{path}"

    def illegal(run: Training, slot: int, _pid: int) -> None:
        # Whole at once, as the slot looks for it all the time.
        (blows / "next").write_text("part illegal")
        (blows / "next").rename(blows / str(slot))

    def by(number: signal.Signals) -> Callable[[Training, int, int], None]:
        return lambda run, slot, pid: os.kill(pid, number)

    kinds = (
        ("SIGKILL", by(signal.SIGKILL), KILL_S),
        ("illegal access", illegal, ILLEGAL_S),
        ("SIGSTOP", by(signal.SIGSTOP), STOP_S),
    )
    standby = min(1, bench.gpus - 2)
    try:
        with bench.run("faults", 2, 2, standby) as run:
            for name, strike, target in kinds:
                run.wait_calm(steps=4)
                usual, first = median_step(run.records()[-8:]), len(run.records())
                victim = run.slots("expert")[-1]
                struck, known = time.time(), len(run.events())
                strike(run, victim["slot"], victim["pid"])
                found = run.after(struck, known, name)
                phases = ", ".join(f"{key} {value:.2f}" for key, value in found.phases.items())
                beyond = f"{found.seconds - usual:.2f} s after the blow, beyond a step; {phases}"
                bench.add(f"{name}, {standby} on standby", pause(run, first, usual), target, "s", beyond)
                if standby:
                    bench.add("and the spare slot's coming", spare_comes(run, known, usual), RESIZE_S, "s")
            print(f"steps lost: {run.repeated_steps()}", flush=True)
            bench.rows.append(f"| steps lost | {run.repeated_steps()} | 0 | | |")
            run.stop()
    finally:
        os.environ["PYTHONPATH"] = path
        del os.environ["SPARSERAY_TEST_FAULT_FOLDER"]


def resize(bench: Bench) -> None:
    """1-2-4-3-2 GPUs, or 1-2-1-2."""
    with bench.run("resize", 1, 1, 0) as run:
        run.wait_steps(4)
        for count in (2, 4, 3, 2) if bench.gpus >= 4 else (2, 1, 2):
            usual, first, asked = median_step(run.records()[-4:]), len(run.records()), time.time()
            for role in ("attention", "experts"):
                run.scale(role, count)
            run.wait_steps(6)
            after = median_step(run.records()[-5:])
            note = f"{time.time() - asked:.1f} s from the wish on; a step {usual * 1e3:.0f} ms, then {after * 1e3:.0f} ms"
            bench.add(f"to {count} GPUs", pause(run, first, max(usual, after)), RESIZE_S, "s", note)
        run.stop()


def cost(bench: Bench) -> None:
    """Two GPUs with every expert once and twice, at once where there are four."""

    def start(gpus: str, replication: int) -> "subprocess.Popen[str]":
        command = [
            sys.executable,
            "-m",
            "benchmarks.train_gpus",
            "--data",
            bench.data,
            "--configs",
            "1b_full",
        ]
        command += ["--gpus", "2", "--steps", "25", "--warmup", "8", "--replication", str(replication)]
        environ = os.environ | {"CUDA_VISIBLE_DEVICES": gpus}
        return subprocess.Popen(command, cwd=ROOT, env=environ, stdout=subprocess.PIPE, text=True)

    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(bench.gpus)))).split(",")
    second = visible[2:4] if bench.gpus >= 4 else visible[:2]
    runs = []
    for gpus, replication in ((visible[:2], 1), (second, 2)):
        runs.append(start(",".join(gpus), replication))
        if bench.gpus < 4:
            runs[-1].wait()
    seconds = []
    for each in runs:
        said = each.communicate()[0]
        found = re.search(r"seconds=([\d.]+)", said)
        if found is None:
            raise RunDied(said[-500:])
        seconds.append(float(found[1]))
    note = f"{seconds[0] * 1e3:.1f} and {seconds[1] * 1e3:.1f} ms a step"
    bench.add("replication 2 against 1", seconds[1] / seconds[0] - 1, COST, "of a step", note)


def table(bench: Bench) -> str:
    """All lines as Markdown."""
    title = (
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {bench.gpus} GPUs, configs/1b_full.yaml"
    )
    train = bench.config.train
    tokens = train.logical_shards * train.sequences_per_shard * train.seq_len
    head = ["# Elastic training on several GPUs", "", f"{title}, {tokens} tokens a step.", ""]
    return "\n".join([*head, "| what | measured | must | met | |", "|---|---|---|---|---|", *bench.rows, ""])


def main() -> int:
    """Measure the chosen parts one after another; 1 where one fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of `sparseray data prepare --vocab_size 32768`")
    parser.add_argument("--only", default="cost,faults,resize")
    parser.add_argument("--sequences", type=int, default=2, help="of each of four parts of a step")
    parser.add_argument("--out", type=Path, help="file to write the table to")
    options = parser.parse_args()
    config, failed = load_yaml(ROOT / "configs" / "1b_full.yaml"), 0
    train = replace(config.train, steps=100_000, logical_shards=PARTS, sequences_per_shard=options.sequences)
    data = str(Path(options.data).absolute())
    config = replace(config, train=train, data=replace(config.data, path=data))
    paths = os.environ.get("PYTHONPATH", "")
    with tempfile.TemporaryDirectory(prefix="sr-e-", dir="/tmp") as folder, environment():
        os.environ["PYTHONPATH"] = f"{ROOT}{os.pathsep}{paths}"
        bench = Bench(config=config, folder=Path(folder), data=data, gpus=torch.cuda.device_count())
        for name in options.only.split(","):
            try:
                {"cost": cost, "faults": faults, "resize": resize}[name](bench)
            except (RunDied, subprocess.SubprocessError) as error:
                print(f"{name} failed: {error}", flush=True)
                failed = 1
    print(table(bench), flush=True)
    if options.out:
        options.out.write_text(table(bench))
    return failed


if __name__ == "__main__":
    raise SystemExit(main())
