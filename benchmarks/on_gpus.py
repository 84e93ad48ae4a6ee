"""All that needs GPUs, in one command: the tests that a machine without one skips, and the benchmarks of docs/results.md.

What is longest unmeasured comes first. Each run has a limit of its own, runs go side by side where there are GPUs for them,
and none is begun that would not be over in time. The output of each is kept in a file of its own, whatever becomes of it.

  PYTHONPATH=. python -m benchmarks.on_gpus --list
  PYTHONPATH=. python -m benchmarks.on_gpus --out results/                      # all that the GPUs at hand can do: an hour on one
  PYTHONPATH=. python -m benchmarks.on_gpus --seconds 560 --only needle drafts --out results/
"""

import argparse
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.processes import end

TESTS = Path(__file__).resolve().parents[1] / "tests"
DATA = "data"
"""Tokens that most runs train on: a folder in the folder of results."""
PREPARE = "-m sparseray data prepare --source stdlib --vocab_size 32768 --validation_fraction 0.3 --out"
STOP_S = 10.0
"""For a run that is ended to end what it started."""


@dataclass(frozen=True)
class Run:
    """One command.

    Args:
        name: of its output.
        gpus: that it takes; 0 for all that there are.
        seconds: after which it is ended; about twice what it takes.
        words: of Python's command line; {out} is the folder of results, {data} that of the tokens, {marked} the files
            with tests of GPUs.
    """

    name: str
    gpus: int
    seconds: int
    words: str


PYTEST = "-m pytest -m gpu --dist worksteal -v -rP -p no:cacheprovider"
RUNS = (
    Run("stories", 2, 350, f"{PYTEST} -n 2 tests/test_gpu_several.py"),
    Run("stories_serving", 2, 350, f"{PYTEST} -n 3 tests/test_gpu_several_serving.py"),
    Run("stories_collective", 2, 300, f"{PYTEST} -n 3 tests/test_gpu_collective.py"),
    Run("elastic_2", 2, 300, "-m benchmarks.elastic_gpus --data {data} --only resize,faults"),
    Run(
        "sixteen_4", 4, 400,
        "-m benchmarks.train_gpus --data {data} --configs moonlight --gpus 4 --steps 12 --extra=--train.sequences_per_shard=4",
    ),
    Run("train_4", 4, 560, "-m benchmarks.train_gpus --data {data} --gpus 4 --steps 700 --warmup 660"),
    Run(
        "bits_4", 4, 300,
        "-m benchmarks.train_gpus --data {data} --configs 1b_full --gpus 1,2,4 --determinism bitwise --steps 12 --same_tokens",
    ),
    Run("elastic_4", 4, 400, "-m benchmarks.elastic_gpus --data {data}"),
    Run("sixteen_2", 2, 300, "-m benchmarks.train_gpus --data {data} --configs moonlight --gpus 2 --steps 12"),
    Run("train_2", 2, 250, "-m benchmarks.train_gpus --data {data} --configs 1b_full --gpus 1,2 --determinism fast,bitwise"),
    Run("peers_2", 2, 250, "-m benchmarks.elastic_gpu_peers --data {data}"),
    Run("layer_2", 2, 120, "-m benchmarks.moe_layer_gpus --gpus 2 --profile"),
    Run("layer_4", 4, 120, "-m benchmarks.moe_layer_gpus --gpus 4 --profile"),
    Run("ordered", 1, 200, f"{PYTEST} -n 4 tests/test_kernels_ordered.py tests/test_gpu_training.py"),
    Run("ordered_attention", 1, 120, "-m benchmarks.ordered_attention"),
    Run("bitwise", 1, 150, "-m benchmarks.train_gpus --data {data} --configs 1b_full --gpus 1 --determinism fast,bitwise,bitwise"),
    Run("exchange_2", 2, 90, "-m benchmarks.exchange_gpus"),
    Run("moonlight_6", 1, 150, "-m benchmarks.train_gpus --data {data} --configs moonlight_6 --gpus 1"),
    Run("warm", 1, 240, f"{PYTEST} -n 4 tests/test_gpu_warm.py"),
    Run("checkpoint", 1, 120, "-m benchmarks.checkpoint_gpu --data {data} --config configs/1b_full.yaml"),
    Run("drafts", 1, 200, "-m benchmarks.serve_gpu --parts drafts"),
    Run("decode_rows", 1, 150, "-m benchmarks.decode_rows"),
    Run("checkpoint_memory", 1, 200, "-m benchmarks.checkpoint_gpu --data {data} --config configs/1b_memory.yaml"),
    Run("train_nsa", 1, 150, "-m benchmarks.train_gpu --data {data} --rows 1b_nsa"),
    Run("generation", 1, 240, "-m benchmarks.serve_gpu --data {data} --parts generation"),
    Run("nsa_decode", 1, 240, "-m benchmarks.serve_gpu --parts long"),
    Run("tests", 0, 500, f"{PYTEST} -n 20 {{marked}}"),
    Run("train", 1, 500, "-m benchmarks.train_gpu --data {data}"),
    Run("needle", 1, 300, "-m benchmarks.needle --folder {out}/needle --out {out}/needle.md"),
    Run(
        "infilling", 1, 250,
        "-m benchmarks.infilling lane --folder {out}/infilling --device cuda --texts uses --steps 1800 --seconds 190 --samples 150",
    ),
    Run("nsa_kernels", 1, 200, "-m benchmarks.nsa --lengths 32768 --out {out}/nsa.md"),
    Run("moves_2", 2, 120, "-m benchmarks.moves --device cuda"),
)  # fmt: skip


