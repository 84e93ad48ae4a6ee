"""Tokens per second of training on one GPU: `pretrain`, a plain loop over the same model and operations, transformers.

Each side runs in a process of its own on the same GPU and real text, one after another: the command
`python -m sparseray pretrain` (scheduler, journal, two-phase commit, metrics), the loop that one would write around
our model without a platform (gpu_loop.py), and transformers' DeepseekV3ForCausalLM of the same shape
(gpu_peers.py). The row `memory` is the command alone: a model with memory tables in host memory, against the same one
without. Prints a table as Markdown:

  PYTHONPATH=. python -m benchmarks.train_gpu --data data/stdlib --out benchmarks/results/train_gpu_GPU_DATE.md
  PYTHONPATH=. python -m benchmarks.train_gpu --data data/stdlib --rows memory
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from sparseray.model.counts import count_parameters, flops_per_token
from sparseray.platform.config import RunConfig, load_yaml

ROOT = Path(__file__).resolve().parent.parent
ROWS = {
    "1.24 B, full attention, 8 x 4096": ("1b_full", "1b"),
    "1.24 B, NSA, 1 x 32768": ("1b_nsa", "1b_long"),
    "Moonlight's layers, depth 6, 8 x 4096": ("moonlight_6", "moonlight_6"),
}

MEMORY = "1.24 B, full attention, 8 x 4096, tables of 10 GB in host memory"
WITHOUT, WITH = "1b_full", "1b_memory"


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One side's figures.

    Args:
        name: of the side.
        tokens_per_second, seconds: of the median step.
        gib: peak of the GPU's memory that torch reserved.
        loss: of the last step.
        times: Unix times of all commits, those of the warm-up included, where they are known.
        loads: tokens of each expert of all steps, [steps][MoE layers][experts].
    """

    name: str
    tokens_per_second: float
    seconds: float
    gib: float
    loss: float
    times: list[float] = field(default_factory=list, repr=False)
    loads: list[list[list[int]]] = field(default_factory=list, repr=False)


def run_side(name: str, module: str, *arguments: str) -> Measured | None:
    """Run a side in its own process; its last line is JSON with tokens, seconds of the steps, gib and loss."""
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.environ.get("PYTHONPATH", "") + f":{ROOT}"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        print(
            f"{name}: exit code {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}", flush=True
        )
        return None
    found = json.loads(done.stdout.strip().splitlines()[-1])
    seconds = statistics.median(found["seconds"])
    return Measured(
        name=name,
        tokens_per_second=found["tokens"] / seconds,
        seconds=seconds,
        gib=found["gib"],
        loss=found["loss"],
    )


def product(
    config: str, data: Path, steps: int, warmup: int, extra: list[str], limit_s: float = 3600.0
) -> Measured | None:
    """Train through the command and read its steps' times from its records; None where it failed, which is shown.

    Args:
        config: name of the configuration.
        data: folder of token shards.
        steps, warmup: how many, and how many of them do not count.
        extra: further options of the command.
        limit_s: seconds after which it is ended; what was committed by then counts, if it is beyond the warm-up.
    """
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        options = [
            f"--config={ROOT / 'configs' / config}.yaml",
            f"--data.path={data}",
            f"--run_dir={run}",
            "--train.steps=100000",
            "--train.checkpoint_every=0",
            "--train.eval_every=0",
            *extra,
        ]
        log = Path(folder) / "log"
        started = time.time()
        with log.open("w") as out:
            process = subprocess.Popen(
                [sys.executable, "-m", "sparseray", "pretrain", *options],
                env={**os.environ, "PYTHONPATH": os.environ.get("PYTHONPATH", "") + f":{ROOT}"},
                stdout=out,
                stderr=subprocess.STDOUT,
            )
        records = _first_records(process, run / "metrics.jsonl", steps, limit_s)
        stop_at_once(process)
        if len(records) < warmup + 2:
            print(f"pretrain: exit code {process.returncode}\n{log.read_text()[-4000:]}", flush=True)
            return None
        # From commit to commit: what a user waits for, the scheduler's work between two steps included.
        times = [record["time"] for record in records]
        seconds = seconds_between(times[warmup:])
        print(
            f"pretrain: {time.time() - started:.0f} s in all for {len(records)} steps, the first after {times[0] - started:.0f} s",
            flush=True,
        )
        return Measured(
            name="pretrain",
            tokens_per_second=records[-1]["tokens"] / seconds,
            seconds=seconds,
            gib=float(records[-1].get("device_gib", 0.0)),
            loss=records[-1]["loss"],
            times=times,
            loads=[record["expert_load"] for record in records],
        )


def seconds_between(times: list[float]) -> float:
    """Of the median step, from commit to commit."""
    return statistics.median(b - a for a, b in pairwise(times))


