"""Times the decode form of the expert layer piece by piece, to choose the tiles in sparseray/kernels/moe/decode.py.

Run: `python -m benchmarks.moe_tune [--tokens 8 64 512] [--workers 14]` on a GPU. Compiles in parallel first, then
times each product with each tile in a CUDA graph over four layers' weights; a tile that does not fit is reported.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import multiprocessing
import statistics
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from sparseray.kernels.moe.decode import SORTED_ROWS, moe_ffn_decode, plan_few_rows
from sparseray.kernels.moe.expert_map import ExpertPlan, plan_experts
from sparseray.kernels.moe.ffn import LayerConfig, TileConfig, combine, project_rows, up_project

EXPERTS, TOP_K, INTER, HIDDEN, LAYERS = 128, 8, 768, 2048, 4
PEAK_TBS = 4.8
ROWS = (16, 32, 64)
TILES: dict[str, list[tuple[int, int, int, int]]] = {
    "up": [
        (64, 128, 4, 3),
        (64, 64, 4, 4),
        (32, 128, 4, 4),
        (64, 64, 4, 6),
        (32, 256, 4, 3),
        (128, 64, 8, 4),
    ],
    "down": [
        (128, 128, 4, 3),
        (128, 64, 4, 5),
        (64, 128, 4, 4),
        (64, 256, 4, 2),
        (256, 64, 8, 4),
        (128, 64, 8, 6),
    ],
}
"""Columns, depth, warps, stages."""

Variant = tuple[str, int, tuple[int, int, int, int]]
VARIANTS: list[Variant] = [(n, m, t) for n, tiles in TILES.items() for m, t in product(ROWS, tiles)]


class Case:
    """Inputs of one decode step of `tokens` tokens through LAYERS layers."""

    def __init__(self, tokens: int, layers: int = LAYERS, device: str = "cuda") -> None:
        def rand(*shape: int) -> Tensor:
            return torch.randn(*shape, device=device, dtype=torch.bfloat16) * 0.02

        self.up = [rand(EXPERTS, 2 * INTER, HIDDEN) for _ in range(layers)]
        self.down = [rand(EXPERTS, HIDDEN, INTER) for _ in range(layers)]
        self.x, self.act = rand(tokens, HIDDEN), rand(tokens * TOP_K, INTER)
        self.y, self.weights = rand(tokens * TOP_K, HIDDEN), torch.rand(tokens, TOP_K, device=device)
        self.ids = [
            torch.rand(tokens, EXPERTS, device=device).topk(TOP_K, dim=1).indices for _ in range(layers)
        ]

    def plan(self, ids: Tensor, rows: int) -> ExpertPlan:
        """The map that decoding makes for this many pairs."""
        make = plan_few_rows if ids.numel() <= SORTED_ROWS else plan_experts
        return make(ids, EXPERTS, tile_rows=rows)

    def touched_bytes(self) -> float:
        """Weights of the experts that a layer's tokens chose, mean over layers."""
        chosen: int = sum(i.unique().numel() for i in self.ids)
        return chosen / len(self.ids) * 3 * HIDDEN * INTER * 2


def one_product(case: Case, variant: Variant) -> Callable[[], None]:
    """One grouped product of every layer with the variant's tile."""
    name, rows, (n, k, warps, stages) = variant
    tile = TileConfig(n=n, k=k, group=4, warps=warps, stages=stages)
    config = LayerConfig(m=rows, up=tile, down=tile, act_grad=tile, input_grad=tile)
    plans = [case.plan(ids, rows) for ids in case.ids]

    def run() -> None:
        for up, down, plan in zip(case.up, case.down, plans):
            if name == "up":
                up_project(case.x, up, plan, config, save=False)
            else:
                project_rows(case.act, down, plan, config, tile, transposed=True)

    return run


def around(case: Case) -> dict[str, Callable[[], Any]]:
    """What else a step does, and the whole of it as it is now."""
    plans = [case.plan(ids, 32) for ids in case.ids]

    def whole() -> None:
        for ids, up, down in zip(case.ids, case.up, case.down):
            moe_ffn_decode(case.x, ids, case.weights, up, down)

    return {
        "map": lambda: [case.plan(ids, 32) for ids in case.ids],
        "combine": lambda: [combine(case.y, plan, case.weights) for plan in plans],
        "whole step": whole,
    }


def graph_us(work: Callable[[], Any], repeats: int = 15) -> float:
    """Median microseconds per layer of the work replayed from a CUDA graph."""
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    spans = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        spans.append(start.elapsed_time(end))
    return float(statistics.median(spans)) * 1e3 / LAYERS


def attempt(work: Callable[[], Any]) -> float | str:
    """The work's result, or why the variant does not run."""
    try:
        return float(work() or 0.0)
    except Exception as error:  # A variant may fail in the compiler in many ways; the next must still run.
        return f"{type(error).__name__}: {str(error)[:80]}"


def compile_variants(variants: list[Variant]) -> None:
    """Fill the compile cache; tokens' number is no compile-time constant."""
    case = Case(64, layers=1)
    for variant in variants:
        attempt(lambda: one_product(case, variant)())  # noqa: B023


def report(tokens: int, timed: Callable[[Callable[[], Any]], float] = graph_us) -> None:
    """Print every piece for one number of tokens, the products' tiles from the fastest on."""
    case = Case(tokens)
    bound = case.touched_bytes() / PEAK_TBS / 1e6
    print(f"\nB={tokens}: weights alone {bound:.0f} us at {PEAK_TBS} TB/s", flush=True)
    for name, work in around(case).items():
        print(f"  {name}: {attempt(partial(timed, work))} us", flush=True)
    for name, share in (("up", 2 / 3), ("down", 1 / 3)):
        found: list[tuple[float, Variant]] = []
        for variant in VARIANTS:
            if variant[0] == name:
                span = attempt(lambda: timed(one_product(case, variant)))  # noqa: B023
                if isinstance(span, str):
                    print(f"  {variant}: {span}", flush=True)
                else:
                    found.append((span, variant))
        for span, variant in sorted(found)[:5]:
            print(f"  {variant}: {span:.1f} us, {bound * share / span:.0%} of the bound", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[8, 16, 64, 256, 512])
    parser.add_argument("--workers", type=int, default=14)
    arguments = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(arguments.workers, mp_context=context) as pool:
        list(pool.map(compile_variants, [VARIANTS[i :: arguments.workers] for i in range(arguments.workers)]))
    torch.manual_seed(0)
    for tokens in arguments.tokens:
        report(tokens)


if __name__ == "__main__":
    main()
