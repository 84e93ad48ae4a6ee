"""CPU gather of table rows: its forms in turns, so that other work on the machine slows all of them alike.

`python -m benchmarks.dse_gather [--threads 1 2] [--turns 15]` prints medians for tables in anonymous memory
and in /dev/shm; the ratio is that of the same turn, hence steadier than the rates.
"""

from __future__ import annotations

import argparse
import mmap
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sparseray.kernels.dse.gather import gather_rows

TABLE_BYTES, OUT_BYTES = 640_000_000, 96_000_000
Floats = NDArray[np.float32]


def shared_table(num_rows: int, width: int) -> Floats:
    """An unnamed shared mapping of /dev/shm, as processes share tables."""
    with tempfile.TemporaryFile(dir="/dev/shm") as file:
        os.ftruncate(file.fileno(), num_rows * width * 4)
        return np.frombuffer(mmap.mmap(file.fileno(), 0), np.float32).reshape(num_rows, width)


def in_turns(forms: dict[str, Callable[[], Any]], turns: int) -> dict[str, list[float]]:
    """Seconds of each form, one run of each per turn, after a turn that does not count."""
    spans: dict[str, list[float]] = {name: [] for name in forms}
    for turn in range(turns + 1):
        for name, form in forms.items():
            start = time.perf_counter()
            form()
            if turn:
                spans[name].append(time.perf_counter() - start)
    return spans


def compare(place: str, width: int, threads: list[int], turns: int) -> None:
    """Print one line per form for rows of `width` floats."""
    num_rows, count = TABLE_BYTES // width // 4, OUT_BYTES // width // 4
    table = shared_table(num_rows, width) if place == "/dev/shm" else np.empty((num_rows, width), np.float32)
    rng = np.random.default_rng(0)
    table[:] = rng.standard_normal(width, dtype=np.float32)
    rows, out = rng.integers(0, num_rows, count), np.empty((count, width), np.float32)
    tensor, index, result = (torch.from_numpy(a) for a in (table, rows, out))
    forms: dict[str, Callable[[], Any]] = {
        "torch index_select": partial(torch.index_select, tensor, 0, index, out=result)
    }
    with ThreadPoolExecutor(max(threads)) as pool:
        for number in threads:
            for streaming in (False, True):
                name = f"{number} threads, {'streamed' if streaming else 'plain'} stores"
                options: dict[str, Any] = {"threads": number, "pool": pool, "streaming": streaming}
                forms[name] = partial(gather_rows, table, rows, out, **options)
        spans = in_turns(forms, turns)
    base = spans["torch index_select"]
    for name, own in spans.items():
        rates = sorted(count / s / 1e6 for s in own)
        ratio = statistics.median(b / s for b, s in zip(base, own))
        print(
            f"| {place} | {4 * width} B | {name} | {statistics.median(rates):.1f} | {rates[0]:.1f} to"
            f" {rates[-1]:.1f} | {ratio:.2f} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--turns", type=int, default=15)
    arguments = parser.parse_args()
    print(f"{os.cpu_count()} CPU cores, torch {torch.__version__} with {torch.get_num_threads()} threads\n")
    print("| table | row | form | M rows/s | range | over index_select |")
    print("|---|---|---|---|---|---|")
    for place in ("anonymous", "/dev/shm"):
        for width in (40, 128):
            compare(place, width, arguments.threads, arguments.turns)


if __name__ == "__main__":
    main()
