"""What a decoding step of NSA appends to the pages, in one launch, against the plain operations."""

from __future__ import annotations

import pytest
import torch
from nsa_sizes import DEVICE, HAS_GPU, PAPER, TINY, relative
from torch import Tensor

from sparseray.kernels.ops import REFERENCE, Compression, KeyValues, Pages, Recent
from sparseray.kernels.settings import NSASizes
from sparseray.kernels.triton_ops import TRITON


def phi_of(width: int, sizes: NSASizes) -> Compression:
    inner = 2 * width
    shapes = (inner, sizes.block * width), (inner,), (width, inner), (width,), (sizes.block, width)
    w1, b1, w2, b2, pos = (torch.randn(*shape) * 0.2 for shape in shapes)
    return Compression(w1=w1, b1=b1, w2=w2, b2=b2, pos=pos)


def errors(
    lens: list[int],
    new: int,
    heads: tuple[int, int],
    widths: tuple[int, int],
    branches: int,
    sizes: NSASizes,
    page: int,
    dtype: torch.dtype = torch.float32,
) -> list[float]:
    """Relative errors of queries, gates and every pool, of sequences that `new` tokens are appended to."""
    torch.manual_seed(0)
    (Q, G), (D, V), hidden, rows = heads, widths, 40, len(lens) * new
    per = -(-max(lens) // page)
    pools = [
        (torch.randn(len(lens) * per, size, G, D), torch.randn(len(lens) * per, size, G, V))
        for size in (page // sizes.stride, page, page, page)
    ]
    # What lies on recent pages has numbers of its own.
    table, recent = (torch.randperm(len(lens) * per).int().view(len(lens), per) for _ in range(2))
    positions = torch.tensor([length - new + i for length in lens for i in range(new)])
    which = torch.arange(rows) // new
    places, recent_places = (t[which, positions // page] * page + positions % page for t in (table, recent))
    needed = max(sizes.block, sizes.window) - 1
    for cache in (x for pool in pools[2:] for x in pool):
        for b, length in enumerate(lens):
            for gone in recent[b, : max(0, length - new - needed) // page]:
                cache[int(gone)] = torch.nan
    angles = torch.randn(max(lens), D // 2).double()
    turns = angles.cos().float(), angles.sin().float()
    fused, x = torch.randn(rows, Q * D + branches * G * (D + V)), torch.randn(rows, hidden)
    gate, phis = torch.randn(3 * Q, hidden), (phi_of(D, sizes), phi_of(V, sizes))
    found: list[list[Tensor]] = []
    for ops, device, kind in ((REFERENCE, "cpu", torch.float32), (TRITON, DEVICE, dtype)):

        def put(x: Tensor, device: str = device, kind: torch.dtype = kind) -> Tensor:
            # Rounded for both, as the kernel reads it.
            return x.to(dtype).to(device, kind)

        moved: list[KeyValues] = [(put(k), put(v)) for k, v in pools]
        weights = tuple(Compression(**{n: put(t) for n, t in vars(p).items()}) for p in phis)
        pages = Pages(
            page=page,
            table_BW=table.to(device),
            context_lens_B=torch.tensor(lens, dtype=torch.int32, device=device),
            places_R=places.to(device),
            num_new=new,
            recent=Recent(recent_P=table, table_BW=recent.to(device), places_R=recent_places.to(device)),
        )
        every = (turns[0].to(device), turns[1].to(device))
        at = (every[0][positions], every[1][positions])
        q, gates = ops.paged_nsa_append(
            moved, put(fused), put(x), put(gate), (weights[0], weights[1]), sizes, at, every, pages
        )
        found.append(
            [y.float().cpu().nan_to_num(7.0) for y in (q, gates, *(z for pool in moved for z in pool))]
        )
    return [relative(b, a) for a, b in zip(*found, strict=True)]


@pytest.mark.parametrize("branches", [3, 1])
@pytest.mark.parametrize("new", [1, 5])
def test_appending_is_what_the_plain_operations_do(new: int, branches: int) -> None:
    """Sequences of every remainder: some end a block, one ends two."""
    lens = [8, 11, 12, 29, 33, 36] if new > 1 else [1, 8, 11, 12, 31]
    found = errors(lens, new, (6, 3), (12, 20), branches, TINY, 16)
    assert max(found) < 1e-5


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")
@pytest.mark.parametrize("heads", [(16, 16), (16, 4), (16, 1)])
def test_appending_in_half_precision(heads: tuple[int, int]) -> None:
    found = errors([512, 1000, 33, 48], 1, heads, (64, 64), 3, PAPER, 256, torch.bfloat16)
    assert max(found) < 1e-2
