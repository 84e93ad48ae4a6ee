"""Native sparse attention against full attention by cuDNN and FlashAttention-2, in one run on one GPU.

Run: `python -m benchmarks.nsa [--out FILE]` (under eight minutes). Checks outputs and gradients against the
fp64 reference first; then times forward and backward at 8k to 64k, every stage, the shapes of small groups
and of the paper, decoding in a CUDA graph, prefill, fla's NSA where it is installed, and peak memory. Times are
medians of CUDA events; compression is included in every NSA total. Calls are timed twice: queued behind each other,
as the layers of a model are, and alone on an idle device, where the host's path to the first kernel counts too.
"""

import argparse
import importlib.metadata
import math
import multiprocessing
import os
import statistics
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from unittest import mock

import torch
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.nsa_serving import SIZES, best, decode_rows, paged_check_rows, prefill_rows, rand
from sparseray.kernels.nsa import branches
from sparseray.kernels.nsa.attention import nsa_layer
from sparseray.kernels.nsa.reference import Compression, compress_reference, nsa_attention_reference
from sparseray.kernels.settings import num_compressed

HIDDEN = 256
BATCHES = [1, 16, 32, 64]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Heads and head sizes of one benchmark."""

    name: str
    heads: int = 64
    num_kv: int = 4
    width: int = 128
    value: int = 128
    smooth: bool = False


STANDARD = Shape(name="64 heads, 4 KV heads, D=128")
OTHERS = [
    Shape(name="the same, smoothed q and k", smooth=True),
    Shape(name="32 heads, 8 KV heads, D=128", heads=32, num_kv=8),
    Shape(name="64 heads, 4 KV heads, 192/128", width=192),
]
WARM_JOBS = len(BATCHES) + len(OTHERS) + 1


def smoothed(x: Tensor) -> Tensor:
    """A moving sum over 64 neighbouring tokens, rescaled to unit variance."""
    total = torch.nn.functional.pad(x.float().cumsum(1), (0, 0, 0, 0, 64, 0))
    return ((total[:, 64:] - total[:, :-64]) / 8.0).to(x.dtype)


def inputs(shape: Shape, tokens: int) -> list[Tensor]:
    """q, k, v of the three branches' shared tokens, gates, and the parameters of both compressions."""
    q, k = rand(1, tokens, shape.heads, shape.width), rand(1, tokens, shape.num_kv, shape.width)
    if shape.smooth:
        q, k = smoothed(q), smoothed(k)
    v = rand(1, tokens, shape.num_kv, shape.value)
    gates = torch.rand(1, tokens, shape.heads, 3, device="cuda", dtype=torch.bfloat16)
    found = [q, k, v, gates]
    for width in (shape.width, shape.value):
        span = SIZES.block * width
        found += [
            rand(HIDDEN, span) / span**0.5,
            rand(width, HIDDEN) / HIDDEN**0.5,
            rand(SIZES.block, width),
        ]
    return [x.detach().requires_grad_() for x in found]


def run_nsa(x: list[Tensor]) -> Tensor:
    """The whole layer: both compressions and the three branches, which share k and v."""
    q, k, v, gates, w1, w2, pos, u1, u2, vpos = x
    keys = Compression(w1=w1, b1=None, w2=w2, b2=None, pos=pos)
    values = Compression(w1=u1, b1=None, w2=u2, b2=None, pos=vpos)
    return nsa_layer(q, k, v, k, v, k, v, gates, SIZES, keys=keys, values=values)


def run_full(x: list[Tensor], backend: SDPBackend) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in x[:3])
    with sdpa_kernel(backend):
        return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def alone_ms(call: Callable[[], object], budget_ms: float = 400.0) -> float:
    """Median of CUDA-event times of calls into an idle device, after one warm-up call."""
    call()
    torch.cuda.synchronize()
    times: list[float] = []
    while len(times) < 3 or (sum(times) < budget_ms and len(times) < 50):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def queued_ms(call: Callable[[], object], alone: float, budget_ms: float = 400.0) -> float:
    """Median of CUDA-event times of calls queued behind each other; `alone` sets how many. The first, which the
    device waits for, does not count."""
    count = min(50, max(3, int(budget_ms / alone)))
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 2)]
    for mark in marks:
        mark.record()
        if mark is not marks[-1]:
            call()
    torch.cuda.synchronize()
    times: list[float] = [a.elapsed_time(b) for a, b in pairwise(marks[1:])]
    return statistics.median(times)


