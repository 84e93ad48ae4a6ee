"""Latent attention's decoding over paged latents on one GPU: checked, then timed in CUDA graphs against the copy rate.

Bytes are those of the latents, read once (1,152 a token at the sizes of DeepSeek-V2-Lite and V3); what more heads than
one tile of rows read comes out of the L2 cache. A graph holds several layers, each with a cache of its own, so that a
small batch does not time the L2 cache. The bound is the larger of bytes at the copy rate and products at the rate of
a large matrix product, both measured in the same run. Prints Markdown:

  PYTHONPATH=. python -m benchmarks.mla_decode [--tune] [--out FILE]

--tune also times the forms of a launch at batch 32 and 8k tokens.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path

import torch
import triton
from torch import Tensor

from benchmarks.dense_serving import graph_ms
from benchmarks.moe import guarded, lines, milliseconds, say
from sparseray.kernels.attention import latent_decode as kernel
from sparseray.kernels.attention.latent_decode import Form, LatentDecodeWorkspace, latent_decode
from sparseray.kernels.ops import REFERENCE
from sparseray.kernels.paged import Pages

LATENT, WIDTH, PAGE = 512, 576, 256
HEADS, BATCHES, CONTEXTS, NEW = (16, 128), (1, 32, 128), (8192, 32768), (1, 2, 4, 8)
TUNED = ((16, 1), (16, 2), (16, 4), (128, 1), (128, 2))
VARIANTS = (*kernel.FORMS, *kernel.PIPELINED, *(replace(form, longest=1024) for form in kernel.PIPELINED))
"""Forms that are compared."""


class Step:
    """Decoding of several layers, with contexts of one length or of given ones."""

    def __init__(self, heads: int, batch: int, new: int, context: int, layers: int = 1) -> None:
        pages = -(-context // PAGE)
        self.caches = [
            torch.empty(batch * pages, PAGE, 1, WIDTH, device="cuda", dtype=torch.bfloat16).normal_()
            for _ in range(layers)
        ]
        self.table = torch.randperm(batch * pages, device="cuda").int().view(batch, pages)
        self.lens = torch.full((batch,), context, dtype=torch.int32, device="cuda")
        self.context, self.scale = context, WIDTH**-0.5
        self.ask(heads, new)

    def ask(self, heads: int, new: int) -> None:
        """Take other queries to the same caches."""
        batch = len(self.lens)
        queries = torch.randn(batch, new, heads, WIDTH, device="cuda", dtype=torch.bfloat16)
        self.q, self.turned = queries.split((LATENT, WIDTH - LATENT), -1)
        self.out = torch.empty(batch, new, heads, LATENT, device="cuda", dtype=torch.bfloat16)
        self.work = LatentDecodeWorkspace.create(self.q, self.caches[0], max_context=self.context)

    def run(self) -> None:
        """All layers."""
        for cache in self.caches:
            at = (cache, self.table, self.lens)
            latent_decode(self.q, self.turned, *at, self.work, self.out, scale=self.scale)

    def expected(self) -> Tensor:
        """The first layer by the plain operation in fp32; every sequence has more tokens than queries."""
        batch, new = self.q.shape[:2]
        chunks = tuple((b * new, (b + 1) * new, n) for b, n in enumerate(self.lens.tolist()))
        places = torch.zeros(batch * new, device="cuda")
        pages = Pages(
            page=PAGE, table_BW=self.table, context_lens_B=self.lens, places_R=places, chunks=chunks
        )
        q, turned = (x.float().flatten(0, 1) for x in (self.q, self.turned))
        found = REFERENCE.paged_latent_attend(q, turned, self.caches[0].float(), self.scale, pages)
        wanted: Tensor = found.unflatten(0, (batch, new))
        return wanted

    def error(self) -> float:
        """Of the first layer against the plain operation."""
        self.run()
        wanted = self.expected()
        return float((self.out.float() - wanted).norm() / wanted.norm())


def copy_rate() -> float:
    """GB/s of a large copy, read and written bytes together."""
    source = torch.empty(1 << 29, dtype=torch.bfloat16, device="cuda").normal_()
    target = torch.empty_like(source)
    return 2 * source.nbytes / milliseconds(lambda: target.copy_(source)) / 1e6


def product_rate() -> float:
    """TFLOP/s of a large matrix product."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * 8192**3 / milliseconds(lambda: a @ b) / 1e9


