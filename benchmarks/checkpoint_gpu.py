"""What checkpoints beside the steps cost a run on one GPU: how long each holds training up, in steps.

Trains through the command, waits for so many checkpoints, and looks at the times of the commits: of the steps that follow a
checkpoint's by what they are longer than the usual step, all of them together, and those until it is on disk.

  PYTHONPATH=. python -m benchmarks.checkpoint_gpu --data data/gpu --config configs/1b_full.yaml --every 40 --count 2
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from benchmarks.train_gpu import stop_at_once
from sparseray.platform.run.checkpoint import list_finished, read_manifest

COPIED = 4
"""Steps after a checkpoint's in which its copy is waited for: the next update comes after it."""


@dataclass(frozen=True, kw_only=True)
class Held:
    """What a checkpoint cost.

    Args:
        step: that it is of.
        usual_s: median step of the run.
        copy_s: by what the next steps took longer.
        written_s: until it was finished.
        beside_s: by what all steps until then took longer.
        gb: of its files.
    """

    step: int
    usual_s: float
    copy_s: float
    written_s: float
    beside_s: float
    gb: float

    def __str__(self) -> str:
        return (
            f"checkpoint of step {self.step}, {self.gb:.1f} GB: held up for {1e3 * self.copy_s:.0f} ms ="
            f" {self.copy_s / self.usual_s:.2f} steps of {1e3 * self.usual_s:.1f} ms; on disk after"
            f" {self.written_s:.1f} s, which cost the steps beside it {1e3 * self.beside_s:.0f} ms"
        )


def held(times: dict[int, float], step: int, finished: float, gb: float) -> Held:
    """Read what a checkpoint cost from the commits' times.

    Args:
        times: of the commits, in seconds, by step.
        step: of the checkpoint.
        finished: when it was there.
        gb: of its files.
    """
    steps = sorted(times)
    took = {b: times[b] - times[a] for a, b in pairwise(steps)}
    usual = statistics.median(took.values())
    after = [s for s in took if s > step]
    beside = [s for s in after if times[s] <= finished]
    return Held(
        step=step,
        usual_s=usual,
        copy_s=sum(took[s] - usual for s in after[:COPIED]),
        written_s=finished - times[step],
        beside_s=sum(took[s] - usual for s in beside),
        gb=gb,
    )


def watch(
    process: "subprocess.Popen[bytes]", run: Path, count: int, until: float
) -> dict[int, tuple[float, float]]:
    """When each of the first checkpoints was there, and its gigabytes, by step.

    Args:
        process: of the run.
        run: its folder.
        count: of checkpoints.
        until: time at which to give up.
    """
    found: dict[int, tuple[float, float]] = {}
    while process.poll() is None and len(found) < count and time.time() < until:
        time.sleep(0.05)
        for path in list_finished(run / "checkpoints") if (run / "checkpoints").exists() else []:
            step = int(path.name.removeprefix("step_"))
            if step not in found:
                found[step] = time.time(), sum(read_manifest(path)["files"].values()) / 1e9
    return found


def main() -> int:
    """Run, and print a line for each checkpoint; 1 where there was none."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of `sparseray data prepare`")
    parser.add_argument("--config", required=True)
    parser.add_argument("--every", type=int, default=40, help="steps between checkpoints")
    parser.add_argument("--count", type=int, default=2, help="of checkpoints")
    parser.add_argument("--seconds", type=float, default=300.0, help="in all, at most")
    parser.add_argument("--extra", default="", help="further options of pretrain, separated by spaces")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run, log = Path(folder) / "run", Path(folder) / "log"
        command = [sys.executable, "-m", "sparseray", "pretrain", f"--config={options.config}"]
        command += [
            f"--data.path={Path(options.data).absolute()}",
            f"--run_dir={run}",
            "--train.steps=1000000",
        ]
        command += [
            f"--train.checkpoint_every={options.every}",
            "--train.eval_every=0",
            *options.extra.split(),
        ]
        with log.open("w") as out:
            process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
            found = watch(process, run, options.count, time.time() + options.seconds)
            # The steps that the last copy held up are told of by then.
            time.sleep(1.0)
            stop_at_once(process)
        metrics = run / "metrics.jsonl"
        lines = metrics.read_text().splitlines() if metrics.exists() else []
        times = {record["step"]: record["time"] for record in map(json.loads, lines)}
        for step, (finished, gb) in sorted(found.items()):
            print(held(times, step, finished, gb), flush=True)
        if not found:
            print(f"no checkpoint after {len(times)} steps:\n{log.read_text()[-3000:]}", flush=True)
    return 0 if found else 1


if __name__ == "__main__":
    raise SystemExit(main())