@dataclass(frozen=True, kw_only=True)
class Times:
    """Milliseconds of forward and backward, queued and alone, and the peak extra GB of both."""

    fwd: float = math.nan
    bwd: float = math.nan
    lone_fwd: float = math.nan
    lone_bwd: float = math.nan
    peak: float = math.nan


def forward_backward(run: Callable[[list[Tensor]], Tensor], x: list[Tensor]) -> Times:
    with torch.no_grad():
        lone_fwd = alone_ms(lambda: run(x))
        fwd = queued_ms(lambda: run(x), lone_fwd)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    base = torch.cuda.memory_allocated()
    out = run(x)
    grad = torch.randn_like(out)
    used = [t for t in x if t.requires_grad]

    def backward() -> object:
        return torch.autograd.grad(out, used, grad, retain_graph=True, allow_unused=True)

    lone_bwd = alone_ms(backward)
    peak = (torch.cuda.max_memory_allocated() - base) / 1e9
    bwd = queued_ms(backward, lone_bwd)
    return Times(fwd=fwd, bwd=bwd, lone_fwd=lone_fwd, lone_bwd=lone_bwd, peak=peak)


def nsa_tflop(shape: Shape, tokens: int) -> float:
    """Forward TFLOP of the three branches and of the score recomputation, 2 per multiply and add."""
    pairs_cmp = sum(num_compressed(t, 32, 16) for t in range(64, tokens + 1, 64)) * 64
    pairs_slc = sum(min(t, 16 * 64) for t in range(64, tokens + 1, 64)) * 64
    pairs_win = sum(min(t, 512) for t in range(64, tokens + 1, 64)) * 64
    both, keys = shape.width + shape.value, shape.width
    return 2.0 * shape.heads * ((pairs_cmp + pairs_slc + pairs_win) * both + pairs_cmp * keys) / 1e12


def ceilings() -> tuple[float, float]:
    """Measured bf16 matrix TFLOP/s and device copy TB/s."""
    a, b = rand(8192, 8192), rand(8192, 8192)
    gemm = 2 * 8192**3 / alone_ms(lambda: a @ b) / 1e9
    x, y = (
        torch.empty(2**30, dtype=torch.uint8, device="cuda"),
        torch.empty(2**30, dtype=torch.uint8, device="cuda"),
    )
    return gemm, 2 * 2**30 / alone_ms(lambda: y.copy_(x)) / 1e9


def check_rows() -> list[str]:
    """Relative errors against fp64 where every block is selected, and whether two runs give the same bits."""
    rows = ["| dtype, shape | output | worst gradient | same bits twice |", "|---|---|---|---|"]
    for dtype, shape in [(d, s) for d in (torch.bfloat16, torch.float16) for s in (STANDARD, *OTHERS[1:])]:
        torch.manual_seed(0)
        x = [t.detach().to(dtype).requires_grad_() for t in inputs(shape, 1001)]
        exact = [t.detach().double().requires_grad_() for t in x]
        q, k, v, gates, w1, w2, pos, u1, u2, vpos = exact
        kc = compress_reference(k, w1, None, w2, None, pos, 32, 16)
        vc = compress_reference(v, u1, None, u2, None, vpos, 32, 16)
        ref = nsa_attention_reference(q, kc, vc, k, v, k, v, gates, SIZES)
        grad = rand(*ref.shape, dtype=dtype)
        wanted = (ref, *torch.autograd.grad(ref, exact, grad.double()))
        found = []
        # So short a sequence would take the dense kernel; the ones that select are to be checked.
        with mock.patch.object(branches, "selects_all", return_value=False):
            for _ in range(2):
                out = run_nsa(x)
                found.append((out, *torch.autograd.grad(out, x, grad)))
        errors = [
            float((a.detach().double() - b.detach()).norm() / b.detach().norm())
            for a, b in zip(found[0], wanted)
        ]
        same = all(torch.equal(a, b) for a, b in zip(*found))
        rows.append(f"| {dtype}, {shape.name} | {errors[0]:.1e} | {max(errors[1:]):.1e} | {same} |")
    return rows


