"""What the last NSA run left unmeasured, in one call of under three minutes on one GPU.

Run: `python -m benchmarks.nsa_open [--out FILE]`. Checks first: decoding, prefill over pages and both forms of
the selected branch against the fp64 reference. Then decode, forward and backward of short
sequences by eager calls (which count) and in a CUDA graph (what the host costs), chunked prefill, and fla's
NSA in the same run where `fla-core` is installed. The table is written after every section.
"""

import argparse
import multiprocessing
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend

from benchmarks.nsa import (
    SIZES,
    STANDARD,
    ceilings,
    forward_backward,
    inputs,
    median_ms,
    rand,
    run_full,
    run_nsa,
    stage_rows,
)
from benchmarks.nsa_decode import decode_rows, graph_us, nsa_steps
from sparseray.kernels.nsa import branches
from sparseray.kernels.nsa.attention import nsa_attention
from sparseray.kernels.nsa.decode import DecodeWorkspace, nsa_decode
from sparseray.kernels.nsa.prefill import nsa_prefill
from sparseray.kernels.nsa.reference import nsa_attention_reference, num_compressed

CONTEXT, PAGE = 65536, 64
BATCHES = [1, 16, 32]
PAPER: dict[str, Any] = dict(SIZES)


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def pages(pair: tuple[Tensor, Tensor]) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Keys and values [1, S, H, D] as shuffled pages, and their table; what no token fills is NaN."""
    tokens = pair[0].shape[1]
    count = -(-tokens // PAGE)
    order = torch.randperm(count, device="cuda")
    caches = []
    for x in pair:
        flat = x.new_full((count * PAGE, *x.shape[2:]), float("nan"))
        flat[:tokens] = x[0]
        cache = torch.empty_like(flat).view(count, PAGE, *x.shape[2:])
        cache[order] = flat.view_as(cache)
        caches.append(cache)
    return (caches[0], caches[1]), order.int()[None]


def check_rows() -> list[str]:
    """Errors of decoding and prefill where all blocks are selected, so that no near tie decides."""
    rows = ["| check, bf16, 64 heads, 4 KV heads | relative error |", "|---|---|"]
    tokens, chunk = 1000, 300
    torch.manual_seed(0)
    q, gates = rand(1, tokens, 64, 128), torch.rand(1, tokens, 64, 3, device="cuda").bfloat16()
    k, v = rand(1, tokens, 4, 128), rand(1, tokens, 4, 128)
    count = num_compressed(tokens, 32, 16)
    kc, vc = rand(1, count, 4, 128), rand(1, count, 4, 128)
    tensors = (q, kc, vc, k, v, k, v, gates)
    wanted = nsa_attention_reference(*(x.double() for x in tensors), **PAPER)
    for is_dense in (True, False):
        with mock.patch.object(branches, "selects_all", return_value=is_dense):
            found = nsa_attention(*tensors, **PAPER)
        rows.append(f"| attention, selected branch {'dense' if is_dense else 'by blocks'} |"
                    f" {relative(found, wanted):.1e} |")  # fmt: skip
    (cmp, tc), (slc, ts) = pages((kc, vc)), pages((k, v))
    lens = torch.tensor([tokens], dtype=torch.int32, device="cuda")
    cu = torch.tensor([0, chunk], device="cuda")
    for is_dense in (True, False):
        with mock.patch.object(branches, "selects_all", return_value=is_dense):
            found = nsa_prefill(
                q[0, -chunk:], gates[0, -chunk:], cmp, slc, slc, tc, ts, ts, cu, lens, **PAPER
            )
        rows.append(f"| prefill of {chunk} tokens over pages | {relative(found, wanted[0, -chunk:]):.1e} |")
    for new in (1, 3, 8):
        work = DecodeWorkspace.create(1, new, 64, 4, 128, CONTEXT, device="cuda", **PAPER)
        out = torch.full_like(q[:, :new], float("nan"))
        last, gate = q[:, -new:].contiguous(), gates[:, -new:].contiguous()
        nsa_decode(last, gate, cmp, slc, slc, tc, ts, ts, lens, work, out, **PAPER)
        rows.append(f"| decode of {new} tokens | {relative(out, wanted[:, -new:]):.1e} |")
    return rows


def graph_ms(call: Callable[[], object]) -> float:
    """The call's GPU time without the host: one captured graph, replayed."""
    return graph_us([call]) / 1e3


def length_rows() -> list[str]:
    """Forward and backward at 8k to 64k against cuDNN; eager, and the forward in a graph."""
    rows = ["### Forward and backward, ms", "| tokens | NSA fwd | NSA fwd, graph | NSA bwd | cuDNN fwd / bwd | **ratio** |",
            "|---|---|---|---|---|---|"]  # fmt: skip
    for tokens in (8192, 16384, 32768, 65536):
        x = inputs(STANDARD, tokens)
        fwd, bwd, _ = forward_backward(run_nsa, x)
        with torch.no_grad():
            graph = graph_ms(partial(run_nsa, x))
        full = forward_backward(
            partial(run_full, backend=SDPBackend.CUDNN_ATTENTION), inputs(STANDARD, tokens)[:3]
        )
        rows.append(f"| {tokens} | {fwd:.2f} | {graph:.2f} | {bwd:.2f} | {full[0]:.2f} / {full[1]:.2f} |"
                    f" **{full[0] / fwd:.2f}x / {full[1] / bwd:.2f}x** |")  # fmt: skip
    return rows


