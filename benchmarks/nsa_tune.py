"""Times every NSA kernel at several launch parameters, to choose those in sparseray/kernels/nsa/tuning.py.

Run: `python -m benchmarks.nsa_tune [--tokens 65536] [--heads 64 4 128] [kernel ...]`. Compiles in parallel first, then times one
kernel after the other; a variant that does not compile or does not fit is reported and passed over.
"""

import argparse
import concurrent.futures
import multiprocessing
from collections.abc import Callable, Iterable
from itertools import product

import torch
from triton.testing import do_bench

from sparseray.kernels.nsa.gates import combine, prepare_backward
from sparseray.kernels.nsa.geometry import COMPRESSED, WINDOW, query_positions, uniform
from sparseray.kernels.nsa.range_backward import range_backward
from sparseray.kernels.nsa.range_forward import range_forward
from sparseray.kernels.nsa.selected_backward import selected_backward
from sparseray.kernels.nsa.selected_forward import selected_forward, selected_query_gradient
from sparseray.kernels.nsa.top_n import select_blocks
from sparseray.kernels.nsa.tuning import LAUNCH
from sparseray.kernels.settings import num_compressed

TILES = [
    (128, 64, 8, 2), (128, 64, 4, 2), (256, 64, 8, 2), (128, 128, 8, 2), (64, 64, 4, 2), (64, 128, 4, 2),
    (128, 64, 4, 3), (128, 128, 4, 2), (64, 128, 4, 3), (64, 256, 4, 2), (128, 128, 8, 3), (256, 128, 8, 2),
]  # fmt: skip
KEYS = [(128, 2), (64, 4), (64, 3), (64, 2)]
GATHERS = [(32, 1, 2), (32, 1, 3), (32, 1, 5), (32, 2, 3), (64, 1, 3), (64, 1, 5), (16, 1, 5)]


def _named(names: tuple[str, ...], choices: Iterable[tuple[int, ...]]) -> list[dict[str, int]]:
    return [dict(zip(names, choice)) for choice in choices]


VARIANTS: dict[str, list[dict[str, int]]] = {
    "range_pipelined": _named(("keys", "num_stages"), KEYS),
    "window_pipelined": _named(("keys", "num_stages"), KEYS),
    "range_pipelined_dq": _named(("keys", "num_stages"), KEYS),
    "window_pipelined_dq": _named(("keys", "num_stages"), KEYS),
    "range_pipelined_dkdv": _named(("num_stages", "programs"), product((2, 3), (1056, 2112, 4224))),
    "window_pipelined_dkdv": _named(("num_stages",), [(2,), (3,)]),
    "score": _named(("rows", "keys", "num_warps", "num_stages"), TILES),
    "top_n": _named(("num_warps",), [(1,), (2,), (4,)]),
    "selected_fwd_bulk": _named(("keys", "num_warps", "num_stages"), GATHERS),
    "selected_dq_bulk": _named(("keys", "num_warps", "num_stages"), GATHERS),
    "selected_pipelined_dkdv": _named(("num_stages", "part"), product((3, 4), (512, 1024, 2048))),
    "combine": _named(("rows", "num_warps"), [(16, 4), (32, 4), (64, 4), (64, 8)]),
}