def shape_rows(shape: Shape, lengths: list[int], gemm: float) -> list[str]:
    """One row a length: NSA, cuDNN and FlashAttention-2, and the ratios to the better of the two."""
    rows = [
        f"### {shape.name}",
        "| tokens | cuDNN fwd / bwd ms | FA2 fwd / bwd ms | NSA fwd / bwd ms | **ratio fwd / bwd** | alone: cuDNN fwd"
        " / bwd, NSA fwd / bwd ms | ratio | NSA fwd TFLOP/s (share of matrix ceiling) | peak extra GB, NSA / cuDNN |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for tokens in lengths:
        results: dict[str, Times] = {}
        for name, call in (
            ("nsa", run_nsa),
            ("cudnn", partial(run_full, backend=SDPBackend.CUDNN_ATTENTION)),
            ("fa2", partial(run_full, backend=SDPBackend.FLASH_ATTENTION)),
        ):
            torch.manual_seed(0)
            x = inputs(shape, tokens)
            try:
                results[name] = forward_backward(call, x if name == "nsa" else x[:3])
            except RuntimeError as error:
                print(f"{name} at {tokens}, {shape.name}: {str(error)[:200]}", flush=True)
                results[name] = Times()
        nsa, cudnn, fa2 = results["nsa"], results["cudnn"], results["fa2"]
        rate = nsa_tflop(shape, tokens) / nsa.fwd * 1e3
        rows.append(
            f"| {tokens} | {cudnn.fwd:.2f} / {cudnn.bwd:.2f} | {fa2.fwd:.2f} / {fa2.bwd:.2f} | {nsa.fwd:.2f} /"
            f" {nsa.bwd:.2f} | **{best(cudnn.fwd, fa2.fwd) / nsa.fwd:.2f}x / {best(cudnn.bwd, fa2.bwd) / nsa.bwd:.2f}x**"
            f" | {cudnn.lone_fwd:.2f} / {cudnn.lone_bwd:.2f}, {nsa.lone_fwd:.2f} / {nsa.lone_bwd:.2f} |"
            f" {best(cudnn.lone_fwd, fa2.lone_fwd) / nsa.lone_fwd:.2f}x /"
            f" {best(cudnn.lone_bwd, fa2.lone_bwd) / nsa.lone_bwd:.2f}x | {rate:.0f} ({rate / gemm:.0%}) |"
            f" {nsa.peak:.2f} / {cudnn.peak:.2f} |"
        )
        print(rows[-1], flush=True)
    return rows


def fla_rows(lengths: list[int]) -> list[str]:
    """fla's NSA: mean pooling over l = d = 64, no window (that needs flash-attn); ours has both."""
    from fla.ops.nsa import parallel_nsa  # type: ignore[import-not-found]

    def run_fla(x: list[Tensor]) -> Tensor:
        q, k, v, g = x
        found = parallel_nsa(q, k, v, g[..., 0].contiguous(), g[..., 1].contiguous(), block_size=64)
        out: Tensor = found[0] if isinstance(found, tuple) else found
        return out

    rows = [
        f"### fla-core {importlib.metadata.version('fla-core')} (l = d = 64, no window)",
        "| tokens | fla fwd / bwd ms | NSA fwd / bwd ms | **ratio** |",
        "|---|---|---|---|",
    ]
    for tokens in lengths:
        nsa = forward_backward(run_nsa, inputs(STANDARD, tokens))
        torch.cuda.empty_cache()
        fla = forward_backward(run_fla, inputs(STANDARD, tokens)[:4])
        rows.append(
            f"| {tokens} | {fla.fwd:.2f} / {fla.bwd:.2f} | {nsa.fwd:.2f} / {nsa.bwd:.2f} |"
            f" **{fla.fwd / nsa.fwd:.2f}x / {fla.bwd / nsa.bwd:.2f}x** |"
        )
        print(rows[-1], flush=True)
    return rows


def stage_rows(tokens: int) -> list[str]:
    """Milliseconds of every kernel of one forward and backward, by the profiler."""
    from torch.profiler import ProfilerActivity, profile

    x = inputs(STANDARD, tokens)
    grad = rand(1, tokens, 64, 128)
    torch.autograd.grad(run_nsa(x), x, grad)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as prof:
        torch.autograd.grad(run_nsa(x), x, grad)
        torch.cuda.synchronize()
    events: dict[str, list[float]] = {}
    for event in prof.events():
        if "CUDA" in str(event.device_type) and event.device_time_total > 0:
            events.setdefault(event.name, []).append(event.device_time_total / 1e3)
    ranked = sorted(events.items(), key=lambda item: -sum(item[1]))
    rows = [
        f"### Kernels of one forward and backward at {tokens}",
        "| kernel | launches, ms each |",
        "|---|---|",
    ]
    for name, times in ranked[:18]:
        rows.append(f"| {name[:60]} | {', '.join(f'{t:.2f}' for t in times[:8])} |")
    return rows


def warm(number: int) -> None:
    """Compile the kernels of one part of the run into the cache."""
    try:
        if number < len(BATCHES):
            decode_rows([BATCHES[number]], 65536, compile_only=True)
        elif number < WARM_JOBS - 1:
            x = inputs([STANDARD, *OTHERS[1:]][number - len(BATCHES)], 16384)
            out = run_nsa(x)
            torch.autograd.grad(out, x, torch.randn_like(out))
            with torch.no_grad():
                run_nsa(x)
        else:
            check_rows()
            paged_check_rows()
    except Exception:  # The timed part reports what fails; warming up must not stop it.
        traceback.print_exc()


def cudnn_version() -> int:
    return int(torch.backends.cudnn.version() or 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".")) / "nsa.md")
    parser.add_argument("--lengths", type=int, nargs="*", default=[8192, 16384, 32768, 65536])
    args = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    with context.Pool(WARM_JOBS) as pool:
        pool.map(warm, range(WARM_JOBS), chunksize=1)
    gemm, copy = ceilings()
    name = torch.cuda.get_device_name()
    versions = f"torch {torch.__version__}, triton {triton.__version__}, Python {sys.version.split()[0]}"
    lines = [
        "# Native sparse attention: kernels against full attention",
        f"{name}; {versions}, cuDNN {cudnn_version()}. Measured ceilings: bf16 8192^3 product {gemm:.0f} TFLOP/s,"
        f" device copy {copy:.2f} TB/s. B=1, causal, bf16, l=32 d=16 l'=64 n=16 w=512; compression (hidden"
        f" {HIDDEN}) included.",
        "Ratios are to the faster of cuDNN and FlashAttention-2 through torch's SDPA in this run. Calls are queued behind"
        " each other; `alone` is a call into an idle device.",
    ]
    sections: list[Callable[[], list[str]]] = [
        check_rows,
        paged_check_rows,
        lambda: shape_rows(STANDARD, args.lengths, gemm),
        lambda: decode_rows(BATCHES, 65536, copy_tb=copy),
        lambda: stage_rows(65536),
        lambda: stage_rows(8192),
        *[lambda s=s: shape_rows(s, args.lengths[-1:], gemm) for s in OTHERS],
        lambda: prefill_rows([16384, 65536], 2048),
        lambda: fla_rows(args.lengths[-2:]),
    ]
    for section in sections:
        try:
            lines += ["", *section()]
        except Exception as error:  # One failing section must not cost the others' numbers.
            traceback.print_exc()
            lines += ["", f"A section failed: {type(error).__name__}: {str(error)[:300]}"]
        args.out.write_text("\n".join(lines) + "\n")
        torch.cuda.empty_cache()
    print("\n".join(lines))


if __name__ == "__main__":
    main()
