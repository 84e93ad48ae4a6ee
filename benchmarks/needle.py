"""Needles at the trained length after YaRN: a small model learns to retrieve at 2,048 tokens, and goes on at 8,192.

Every step is a command of the product: `data prepare` (real text, and texts of needles.py as sources with weights),
`pretrain` at the short length until its time is over, `pretrain --init_from ... --model.rope.scaling yarn` for a short
while at the long one, and `evaluate --tasks needle`. Beside it: the same training without YaRN, YaRN without training,
and the short model asked at the long length. Results are written as they come.

  PYTHONPATH=. python -m benchmarks.needle --folder DIR --out DIR/needle.md [--size cpu]
"""

import argparse
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.infilling import sparseray
from benchmarks.needle_text import Kind, write_texts

LETTERS = 3
"""Characters of a token, about."""
ENOUGH = 0.95


@dataclass(frozen=True, kw_only=True)
class Size:
    """What fits a machine.

    Args:
        trained, factor: tokens of the first training's sequences, and how many times longer the second's are.
        scale: of YaRN, more than `factor`: what lies as far apart as the longest sequence of a training allows is hardly ever
            trained. DeepSeek-V3 takes 40 for sequences 8 and 32 times as long (arXiv 2412.19437 section 4.3).
        batch: sequences of the first training's steps; the second has as many tokens.
        drilled: first steps, with dense needles most of the time.
        steps: of the first and of the second training, if their time is enough for them.
        amount: factor on the number of documents.
        keys: of the model and of where it runs.
    """

    trained: int
    factor: int
    scale: float
    batch: int
    drilled: int
    steps: tuple[int, int]
    amount: float
    keys: dict[str, object]

    @property
    def long(self) -> int:
        return self.trained * self.factor

    def kinds(self) -> dict[str, Kind]:
        """The sources: dense needles, those within a short sequence, those within a long one."""
        short, long = LETTERS * self.trained, LETTERS * self.long

        def many(number: int) -> int:
            return max(8, round(self.amount * number))

        return {
            "drill": Kind(
                size=2 * short,
                documents=many(1200),
                gap=60,
                nearest=30,
                farthest=short // 3,
                questions=3,
                even=0.0,
            ),
            "near": Kind(
                size=3 * short,
                documents=many(1600),
                gap=short // 12,
                nearest=40,
                farthest=short,
                questions=3,
                even=0.0,
            ),
            "far": Kind(
                size=3 * long,
                documents=many(400),
                gap=short // 24,
                nearest=100,
                farthest=long,
                questions=1,
                even=0.8,
            ),
        }


MODEL: dict[str, object] = {
    "model.vocab_size": 2048,
    "model.attention": "full",
    "model.moe.leading_dense": 1,
    "model.moe.num_experts": 8,
    "model.moe.top_k": 2,
    # Each token's memory is of itself and the two before it, so what follows the same words further up is found by one layer of
    # attention: without it these models copied nothing in the time they have (results/needle_gpu_*.md).
    "model.dse.layers": "[1]",
    "model.dse.rows_per_head": 16384,
    "cluster.colocated": "true",
    "train.logical_shards": 1,
    "train.checkpoint_every": 0,
    "train.eval_every": 0,
}
SIZES = {
    "gpu": Size(
        trained=2048,
        factor=4,
        scale=8.0,
        batch=16,
        drilled=500,
        steps=(3600, 800),
        amount=2.0,
        keys={
            "model.hidden": 256,
            "model.num_layers": 4,
            "model.num_heads": 4,
            "model.num_kv_heads": 2,
            "model.head_dim": 64,
            "model.ffn_dim": 768,
            "model.moe.expert_dim": 192,
            "cluster.device": "cuda",
            "train.dtype": "bfloat16",
        },
    ),
    "cpu": Size(
        trained=128,
        factor=4,
        scale=8.0,
        batch=4,
        drilled=100,
        steps=(600, 100),
        amount=0.02,
        keys={
            "model.hidden": 64,
            "model.num_layers": 2,
            "model.num_heads": 4,
            "model.num_kv_heads": 2,
            "model.head_dim": 16,
            "model.ffn_dim": 192,
            "model.moe.expert_dim": 48,
            "cluster.device": "cpu",
        },
    ),
}


