"""Fused MoE layer against torch's grouped GEMM composition, in one run and one table.

`python benchmarks/moe.py --out results.md` needs a GPU of compute capability 9.0 and takes about two
minutes; without a GPU it times the plain expert path on the CPU. Router and combine are included on
both sides; routing is balanced (uniform) or lognormal (expert popularity, sigma 1).
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from sparseray.kernels.moe import decode, reference
from sparseray.kernels.moe.ffn import moe_ffn
from sparseray.kernels.moe.router import route_and_plan

LAYERS = [(8192, 64, 6, 1408), (32768, 64, 6, 1408), (8192, 256, 8, 768), (16384, 256, 8, 768)]
HIDDEN = 2048
PEAK_TBS, H100_TBS = 4.8, 3.35
"""Memory rates of the H200 and the H100; the target for decoding was set at the latter."""

lines: list[str] = []


def say(line: str = "") -> None:
    print(line, flush=True)
    lines.append(line)


def guarded(name: str, part: Callable[[], None]) -> None:
    """Run one part; what fails stays in the table."""
    try:
        part()
    except Exception as error:
        say(f"\n{name} failed: {type(error).__name__}: {str(error)[:300]}\n")
    torch.cuda.empty_cache()


def milliseconds(work: Callable[[], Any], repeats: int = 15) -> float:
    """Median GPU time of one call; the host runs ahead behind a sleeping kernel."""
    for _ in range(2):
        work()
    spans = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(4_000_000)
        start.record()
        work()
        end.record()
        end.synchronize()
        spans.append(start.elapsed_time(end))
    return float(statistics.median(spans))


def make_logits(T: int, E: int, routing: str) -> Tensor:
    logits = -torch.log(-torch.log(torch.rand(T, E, device="cuda").clamp_(1e-6, 1 - 1e-6)))
    if routing == "lognormal":
        logits += torch.randn(E, device="cuda")
    return (logits * 0.3).requires_grad_()


def torch_route(logits_TE: Tensor, bias_E: Tensor, K: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The torch chain: score, top-k, normalise, sort, counts; returns what the composition needs."""
    scores = logits_TE.sigmoid()
    ids = torch.topk(scores + bias_E, K, dim=-1, sorted=False).indices
    weights = scores.gather(1, ids)
    weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    flat = ids.reshape(-1)
    order = torch.argsort(flat, stable=True)
    counts = torch.histc(flat.float(), logits_TE.shape[1], 0, logits_TE.shape[1] - 1)
    return ids, weights, order, counts.cumsum(0).to(torch.int32), flat


def torch_layer(x: Tensor, logits: Tensor, bias: Tensor, w_up: Tensor, w_down: Tensor, K: int) -> Tensor:
    """Sort, gather, two grouped products, SwiGLU, weighted index_add."""
    grouped = getattr(F, "grouped_mm", None) or torch._grouped_mm
    _, weights, order, ends, _ = torch_route(logits, bias, K)
    token = order // K
    gate, up = grouped(x[token], w_up.transpose(1, 2), offs=ends).chunk(2, dim=-1)
    y = grouped(F.silu(gate) * up, w_down.transpose(1, 2), offs=ends)
    y = y * weights.reshape(-1)[order][:, None].to(y.dtype)
    return torch.zeros_like(x).index_add_(0, token, y)


def fused_layer(x: Tensor, logits: Tensor, bias: Tensor, w_up: Tensor, w_down: Tensor, K: int) -> Tensor:
    ids, weights, _, plan = route_and_plan(logits, top_k=K, bias_E=bias)
    return moe_ffn(x, ids, weights, w_up, w_down, plan=plan)


def make_layer(T: int, E: int, I: int, routing: str, hidden: int = HIDDEN) -> list[Tensor]:
    """x, logits, bias, gate|up, down."""
    parameters: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16, "requires_grad": True}
    x = torch.randn(T, hidden, **parameters)
    w_up, w_down = torch.empty(E, 2 * I, hidden, **parameters), torch.empty(E, hidden, I, **parameters)
    for w in (w_up, w_down):
        torch.nn.init.normal_(w, std=0.02)
    return [x, make_logits(T, E, routing), torch.zeros(E, device="cuda"), w_up, w_down]


def measure(layer: Callable[..., Tensor], tensors: list[Tensor], K: int) -> tuple[float, float, float]:
    """Forward ms, forward + backward ms, and bytes kept for the backward per token."""
    dy = torch.randn_like(tensors[0])
    leaves = [t for t in tensors if t.requires_grad]
    forward = milliseconds(lambda: layer(*tensors, K))
    both = milliseconds(lambda: torch.autograd.grad(layer(*tensors, K), leaves, dy))
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    y = layer(*tensors, K)
    kept = torch.cuda.memory_allocated() - before - y.numel() * y.element_size()
    return forward, both, kept / tensors[0].shape[0]