def cases(tokens: int, sizes: tuple[int, int, int]) -> dict[str, Callable[[], object]]:
    """One call per kernel for so many tokens, and query heads, key heads and channels; backward cases time dq and dk/dv
    together."""
    heads, num_kv, width = sizes
    scale = width**-0.5
    device, dtype = torch.device("cuda"), torch.bfloat16
    count = num_compressed(tokens, 32, 16)
    geometry = uniform(1, tokens, count, tokens, tokens, 0, 0, device)

    def rand(n: int, h: int) -> torch.Tensor:
        return torch.randn(n, h, width, device=device, dtype=dtype)

    q, do = rand(tokens, heads), rand(tokens, heads)
    k, v, kc, vc = (rand(n, num_kv) for n in (tokens, tokens, count, count))
    gates = torch.rand(tokens, heads, 3, device=device, dtype=dtype)
    cmp = {"kind": COMPRESSED, "block": 32, "stride": 16, "window": 0, "scale": scale}
    win = {"kind": WINDOW, "block": 1, "stride": 1, "window": 512, "scale": scale}
    sel = {"select_block": 64, "scale": scale}
    top = {
        "block": 32,
        "stride": 16,
        "select_block": 64,
        "num_selected": 16,
        "num_initial": 1,
        "num_local": 2,
        "scale": scale,
    }
    o_cmp, lse_cmp = range_forward(q, kc, vc, geometry, **cmp)
    index = select_blocks(q, kc, lse_cmp, geometry, **top)
    positions = query_positions(geometry)
    o_win, lse_win = range_forward(q, k, v, geometry, **win)
    last = ((o_cmp, o_win), gates)
    _, o_slc, lse_slc = selected_forward(q, k, v, index, positions, geometry, *last, keep=True, **sel)
    outs, lses = (o_cmp, o_slc, o_win), (lse_cmp, lse_slc, lse_win)
    lse, dg, _ = prepare_backward(do, outs, lses, gates)
    dq = torch.empty_like(q)

    def back(k_: torch.Tensor, v_: torch.Tensor, c: int, kw: dict[str, object]) -> object:
        return range_backward(q, k_, v_, do, lse[c], dg[c], dq, geometry, add=False, **kw)  # type: ignore[arg-type]

    return {
        "range_pipelined": lambda: range_forward(q, kc, vc, geometry, **cmp),
        "window_pipelined": lambda: range_forward(q, k, v, geometry, **win),
        "range_pipelined_dq": lambda: back(kc, vc, 0, cmp),
        "range_pipelined_dkdv": lambda: back(kc, vc, 0, cmp),
        "window_pipelined_dq": lambda: back(k, v, 2, win),
        "window_pipelined_dkdv": lambda: back(k, v, 2, win),
        "score": lambda: select_blocks(q, kc, lse_cmp, geometry, **top),
        "top_n": lambda: select_blocks(q, kc, lse_cmp, geometry, **top),
        "selected_fwd_bulk": lambda: selected_forward(
            q, k, v, index, positions, geometry, *last, keep=False, **sel
        ),
        "selected_dq_bulk": lambda: selected_query_gradient(
            q, k, v, do, lse[1], dg[1], dq, index, positions, geometry, add=False, **sel
        ),
        "selected_pipelined_dkdv": lambda: selected_backward(
            q, k, v, do, lse[1], dg[1], dq, index, positions, geometry, add=False, **sel
        ),
        "combine": lambda: (combine(*outs, gates), prepare_backward(do, outs, lses, gates)),
    }


def try_variant(name: str, call: Callable[[], object], variant: dict[str, int], time: bool) -> float | str:
    """Median milliseconds, or why the variant does not run."""
    saved = dict(LAUNCH[name])
    LAUNCH[name].update(variant)
    try:
        call()
        torch.cuda.synchronize()
        return float(do_bench(call, warmup=20, rep=60, return_mode="median")) if time else 0.0
    except (
        Exception
    ) as error:  # A variant may fail in the compiler in many ways; the next one must still run.
        return f"{type(error).__name__}: {str(error)[:80]}"
    finally:
        LAUNCH[name].clear()
        LAUNCH[name].update(saved)


def compile_all(job: tuple[str, int, int, tuple[int, int, int]]) -> None:
    """Fill the compile cache with one variant."""
    name, number, tokens, sizes = job
    try_variant(name, cases(tokens, sizes)[name], VARIANTS[name][number], time=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--heads", type=int, nargs=3, default=(64, 4, 128))
    parser.add_argument("--workers", type=int, default=14)
    parser.add_argument("kernels", nargs="*", default=list(VARIANTS))
    args = parser.parse_args()
    heads, num_kv, width = args.heads
    sizes = (heads, num_kv, width)
    jobs = [(name, i, args.tokens, sizes) for name in args.kernels for i in range(len(VARIANTS[name]))]
    cases(args.tokens, sizes)
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(args.workers, mp_context=context) as pool:
        list(pool.map(compile_all, jobs))
    calls = cases(args.tokens, sizes)
    for name in args.kernels:
        for variant in VARIANTS[name]:
            result = try_variant(name, calls[name], variant, time=True)
            shown = f"{result:8.3f} ms" if isinstance(result, float) else result
            print(f"{name:23} {' '.join(f'{k}={v}' for k, v in variant.items()):44} {shown}", flush=True)


if __name__ == "__main__":
    main()
