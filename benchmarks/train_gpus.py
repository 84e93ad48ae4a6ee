"""Tokens per second of training on 1, 2 and 4 GPUs of one host, the same tokens for each GPU.

Through `python -m sparseray pretrain` on real text: data parallel dense weights and expert parallel experts, a logical
part for each GPU. TFLOP/s are those of 6 x the parameters that are active for a token, and attention; what is computed
again does not count. In the first some hundred steps of a run experts get uneven numbers of tokens, and all GPUs wait for the
busiest: `busiest` says by how much, and `--steps 700 --warmup 660` measures after it. Prints a table as Markdown:

  PYTHONPATH=. python -m benchmarks.train_gpus --data data/stdlib --gpus 1,2 --out benchmarks/results/train_gpus_GPU_DATE.md
  PYTHONPATH=. python -m benchmarks.train_gpus --data data/stdlib --configs moonlight --gpus 2 --steps 12
"""

import argparse
from pathlib import Path

import torch

from benchmarks.train_gpu import ROOT, Measured, product, seconds_between, teraflops
from sparseray.actors.state.assignment import Plan
from sparseray.platform.config import RunConfig, load_yaml
from sparseray.platform.planning.placement import split_evenly
from sparseray.platform.planning.policy import imbalance

CONFIGS = ("1b_full", "moonlight_6")
SEQUENCES = 8
"""Of a step on one GPU."""
SPAN = 50
"""Steps of which `as_it_trains` makes one figure."""


def options_for(
    gpus: int, shape: tuple[int, int], determinism: str, replication: int, exchange: str
) -> list[str]:
    """Settings that spread a configuration over GPUs.

    Args:
        gpus: how many.
        shape: parts of a step, and sequences of each; 0 for the configuration's.
        determinism: order of sums.
        replication: holders of every expert.
        exchange: `cluster.exchange`.
    """
    return [
        f"--cluster.attention_workers={gpus}",
        f"--cluster.expert_shards={gpus}",
        f"--cluster.replication={min(gpus, replication)}",
        f"--train.logical_shards={shape[0]}",
        *([f"--train.sequences_per_shard={shape[1]}"] if shape[1] else []),
        f"--determinism={determinism}",
        f"--cluster.exchange={exchange}",
    ]


def busiest(loads: list[list[list[int]]], gpus: int) -> float:
    """How much longer experts take than with even loads: a layer waits for the GPU with most tokens.

    Args:
        loads: of some steps of `Measured`.
        gpus: that have as many experts each, side by side.
    """
    rows = [row for layers in loads for row in layers]
    if not rows:
        return 1.0
    holders = tuple((gpu,) for gpu in split_evenly(len(rows[0]), range(gpus)))
    experts = (holders,) * len(rows)
    plan = Plan(generation=0, addresses={}, part_owners=(), dense=(), experts=experts, buckets=())
    return imbalance(plan, rows)


def as_it_trains(found: Measured, gpus: int) -> str:
    """Milliseconds of a step and `busiest`, of `SPAN` steps each: experts get more even as routers learn."""
    spans = []
    for first in range(0, len(found.times) - 1, SPAN):
        times = found.times[first : first + SPAN + 1]
        most = busiest(found.loads[first : first + SPAN], gpus)
        spans.append(f"{first + 1}: {seconds_between(times) * 1e3:.1f} ms {most:.3f}")
    return ", ".join(spans)


def row(config: RunConfig, gpus: int, determinism: str, found: Measured, one: Measured | None) -> str:
    """A line of the table.

    Args:
        config: what was trained.
        gpus, determinism: how.
        found: what was measured.
        one: the same on one GPU.
    """
    each = found.tokens_per_second / gpus
    ratio = f"{each / one.tokens_per_second:.3f}" if one is not None else "-"
    return (
        f"| {gpus} | {determinism} | {found.seconds * 1e3:.1f} | {found.tokens_per_second:,.0f} | {each:,.0f} |"
        f" {teraflops(config, found) / gpus:.0f} | {ratio} | {found.gib:.1f} | {found.loss!r} |"
    )


def main() -> int:
    """Measure the chosen configurations one after another."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of `sparseray data prepare --vocab_size 32768`")
    parser.add_argument("--configs", default=",".join(CONFIGS))
    parser.add_argument("--gpus", default="1,2,4")
    parser.add_argument("--determinism", default="fast", help="one or both of fast,bitwise")
    parser.add_argument("--replication", type=int, default=1)
    parser.add_argument("--exchange", default="auto", choices=("auto", "peers", "collective"))
    parser.add_argument(
        "--same_tokens",
        action="store_true",
        help="the same step on all, in parts of as few sequences as on the most",
    )
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--extra", default="", help="further options of pretrain, separated by spaces")
    parser.add_argument("--limit_s", type=float, default=3600.0, help="seconds after which a run is ended")
    parser.add_argument("--out", type=Path, help="file to write the table to")
    options = parser.parse_args()
    data, counts = Path(options.data).absolute(), list(map(int, options.gpus.split(",")))
    parts = [
        "# Training on several GPUs of one host",
        "",
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, bf16, real text (Python's standard library), "
        f"{options.steps} steps of which the first {options.warmup} do not count, replication {options.replication}, "
        f"exchange {options.exchange}. TFLOP/s by 6 x active parameters and attention.",
        "",
    ]
    for config in options.configs.split(","):
        settings = load_yaml(ROOT / "configs" / f"{config}.yaml")
        parts += [
            f"## {config}",
            "",
            "| GPUs | order | ms a step | tokens/s | of each GPU | TFLOP/s of each | of one alone | peak GiB | last loss |",
        ]
        parts += ["|---|---|---|---|---|---|---|---|---|"]
        for determinism in options.determinism.split(","):
            found: dict[int, Measured] = {}
            for gpus in counts:
                shape = (max(counts), SEQUENCES // max(counts)) if options.same_tokens else (gpus, 0)
                extra = options_for(gpus, shape, determinism, options.replication, options.exchange)
                extra += options.extra.split()
                measured = product(config, data, options.steps, options.warmup, extra, options.limit_s)
                if measured is not None:
                    found[gpus] = measured
                    most = busiest(measured.loads[options.warmup :], gpus)
                    print(f"{config}, {determinism}, {gpus} GPUs: {measured}, busiest {most:.3f}", flush=True)
                    if len(measured.times) > SPAN:
                        print(f"from step: ms a step, busiest: {as_it_trains(measured, gpus)}", flush=True)
            parts += [
                row(settings, gpus, determinism, measured, found.get(1))
                for gpus, measured in sorted(found.items())
            ]
        parts.append("")
    print("\n".join(parts), flush=True)
    if options.out:
        options.out.write_text("\n".join(parts))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
