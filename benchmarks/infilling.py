"""Fill-in-the-middle against none: equal tokens on configs/tiny.yaml, several seeds, infilling and left-to-right loss.

`python -m benchmarks.infilling run --folder DIR --rate 0.5 --seed 1` trains one model with the product and evaluates
it (`data prepare`, `pretrain`, `evaluate`); what is there already is not done again. `lane --lane 1 --lanes 4` runs its
share of all models side by side, and `report` compares what has been evaluated, as tables. `--device cuda` takes
large batches of long sequences in bf16, `cpu` (default) those of the configuration. `--attention full` has full attention
in all layers: the configuration's own attends to 32 tokens and 4 blocks of 16, and what is before a gap is further away.

Two texts: `code`, the sources of the standard library and of torch in documents of 600 bytes; and `uses`, made here,
where the first of two numbered lines of random names can be known from the second, so from what is behind the gap alone. Lines
are of different lengths: what copies by counting back a fixed number of tokens fills no gap.
"""

import argparse
import fcntl
import importlib.util
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.infilling_report import report

ROOT = Path(__file__).resolve().parent.parent
RATES, SEEDS, TEXTS = (0.5, 0.0), (1, 2, 3), ("code", "uses")
DOCUMENTS, RECORDS, WORDS = 120_000, (2, 4), (2, 6)
NAMES = tuple(first + second for first in "bdfgklmn" for second in "aeiou")
OF_TORCH = ("_inductor", "distributed", "nn", "testing")
APART_S = 1.0
"""Between the starts of a lane's runs: each brings a cluster up."""
START_S, GRACE_S = 100.0, 60.0
"""That a run has for its first step, and one that is told to stop for its checkpoint."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How long a model trains, and how it is asked.

    Args:
        device: "cpu" or "cuda".
        steps: of training.
        seconds: after the first step when training is stopped; its last scheduled checkpoint counts then.
        samples: of each task.
        attention: "full" in all layers, or "own" for the configuration's.
    """

    device: str
    steps: int
    seconds: float
    samples: int
    attention: str

    @property
    def every(self) -> int:
        """Steps between checkpoints."""
        return max(1, self.steps // 6)

    def keys(self) -> dict[str, object]:
        """Of the run's configuration, beside those of every run."""
        keys: dict[str, object] = {
            "train.steps": self.steps,
            "train.checkpoint_every": self.every,
            "train.keep_checkpoints": 2,
            "train.eval_every": 0,
            "cluster.colocated": "true",
        }
        if self.attention == "full":
            keys["model.attention"] = "full"
        if self.device == "cuda":
            keys |= {
                "cluster.device": "cuda",
                "train.dtype": "bfloat16",
                "train.logical_shards": 1,
                "train.sequences_per_shard": 64,
                "train.seq_len": 256,
                "optim.lr": 0.003,
                "optim.warmup_steps": 100,
            }
        return keys


@dataclass(frozen=True, kw_only=True)
class Run:
    """One model: a text, a share of rearranged documents, a seed."""

    text: str
    rate: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.text}_rate{self.rate:g}_seed{self.seed}"


def all_runs(texts: Sequence[str]) -> list[Run]:
    """Every model; those of a rate begin while the other's text is being prepared."""
    return [Run(text=text, rate=rate, seed=seed) for text in texts for rate in RATES for seed in SEEDS]


def write_uses(folder: Path) -> Path:
    """Write documents of records, whose second line says again what the first one says; always the same."""
    draw = random.Random(20261128)
    folder.mkdir(parents=True)
    for index in range(DOCUMENTS):
        records = []
        for number in range(draw.randint(*RECORDS)):
            names = " ".join(draw.sample(NAMES, draw.randint(*WORDS)))
            # Without numbers nobody could know whether one line is missing or many.
            records.append(f"use {number} {names}\nend {number} {names}\n")
        (folder / f"{index:05d}.py").write_text("go\n" + "".join(records))
    return folder


def sources(folder: Path, text: str) -> list[str]:
    """What a text is prepared from.

    Args:
        folder: of all results.
        text: its name.
    """
    if text == "uses":
        made = folder / "uses"
        return [str(made if made.exists() else write_uses(made))]
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None
    torch = Path(spec.origin).parent
    return ["stdlib", *(str(torch / name) for name in OF_TORCH)]


def sparseray(*arguments: str, log: Path, seconds: float = 3600.0, begun: Path | None = None) -> None:
    """Run one command of the product, and ask it to stop when its time is over.

    Args:
        arguments: of it.
        log: that its output is added to.
        seconds: that it has.
        begun: file from whose appearance on they count.

    Raises:
        CalledProcessError: it failed.
    """
    environment = {**os.environ, "PYTHONPATH": f"{os.environ.get('PYTHONPATH', '')}:{ROOT}"}
    command = [sys.executable, "-m", "sparseray", *arguments]
    started = time.perf_counter()
    with log.open("a") as out:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT)
        try:
            while begun is not None and not begun.exists() and process.poll() is None:
                if time.perf_counter() > started + START_S:
                    raise subprocess.TimeoutExpired(command, START_S)
                time.sleep(0.2)
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
            process.wait(GRACE_S)
            code = 0
        finally:
            process.kill()
        print(f"{time.perf_counter() - started:.1f} s, exit code {code}: {' '.join(arguments[:2])}", file=out)
    if code:
        raise subprocess.CalledProcessError(code, command)


