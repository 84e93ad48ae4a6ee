"""How fast text becomes token shards, and how fast shards open: one table line a tokenizer.

Run `python -m benchmarks.data`; it prepares the standard library in a temporary folder, several times, and
reports the median with the spread, the peak memory of the process so far, and the versions.
"""

import argparse
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

import pyarrow
import tokenizers

from sparseray.actors.training.token_data import TokenDataset
from sparseray.jobs.tokens.prepare import prepare

HEADER = (
    "| corpus | tokenizer | MB | seconds (median) | MB/s (median, min to max) | tokens | bytes/token "
    "| open verified ms | peak RSS MB |\n|---|---|---|---|---|---|---|---|---|"
)


def measure(source: str, tokenizer: str, repeats: int) -> str:
    """Prepare a source several times and return one table line."""
    seconds, opens = [], []
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "data"
        for _ in range(repeats):
            begin = time.perf_counter()
            manifest = prepare([source], out, tokenizer=tokenizer, overwrite=True)
            seconds.append(time.perf_counter() - begin)
            begin = time.perf_counter()
            dataset = TokenDataset(out)
            opens.append(time.perf_counter() - begin)
    megabytes = sum(split.bytes for split in manifest.splits.values()) / 1e6
    middle = statistics.median(seconds)
    scale = 1024**2 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale
    return (
        f"| {source} | {tokenizer} ({manifest.vocab_size}) | {megabytes:.1f} | {middle:.2f} "
        f"| {megabytes / middle:.2f} ({megabytes / max(seconds):.2f} to {megabytes / min(seconds):.2f}) "
        f"| {dataset.num_tokens:,} | {dataset.bytes_per_token:.2f} | {statistics.median(opens) * 1e3:.0f} "
        f"| {peak:.0f} |"
    )


def cpu_name() -> str:
    """Return the CPU's model as Linux states it, else the machine type."""
    info = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line]
    return names[0] if names else platform.machine()


def main() -> None:
    """Parse the command line, measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", default="stdlib")
    parser.add_argument("--tokenizer", action="append", help="bpe, deepseek or a path; default: bpe")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    print(
        f"{cpu_name()}, {cores} cores; Python {platform.python_version()}, "
        f"tokenizers {tokenizers.__version__}, pyarrow {pyarrow.__version__}; {arguments.repeats} runs each\n"
    )
    print(HEADER)
    for tokenizer in arguments.tokenizer or ["bpe"]:
        print(measure(arguments.source, tokenizer, arguments.repeats), flush=True)


if __name__ == "__main__":
    main()
