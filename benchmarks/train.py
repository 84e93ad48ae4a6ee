"""Tokens per second of training on one CPU: Ray actors against a plain PyTorch loop over the same model.

The plain loop is what one would write without this project: one process, autograd through all
experts and tables, fused AdamW. It runs the global batch whole and by logical shards, on one
and two threads; the fastest one counts.
Both sides have the same model, batches, clipping and router bias update. Prints a table as Markdown:

  PYTHONPATH=. python benchmarks/train.py --data data/stdlib --out benchmarks/results/train_cpu_DATE.md
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from sparseray.actors.training.token_data import TokenDataset, batch
from sparseray.model.dse import LocalMemory
from sparseray.model.moe import LocalExperts
from sparseray.model.transformer import Transformer, cross_entropy_sum
from sparseray.platform.config import ClusterConfig, RunConfig, load_yaml, save_yaml
from sparseray.platform.opening import build_layout, resolve
from sparseray.platform.planning.schedule import learning_rate

ROOT = Path(__file__).resolve().parent.parent
PEERS = {
    "actors 2+2+2, 1 thread each": ClusterConfig(attention_workers=2, expert_shards=2, memory_shards=2),
    "actors 1+1+1, 1 thread each": ClusterConfig(),
    "one colocated actor, 1 thread": ClusterConfig(colocated=True),
    "one colocated actor, 2 threads": ClusterConfig(colocated=True, threads_per_slot=2),
}


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One line of the table: median and range of a step's seconds, and the loss of the last step."""

    name: str
    seconds: float
    fastest: float
    slowest: float
    loss: float


def summarize(name: str, seconds: list[float], loss: float, warmup: int) -> Measured:
    """Median over the steps after the warm-up."""
    kept = seconds[warmup:]
    return Measured(
        name=name, seconds=statistics.median(kept), fastest=min(kept), slowest=max(kept), loss=loss
    )


