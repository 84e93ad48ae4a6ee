"""DSE kernels: rows from host memory under a model step, gather, hash, gate and convolution, Adam.

`python benchmarks/dse.py --out results.md` prints one table for the GPU (about a minute) or, with
`--cpu` or without a GPU, for the CPU path. Shapes are those of the paper's 27B model: 2 layers, 16
rows per token and layer, 80-wide bf16 rows.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sparseray.kernels.dse import cpu

ROWS_PER_TOKEN, WIDTH, HEAD_ROWS = 32, 80, 2_262_400
lines: list[str] = []


def say(line: str = "") -> None:
    print(line, flush=True)
    lines.append(line)


def seconds(work: Callable[[], Any], repeats: int = 7) -> float:
    """Median wall time of one call after one warm-up."""
    work()
    spans = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        spans.append(time.perf_counter() - start)
    return statistics.median(spans)


def layout() -> dict[str, Any]:
    """Hash constants of one layer; the moduli are odd rather than prime, which costs the same."""
    rng = np.random.default_rng(0)
    half = (2**63 - 1) // 99092 // 2
    primes = [[HEAD_ROWS + 1 + 2 * (8 * o + h) for h in range(8)] for o in range(2)]
    offsets = [[(8 * o + h) * (HEAD_ROWS + 64) for h in range(8)] for o in range(2)]
    multipliers = (rng.integers(0, half, 3) * 2 + 1).tolist()
    return {"multipliers": multipliers, "orders": (2, 3), "primes": primes, "offsets": offsets, "pad": 2}


def skewed_rows(count: int, num_rows: int) -> np.ndarray:
    """Zipf rows, scattered over the table: about a third are distinct, as in text."""
    rng = np.random.default_rng(1)
    return (rng.zipf(1.12, count) * 7919 % num_rows).astype(np.int64)


def on_cpu() -> None:
    rng = np.random.default_rng(0)
    say("| CPU operation | rate | peer in this run | ratio |")
    say("|---|---|---|---|")
    table, count = rng.standard_normal((4_000_000, 40), dtype=np.float32), 1_000_000
    rows, out = rng.integers(0, len(table), count), np.empty((count, 40), np.float32)
    tensor, index = torch.from_numpy(table), torch.from_numpy(rows)
    peer = seconds(lambda: tensor[index])
    for threads in (1, 2):
        span = seconds(lambda: cpu.gather_rows(table, rows, out, threads=threads))  # noqa: B023
        say(
            f"| gather of 160 B rows, {threads} threads | {count / span / 1e6:.1f} M rows/s | `table[index]`"
            f" {count / peer / 1e6:.1f} M/s | {peer / span:.1f} |"
        )
    tokens, constants = rng.integers(0, 99092, (1, count)), layout()
    span = seconds(lambda: cpu.ngram_hash(tokens, **constants))

    def numpy_hash() -> None:
        padded = np.pad(tokens[0], (2, 0), constant_values=2)
        mix = padded[2:] * constants["multipliers"][0]
        for distance in (1, 2):
            mix = mix ^ (padded[2 - distance : -distance] * constants["multipliers"][distance])
            np.stack([mix % p for p in constants["primes"][distance - 1]], axis=1)

    peer = seconds(numpy_hash, 3)
    say(
        f"| n-gram hash, 16 rows/token | {count / span / 1e6:.1f} M tokens/s | numpy {count / peer / 1e6:.1f} |"
        f" {peer / span:.1f} |"
    )
    num_rows, count = HEAD_ROWS, 500_000
    weight, m = np.zeros((num_rows, WIDTH), np.float32), np.zeros((num_rows, WIDTH), np.float32)
    v, t = np.zeros(num_rows, np.float32), np.zeros(num_rows, np.int32)
    grads, rows = rng.standard_normal((count, WIDTH), dtype=np.float32), skewed_rows(count, num_rows)
    unique, sums = cpu.segment_sum_rows(rows, grads)
    sum_span = seconds(lambda: cpu.segment_sum_rows(rows, grads))
    adam_span = seconds(lambda: cpu.rowwise_adam_(weight, m, v, t, unique, sums, lr=1e-3))
    parameter = torch.nn.Parameter(torch.from_numpy(weight))
    optimizer = torch.optim.SparseAdam([parameter], lr=1e-3)
    parameter.grad = torch.sparse_coo_tensor(
        torch.from_numpy(rows)[None], torch.from_numpy(grads), parameter.shape, check_invariants=False
    )
    peer = seconds(optimizer.step, 2)
    span = sum_span + adam_span
    say(
        f"| segment sum + row-wise Adam, 80-wide, {len(unique) / count:.0%} distinct |"
        f" {count / span / 1e6:.1f} M gradients/s ({count / sum_span / 1e6:.1f}; {len(unique) / adam_span / 1e6:.1f}"
        f" M rows/s) | SparseAdam {count / peer / 1e6:.2f} | {peer / span:.1f} |"
    )


def milliseconds(work: Callable[[], Any], repeats: int = 9) -> float:
    work()
    spans = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        end.record()
        end.synchronize()
        spans.append(start.elapsed_time(end))
    return float(statistics.median(spans))


def gathers(table: torch.Tensor, pages: str) -> None:
    from sparseray.kernels.dse import fetch as gpu

    source = torch.empty(2**28, dtype=torch.uint8, pin_memory=True)
    bulk = source.numel() / milliseconds(lambda: source.cuda(non_blocking=True)) / 1e6
    say(f"\nBulk copy of pinned host memory: {bulk:.1f} GB/s. Table of 4 GiB, random rows.\n")
    say(
        "| gather from host memory | GB/s | of bulk | 8 products of 8192^3 alone / beside it, ms | added / alone |"
    )
    say("|---|---|---|---|---|")
    a, b = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in range(2))

    def work() -> None:
        for _ in range(8):
            a @ b

    alone = milliseconds(work, 5)
    threads = min(16, os.cpu_count() or 1)
    for width, count in ((80, 600_000), (256, 200_000)):
        view = table[: table.numel() // width * width].view(-1, width)
        index = torch.randint(0, len(view), (count,), device="cuda")
        host_index, size = index.cpu().numpy(), count * width * 2
        staged = gpu.StagedRowFetcher(view, max_rows=count, threads=threads, device=torch.device("cuda"))
        forms: list[tuple[str, Callable[[], Callable[[], Any]]]] = []
        for programs, block, warps, ascending in (
            (4, 128, 1, False),
            (16, 128, 1, False),
            (64, 128, 1, False),
            (4, 2048, 16, False),
            (4, 2048, 16, True),
            (16, 2048, 16, True),
        ):
            fetcher = gpu.RowFetcher(view, programs=programs, block=block, warps=warps, ascending=ascending)
            name = f"zero-copy, {programs} programs of {warps} warps{', sorted first' if ascending else ''}"
            forms.append((name, partial(start_direct, fetcher, index)))
        forms.append((f"{threads} CPU threads, DMA", partial(start_staged, staged, host_index)))
        for name, start in forms:

            def beside(start: Callable[[], Callable[[], Any]] = start) -> None:
                wait = start()
                work()
                wait()

            def fetched(start: Callable[[], Callable[[], Any]] = start) -> None:
                start()()
                torch.cuda.synchronize()

            span = 1e3 * seconds(fetched, 5)
            both = milliseconds(beside, 5)
            say(
                f"| {2 * width} B rows, {pages} pages, {name} | {size / span / 1e6:.1f} |"
                f" {size / span / 1e6 / bulk:.0%} | {alone:.1f} / {both:.1f} | {(both - alone) / span:.0%} |"
            )


def start_direct(fetcher: Any, rows: torch.Tensor) -> Callable[[], Any]:
    """Start a zero-copy fetch; the result waits for it."""
    wait: Callable[[], Any] = fetcher.fetch(rows).wait
    return wait


def start_staged(fetcher: Any, rows: np.ndarray) -> Callable[[], Any]:
    """Start a staged fetch; the result waits for it."""
    future = fetcher.fetch(rows)
    return lambda: future.result().wait()


def steps(table: torch.Tensor) -> None:
    """A step of 16,384 tokens at more than 100k tokens/s; rows of the next step are fetched under it."""
    from sparseray.kernels.dse import fetch as gpu

    tokens = 16_384
    view = table[: table.numel() // WIDTH * WIDTH].view(-1, WIDTH)
    resident = view.cuda()
    index = [torch.randint(0, len(view), (tokens * ROWS_PER_TOKEN,), device="cuda") for _ in range(2)]
    host = [i.cpu().numpy() for i in index]
    a, b = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in range(2))
    used = torch.empty((), device="cuda")
    threads = min(16, os.cpu_count() or 1)
    staged = gpu.StagedRowFetcher(view, max_rows=len(host[0]), threads=threads, device=torch.device("cuda"))
    fetchers = {n: gpu.RowFetcher(view, programs=n, block=128, warps=1) for n in (16, 64)}

    def model(rows: torch.Tensor) -> None:
        used.add_(rows[::64].float().sum())
        for _ in range(90):
            a @ b

    def on_gpu(count: int) -> None:
        for step in range(count):
            model(resident[index[step % 2]])

    def zero_copy(count: int, programs: int) -> None:
        ahead = fetchers[programs].fetch(index[0])
        for step in range(count):
            rows = ahead.wait()
            ahead = fetchers[programs].fetch(index[(step + 1) % 2])
            model(rows)
        ahead.wait()

    def by_threads(count: int) -> None:
        ahead = staged.fetch(host[0])
        for step in range(count):
            rows = ahead.result().wait()
            ahead = staged.fetch(host[(step + 1) % 2])
            model(rows)
        ahead.result().wait()

    forms: list[tuple[str, Callable[[int], None]]] = [
        ("table on the GPU", on_gpu),
        ("host, zero-copy, 16 programs of one warp", lambda n: zero_copy(n, 16)),
        ("host, zero-copy, 64 programs of one warp", lambda n: zero_copy(n, 64)),
        (f"host, {threads} CPU threads and DMA", by_threads),
        ("table on the GPU, again", on_gpu),
    ]
    say(
        f"\nStep of {tokens} tokens, {ROWS_PER_TOKEN} rows of {2 * WIDTH} B per token, four steps in a row.\n"
    )
    say("| table | ms/step | tokens/s | against the GPU table |")
    say("|---|---|---|---|")
    base = 0.0
    for name, form in forms:
        span = milliseconds(partial(form, 4), 3) / 4
        base = base or span
        say(f"| {name} | {span:.2f} | {tokens / span * 1e3:,.0f} | {span / base - 1:+.2%} |")


def fused() -> None:
    from sparseray.kernels.dse import fusion, reference
    from sparseray.kernels.dse import rows as gpu

    say("\n| fused operation | ours ms | plain torch ms | ratio |")
    say("|---|---|---|---|")
    h, key_value = (torch.randn(4, 4096, n * 2560, device="cuda").bfloat16() for n in (1, 2))
    weight, ones = torch.randn(2560, 4, device="cuda"), torch.ones(2560, device="cuda")
    learnt = reference.Fusion(
        query_norm_C=ones, key_norm_C=ones, value_norm_C=ones, conv_CK=weight, dilation=3,
        gate_eps=1.1920929e-07, conv_eps=1e-5,
    )  # fmt: skip
    ours = milliseconds(lambda: fusion.memory_output(h, key_value, learnt))
    key, value = key_value.chunk(2, -1)
    plain = milliseconds(lambda: reference.memory_output(h, key, value, learnt))
    say(f"| gate and convolution, 16,384 x 2560 (forward) | {ours:.3f} | {plain:.3f} | {plain / ours:.1f} |")
    constants = layout()
    tokens = torch.randint(0, 99092, (4, 65536), device="cuda")
    names = ("multipliers", "primes", "offsets")
    multipliers, primes, offsets = (torch.tensor(constants[n], device="cuda") for n in names)
    ours = milliseconds(
        lambda: gpu.ngram_hash(
            tokens, multipliers=multipliers, orders=(2, 3), primes_OH=primes, offsets_OH=offsets, pad=2
        )
    )
    plain = milliseconds(lambda: reference.ngram_hash(tokens, **constants))
    say(f"| n-gram hash, 262,144 tokens, 16 rows each | {ours:.3f} | {plain:.3f} | {plain / ours:.1f} |")
    index = torch.from_numpy(skewed_rows(262_144, HEAD_ROWS)).cuda()
    grads = torch.randn(262_144, WIDTH, device="cuda")
    ours = milliseconds(lambda: gpu.segment_sum_rows(index, grads))

    def scatter() -> None:
        unique, inverse = torch.unique(index, return_inverse=True)
        torch.zeros(len(unique), WIDTH, device="cuda").index_add_(0, inverse, grads)

    plain = milliseconds(scatter)
    say(
        f"| segment sum of 262,144 gradients (torch: atomics) | {ours:.3f} | {plain:.3f} | {plain / ours:.1f} |"
    )


def make_tables() -> tuple[torch.Tensor, torch.Tensor]:
    """4 GiB of pinned host memory twice: as the driver allocates it, and with huge pages."""
    from sparseray.kernels.dse import rows as gpu

    tables = (
        torch.empty(2**31, dtype=torch.bfloat16, pin_memory=True),
        gpu.host_table(1, 2**31, torch.bfloat16)[0],
    )
    for table in tables:
        table.view(torch.int64).fill_(0x3F803F803F803F80)
    lines_of = Path("/proc/meminfo").read_text().splitlines()
    say("; ".join(" ".join(line.split()) for line in lines_of if line.startswith("AnonHuge")))
    return tables


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="also write the tables to this file")
    parser.add_argument("--cpu", action="store_true", help="time the CPU path although there is a GPU")
    arguments = parser.parse_args()
    start = time.perf_counter()
    gpu = torch.cuda.is_available() and not arguments.cpu
    device = torch.cuda.get_device_name() if gpu else f"{os.cpu_count()} CPU cores ({platform.machine()})"
    say(f"# DSE kernels on {device}: torch {torch.__version__}\n")
    if gpu:
        small, huge = make_tables()
        parts = (lambda: gathers(small, "small"), lambda: gathers(huge, "huge"), lambda: steps(huge), fused)
        for part in parts:
            try:
                part()
            except Exception as error:
                say(f"\nfailed: {type(error).__name__}: {str(error)[:300]}\n")
    else:
        on_cpu()
    say(f"\nWhole run: {time.perf_counter() - start:.0f} s.")
    if arguments.out:
        arguments.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
