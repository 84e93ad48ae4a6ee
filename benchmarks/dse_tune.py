"""Says which bound holds when random rows come from host memory, and times every form and setting of the fetch.

Run: `python -m benchmarks.dse_tune` on a GPU (about two minutes). Random against sorted addresses over growing
tables (a rate that falls with the table is a cost of address translation, not of rows or bytes), the CPU's
gather alone by threads and stores, the staged fetch by threads and parts, both engines at once, the segment sum.
"""

from __future__ import annotations

import statistics
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.dse import HEAD_ROWS, WIDTH, skewed_rows
from sparseray.kernels.dse import rows as gpu
from sparseray.kernels.dse.fetch import RowFetcher, StagedRowFetcher
from sparseray.kernels.dse.gather import gather_parts

SHAPES = ((80, 600_000), (256, 200_000))
TABLE_WORDS = 2**31
FOOTPRINTS = (2**24, 2**26, 2**28, 2**30, 2**32)
ZERO_COPY = ((4, 2048, 16), (16, 2048, 16), (16, 512, 8), (64, 512, 8), (132, 512, 8))
STAGED = ((16, 8, True), (16, 8, False), (15, 8, True), (12, 8, True), (16, 2, True), (16, 32, True))
SEGMENTS = ((32, 64), (32, 32), (32, 128), (64, 32), (128, 32))


def rate(size: int, work: Callable[[], Any], repeats: int = 5) -> float:
    """GB/s of `size` bytes by the median wall time of the finished work."""
    work()
    torch.cuda.synchronize()
    spans = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        torch.cuda.synchronize()
        spans.append(time.perf_counter() - start)
    return size / statistics.median(spans) / 1e9


