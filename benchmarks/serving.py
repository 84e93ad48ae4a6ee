"""Serving under kills, hangs, resizes and load, in real processes: what clients see of it.

Every line of the table has its target beside it; gaps are the longest wait for a token of any stream, beyond that of an
undisturbed turn of the same streams. All parts in one call take about an hour; each alone as in the second line:

  PYTHONPATH=. python benchmarks/serving.py --checkpoint RUN/checkpoints/step_2 --out benchmarks/results/serving_cpu_DATE.md
  PYTHONPATH=. python benchmarks/serving.py --checkpoint RUN/checkpoints/step_2 --only shards,scale
"""

import argparse
import os
import platform
import random
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import ray
import torch

from benchmarks.serving_bench import Bench
from benchmarks.serving_faults import engines, gcs, scale, scheduler, shards, versions
from benchmarks.serving_http import http
from benchmarks.serving_long import kills, load, soak, start, throughput


def path(bench: Bench) -> None:
    """The HTTP path alone."""
    for row in http():
        bench.line(row.part, row.what, row.measured, row.target, row.is_met)


PARTS: dict[str, Callable[[Bench], None]] = {
    "start": start,
    "http": path,
    "throughput": throughput,
    "shards": shards,
    "engines": engines,
    "scale": scale,
    "scheduler": scheduler,
    "gcs": gcs,
    "versions": versions,
    "load": load,
    "kills": kills,
    "soak": soak,
}


def options_of() -> argparse.Namespace:
    """Read the command line."""
    names = ",".join(PARTS)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="of the tiny model")
    parser.add_argument("--only", default=names, help=f"parts, with commas between; default all: {names}")
    parser.add_argument("--streams", type=int, default=50, help="at once; twice as many at killed engines")
    parser.add_argument("--tokens", type=int, default=48, help="of each stream")
    parser.add_argument("--repeats", type=int, default=20, help="kills of an engine")
    parser.add_argument("--minutes", type=float, default=10.0, help="of kills, and of constant load")
    parser.add_argument("--cycles", type=int, default=20, help="changes of plan in the soak")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of victims")
    parser.add_argument("--out", type=Path, help="file to write the table to")
    found = parser.parse_args()
    found.parts = found.only.split(",")
    if unknown := sorted(set(found.parts) - set(PARTS)):
        parser.error(f"--only: there is no part {', '.join(unknown)}; there are {names}")
    return found


def table(bench: Bench, seconds: float) -> str:
    """Render the result.

    Args:
        bench: with its lines.
        seconds: that all took.
    """
    verdicts = {True: "yes", False: "**no**", None: ""}
    lines = [
        f"| {r.part} | {r.what} | {r.measured} | {r.target} | {verdicts[r.is_met]} |" for r in bench.rows
    ]
    return "\n".join(
        [
            "# Serving on one CPU",
            "",
            f"{os.cpu_count()} logical CPUs, Python {platform.python_version()}, torch {torch.__version__}, ray {ray.__version__}; "
            f"{bench.tokens} tokens a stream; 2 engines, 2 expert shards, 2 memory shards, replication 2 and one standby slot "
            f"where the line does not say otherwise, one-threaded processes. All in {seconds / 60:.0f} minutes.",
            "",
            "| part | what | measured | target | met |",
            "|---|---|---|---|---|",
            *lines,
            "",
        ]
    )


def main() -> int:
    """Measure the parts one after another; 1 when a target is missed or a part fails."""
    options, started = options_of(), time.monotonic()
    bench = Bench(
        checkpoint=options.checkpoint.absolute(),
        streams=options.streams,
        tokens=options.tokens,
        repeats=options.repeats,
        minutes=options.minutes,
        cycles=options.cycles,
        source=random.Random(options.seed),
    )
    os.environ["RAY_AUTH_MODE"] = "disabled"
    for name in options.parts:
        try:
            PARTS[name](bench)
        except Exception as error:
            print(traceback.format_exc(), flush=True)
            text = " ".join(str(error).split()).replace("|", "/")[:300]
            bench.line(name, "the part failed", text, "no failure", False)
    result = table(bench, time.monotonic() - started)
    print(result)
    if options.out:
        options.out.write_text(result)
    return 0 if all(row.is_met is not False for row in bench.rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
