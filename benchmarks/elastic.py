"""Training under kills, hangs and resizes, in real processes: what is lost, for how long it stops, what it costs.

Every line of the table has its target beside it. All parts in one call take about an hour; some of them:

  PYTHONPATH=. python benchmarks/elastic.py --data data/stdlib --out benchmarks/results/elastic_cpu_DATE.md
  PYTHONPATH=. python benchmarks/elastic.py --data data/stdlib --only kill,hang --repeats 2

The peers (Ray Train v2, torchft) run with --peer_python, a Python of their own that has ray[train] and torchft.
"""

import argparse
import os
import platform
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import ray
import torch

from benchmarks.elastic_long import goodput, raylet, soak
from benchmarks.elastic_parts import Bench, Row, cost, hang, kill, losses, nostandby, resize
from benchmarks.elastic_peers import peers
from benchmarks.elastic_run import ROOT, environment
from sparseray.platform.config import RunConfig, load_yaml

PARTS: dict[str, Callable[[Bench], None]] = {
    "losses": losses,
    "kill": kill,
    "hang": hang,
    "nostandby": nostandby,
    "raylet": raylet,
    "resize": resize,
    "cost": cost,
    "goodput": goodput,
    "soak": soak,
}
MORE_STEPS_THAN_ANY_RUN = 100_000


def run_config(data: str, sequences: int, seq_len: int) -> RunConfig:
    """The tiny model with few and short sequences a step; nothing but steps in the run."""
    config = load_yaml(ROOT / "configs" / "tiny.yaml")
    train = replace(
        config.train,
        steps=MORE_STEPS_THAN_ANY_RUN,
        sequences_per_shard=sequences,
        seq_len=seq_len,
        checkpoint_every=0,
        eval_every=0,
        eval_batches=1,
    )
    data_config = replace(config.data, path=str(Path(data).absolute()))
    return replace(config, data=data_config, train=train, optim=replace(config.optim, lr=5e-4))


def table(rows: list[Row], config: RunConfig, seconds: float) -> str:
    """Render the result."""
    train = config.train
    tokens = train.logical_shards * train.sequences_per_shard * train.seq_len
    verdicts = {True: "yes", False: "**no**", None: ""}
    return "\n".join(
        [
            "# Elastic training on one CPU",
            "",
            f"{_processor()}, {os.cpu_count()} logical CPUs, Python {platform.python_version()}, "
            f"torch {torch.__version__}, ray {ray.__version__}; configs/tiny.yaml with {tokens} tokens a step, "
            "2 attention workers, 2 expert shards, 2 memory shards, replication 2 and one standby slot where the "
            "line does not say otherwise: seven one-threaded processes. Times run from the signal to the commit of "
            f"the first step that began after it, from outside. All in {seconds / 60:.0f} minutes.",
            "",
            "| part | what | measured | target | met |",
            "|---|---|---|---|---|",
            *(
                f"| {row.part} | {row.what} | {row.measured} | {row.target} | {verdicts[row.is_met]} |"
                for row in rows
            ),
            "",
        ]
    )


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or "unknown CPU"


def options_of() -> argparse.Namespace:
    """Read the command line."""
    names = ",".join([*PARTS, "peers"])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of `sparseray data prepare`")
    parser.add_argument("--only", default=names, help=f"parts, with commas between; default all: {names}")
    parser.add_argument(
        "--repeats", type=int, default=5, help="of each kill, hang, resize, turn of the cost part"
    )
    parser.add_argument("--steps", type=int, default=60, help="steps of one turn of the cost part")
    parser.add_argument(
        "--sequences", type=int, default=1, help="train.sequences_per_shard: how long a step is"
    )
    parser.add_argument("--seq_len", type=int, default=96, help="train.seq_len: likewise")
    parser.add_argument("--minutes", type=float, default=10.0, help="of the goodput part")
    parser.add_argument("--cycles", type=int, default=50, help="resizes up and down in the soak")
    parser.add_argument("--kills", type=int, default=100, help="kills in the soak")
    parser.add_argument(
        "--compare", type=int, default=1000, help="most steps of one run to compare losses of"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the choice of victims")
    parser.add_argument("--peer_python", default=sys.executable, help="Python that the peers run with")
    parser.add_argument("--peer_step_s", type=float, default=0.15, help="seconds of a step of the peers")
    parser.add_argument("--keep", type=Path, help="new folder that keeps all runs; a temporary one without")
    parser.add_argument("--out", type=Path, help="file to write the table to")
    found = parser.parse_args()
    found.parts = found.only.split(",")
    if unknown := sorted(set(found.parts) - {*PARTS, "peers"}):
        parser.error(f"--only: there is no part {', '.join(unknown)}; there are {names}")
    return found


def main() -> int:
    """Measure the parts one after another; 1 when a target is missed or a part fails."""
    options, started = options_of(), time.monotonic()
    folder = options.keep or Path(tempfile.mkdtemp(prefix="sparseray-elastic-"))
    folder = folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    bench = Bench(
        config=run_config(options.data, options.sequences, options.seq_len),
        folder=folder,
        repeats=options.repeats,
        steps=options.steps,
        compare=options.compare,
        minutes=options.minutes,
        cycles=options.cycles,
        kills=options.kills,
        source=random.Random(options.seed),
    )
    parts = {**PARTS, "peers": lambda b: peers(b, options.peer_python, options.peer_step_s)}
    with environment():
        for name in options.parts:
            try:
                parts[name](bench)
            except Exception as error:
                # One part that fails is a line of the table; the others are measured all the same.
                print(traceback.format_exc(), flush=True)
                text = " ".join(str(error).split()).replace("|", "/")[:300]
                bench.add(
                    Row(part=name, what="the part failed", measured=text, target="no failure", is_met=False)
                )
    result = table(bench.rows, bench.config, time.monotonic() - started)
    print(result)
    if options.out:
        options.out.write_text(result)
    if not options.keep:
        shutil.rmtree(folder, ignore_errors=True)
    return 0 if all(row.is_met is not False for row in bench.rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