def _first_records(
    process: "subprocess.Popen[bytes]", metrics: Path, steps: int, limit_s: float
) -> list[dict[str, Any]]:
    """Wait for the records of the first steps; fewer where the time is over, none where the run ends before."""
    deadline = time.monotonic() + limit_s
    while process.poll() is None:
        # The last line may be half written.
        lines = metrics.read_text().splitlines()[:-1] if metrics.exists() else []
        if len(lines) >= steps or time.monotonic() > deadline:
            return [json.loads(line) for line in lines[:steps]]
        time.sleep(0.2)
    return []


def stop_at_once(process: "subprocess.Popen[bytes]") -> None:
    """Ctrl-C twice: the second one waits for no checkpoint, which would take longer than the steps."""
    for _ in range(2):
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            time.sleep(1.0)
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        process.kill()


def teraflops(config: RunConfig, measured: Measured) -> float:
    """TFLOP/s by 6 x active parameters + attention, as others count; looking up an embedding is no product."""
    seq_len = config.train.seq_len
    active = count_parameters(config.model)["active"] - config.model.vocab_size * config.model.hidden
    attention = flops_per_token(config.model, seq_len)["attention"]
    return measured.tokens_per_second * (6 * active + 3 * attention) / 1e12


def table(title: str, config: RunConfig, sides: list[Measured]) -> str:
    """Render one row of the comparison; ratios are to transformers."""
    peer = next((m for m in sides if m.name.startswith("transformers")), None)
    lines = [
        f"## {title}",
        "",
        "| | ms a step | tokens/s | over transformers | TFLOP/s | peak GiB | last loss |",
        "|---|---|---|---|---|---|---|",
    ]
    for m in sides:
        ratio = f"{m.tokens_per_second / peer.tokens_per_second:.2f}" if peer else "-"
        flops = "-" if m is peer else f"{teraflops(config, m):.0f}"
        lines.append(
            f"| {m.name} | {m.seconds * 1e3:.1f} | {m.tokens_per_second:,.0f} | {ratio} | {flops} | {m.gib:.1f} | {m.loss:.3f} |"
        )
    return "\n".join([*lines, ""])


def memory_row(data: Path, steps: int, warmup: int, extra: list[str]) -> str:
    """Measure the command with and without memory layers, and render the row."""
    sides = []
    for config in (WITHOUT, WITH):
        measured = product(config, data, steps, warmup, extra)
        if measured is None:
            return f"## {MEMORY}\n\n{config} failed\n"
        print(f"{config}: {measured}", flush=True)
        sides.append(measured)
    lines = [
        f"## {MEMORY}",
        "",
        "| `pretrain` | ms a step | tokens/s | over that without | peak GiB | last loss |",
        "|---|---|---|---|---|---|",
    ]
    for config, m in zip((WITHOUT, WITH), sides):
        ratio = m.tokens_per_second / sides[0].tokens_per_second
        lines.append(
            f"| {config} | {m.seconds * 1e3:.1f} | {m.tokens_per_second:,.0f} | {ratio:.3f} | {m.gib:.1f}"
            f" | {m.loss:.3f} |"
        )
    return "\n".join([*lines, ""])


def main() -> int:
    """Measure the chosen rows and sides in one run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of `sparseray data prepare --vocab_size 32768`")
    parser.add_argument("--rows", default=",".join([*(c for c, _ in ROWS.values()), "memory"]))
    parser.add_argument("--sides", default="transformers,loop,pretrain")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--extra", default="", help="further options of pretrain, separated by spaces")
    parser.add_argument("--out", type=Path, help="file to write the table to")
    options = parser.parse_args()
    data = Path(options.data).absolute()
    parts = [
        "# Training on one GPU",
        "",
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, bf16, real text (Python's standard library), "
        f"{options.steps} steps of which the first {options.warmup} do not count, one side after another.",
        "",
    ]
    for title, (config, peer) in ROWS.items():
        if config not in options.rows.split(","):
            continue
        counts = (str(options.steps), str(options.warmup))
        sides = []
        for side in options.sides.split(","):
            if side == "transformers":
                measured = run_side("transformers", "benchmarks.gpu_peers", peer, *counts)
            elif side == "loop":
                measured = run_side(
                    "plain loop, same model and operations", "benchmarks.gpu_loop", config, str(data), *counts
                )
            else:
                measured = product(config, data, options.steps, options.warmup, options.extra.split())
            if measured is not None:
                sides.append(measured)
                print(f"{title}: {measured}", flush=True)
        parts.append(table(title, load_yaml(ROOT / "configs" / f"{config}.yaml"), sides))
        print(parts[-1], flush=True)
    if "memory" in options.rows.split(","):
        parts.append(memory_row(data, options.steps, options.warmup, options.extra.split()))
        print(parts[-1], flush=True)
    if options.out:
        options.out.write_text("\n".join(parts))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