def decode_kernel_rows() -> list[str]:
    """Microseconds of every kernel of a decode step, by the profiler."""
    from torch.profiler import ProfilerActivity, profile

    rows = ["### Kernels of a decode step, us (one launch after the other)"]
    for batch in BATCHES:
        steps = nsa_steps(max(2, 16 // batch), batch, CONTEXT)
        for step in steps:
            step()
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as prof:
            for step in steps:
                step()
            torch.cuda.synchronize()
        times: dict[str, list[float]] = {}
        for event in prof.events():
            if "CUDA" in str(event.device_type) and event.device_time_total > 0:
                times.setdefault(event.name, []).append(event.device_time_total)
        shown = ", ".join(f"{name} {statistics.median(found):.1f}" for name, found in times.items())
        rows.append(f"- B={batch}: {shown}")
    return rows


def prefill_rows() -> list[str]:
    """A chunk of 2048 queries against pages, beside the same chunk against contiguous keys."""
    rows = ["### Prefill of 2048 tokens, ms", "| context | pages | contiguous |", "|---|---|---|"]
    for context in (16384, 65536):
        count = num_compressed(context, 32, 16)
        q, gates = rand(1, 2048, 64, 128), torch.rand(1, 2048, 64, 3, device="cuda").bfloat16()
        k, v, kc, vc = (rand(1, n, 4, 128) for n in (context, context, count, count))
        (cmp, tc), (slc, ts) = pages((kc, vc)), pages((k, v))
        lens, cu = torch.tensor([context], device="cuda"), torch.tensor([0, 2048], device="cuda")
        args = (q[0], gates[0], cmp, slc, slc, tc, ts, ts, cu, lens)
        ours = median_ms(partial(nsa_prefill, *args, **PAPER))
        with torch.no_grad():
            flat = median_ms(
                partial(nsa_attention, q, kc, vc, k, v, k, v, gates, **PAPER, q_start=context - 2048)
            )
        rows.append(f"| {context} | {ours:.2f} | {flat:.2f} |")
    return rows


def fla_rows() -> list[str]:
    """fla's NSA: mean pooling over l = d = 64, no window (flash-attn is not there); ours has both."""
    from fla.ops.nsa import parallel_nsa  # type: ignore[import-not-found]

    rows = ["### fla-core 0.6.0 (l = d = 64, no window), ms", "| tokens | fla fwd / bwd | NSA fwd / bwd | **ratio** |",
            "|---|---|---|---|"]  # fmt: skip
    for tokens in (32768, 65536):
        ours = forward_backward(run_nsa, inputs(STANDARD, tokens))
        torch.cuda.empty_cache()
        q, k, v, gates = inputs(STANDARD, tokens)[:4]

        def run(x: list[Tensor]) -> Tensor:
            g = x[3]
            found = parallel_nsa(
                x[0], x[1], x[2], g[..., 0].contiguous(), g[..., 1].contiguous(), block_size=64
            )
            out: Tensor = found[0] if isinstance(found, tuple) else found
            return out

        peer = forward_backward(run, [q, k, v, gates])
        rows.append(f"| {tokens} | {peer[0]:.2f} / {peer[1]:.2f} | {ours[0]:.2f} / {ours[1]:.2f} |"
                    f" **{peer[0] / ours[0]:.2f}x / {peer[1] / ours[1]:.2f}x** |")  # fmt: skip
        print(rows[-1], flush=True)
    return rows


def decode_ratio_rows() -> list[str]:
    return decode_rows(BATCHES, CONTEXT, copy_tb=ceilings()[1])


def profile_rows() -> list[str]:
    return stage_rows(8192)


def warm(number: int) -> None:
    """Compile the kernels of one part of the run into the cache."""
    try:
        if number < len(BATCHES):
            nsa_steps(1, BATCHES[number], CONTEXT)[0]()
        elif number == len(BATCHES):
            check_rows()
        else:
            out = run_nsa(x := inputs(STANDARD, 16384))
            torch.autograd.grad(out, x, torch.randn_like(out))
    except Exception:  # The timed part reports what fails; warming up must not stop it.
        traceback.print_exc()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".")) / "nsa_open.md")
    args = parser.parse_args()
    versions = f"torch {torch.__version__}, triton {triton.__version__}, Python {sys.version.split()[0]}"
    lines = ["# Native sparse attention: what was open", f"{torch.cuda.get_device_name()}; {versions}."]
    started = time.monotonic()
    jobs = range(len(BATCHES) + 2)
    with multiprocessing.get_context("spawn").Pool(len(jobs)) as pool:
        pool.map(warm, jobs, chunksize=1)
    sections: list[Callable[[], list[str]]] = [check_rows, decode_ratio_rows, length_rows, decode_kernel_rows]
    sections += [profile_rows, prefill_rows, fla_rows]
    for section in sections:
        try:
            lines += ["", *section()]
        except Exception as error:  # One failing section must not cost the others' numbers.
            traceback.print_exc()
            lines += ["", f"{section.__name__} failed: {type(error).__name__}: {str(error)[:300]}"]
        lines.append(f"\n({section.__name__}: {time.monotonic() - started:.0f} s since the start)")
        args.out.write_text("\n".join(lines) + "\n")
        torch.cuda.empty_cache()
    print("\n".join(lines))


if __name__ == "__main__":
    main()