def prepared(folder: Path, text: str, rate: float) -> Path:
    """The data of a rate; both have one tokenizer, with the sentinels, and the same documents and splits.

    Args:
        folder: of all results.
        text: its name.
        rate: share of rearranged documents.
    """
    first, out = (folder / f"data_{text}_{one:g}" for one in (0.5, rate))
    vocabulary = ["--vocab_size", "512" if text == "uses" else "2048"]
    shape = ["--document_bytes", "2048" if text == "uses" else "600", "--validation_fraction", "0.05"]
    # Lanes share a folder, and one of them prepares.
    with (folder / f"{text}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        said = [word for one in sources(folder, text) for word in ("--source", one)]
        for data, own_rate, tokenizer in ((first, 0.5, "bpe"), (out, rate, str(first))):
            if not data.exists():
                more = [*vocabulary, *shape, "--fim_rate", f"{own_rate:g}", "--tokenizer", tokenizer]
                sparseray("data", "prepare", *said, *more, "--out", str(data), log=folder / f"{text}.log")
    return out


def run(folder: Path, one: Run, plan: Plan) -> None:
    """Train and evaluate one model.

    Args:
        folder: of all results.
        one: the model.
        plan: how long, and where.
    """
    out, run_dir, log = (folder / f"{one.name}{end}" for end in (".json", "", ".log"))
    if out.exists():
        return
    data = prepared(folder, one.text, one.rate)
    keys = {
        "config": "configs/tiny.yaml",
        "data.path": data,
        "run_dir": run_dir,
        "train.seed": one.seed,
        **plan.keys(),
    }
    options = [f"--{key}={value}" for key, value in keys.items()]
    sparseray("pretrain", *options, log=log, seconds=plan.seconds, begun=run_dir / "metrics.jsonl")
    steps = [int(path.name.removeprefix("step_")) for path in (run_dir / "checkpoints").glob("step_*")]
    scheduled = [step for step in steps if step % plan.every == 0 or step == plan.steps]
    newest = run_dir / "checkpoints" / f"step_{max(scheduled or steps)}"
    context = "256" if plan.device == "cuda" else "128"
    more = ["--context", context, "--samples", str(plan.samples), "--tasks", "loss", "infilling"]
    # All are asked about the same documents.
    asked = ["--data", str(folder / f"data_{one.text}_0.5"), "--device", plan.device]
    sparseray("evaluate", "--checkpoint", str(newest), *asked, *more, "--out", str(out), log=log)


def lane(folder: Path, runs: Sequence[Run], plan: Plan) -> None:
    """Run several models side by side, each in a process of its own; the report is written anew after each.

    Args:
        folder: of all results.
        runs: of this lane.
        plan: of all.
    """
    waiting: dict[str, subprocess.Popen[bytes]] = {}
    for one in runs:
        options = [f"--{key}={value}" for key, value in vars(plan).items()]
        options += [f"--text={one.text}", f"--rate={one.rate:g}", f"--seed={one.seed}", f"--folder={folder}"]
        waiting[one.name] = subprocess.Popen([sys.executable, "-m", "benchmarks.infilling", "run", *options])
        time.sleep(APART_S)
    begin = time.perf_counter()
    while waiting:
        time.sleep(1.0)
        for name in [name for name, process in waiting.items() if process.poll() is not None]:
            code = waiting.pop(name).returncode
            print(f"{name}: exit code {code} after {time.perf_counter() - begin:.0f} s", flush=True)
            (folder / "report.md").write_text(report(folder))


def main() -> None:
    """Run one model, or a lane's, or report all."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    say = parser.add_argument
    say("what", choices=("run", "lane", "report"))
    say("--folder", type=Path, required=True)
    say("--device", choices=("cpu", "cuda"), default="cpu")
    say("--text", choices=TEXTS, default="code")
    say("--texts", nargs="+", choices=TEXTS, default=list(TEXTS))
    say("--rate", type=float, default=0.5)
    say("--seed", type=int, default=1)
    say("--steps", type=int, default=300)
    say("--seconds", type=float, default=3600.0)
    say("--samples", type=int, default=300)
    say("--attention", choices=("own", "full"), default="own")
    say("--lane", type=int, default=1, help="of --lanes, from 1")
    say("--lanes", type=int, default=1)
    options = parser.parse_args()
    folder = options.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    plan = Plan(
        **{name: getattr(options, name) for name in ("device", "steps", "seconds", "samples", "attention")}
    )
    if options.what == "run":
        run(folder, Run(text=options.text, rate=options.rate, seed=options.seed), plan)
    elif options.what == "lane":
        lane(folder, all_runs(options.texts)[options.lane - 1 :: options.lanes], plan)
    else:
        print(report(folder))


if __name__ == "__main__":
    main()