class PlainLoop:
    """The model with its experts and tables as ordinary parameters, and one optimizer over all of them."""

    def __init__(self, config: RunConfig, data: TokenDataset, *, by_shard: bool) -> None:
        self.config, self.data = config, data
        train, optim = config.train, config.optim
        layout = build_layout(config.model, data)
        self.model = Transformer(config.model, layout, seed=train.seed)
        self.experts = LocalExperts(config.model, seed=train.seed)
        self.memory = None if layout is None else LocalMemory(config.model, layout, seed=train.seed)
        weights = [*self.model.parameters(), *self.experts.parameters()]
        rows = [] if self.memory is None else list(self.memory.parameters())
        self.parameters = [*weights, *rows]
        groups = [
            {"params": [p for p in weights if p.ndim >= 2], "weight_decay": optim.weight_decay, "scale": 1.0},
            {"params": [p for p in weights if p.ndim < 2], "weight_decay": 0.0, "scale": 1.0},
            {"params": rows, "weight_decay": 0.0, "scale": optim.memory_lr_scale},
        ]
        betas = (optim.beta1, optim.beta2)
        self.optimizer = torch.optim.AdamW(
            [g for g in groups if g["params"]], betas=betas, eps=optim.eps, fused=True
        )
        sequences = train.logical_shards * train.sequences_per_shard
        self.parts = train.logical_shards if by_shard else 1
        self.sequences = sequences // self.parts

    def step(self, step: int, lr: float) -> float:
        """Run one step and return its loss."""
        loss, counts = 0.0, []
        for part in range(self.parts):
            b = batch(
                self.data,
                seed=self.config.train.seed,
                step=step,
                part=part,
                num_parts=self.parts,
                sequences_per_part=self.sequences,
                seq_len=self.config.train.seq_len,
            )
            starts = b.document_starts_BT
            out = self.model(b.tokens_BT, experts=self.experts, memory=self.memory, document_starts_BT=starts)
            total = cross_entropy_sum(self.model, out.hidden_BTH, b.targets_BT) / b.targets_BT.numel()
            ((total + out.aux_loss) / self.parts).backward()
            loss += float(total.detach()) / self.parts
            counts.append(out.expert_counts_LE)
        nn.utils.clip_grad_norm_(self.parameters, self.config.optim.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["scale"]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.model.update_router_bias(torch.stack(counts).sum(0))
        return loss


def plain_loop(
    config: RunConfig, data: TokenDataset, *, by_shard: bool, threads: int, steps: int, warmup: int
) -> Measured:
    """Train in this process with torch alone."""
    torch.set_num_threads(threads)
    loop, seconds, loss = PlainLoop(config, data, by_shard=by_shard), [], 0.0
    for step in range(1, steps + 1):
        started = time.perf_counter()
        loss = loop.step(step, learning_rate(step, config.optim, steps))
        seconds.append(time.perf_counter() - started)
    how = "by logical shards" if by_shard else "whole batch"
    return summarize(f"plain PyTorch, {threads} threads, {how}", seconds, loss, warmup)


def actors(config: RunConfig, name: str, cluster: ClusterConfig, *, steps: int, warmup: int) -> Measured:
    """Train through the command and read the seconds of its steps."""
    with tempfile.TemporaryDirectory() as folder:
        file, run = Path(folder) / "run.yaml", Path(folder) / "run"
        train = replace(config.train, steps=steps, checkpoint_every=0, eval_every=0, eval_batches=1)
        save_yaml(replace(config, train=train, cluster=cluster), file)
        command = [sys.executable, "-m", "sparseray", "pretrain", "--config", str(file), f"--run_dir={run}"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{name}: exit code {done.returncode}\n{done.stdout}\n{done.stderr}")
        records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return summarize(name, [r["seconds"] for r in records], records[-1]["loss"], warmup)


def table(lines: list[Measured], tokens: int, steps: int, warmup: int) -> str:
    """Render the result; ratios are to the faster plain loop."""
    plain = min((m for m in lines if m.name.startswith("plain")), key=lambda m: m.seconds)
    rows = [
        f"| {m.name} | {m.seconds * 1e3:.1f} ({m.fastest * 1e3:.1f} to {m.slowest * 1e3:.1f}) | "
        f"{tokens / m.seconds:,.0f} | {plain.seconds / m.seconds:.2f} | {m.loss:.3f} |"
        for m in lines
    ]
    return "\n".join(
        [
            f"{_processor()}, {os.cpu_count()} logical CPUs, Python {platform.python_version()}, "
            f"torch {torch.__version__}; configs/tiny.yaml, {tokens} tokens a step, "
            f"{steps} steps of which the first {warmup} do not count, one configuration after another.",
            "",
            "| | ms a step: median (fastest to slowest) | tokens/s | speed over the plain loop | last loss |",
            "|---|---|---|---|---|",
            *rows,
            "",
        ]
    )


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or "unknown CPU"


def main() -> int:
    """Measure all peers in one run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of `sparseray data prepare`")
    parser.add_argument("--steps", type=int, default=40, help="steps of each peer")
    parser.add_argument("--warmup", type=int, default=5, help="first steps that do not count")
    parser.add_argument("--out", type=Path, help="file to write the table to")
    options = parser.parse_args()
    if options.steps <= options.warmup:
        parser.error(f"--steps {options.steps} must be more than --warmup {options.warmup}")
    config = load_yaml(ROOT / "configs" / "tiny.yaml")
    config = replace(config, data=replace(config.data, path=str(Path(options.data).absolute())))
    data = TokenDataset(options.data, "train")
    config = resolve(config, data)
    counts = {"steps": options.steps, "warmup": options.warmup}
    jobs: list[Callable[[], Measured]] = [
        *(
            lambda t=threads, s=by_shard: plain_loop(config, data, by_shard=s, threads=t, **counts)
            for threads in (1, 2)
            for by_shard in (False, True)
        ),
        *(lambda n=name, c=cluster: actors(config, n, c, **counts) for name, cluster in PEERS.items()),
    ]
    lines = []
    for job in jobs:
        lines.append(job())
        print(f"{lines[-1].name}: {lines[-1].seconds * 1e3:.1f} ms a step", flush=True)
    train = config.train
    tokens = train.logical_shards * train.sequences_per_shard * train.seq_len
    result = "# Training on one CPU\n\n" + table(lines, tokens, options.steps, options.warmup)
    print(result)
    if options.out:
        options.out.write_text(result)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
