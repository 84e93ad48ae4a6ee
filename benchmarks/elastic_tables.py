"""How long training waits while memory tables of gigabytes move: to more slots and back, and where a replica was lost.

    python -m benchmarks.elastic_tables --data FOLDER --gigabytes 1.5

A pause is what the time between two commits has beyond a step's median. Real processes, as in benchmarks/elastic.py.
"""

import argparse
import random
import signal
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from benchmarks.elastic import run_config
from benchmarks.elastic_run import Training, environment, gaps, median_step
from sparseray.platform.config import ClusterConfig, RunConfig

STEPS = 20
LONG_S = 900.0


def with_tables(config: RunConfig, gigabytes: float) -> RunConfig:
    """A run whose tables have so many bytes, moments among them, in buckets of a few megabytes.

    Args:
        config: the run.
        gigabytes: of all tables.
    """
    dse = config.model.dse
    row_bytes = 8 * dse.head_dim + 12
    rows = int(gigabytes * 1e9 / (row_bytes * dse.heads * len(dse.orders) * len(dse.layers)))
    dse = replace(dse, rows_per_head=rows, num_buckets=max(dse.num_buckets, int(gigabytes * 100)))
    return replace(config, model=replace(config.model, dse=dse))


def resize(run: Training, count: int) -> str:
    """Ask for a number of memory shards and say what that cost.

    Args:
        run: that trains.
        count: of memory shards.
    """
    run.wait_calm(STEPS)
    step, asked, known = median_step(run.records()[-STEPS:]), len(run.records()), len(run.events())
    run.ask("scale", "memory", count)
    run.wait(lambda: any(e["kind"] == "resized" for e in run.events()[known:]), f"memory {count}", LONG_S)
    run.wait_steps(2)
    changes = [e for e in run.events()[known:] if e["kind"] in ("staged", "resized")]
    during = [r for r in run.records()[asked:] if r["step"] >= changes[0]["step"]]
    late = [max(0.0, gap - step) for gap in gaps(during[: changes[-1]["step"] - changes[0]["step"] + 2])]
    moved = sum(e["moved"] for e in changes)
    return (
        f"memory {count}: {moved / 1e6:.0f} MB in {len(changes)} plans; longest pause {max(late):.2f} s, "
        f"median {statistics.median(e['pause'] for e in changes):.2f}, all {sum(late):.2f} s "
        f"of {during[len(late)]['time'] - during[0]['time']:.1f}; step {step * 1e3:.0f} ms"
    )


def lose(run: Training) -> str:
    """Kill a memory shard of which there is a replica, and say how long training waited and until there were two again.

    Args:
        run: that trains.
    """
    run.wait_calm(STEPS)
    step, known = median_step(run.records()[-STEPS:]), len(run.records())
    started = time.monotonic()
    strike = run.strike("memory", signal.SIGKILL, random.Random(0))
    run.wait(lambda: run.ask("status")["replicas"]["actual"] < 2 or time.monotonic() > started + 2, "a loss")
    run.wait_calm()
    late = [max(0.0, gap - step) for gap in gaps(run.records()[known - 1 :])]
    return (
        f"SIGKILL of a memory shard: {strike.seconds:.2f} s to the next commit; longest pause until all is as before "
        f"{max(late):.2f} s, all {sum(late):.2f} s of {time.monotonic() - started:.0f}; step {step * 1e3:.0f} ms"
    )


def main() -> None:
    """Grow and shrink the memory of one run, kill a shard of another, and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, help="folder of `sparseray data prepare`")
    parser.add_argument("--gigabytes", type=float, default=1.5, help="of all tables with their moments")
    options = parser.parse_args()
    config = with_tables(run_config(options.data, 1, 96), options.gigabytes)
    cluster = ClusterConfig(attention_workers=1, expert_shards=1, memory_shards=1, standby=1, hang_s=20.0)
    with environment(), tempfile.TemporaryDirectory() as folder:
        with Training(config, cluster, Path(folder), "resized") as run:
            for count in (2, 3, 1):
                print(resize(run, count), flush=True)
            run.stop()
        twice = replace(cluster, memory_shards=2, replication=2)
        with Training(config, twice, Path(folder), "lost") as run:
            print(lose(run), flush=True)
            run.stop()


if __name__ == "__main__":
    main()
