"""Times the six grouped products of the expert layer with several tiles, to choose those of a shape in kernels/moe/ffn.py.

Run: `python -m benchmarks.moe_layer_tune [--shape 32768 64 6 1024 512] [--workers 14]` on a GPU. Compiles in parallel
first; a tile that does not fit is reported. `up_slab` is the gradient of up and gate added to an fp32 slab.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import multiprocessing
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from benchmarks.moe import milliseconds
from sparseray.kernels.moe.expert_map import plan_experts
from sparseray.kernels.moe.ffn import (
    HOPPER,
    GradientTile,
    TileConfig,
    activation_grad,
    project_rows,
    up_project,
    weight_grad,
)

TILES: dict[str, list[tuple[int, ...]]] = {
    "up": [(128, 64, 8, 4), (128, 64, 8, 3), (64, 64, 4, 3), (64, 64, 8, 3, 128)],
    "down": [(256, 64, 8, 4), (128, 64, 4, 3), (128, 64, 8, 3, 128)],
    "act_grad": [(256, 64, 8, 4), (256, 64, 8, 3), (128, 64, 8, 3, 128), (128, 64, 4, 3), (128, 32, 4, 4), (128, 64, 4, 2, 168)],
    "prefetched": [(256, 64, 8, 4), (256, 64, 8, 3), (128, 64, 8, 3, 128), (128, 64, 4, 3), (128, 32, 4, 4), (128, 64, 4, 2, 168)],
    "input_grad": [(256, 64, 8, 3), (256, 64, 8, 4), (128, 64, 8, 3, 128)],
}  # fmt: skip
"""Columns, depth, warps, stages, registers; "prefetched" is the activation gradient that asks for its pre-activations."""
GRADIENT_TILES = [
    (256, 128, 64, 8, 4), (256, 128, 64, 8, 3), (128, 256, 64, 8, 4), (128, 128, 64, 4, 2, 168), (128, 128, 64, 4, 3),
    (128, 128, 32, 4, 4), (256, 128, 32, 8, 6), (128, 128, 64, 8, 3, 128),
]  # fmt: skip
"""Of the weight gradients: columns of the sorted rows, columns of the tokens, depth, warps, stages, registers."""

Variant = tuple[str, tuple[int, ...]]
GRADIENTS = ("up_weights", "down_weights", "up_slab")
VARIANTS: list[Variant] = [(name, tile) for name, tiles in TILES.items() for tile in tiles] + [
    (name, tile) for name in GRADIENTS for tile in GRADIENT_TILES
]
Shape = tuple[int, int, int, int, int]


class Case:
    """Inputs of every product for tokens, experts, top-k, hidden, inter."""

    def __init__(self, shape: Shape) -> None:
        T, E, K, H, I = shape

        def rand(*sizes: int) -> torch.Tensor:
            return torch.randn(*sizes, device="cuda", dtype=torch.bfloat16) * 0.05

        self.x, self.up, self.down = rand(T, H), rand(E, 2 * I, H), rand(E, H, I)
        self.act, self.pre = rand(T * K, I), rand(T * K, 2 * I)
        self.weights = torch.rand(T, K, device="cuda")
        self.slab = torch.zeros(E, 2 * I, H, device="cuda")
        ids = torch.rand(T, E, device="cuda").topk(K, dim=1).indices
        self.plan = plan_experts(ids, E, tile_rows=HOPPER.m)
        self.work = 2 * T * K * H * I

    def product(self, variant: Variant) -> tuple[Callable[[], Any], int]:
        """The product with this tile, and its operations."""
        name, numbers = variant
        keys = ("n", "k", "warps", "stages", "registers")
        if name in GRADIENTS:
            tile: TileConfig = GradientTile(group=8, **dict(zip(("rows", *keys), numbers)))
        else:
            tile = TileConfig(group=8, **dict(zip(keys, numbers)))
        field = {"prefetched": "act_grad", "up_slab": "up_weights"}.get(name, name)
        chosen: dict[str, Any] = {field: tile, "prefetch": name == "prefetched"}
        config, plan = replace(HOPPER, **chosen), self.plan
        gradient = (self.x, self.pre, self.down, self.weights, plan, config)
        into_slab: dict[str, Any] = {"out": self.slab, "accumulate": True}
        forms: dict[str, tuple[Callable[[], Any], int]] = {
            "up": (lambda: up_project(self.x, self.up, plan, config, save=True), 2),
            "down": (lambda: project_rows(self.act, self.down, plan, config, tile, transposed=True), 1),
            "act_grad": (lambda: activation_grad(*gradient), 1),
            "prefetched": (lambda: activation_grad(*gradient), 1),
            "input_grad": (lambda: project_rows(self.pre, self.up, plan, config, tile, transposed=False), 2),
            "up_weights": (lambda: weight_grad(self.pre, self.x, plan, config, rows_first=True), 2),
            "down_weights": (lambda: weight_grad(self.act, self.x, plan, config, rows_first=False), 1),
            "up_slab": (lambda: weight_grad(self.pre, self.x, plan, config, rows_first=True, **into_slab), 2),
        }
        form, products = forms[name]
        return form, products * self.work


def attempt(work: Callable[[], Any]) -> Any:
    """The work's result, or why the variant does not run."""
    try:
        return work()
    except Exception as error:  # A variant may fail in the compiler in many ways; the next must still run.
        return f"{type(error).__name__}: {str(error)[:80]}"


def compile_variants(job: tuple[Shape, list[Variant]]) -> None:
    """Fill the compile cache; the number of tokens is no compile-time constant."""
    case = Case((256, *job[0][1:]))
    for variant in job[1]:
        attempt(case.product(variant)[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", type=int, nargs=5, default=[32768, 64, 6, 1024, 512])
    parser.add_argument("--workers", type=int, default=14)
    arguments = parser.parse_args()
    T, E, K, H, I = arguments.shape
    shape = (T, E, K, H, I)
    jobs = [(shape, VARIANTS[i :: arguments.workers]) for i in range(arguments.workers)]
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(arguments.workers, mp_context=context) as pool:
        list(pool.map(compile_variants, jobs))
    torch.manual_seed(0)
    case = Case(shape)
    for variant in VARIANTS:
        form, work = case.product(variant)
        ms = attempt(lambda: milliseconds(form, 7))  # noqa: B023
        rate = f"{work / ms / 1e9:.0f} TFLOP/s" if isinstance(ms, float) else ""
        print(variant, f"{ms:.3f} ms" if isinstance(ms, float) else ms, rate, flush=True)


if __name__ == "__main__":
    main()