def check() -> None:
    """Compare with the plain operation at uneven lengths."""
    for heads in HEADS:
        step = Step(heads, 5, 1, 3000)
        step.lens.copy_(torch.tensor([3000, 9, 257, 1024, 2111]))
        errors = []
        for new in NEW:
            step.ask(heads, new)
            errors.append(step.error())
        assert max(errors) < 1e-2, f"{heads} heads: {errors}"
        say(f"- {heads} heads, 1 to 8 query tokens: relative error at most {max(errors):.1e}")


def timed(step: Step, rates: tuple[float, float]) -> str:
    """Columns of the table from the time on."""
    ms = graph_ms(step.run, len(step.caches))
    batch, new, heads, _ = step.q.shape
    tokens = batch * step.context
    size, flop = tokens * WIDTH * 2, 2 * tokens * new * heads * (WIDTH + LATENT)
    bound = max(size / rates[0] / 1e6, flop / rates[1] / 1e9)
    kind = "products" if flop / rates[1] / 1e9 > size / rates[0] / 1e6 else "bytes"
    rate = size / ms / 1e6
    return (
        f"{ms * 1e3:.1f} | {rate:.0f} | {rate / rates[0]:.0%} | {flop / ms / 1e9:.0f} |"
        f" {bound / ms:.0%} of {kind} |"
    )


def table(rates: tuple[float, float]) -> None:
    """Every size."""
    say("\n| heads | batch | context | query tokens | us | GB/s | of copy | TFLOP/s | of the bound |")
    say("|---|---|---|---|---|---|---|---|---|")
    for batch, context in product(BATCHES, CONTEXTS):
        layers = max(1, min(24, (300 << 20) // (batch * context * WIDTH * 2)))
        step = Step(HEADS[0], batch, 1, context, layers)
        for heads, new in product(HEADS, NEW):
            step.ask(heads, new)
            say(f"| {heads} | {batch} | {context} | {new} | {timed(step, rates)}")


def tune(rates: tuple[float, float]) -> None:
    """Every variant at batch 32 and 8k tokens, as the only form."""
    say("\n| heads | query tokens | form | error | us | GB/s | of copy | TFLOP/s | of the bound |")
    say("|---|---|---|---|---|---|---|---|---|")
    kept, step = kernel.PIPELINED, Step(HEADS[0], 32, 1, 8192)

    def one(heads: int, new: int, form: Form) -> Callable[[], None]:
        def run() -> None:
            step.ask(heads, new)
            name = f"| {heads} | {new} | {form.rows} x {form.tokens}, {form.num_warps} warps, {form.num_stages} stages,"
            name += f" {form.programs} programs, {form.longest}{', pipelined' if form.is_pipelined else ''} |"
            say(f"{name} {step.error():.0e} | {timed(step, rates)}")

        return run

    try:
        for heads, new in TUNED:
            for form in VARIANTS:
                if min(16, heads * new) <= form.rows <= heads * new and form.rows * 4 >= min(64, heads * new):
                    kernel.PIPELINED = (form,)
                    guarded(str(form), one(heads, new, form))
    finally:
        kernel.PIPELINED = kept


def main() -> None:
    """Check, time, and where asked tune."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    started = time.perf_counter()
    torch.manual_seed(0)
    rates = copy_rate(), product_rate()
    torch.cuda.empty_cache()
    say(
        f"# Latent decoding: {torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}\n"
    )
    say(f"- copy {rates[0]:.0f} GB/s, matrix product {rates[1]:.0f} TFLOP/s; bf16, pages of {PAGE} tokens")
    if options.tune:
        tune(rates)
    check()
    table(rates)
    say(f"\n{time.perf_counter() - started:.0f} s in all")
    if options.out is not None:
        options.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