@dataclass(frozen=True, kw_only=True)
class Course:
    """One experiment in a folder.

    Args:
        folder: of all results.
        size: of model and lengths.
        out: file of the report.
        seconds: of the first and of the second training.
        samples: needles for each length.
        device: that evaluates.
    """

    folder: Path
    size: Size
    out: Path
    seconds: tuple[float, float]
    samples: int
    device: str

    @property
    def log(self) -> Path:
        return self.folder / "log.txt"

    def prepare(self) -> None:
        """Real text, whose tokenizer all has and in which `evaluate` hides its needle; and texts to learn from."""
        hay, data = self.folder / "hay", self.folder / "data"
        if not hay.exists():
            shape = ["--vocab_size", "2048", "--validation_fraction", "0.1"]
            sparseray("data", "prepare", "--source", "stdlib", *shape, "--out", str(hay), log=self.log)
        if not data.exists():
            said = []
            for seed, (name, kind) in enumerate(self.size.kinds().items()):
                text = self.folder / f"text_{name}"
                said += ["--source", f"{name}={text if text.exists() else write_texts(text, kind, seed)}"]
            more = ["--tokenizer", str(hay), "--validation_fraction", "0.05", "--out", str(data)]
            sparseray("data", "prepare", *said, *more, log=self.log)

    def train(self, name: str, keys: dict[str, object], seconds: float) -> Path:
        """Train until the time is over; the last checkpoint.

        Args:
            name: of the run.
            keys: beside those of all runs.
            seconds: from the first step on.
        """
        run_dir = self.folder / name
        shared = {"data.path": self.folder / "data", "run_dir": run_dir, **MODEL, **self.size.keys}
        options = [f"--{key}={value}" for key, value in (shared | keys).items()]
        if not run_dir.exists():
            begun, log = run_dir / "metrics.jsonl", self.folder / f"{name}.log"
            sparseray("pretrain", *options, log=log, seconds=seconds, begun=begun)
        found = sorted((run_dir / "checkpoints").glob("step_*"), key=lambda p: int(p.name.split("_")[1]))
        return found[-1]

    def first(self) -> Path:
        """Learn to retrieve within the short length; positions up to the long one have a place in the tables."""
        size = self.size
        mixture = f"[drill=0.7 near=0.3, drill=0.2 near=0.8 from={size.drilled}]"
        keys: dict[str, object] = {
            "model.max_seq_len": size.long,
            "train.seq_len": size.trained,
            "train.sequences_per_shard": size.batch,
            "train.steps": size.steps[0],
            # What copies appears at once, after steps that nobody can foretell; until then a rate that falls is lost time.
            "optim.schedule": "wsd",
            "optim.decay_steps": size.steps[0] // 5,
            "optim.lr": 0.002,
            "optim.warmup_steps": 100,
            "data.mixture": mixture,
        }
        return self.train("short", keys, self.seconds[0])

    def second(self, name: str, begin: Path, more: dict[str, object]) -> Path:
        """Go on at the long length.

        Args:
            name: of the run.
            begin: checkpoint.
            more: keys that tell the runs apart.
        """
        size = self.size
        keys: dict[str, object] = {
            "init_from": begin,
            "model.max_seq_len": size.long,
            "train.seq_len": size.long,
            "train.sequences_per_shard": max(1, size.batch // size.factor),
            "train.steps": size.steps[1],
            "optim.schedule": "cosine",
            "optim.lr": 0.0002,
            "optim.warmup_steps": 50,
            "data.mixture": "[far=0.7 near=0.3]",
        }
        return self.train(name, keys | more, self.seconds[1])

    def ask(self, name: str, checkpoint: Path) -> None:
        """Evaluate at the long length, its half and its quarter, which is the short one.

        Args:
            name: of the row.
            checkpoint: to ask.
        """
        out = self.folder / f"{name}.json"
        more = ["--samples", str(self.samples), "--context", str(self.size.long), "--device", self.device]
        where = ["--checkpoint", str(checkpoint), "--data", str(self.folder / "hay"), "--out", str(out)]
        if not out.exists():
            sparseray("evaluate", *where, *more, "--tasks", "needle", log=self.folder / f"{name}.log")

    def follow(self, begin: Path) -> None:
        """Go on with YaRN, with and without training on; then without YaRN. Each is asked when it is done."""
        size = self.size
        yarn: dict[str, object] = {
            "model.rope.scaling": "yarn",
            "model.rope.factor": size.scale,
            "model.rope.original_max_seq_len": size.trained,
        }
        untrained = yarn | {"train.steps": 1, "optim.lr": 0.0}
        ways = {"yarn": yarn, "yarn_untrained": untrained, "longer": dict[str, object]()}

        def go(name: str) -> None:
            try:
                self.ask(name, begin if name == "short" else self.second(name, begin, ways[name]))
            except (OSError, subprocess.SubprocessError, IndexError) as error:
                print(f"{name}: {error}", flush=True)
            self.out.write_text(report(self.folder, size))

        with ThreadPoolExecutor(3) as pool:
            list(pool.map(go, ("yarn", "short", "yarn_untrained")))
        go("longer")


NAMES = {
    "short": "trained at {trained}",
    "yarn_untrained": "the same, YaRN x{scale:g}, not trained on",
    "longer": "the same, trained on at {long} without YaRN",
    "yarn": "the same, trained on at {long} with YaRN x{scale:g}",
}


def report(folder: Path, size: Size) -> str:
    """The table of what has been asked so far.

    Args:
        folder: of the results.
        size: of the experiment.
    """
    lengths = [size.long // part for part in (4, 2, 1)]
    lines = ["| model | steps | " + " | ".join(f"needle in {n} tokens" for n in lengths) + " |"]
    lines.append("|---" * (2 + len(lengths)) + "|")
    said = "not measured"
    for name, text in NAMES.items():
        path = folder / f"{name}.json"
        if not path.exists():
            continue
        found = json.loads(path.read_text())
        figures = found["figures"]
        cells = [_cell(figures.get(f"needle in {n} tokens")) for n in lengths]
        what = text.format(trained=size.trained, long=size.long, scale=size.scale)
        lines.append(f"| {what} | {found['step']} | {' | '.join(cells)} |")
        if name == "yarn":
            value = figures[f"needle in {size.long} tokens"]["value"]
            said = f"{100 * value:.1f} %: {'met' if value >= ENOUGH else 'missed'}"
    return (
        "\n".join([*lines, "", f"Wanted after YaRN: {100 * ENOUGH:.0f} % at {size.long} tokens; {said}."])
        + "\n"
    )


def _cell(one: dict[str, Any] | None) -> str:
    if one is None:
        return ""
    return f"{100 * one['value']:.1f} % ({100 * one['low']:.1f} to {100 * one['high']:.1f}, {one['samples']})"


def main() -> int:
    """Run what is not there yet, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    say = parser.add_argument
    say("--folder", type=Path, required=True)
    say("--out", type=Path, required=True)
    say("--size", choices=tuple(SIZES), default="gpu")
    say("--seconds", type=float, nargs=2, default=(110.0, 70.0), metavar=("SHORT", "LONG"))
    say("--steps", type=int, nargs=2, default=None, metavar=("SHORT", "LONG"))
    say("--samples", type=int, default=200)
    options = parser.parse_args()
    folder, size, begin = options.folder.absolute(), SIZES[options.size], time.perf_counter()
    if options.steps:
        size = replace(size, steps=tuple(options.steps))
    folder.mkdir(parents=True, exist_ok=True)
    course = Course(
        folder=folder,
        size=size,
        out=options.out.absolute(),
        seconds=(options.seconds[0], options.seconds[1]),
        samples=options.samples,
        device="cuda" if options.size == "gpu" else "cpu",
    )
    course.prepare()
    print(f"text: {time.perf_counter() - begin:.0f} s", flush=True)
    newest = course.first()
    print(f"{newest.name} at {size.trained}: {time.perf_counter() - begin:.0f} s", flush=True)
    course.follow(newest)
    course.out.write_text(report(folder, size))
    print(f"{course.out.read_text()}\n{time.perf_counter() - begin:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