def rows_of(table: Tensor, width: int) -> Tensor:
    """The table's memory as rows of `width` elements."""
    return table[: table.numel() // width * width].view(-1, width)


def zero_copy(table: Tensor) -> None:
    for width, count in SHAPES:
        size = 2 * width * count
        for footprint in FOOTPRINTS:
            view = rows_of(table[: footprint // 2], width)
            index = torch.randint(0, len(view), (count,), device="cuda")
            ascending, order = torch.sort(index)
            out = torch.empty(count, width, dtype=view.dtype, device="cuda")
            for programs, block, warps in ZERO_COPY if footprint == FOOTPRINTS[-1] else ZERO_COPY[:2]:
                launch = partial(
                    gpu.gather_rows, view, out_ND=out, programs=programs, block=block, warps=warps
                )
                plain = rate(size, partial(launch, rows_N=index), 3)
                tidy = rate(size, partial(launch, rows_N=ascending, order_N=order), 3)
                print(
                    f"zero-copy {2 * width} B, table {footprint >> 20} MiB, {programs} x {warps} warps x {block}:"
                    f" random {plain:.1f} GB/s ({plain * 500 / width:.0f} M rows/s), sorted {tidy:.1f}",
                    flush=True,
                )
        print(f"  sort of {count}: {size / rate(size, partial(torch.sort, index)) / 1e6:.2f} ms", flush=True)


def drain(view: Any, rows: Any, out: Any, pool: Any, threads: int, streaming: bool) -> None:
    """Gather on the CPU alone."""
    options: dict[str, Any] = {"part_rows": len(rows), "threads": threads, "streaming": streaming}
    for _ in gather_parts(view, rows, out, pool=pool, **options):
        pass


def cpu_alone(table: Tensor) -> None:
    source = torch.ones(2**28, dtype=torch.uint8)
    target = torch.empty_like(source)
    print(
        f"memcpy, torch's threads: {rate(2**28, partial(target.copy_, source)):.1f} GB/s copied", flush=True
    )
    for width, count in SHAPES:
        view = rows_of(table, width).view(torch.uint8).numpy()
        rows = np.random.default_rng(0).integers(0, len(view), count)
        out = torch.empty(count, 2 * width, dtype=torch.uint8, pin_memory=True).numpy()
        for threads in (1, 4, 8, 16):
            with ThreadPoolExecutor(threads) as pool:
                found = [
                    rate(out.nbytes, partial(drain, view, rows, out, pool, threads, streaming))
                    for streaming in (False, True)
                ]
            print(
                f"CPU gather {2 * width} B, {threads} threads: plain {found[0]:.1f} GB/s, streamed {found[1]:.1f}",
                flush=True,
            )


def staged(table: Tensor) -> None:
    for width, count in SHAPES:
        view, size = rows_of(table, width), 2 * width * count
        rows = torch.randint(0, len(view), (count,))
        want = view[rows[::101]]
        for threads, part_mib, streaming in STAGED:
            fetcher = StagedRowFetcher(
                view,
                max_rows=count,
                threads=threads,
                device=torch.device("cuda"),
                part_bytes=part_mib << 20,
                streaming=streaming,
            )

            def fetch(fetcher: StagedRowFetcher = fetcher, rows: Tensor = rows) -> Tensor:
                return fetcher.fetch(rows.numpy()).result().wait()

            found = rate(size, fetch, 7)
            # As integers: some words of the table are NaN as bfloat16.
            right = torch.equal(fetch()[::101].cpu().view(torch.int16), want.view(torch.int16))
            print(
                f"staged {2 * width} B, {threads} threads, parts of {part_mib} MiB, streamed {streaming}:"
                f" {found:.1f} GB/s, {'right' if right else 'WRONG'}",
                flush=True,
            )


def both_engines(table: Tensor) -> None:
    """A share of the rows by zero-copy while threads and DMA fetch the rest."""
    for width, count in SHAPES:
        view, size = rows_of(table, width), 2 * width * count
        rows = torch.randint(0, len(view), (count,))
        fetcher = StagedRowFetcher(view, max_rows=count, threads=16, device=torch.device("cuda"))
        for ascending in (False, True):
            direct = RowFetcher(view, programs=4, block=2048, warps=16, ascending=ascending)
            for share in (0.2, 0.35, 0.5):
                cut = int(count * share)
                first, rest = rows[:cut].cuda(), rows[cut:].numpy()

                def fetch(direct: RowFetcher = direct, first: Tensor = first, rest: Any = rest) -> None:
                    started = direct.fetch(first)
                    fetcher.fetch(rest).result().wait()  # noqa: B023
                    started.wait()

                print(
                    f"both {2 * width} B, {share:.0%} zero-copy, sorted {ascending}: {rate(size, fetch):.1f} GB/s",
                    flush=True,
                )


def segments(_: Tensor) -> None:
    index = torch.from_numpy(skewed_rows(262_144, HEAD_ROWS)).cuda()
    grads = torch.randn(262_144, WIDTH, device="cuda")
    for columns, loads in SEGMENTS:
        gpu.SEGMENT_COLUMNS, gpu.SEGMENT_LOADS = columns, loads
        span = 1 / rate(10**9, partial(gpu.segment_sum_rows, index, grads)) * 1e3
        print(f"segment sum, {columns} columns, {loads} loads ahead: {span:.2f} ms", flush=True)


def main() -> None:
    table = gpu.host_table(1, TABLE_WORDS, torch.bfloat16)[0]
    words = table.view(torch.int64)
    torch.arange(len(words), out=words)
    source = torch.empty(2**28, dtype=torch.uint8, pin_memory=True)
    print(f"bulk copy: {rate(2**28, partial(source.to, 'cuda', non_blocking=True)):.1f} GB/s", flush=True)
    for part in (zero_copy, cpu_alone, staged, both_engines, segments):
        try:
            part(table)
        except Exception:  # One part that fails must not cost the others their measurement.
            print(traceback.format_exc()[-800:], flush=True)


if __name__ == "__main__":
    main()