def layers() -> None:
    say("| tokens, experts, top-k, inter, routing | fwd ms: ours / torch | fwd TFLOP/s: ours / torch | fwd ratio |"
        " fwd+bwd ms: ours / torch | TFLOP/s: ours / torch | **ratio** | kept KB/token: ours / torch | share |")  # fmt: skip
    say("|---|---|---|---|---|---|---|---|---|")
    for T, E, K, I in LAYERS:
        for routing in ("balanced", "lognormal"):

            def row(T: int = T, E: int = E, K: int = K, I: int = I, routing: str = routing) -> None:
                tensors = make_layer(T, E, I, routing)
                of, ob, om = measure(fused_layer, tensors, K)
                tf, tb, tm = measure(torch_layer, tensors, K)
                work = 6 * T * K * HIDDEN * I / 1e9
                say(
                    f"| {T}, {E}, {K}, {I}, {routing} | {of:.2f} / {tf:.2f} | {work / of:.0f} / {work / tf:.0f} |"
                    f" {tf / of:.2f} | {ob:.2f} / {tb:.2f} | {3 * work / ob:.0f} / {3 * work / tb:.0f} |"
                    f" **{tb / ob:.2f}** | {om / 1024:.1f} / {tm / 1024:.1f} | {om / tm:.2f} |"
                )

            guarded(f"{T}, {E}, {routing}", row)