MARKED = [str(path) for path in sorted(TESTS.glob("test_*.py")) if "mark.gpu" in path.read_text()]


class Evening:
    """Runs what fits into the time, on the GPUs that there are.

    Args:
        out: folder of the outputs.
        seconds: for all.
    """

    def __init__(self, out: Path, seconds: float) -> None:
        self.out, self.end = out, time.monotonic() + seconds
        self._lock = threading.Lock()
        self.failed: list[str] = []

    def prepare(self) -> None:
        """Make the tokens, once."""
        if not (self.out / DATA).exists():
            subprocess.run([sys.executable, *PREPARE.split(), str(self.out / DATA)], check=True)

    def side_by_side(self, runs: Sequence[Run], gpus: int) -> None:
        """Begin runs in order, each as soon as there are as many free GPUs as it takes.

        Args:
            runs: in the order in which they are begun.
            gpus: that there are.
        """
        free, threads = list(range(gpus)), list[threading.Thread]()
        is_free = threading.Condition()

        def lane(run: Run, own: list[int]) -> None:
            self.one(run, own)
            with is_free:
                free.extend(own)
                is_free.notify()

        for run in runs:
            count = run.gpus or gpus
            with is_free:
                while len(free) < count:
                    is_free.wait()
                free.sort()
                own, free[:count] = free[:count], []
            threads.append(threading.Thread(target=lane, args=(run, own)))
            threads[-1].start()
        for thread in threads:
            thread.join()

    def one(self, what: Run, gpus: Sequence[int]) -> None:
        """One run, unless it would not be over in time.

        Args:
            what: to run.
            gpus: that it sees.
        """
        if time.monotonic() + what.seconds > self.end:
            print(f"{what.name}: left out, {what.seconds} s are not left", flush=True)
            return
        words = what.words.format(out=self.out, data=self.out / DATA, marked=" ".join(MARKED)).split()
        environ = {**os.environ, "PYTHONUNBUFFERED": "1"}
        if len(gpus) < torch.cuda.device_count():
            environ["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, gpus))
        begin = time.monotonic()
        with (self.out / f"{what.name}.txt").open("w") as file:
            file.write(f"python {' '.join(words)}\n")
            file.flush()
            process = subprocess.Popen(
                [sys.executable, *words], stdout=file, stderr=subprocess.STDOUT, env=environ, start_new_session=True
            )  # fmt: skip
            code = _ended(process, what.seconds)
        text = (self.out / f"{what.name}.txt").read_text().strip().splitlines()
        print(f"{what.name}: exit code {code} after {time.monotonic() - begin:.0f} s: {text[-1]}", flush=True)
        if code:
            with self._lock:
                self.failed.append(what.name)


def _ended(process: "subprocess.Popen[bytes]", seconds: float) -> int:
    """Its exit code; after its limit it is ended, and that is a failure."""
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return end(process, within_s=STOP_S) or -signal.SIGTERM


def main() -> int:
    """Run what was asked for; exit code 1 where one of them failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="folder of the outputs, and of what the runs need")
    parser.add_argument("--gpus", type=int, default=torch.cuda.device_count(), help="to use; all by default")
    parser.add_argument("--seconds", type=float, default=3 * 3600.0, help="for all, at most")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="which, in this order")
    parser.add_argument("--list", action="store_true", help="say what there is, and run nothing")
    options = parser.parse_args()
    by_name = {run.name: run for run in RUNS}
    if options.list:
        for run in RUNS:
            print(f"{run.name:24} {run.gpus or 'any'} GPU, {run.seconds} s at most: python {run.words}")
        return 0
    unknown = sorted(set(options.only or ()) - set(by_name))
    if unknown or options.out is None:
        parser.error(f"there is no {', '.join(unknown)}; see --list" if unknown else "--out is needed")
    if not options.gpus:
        parser.error("there is no GPU here")
    wanted = [by_name[name] for name in options.only] if options.only else list(RUNS)
    for run in wanted:
        if run.gpus > options.gpus:
            print(f"{run.name}: left out, it takes {run.gpus} GPUs")
    options.out.mkdir(parents=True, exist_ok=True)
    evening = Evening(options.out.absolute(), options.seconds)
    evening.prepare()
    evening.side_by_side([run for run in wanted if run.gpus <= options.gpus], options.gpus)
    print(f"failed: {', '.join(evening.failed) or 'none'}; outputs are in {options.out}")
    return 1 if evening.failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
