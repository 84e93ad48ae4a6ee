"""Over paged caches: errors of decoding and prefill, NSA's decoding beside full attention's, and chunked prefill.

Decoding is timed in a CUDA graph, one token against a long cache. A graph holds the steps of several layers: each reads caches of its own, so that a small batch does not time the L2
cache; the page tables, the lengths and the workspace are one for all, as in a model.
"""

import math
from collections.abc import Callable
from functools import partial
from unittest import mock

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from triton.testing import do_bench

from sparseray.kernels.nsa import branches
from sparseray.kernels.nsa.attention import nsa_attention
from sparseray.kernels.nsa.decode import DecodeWorkspace, nsa_decode
from sparseray.kernels.nsa.prefill import nsa_prefill, prefill_geometry
from sparseray.kernels.nsa.reference import nsa_attention_reference
from sparseray.kernels.settings import NSASizes, num_compressed

HEADS, NUM_KV, DIM, PAGE = 64, 4, 128, 64
WARM_UP_MS = 50.0
SIZES = NSASizes(block=32, stride=16, select_block=64, num_selected=16, window=512)


def rand(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=dtype)


def best(*times: float) -> float:
    """The least of those that were measured."""
    return min((t for t in times if t == t), default=math.nan)


def _queries(batch: int, tokens: int) -> tuple[Tensor, Tensor]:
    """Queries and gates."""
    gates = torch.rand(batch, tokens, HEADS, 3, device="cuda", dtype=torch.bfloat16)
    return rand(batch, tokens, HEADS, DIM), gates


def _pages(batch: int, tokens: int) -> Tensor:
    """Shuffled page table of `batch` sequences."""
    pages = -(-tokens // PAGE)
    return torch.randperm(batch * pages, device="cuda").int().view(batch, pages)


def _cache(table: Tensor) -> tuple[Tensor, Tensor]:
    shape = (table.numel(), PAGE, NUM_KV, DIM)
    return rand(*shape), rand(*shape)


def nsa_steps(layers: int, batch: int, context: int) -> list[Callable[[], object]]:
    """One step of every layer of a model: page tables, lengths and workspace are the model's, caches the layer's."""
    cmp_table, slc_table = _pages(batch, num_compressed(context, 32, 16)), _pages(batch, context)
    workspace = DecodeWorkspace.create(batch, 1, HEADS, NUM_KV, DIM, context, SIZES, device="cuda")
    lens = torch.full((batch,), context, dtype=torch.int32, device="cuda")
    steps: list[Callable[[], object]] = []
    for _ in range(layers):
        q, gates = _queries(batch, 1)
        caches = _cache(cmp_table), _cache(slc_table)
        tables = (cmp_table, slc_table, slc_table)
        state = (lens, workspace, torch.empty_like(q))
        steps.append(partial(nsa_decode, q, gates, caches[0], caches[1], caches[1], *tables, *state, SIZES))
    return steps


def _paged(*pair: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
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


def paged_check_rows() -> list[str]:
    """Errors of prefill and decoding where all blocks are selected, so that no near tie decides."""
    rows = ["| bf16, 64 heads, 4 KV heads | relative error |", "|---|---|"]
    tokens, chunk = 1000, 300
    torch.manual_seed(0)
    q, gates = _queries(1, tokens)
    count = num_compressed(tokens, 32, 16)
    k, v, kc, vc = (rand(1, n, NUM_KV, DIM) for n in (tokens, tokens, count, count))
    q64, kc64, vc64, k64, v64, gates64 = (x.double() for x in (q, kc, vc, k, v, gates))
    wanted = nsa_attention_reference(q64, kc64, vc64, k64, v64, k64, v64, gates64, SIZES)

    def row(name: str, found: Tensor, part: Tensor) -> None:
        rows.append(f"| {name} | {float((found.double() - part).norm() / part.norm()):.1e} |")

    (cmp, cmp_table), (slc, slc_table) = _paged(kc, vc), _paged(k, v)
    tables = (cmp_table, slc_table, slc_table)
    lens = torch.tensor([tokens], dtype=torch.int32, device="cuda")
    cu = torch.tensor([0, chunk], device="cuda")
    for name, is_dense in (("dense", True), ("by blocks", False)):
        with mock.patch.object(branches, "selects_all", return_value=is_dense):
            found = nsa_prefill(q[0, -chunk:], gates[0, -chunk:], cmp, slc, slc, *tables, cu, lens, SIZES)
        row(f"prefill of {chunk} tokens, selected branch {name}", found, wanted[0, -chunk:])
    for new in (1, 3, 8):
        work = DecodeWorkspace.create(1, new, HEADS, NUM_KV, DIM, 65536, SIZES, device="cuda")
        out = torch.full_like(q[:, :new], float("nan"))
        last, gate = q[:, -new:].contiguous(), gates[:, -new:].contiguous()
        nsa_decode(last, gate, cmp, slc, slc, *tables, lens, work, out, SIZES)
        row(f"decode of {new} tokens", out, wanted[:, -new:])
    return rows


def prefill_rows(contexts: list[int], chunk: int) -> list[str]:
    """A chunk of queries against pages, beside the same chunk against contiguous keys."""
    rows = [
        f"### Prefill of {chunk} tokens",
        "| context | pages, first layer of a step, ms | a later layer, ms | contiguous, ms |",
        "|---|---|---|---|",
    ]
    for context in contexts:
        count = num_compressed(context, 32, 16)
        q, gates = _queries(1, chunk)
        k, v, kc, vc = (rand(1, n, NUM_KV, DIM) for n in (context, context, count, count))
        (cmp, cmp_table), (slc, slc_table) = _paged(kc, vc), _paged(k, v)
        tables = (cmp_table, slc_table, slc_table)
        lens, cu = torch.tensor([context], device="cuda"), torch.tensor([0, chunk], device="cuda")
        geometry = prefill_geometry(cu, lens, tables, tokens=chunk, page=PAGE, sizes=SIZES)
        over_pages = partial(nsa_prefill, q[0], gates[0], cmp, slc, slc, *tables, cu, lens, SIZES)
        later = partial(over_pages, geometry=geometry)
        over_keys = partial(nsa_attention, q, kc, vc, k, v, k, v, gates, SIZES, q_start=context - chunk)
        with torch.no_grad():
            times = [do_bench(call, return_mode="median") for call in (over_pages, later, over_keys)]
        rows.append(f"| {context} | {' | '.join(f'{t:.2f}' for t in times)} |")
    return rows


def _full_step(batch: int, context: int, backend: SDPBackend) -> Callable[[], object]:
    q = rand(batch, HEADS, 1, DIM)
    k, v = (rand(batch, NUM_KV, context, DIM) for _ in range(2))

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
                full.append(math.nan)
        rate = batch * tokens * NUM_KV * DIM * 4 / nsa / 1e6
        rows.append(
            f"| {batch} | {full[0]:.1f} | {full[1]:.1f} | {nsa:.1f} | **{best(*full) / nsa:.2f}x** | {rate:.2f}"
            f" ({rate / copy_tb if copy_tb else 0:.0%}) |"
        )
        print(rows[-1], flush=True)
    return rows
