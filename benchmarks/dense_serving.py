"""Full-attention decoding over paged caches against cuDNN's SDPA over contiguous ones, in CUDA graphs.

A graph holds several layers, each with a cache of its own, so that a small batch does not time the L2 cache.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.moe import milliseconds
from sparseray.kernels.attention.decode import PagedDecodeWorkspace, paged_decode

PAGE = 64
SHAPES = [
    (1, 640, 16, 16, 64), (64, 640, 16, 16, 64), (1, 8192, 16, 16, 64), (16, 8192, 16, 16, 128),
    (1, 65536, 16, 16, 64), (1, 65536, 64, 4, 128), (16, 65536, 64, 4, 128), (64, 8192, 64, 4, 128),
]  # fmt: skip
"""Batch, context, query heads, key/value heads, channels of a head."""


def graph_ms(work: Callable[[], Any], layers: int) -> float:
    """Milliseconds of one layer, replayed from a CUDA graph."""
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return milliseconds(graph.replay, 20) / layers


def decode_rows() -> list[str]:
    """The table, line by line."""
    rows = [
        "\n| decode: batch, context, heads, KV heads, channels | us | GB/s of keys and values | cuDNN us | ratio | error |",
        "|---|---|---|---|---|---|",
    ]
    for B, context, HQ, H, D in SHAPES:
        size = 2 * B * context * H * D * 2
        layers = max(2, min(8, (200 << 20) // size))
        caches = [
            [torch.randn(B, context, H, D, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
            for _ in range(layers)
        ]
        q = torch.randn(B, 1, HQ, D, device="cuda", dtype=torch.bfloat16)
        pages = B * context // PAGE
        table = torch.randperm(pages, device="cuda").int().view(B, -1)
        lens = torch.full((B,), context, dtype=torch.int32, device="cuda")
        work, out = PagedDecodeWorkspace.create(B, 1, HQ, D, context, "cuda"), torch.empty_like(q)
        expected: list[Tensor] = []

        def theirs(caches: Any = caches, q: Tensor = q, expected: list[Tensor] = expected) -> None:
            with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], set_priority=True):
                for k, v in caches:
                    heads = [x.transpose(1, 2) for x in (q, k, v)]
                    found = scaled_dot_product_attention(heads[0], heads[1], heads[2], enable_gqa=True)
                    expected[:] = [found.transpose(1, 2)]

        their_ms = graph_ms(theirs, layers)
        wanted = expected[0].clone()
        order = torch.argsort(table.flatten().long())
        paged = [[x.view(pages, PAGE, H, D)[order] for x in pair] for pair in caches]
        del caches

        def ours(
            paged: Any = paged,
            q: Tensor = q,
            table: Tensor = table,
            lens: Tensor = lens,
            work: Any = work,
            out: Tensor = out,
        ) -> None:
            for k, v in paged:
                paged_decode(q, k, v, table, lens, work, out)

        ms = graph_ms(ours, layers)
        error = float((out.float() - wanted.float()).norm() / wanted.float().norm())
        rows.append(
            f"| {B}, {context}, {HQ}, {H}, {D} | {ms * 1e3:.1f} | {size / ms / 1e6:.0f} | {their_ms * 1e3:.1f} |"
            f" {their_ms / ms:.2f}x | {error:.1e} |"
        )
        del paged
        torch.cuda.empty_cache()
    return rows
