"""Kernels whose warps have different roles (Gluon, no interpreter) on a GPU against the tiled ones, which the interpreter and the
fp64 reference check: odd lengths, packed sequences, a chunk against longer keys, every supported kind of head.
test_kernels_hopper.py compiles them without a GPU."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from nsa_sizes import DEVICE, HAS_GPU, PAPER, relative
from torch import Tensor

from sparseray.kernels.nsa import attention, branches, tiles
from sparseray.kernels.nsa import range_backward as backward
from sparseray.kernels.nsa import range_forward as forward
from sparseray.kernels.nsa import selected_backward as selected
from sparseray.kernels.nsa.attention import nsa_attention
from sparseray.kernels.nsa.geometry import COMPRESSED, WINDOW, Geometry, packed, query_positions, uniform
from sparseray.kernels.nsa.reference import top_n_reference
from sparseray.kernels.nsa.tuning import LAUNCH
from sparseray.kernels.settings import num_compressed

CU = [0, 5, 700, 700, 2500, 2531, 4000]
SHAPES = {
    "odd length": ("uniform", 777, 64, 4, 128, 128, torch.bfloat16),
    "small groups": ("uniform", 5000, 32, 8, 128, 128, torch.float16),
    "heads of 64 and 128": ("uniform", 3001, 16, 2, 64, 128, torch.bfloat16),
    "64 heads a group": ("uniform", 2000, 64, 1, 128, 64, torch.bfloat16),
    "groups of 3": ("uniform", 1500, 12, 4, 64, 64, torch.float16),
    "shorter than a tile": ("uniform", 40, 64, 4, 128, 128, torch.bfloat16),
    "packed": ("packed", 4000, 64, 4, 128, 128, torch.bfloat16),
    "chunk": ("chunk", 1000, 64, 4, 128, 128, torch.bfloat16),
}


def lay_out(kind: str, tokens: int) -> tuple[Geometry, int, int]:
    """Geometry, and how many compressed tokens and window keys it has."""
    device = torch.device(DEVICE)
    if kind == "packed":
        count = sum(num_compressed(b - a, 32, 16) for a, b in itertools.pairwise(CU))
        return packed(torch.tensor(CU, device=device), tokens, count, 32, 16), count, tokens
    start, first = (2003, 1803) if kind == "chunk" else (0, 0)
    longest = start + tokens
    count = num_compressed(longest, 32, 16)
    return uniform(1, tokens, count, longest, longest - first, start, first, device), count, longest - first


@pytest.mark.parametrize(("capability", "is_hopper"), [(8, False), (9, True), (10, False)])
def test_pipelined_kernels_are_for_hopper_alone(
    monkeypatch: pytest.MonkeyPatch, capability: int, is_hopper: bool
) -> None:
    monkeypatch.setattr(tiles, "_compute_capability", lambda device: capability)
    # No tensor can stand on a GPU that is not there.
    x: Any = SimpleNamespace(is_cuda=True, device=None, shape=(8, 16, 128))
    assert forward.fits_pipeline(x, x, x) is is_hopper
    assert backward.fits_pipeline(x, SimpleNamespace(shape=(8, 1, 128)), x) is is_hopper  # type: ignore[arg-type]
    assert selected.fits_pipeline(x, SimpleNamespace(shape=(8, 1, 128)), x, 64) is is_hopper  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")
@pytest.mark.parametrize("branch", [COMPRESSED, WINDOW], ids=["compressed", "window"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_pipelined_ranges_equal_the_tiled_ones(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[Any, ...], branch: int
) -> None:
    kind, tokens, heads, num_kv, width, value, dtype = shape
    geometry, compressed, window = lay_out(kind, tokens)
    keys = compressed if branch == COMPRESSED else window
    torch.manual_seed(0)
    q, k, v, do = (
        torch.randn(n, h, d, device=DEVICE, dtype=dtype)
        for n, h, d in (
            (tokens, heads, width), (keys, num_kv, width), (keys, num_kv, value), (tokens, heads, value)
        )
    )  # fmt: skip
    sizes = {"kind": branch, "block": 1, "stride": 1, "window": 200, "scale": width**-0.5}
    if branch == COMPRESSED:
        sizes |= {"block": 32, "stride": 16, "window": 0}
    found: list[list[Tensor]] = []
    for _ in range(3):
        out, lse = forward.range_forward(q, k, v, geometry, **sizes)
        if not found:
            row_dg = (do.float() * out.float()).sum(-1)
            row_lse = torch.where(lse == -torch.inf, torch.inf, lse)
        dq = torch.ones_like(q)
        dk, dv = backward.range_backward(q, k, v, do, row_lse, row_dg, dq, geometry, add=True, **sizes)
        found.append([out, torch.nan_to_num(lse, neginf=-1.0), dq, dk, dv])
        if len(found) == 2:
            monkeypatch.setattr(forward, "fits_pipeline", lambda *args: False)
            monkeypatch.setattr(backward, "fits_pipeline", lambda *args: False)
    assert all(torch.equal(a, b) for a, b in zip(found[0], found[1]))
    errors = [relative(a, b) for a, b in zip(found[0], found[2])]
    assert max(errors) < 3e-3, errors


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")
@pytest.mark.parametrize(("heads", "num_kv"), [(64, 4), (32, 8)])
@pytest.mark.parametrize("kind", ["uniform", "packed"])
def test_forced_blocks_beside_the_window_change_nothing(
    monkeypatch: pytest.MonkeyPatch, kind: str, heads: int, num_kv: int
) -> None:
    tokens = 4000
    torch.manual_seed(0)
    shapes = [(heads, 128), *[(num_kv, 128)] * 6, (heads, 3)]
    compressed = lay_out(kind, tokens)[1]
    inputs = [
        torch.randn(1, compressed if i in (1, 2) else tokens, *shape, device=DEVICE, dtype=torch.bfloat16)
        for i, shape in enumerate(shapes)
    ]
    inputs[-1] = inputs[-1].sigmoid()
    inputs = [x.requires_grad_() for x in inputs]
    cu_seqlens = torch.tensor(CU, device=DEVICE) if kind == "packed" else None
    weight = torch.randn(1, tokens, heads, 128, device=DEVICE, dtype=torch.bfloat16)
    found = []
    for _ in range(2):
        out = nsa_attention(*inputs, PAPER, cu_seqlens=cu_seqlens)
        found.append([out, *torch.autograd.grad(out, inputs, weight)])
        for module in (branches, attention):
            monkeypatch.setattr(module, "forced_blocks", lambda *args: None)
    errors = [relative(a, b) for a, b in zip(*found)]
    assert max(errors) < 5e-3, errors


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")
@pytest.mark.parametrize("part", [4096, 100], ids=["whole rows", "cut rows"])
@pytest.mark.parametrize(
    ("kind", "tokens", "heads", "num_kv", "dtype"),
    [
        ("uniform", 777, 64, 4, torch.bfloat16),
        ("uniform", 3001, 64, 2, torch.float16),
        ("uniform", 2000, 64, 1, torch.bfloat16),
        ("uniform", 10, 16, 1, torch.bfloat16),
        ("packed", 4000, 64, 4, torch.bfloat16),
    ],
)
def test_pipelined_gradients_of_selected_keys_equal_the_tiled_ones(
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    tokens: int,
    heads: int,
    num_kv: int,
    dtype: torch.dtype,
    part: int,
) -> None:
    monkeypatch.setitem(
        LAUNCH,
        "selected_pipelined_dkdv",
        {**LAUNCH["selected_pipelined_dkdv"], "part": part, "programs": 1 << 30},
    )
    geometry, _, _ = lay_out(kind, tokens)
    torch.manual_seed(0)
    q, k, v, do = (
        torch.randn(tokens, h, 128, device=DEVICE, dtype=dtype) for h in (heads, num_kv, num_kv, heads)
    )
    positions = query_positions(geometry)
    scores = torch.rand(1, tokens, num_kv, -(-tokens // 64), device=DEVICE)
    spans = itertools.pairwise(CU) if kind == "packed" else [(0, tokens)]
    index = torch.cat(
        [top_n_reference(scores[:, a:b], select_block=64, num_selected=16)[0] for a, b in spans]
    )
    row_lse = torch.rand(tokens, heads, device=DEVICE) * 3 + 9
    row_lse[3] = torch.inf
    row_dg = torch.randn(tokens, heads, device=DEVICE)
    found = []
    for _ in range(3):
        dq = torch.empty_like(q)
        found.append(
            selected.selected_backward(
                q, k, v, do, row_lse, row_dg, dq, index, positions, geometry, select_block=64, scale=128**-0.5, add=False
            )
        )  # fmt: skip
        if len(found) == 2:
            monkeypatch.setattr(selected, "fits_pipeline", lambda *args: False)
    assert all(torch.equal(a, b) for a, b in zip(found[0], found[1]))
    errors = [relative(a, b) for a, b in zip(found[0], found[2])]
    assert max(errors) < 1e-3, errors