def routers() -> None:
    say("\n| router, sort and map: tokens, experts, top-k | ours ms | torch chain ms | ratio |")
    say("|---|---|---|---|")
    for T, E, K, groups in ((32768, 64, 6, 1), (16384, 256, 8, 1), (16384, 256, 8, 8)):
        logits, bias = make_logits(T, E, "balanced").detach(), torch.zeros(E, device="cuda")
        limits: dict[str, Any] = {"num_groups": groups, "topk_groups": max(1, groups // 2)}

        def chain(
            logits: Tensor = logits, bias: Tensor = bias, K: int = K, limits: dict[str, Any] = limits
        ) -> None:
            if limits["num_groups"] > 1:
                ids = reference.route(logits, top_k=K, bias_E=bias, **limits)[0].reshape(-1)
                torch.argsort(torch.argsort(ids, stable=True))
                torch.histc(ids.float(), logits.shape[1], 0, logits.shape[1] - 1)
            else:
                torch.argsort(torch_route(logits, bias, K)[2])

        ours = milliseconds(lambda: route_and_plan(logits, top_k=K, bias_E=bias, **limits))  # noqa: B023
        theirs = milliseconds(chain)
        say(f"| {T}, {E}, {K}, {groups} groups | {ours:.3f} | {theirs:.3f} | {theirs / ours:.1f} |")


def decoding() -> None:
    E, K, I = 128, 8, 768
    say(f"\nDecode, {E} experts top-{K}, inter {I}, CUDA graph of four layers with different weights.\n")
    say(f"| B | us | weights touched MB | TB/s | of {PEAK_TBS} TB/s | of {H100_TBS} TB/s |")
    say("|---|---|---|---|---|---|")
    weights = [make_layer(1, E, I, "balanced")[3:] for _ in range(4)]
    for B in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512):
        x, w = torch.randn(B, HIDDEN, device="cuda").bfloat16(), torch.rand(B, K, device="cuda")
        ids = [torch.rand(B, E, device="cuda").topk(K, dim=1).indices for _ in weights]
        touched = sum(i.unique().numel() for i in ids) / len(ids) * 3 * HIDDEN * I * 2

        def step(x: Tensor = x, w: Tensor = w, ids: list[Tensor] = ids) -> None:
            for i, (w_up, w_down) in zip(ids, weights):
                decode.moe_ffn_decode(x, i, w, w_up, w_down)

        step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        ms = milliseconds(graph.replay, 30) / len(weights)
        rate = touched / ms / 1e9
        say(f"| {B} | {ms * 1e3:.1f} | {touched / 1e6:.0f} | {rate:.2f} | {rate / PEAK_TBS:.0%} |"
            f" {rate / H100_TBS:.0%} |")  # fmt: skip


def transformers_block(gate: Tensor, w_up: Tensor, w_down: Tensor, K: int) -> Any:
    """transformers' Qwen3 MoE block over these weights; `config._experts_implementation` chooses its loop."""
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    config = Qwen3MoeConfig(
        hidden_size=w_down.shape[1],
        moe_intermediate_size=w_down.shape[2],
        num_experts=w_down.shape[0],
        num_experts_per_tok=K,
        norm_topk_prob=True,
        hidden_act="silu",
    )
    with torch.device("meta"):
        block = Qwen3MoeSparseMoeBlock(config)
    block.gate.weight = torch.nn.Parameter(gate.detach())
    block.experts.gate_up_proj = torch.nn.Parameter(w_up.detach())
    block.experts.down_proj = torch.nn.Parameter(w_down.detach())
    return block


def eager(T: int = 8192, E: int = 128, K: int = 8, I: int = 768) -> None:
    """The layer with its gate against transformers' own block, on the same weights."""
    import transformers

    x, _, _, w_up, w_down = make_layer(T, E, I, "balanced")
    gate = (torch.randn(E, HIDDEN, device=x.device) * 0.02).to(x.dtype).requires_grad_()
    dy, block = torch.randn_like(x), transformers_block(gate, w_up, w_down, K)

    def fused() -> Tensor:
        options: dict[str, Any] = {"top_k": K, "router": "v2", "normalize": True}
        ids, weights, _, plan = route_and_plan(F.linear(x, gate), **options)
        return moe_ffn(x, ids, weights, w_up, w_down, plan=plan)

    def theirs(name: str) -> Tensor:
        block.experts.config._experts_implementation = name
        y: Tensor = block(x[None])[0]
        return y

    forms: list[tuple[str, Callable[[], Tensor], list[Tensor]]] = [("ours", fused, [x, gate, w_up, w_down])]
    for name in ("eager", "grouped_mm"):
        title = f"transformers {transformers.__version__}, {name}"
        forms.append((title, partial(theirs, name), [x, *block.parameters()]))
    say(f"\n| {T} tokens, {E} experts, top-{K}, inter {I}, gate included | forward ms | over ours | forward +"
        " backward ms | over ours | relative difference to ours |")  # fmt: skip
    say("|---|---|---|---|---|---|")
    base, want = [0.0, 0.0], fused().detach().float()
    for name, form, leaves in forms:

        def both(form: Callable[[], Tensor] = form, leaves: list[Tensor] = leaves) -> None:
            torch.autograd.grad(form(), leaves, dy)

        difference = (form().detach().float() - want).norm() / want.norm()
        times = [milliseconds(form, 5), milliseconds(both, 5)]
        base = base if base[0] else times
        cells = " | ".join(f"{t:.2f} | {t / b:.1f}" for t, b in zip(times, base))
        say(f"| {name} | {cells} | {difference:.4f} |")


def cpu() -> None:
    """The plain expert path on CPU threads, against a loop over experts with index_add."""
    T, E, K, H, I = 2048, 64, 6, 256, 128
    x, w_up, w_down = torch.randn(T, H), torch.randn(E, 2 * I, H) * 0.02, torch.randn(E, H, I) * 0.02
    ids, weights, _ = reference.route(torch.randn(T, E), top_k=K)

    def loop() -> Tensor:
        out = torch.zeros_like(x)
        mask = F.one_hot(ids, E).permute(2, 1, 0)
        for expert in range(E):
            slot, token = torch.where(mask[expert])
            gate, up = F.linear(x[token], w_up[expert]).chunk(2, dim=-1)
            y = F.linear(F.silu(gate) * up, w_down[expert])
            out.index_add_(0, token, y * weights[token, slot, None])
        return out

    def seconds(work: Callable[[], Any]) -> float:
        work()
        spans = []
        for _ in range(7):
            start = time.perf_counter()
            work()
            spans.append(time.perf_counter() - start)
        return statistics.median(spans)

    plain = seconds(lambda: reference.moe_ffn_reference(x, ids, weights, w_up, w_down))
    say("| CPU, forward: 2048 tokens, 64 experts top-6, hidden 256, inter 128, fp32 | ms | GFLOP/s |")
    say("|---|---|---|")
    for name, span in (("plain expert path (bits independent of placement)", plain), ("loop", seconds(loop))):
        say(f"| {name} | {span * 1e3:.1f} | {6 * T * K * H * I / span / 1e9:.0f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    arguments = parser.parse_args()
    start = time.perf_counter()
    gpu = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if gpu else f"{platform.processor() or 'CPU'}"
    say(f"# MoE kernels on {device}: torch {torch.__version__}, triton {triton.__version__}\n")
    if gpu:
        for part in (layers, routers, decoding, eager):
            guarded(part.__name__, part)
    else:
        say(f"{torch.get_num_threads()} threads\n")
        cpu()
    say(f"\nWhole run: {time.perf_counter() - start:.0f} s.")
    if arguments.out:
        arguments.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
