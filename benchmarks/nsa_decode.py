"""Decoding one token against a long paged cache, in a CUDA graph: NSA beside full attention.

A graph holds the steps of several layers: each reads caches of its own, so that a small batch does not time the L2
cache; the page tables, the lengths and the workspace are one for all, as in a model.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from sparseray.kernels.nsa.decode import DecodeWorkspace, nsa_decode
from sparseray.kernels.nsa.reference import num_compressed

HEADS, NUM_KV, DIM, PAGE = 64, 4, 128, 64
WARM_UP_MS = 50.0
SIZES = {"block": 32, "stride": 16, "select_block": 64, "num_selected": 16, "window": 512}


def _pages(batch: int, tokens: int) -> Tensor:
    """Shuffled page table of `batch` sequences."""
    pages = -(-tokens // PAGE)
    return torch.randperm(batch * pages, device="cuda").int().view(batch, pages)


def _cache(table: Tensor) -> tuple[Tensor, Tensor]:
    shape = (table.numel(), PAGE, NUM_KV, DIM)
    return (
        torch.randn(shape, device="cuda", dtype=torch.bfloat16),
        torch.randn(shape, device="cuda", dtype=torch.bfloat16),
    )


def nsa_steps(layers: int, batch: int, context: int) -> list[Callable[[], object]]:
    """One step of every layer of a model: page tables, lengths and workspace are the model's, caches the layer's."""
    cmp_table, slc_table = _pages(batch, num_compressed(context, 32, 16)), _pages(batch, context)
    workspace = DecodeWorkspace.create(batch, 1, HEADS, NUM_KV, DIM, context, device="cuda", **SIZES)
    lens = torch.full((batch,), context, dtype=torch.int32, device="cuda")
    steps: list[Callable[[], object]] = []
    for _ in range(layers):
        q = torch.randn(batch, 1, HEADS, DIM, device="cuda", dtype=torch.bfloat16)
        gates = torch.rand(batch, 1, HEADS, 3, device="cuda", dtype=torch.bfloat16)
        caches = _cache(cmp_table), _cache(slc_table)
        steps.append(
            partial(
                nsa_decode,
                q,
                gates,
                caches[0],
                caches[1],
                caches[1],
                cmp_table,
                slc_table,
                slc_table,
                lens,
                workspace,
                torch.empty_like(q),
                **SIZES,
            )
        )
    return steps


def _full_step(batch: int, context: int, backend: SDPBackend) -> Callable[[], object]:
    q = torch.randn(batch, HEADS, 1, DIM, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(batch, NUM_KV, context, DIM, device="cuda", dtype=torch.bfloat16) for _ in range(2))

    def step() -> object:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v, enable_gqa=True)

    return step


def graph_us(steps: list[Callable[[], object]]) -> float:
    """Median microseconds of one step, all steps captured in one graph; replays of the first 50 ms do not count."""
    # The inputs were made on another stream; a page table that is not written yet sends reads anywhere.
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for step in steps:
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for step in steps:
            step()
    times: list[float] = []
    spent = 0.0
    while spent < WARM_UP_MS or len(times) < 40:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        spent += start.elapsed_time(end)
        # A device that has just been idle is slower for some milliseconds (7 % at a batch of 32).
        if spent > WARM_UP_MS:
            times.append(start.elapsed_time(end))
    return float(sorted(times)[len(times) // 2]) * 1e3 / len(steps)


def decode_rows(
    batches: list[int], context: int, *, copy_tb: float = 0.0, compile_only: bool = False
) -> list[str]:
    """Markdown rows: microseconds of NSA and of full attention, ratio, share of the bandwidth."""
    rows = [
        f"### Decode, one token a sequence, {context} cached, in a CUDA graph",
        "| batch | cuDNN us | FA2 us | NSA us | **ratio** | NSA TB/s (share of the copy rate) |",
        "|---|---|---|---|---|---|",
    ]
    tokens = num_compressed(context, 32, 16) + 16 * 64 + 512
    for batch in batches:
        layers = 1 if compile_only else max(2, 16 // batch)
        steps = nsa_steps(layers, batch, context)
        if compile_only:
            steps[0]()
            torch.cuda.synchronize()
            continue
        nsa = graph_us(steps)
        del steps
        full = []
        for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
            try:
                full.append(graph_us([_full_step(batch, context, backend) for _ in range(layers)]))
            except RuntimeError as error:
                print(f"{backend} decode: {str(error)[:200]}", flush=True)
                full.append(float("nan"))
        best = min((t for t in full if t == t), default=float("nan"))
        rate = batch * tokens * NUM_KV * DIM * 4 / nsa / 1e6
        rows.append(
            f"| {batch} | {full[0]:.1f} | {full[1]:.1f} | {nsa:.1f} | **{best / nsa:.2f}x** | {rate:.2f}"
            f" ({rate / copy_tb if copy_tb else 0:.0%}) |"
        )
        print(rows[-1], flush=True)
    return rows
